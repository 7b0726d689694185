"""Steps of KTO on CPU: ours against TRL's KTOTrainer, its reference live and precomputed, same model, one run.

``python -m benchmarks.kto --data pairs.jsonl`` takes each pair as a good and a bad completion. See
``benchmarks/README.md``.
"""

from benchmarks.steps.run import compare

if __name__ == "__main__":
    compare("kto", __doc__, ["ours", "trl", "trl precomputed"])
