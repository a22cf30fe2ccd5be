"""Token sources for calibration: the model's own text, text that Python carries, a file, or a data set.

`tokens` returns the ids and says where they came from, so that a run can be repeated from its output.
"""

from qexport.calibration.choose import Calibration, Tokens, bos_id, encode, ids_sha256, tokens, tokens_of
from qexport.calibration.sampling import sample
from qexport.calibration.texts import builtin_text

__all__ = ["Calibration", "Tokens", "bos_id", "builtin_text", "encode", "ids_sha256", "sample", "tokens", "tokens_of"]
