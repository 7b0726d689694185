"""Steps of GRPO on CPU with given completions and scores: ours against TRL's GRPOTrainer, same model, one run.

``python -m benchmarks.grpo`` compares with 3 and 8 completions of a prompt that is four times as long as each; a step
trains once on completions of the policy itself, so neither makes a pass for old log-probs. Both read completion rows
only in the head, and the allocator keeps large blocks for both. See ``benchmarks/README.md``.
"""

from benchmarks.steps.run import compare

if __name__ == "__main__":
    compare("grpo", __doc__, ["ours", "trl"])
