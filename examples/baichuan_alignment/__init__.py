"""The recipe of the Baichuan Alignment report from end to end, with a tiny model on a CPU."""
