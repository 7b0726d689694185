"""Steps of DPO on CPU: ours against TRL's DPOTrainer, its reference live and precomputed, same model, one run.

``python -m benchmarks.dpo --data pairs.jsonl`` compares on real pairs, without ``--data`` on drawn ones whose prompts
are four times as long as their answers; ``--adapter RANK`` trains a LoRA adapter instead of all weights, TRL with
PEFT, both from the same A and B with the base as reference. What is made equal for both: ``benchmarks/README.md``.
"""

from benchmarks.steps.run import compare

if __name__ == "__main__":
    compare("dpo", __doc__, ["ours", "trl", "trl precomputed"])
