"""Steps of a reward model on CPU: ours against TRL's RewardTrainer, same model and pairs, one run.

``python -m benchmarks.reward --data pairs.jsonl`` compares on real pairs. See ``benchmarks/README.md``.
"""

from benchmarks.steps.run import compare

if __name__ == "__main__":
    compare("reward", __doc__, ["ours", "trl"])
