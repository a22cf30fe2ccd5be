"""Ways of rounding a linear's input to integers, one a file; `qexport.plugins.get("inputs", name)` imports it."""
