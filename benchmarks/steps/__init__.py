"""Training steps on CPU, ours against TRL's trainers in one run; ``benchmarks/dpo.py`` and its sisters start it."""
