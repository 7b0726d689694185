"""Steps of SFT on CPU: ours against TRL's SFTTrainer, padded and with its own packing, same model, one run.

``python -m benchmarks.sft --data alpaca.json`` compares on real lengths, without ``--data`` on drawn ones. On a CPU
the samples of TRL's packs see each other, so the losses of that contestant are others. See ``benchmarks/README.md``.
"""

from benchmarks.steps.run import compare

if __name__ == "__main__":
    compare("sft", __doc__, ["ours", "trl", "trl packed"])
