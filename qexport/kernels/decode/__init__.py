"""Weights decoded on a CPU by loops that numba compiles, a file a format; as the format does it, to the bit."""
