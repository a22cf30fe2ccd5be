"""Kernels for CPUs, compiled by numba: what multiplies by a packed weight where x stays a float, a file a format."""
