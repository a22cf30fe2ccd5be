"""`qexport report`: what there is to know of finished checkpoints, as one page with pictures."""

from qexport.reporting.measure import Sample
from qexport.reporting.write import Request, report

__all__ = ["Request", "Sample", "report"]
