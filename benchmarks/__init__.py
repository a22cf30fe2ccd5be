"""Measurements that anyone can repeat; each writes its lines to `benchmarks/results/`."""
