"""Attention of one query a head over packed keys and values, without decoding them into memory.

`read` says what a format stores in a way that kernels understand: numbers of codes, scales, outliers, rotations. `cpu`
has loops compiled by numba (`qexport[cpu]`), `decode` kernels compiled by Triton, which read what is stored as it is.
"""
