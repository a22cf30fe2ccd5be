"""`qexport sweep`: a grid of recipes and options, one checkpoint and one row of figures for each."""

from qexport.sweep.grid import Grid, Setting, read_grid, selected
from qexport.sweep.run import make_plans, outlook, sweep

__all__ = ["Grid", "Setting", "make_plans", "outlook", "read_grid", "selected", "sweep"]
