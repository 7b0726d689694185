"""Train a tiny model end to end on a CPU: data, training, export, answers."""
