"""Transforms: what makes weights easier to quantize and leaves the model's function as it is; one file each."""
