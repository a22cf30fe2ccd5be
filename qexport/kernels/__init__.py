"""Products with packed weights, one file a format; `qexport.plugins.get("kernels", name)` imports it on first use.

Nothing is imported here: Triton is an optional dependency, and it is read only when a kernel is asked for.
"""
