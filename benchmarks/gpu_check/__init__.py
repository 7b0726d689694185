"""``make gpu-check``: kernel gates, losses against the CPU, memory and speed on one GPU, in under 9 minutes."""
