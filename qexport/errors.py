"""What can go wrong, as one tree.

    QExportError
    ├── UsageError         the command line or a recipe asks for something that does not exist
    ├── PlanError          the request is well formed, but this model, method and format can't do it
    ├── SourceError        the model, file or data set to read can't be found or read
    ├── CalibrationError   too little text, non-finite activations, a Hessian that can't be factored
    ├── LayoutError        a tensor does not have the name, dtype, shape or content that its format demands
    ├── CheckpointError    a file of a checkpoint is missing, damaged, foreign or too new
    ├── ResumeError        the output folder belongs to another job, or can't be written to
    └── BackendError       the chosen kernel can't run here

Every message says what failed, where, what was expected, what was found and what to do next.
The command line prints it and ends with `exit_code`; nothing else of the program ends a process.
"""


class QExportError(Exception):
    """Base of every error that qexport raises on purpose; `exit_code` is what the command line ends with."""

    exit_code = 1


class UsageError(QExportError):
    """The command line or a recipe asks for something that does not exist."""

    exit_code = 2


class PlanError(QExportError):
    """The request is well formed, but this model, method and format can't do it."""


class SourceError(QExportError):
    """The model, file or data set to read can't be found or read."""


class CalibrationError(QExportError):
    """Too little text, non-finite activations, or a Hessian that can't be factored."""


class LayoutError(QExportError):
    """A tensor does not have the name, dtype, shape or content that its format demands."""


class CheckpointError(QExportError):
    """A file of a checkpoint is missing, damaged, foreign or too new."""


class ResumeError(QExportError):
    """The output folder belongs to another job, or can't be written to."""


class BackendError(QExportError):
    """The chosen kernel can't run here."""
