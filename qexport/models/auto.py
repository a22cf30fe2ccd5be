"""Configs and tokenizers as transformers finds them, from files that nothing is known about.

transformers would offer to run Python code that such files name, with a prompt where there is a terminal. Here nobody
is asked and nothing is run: what can't be read without such code can't be read.
"""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from qexport.errors import SourceError


def read_config(name: str | Path, **where: Any) -> PretrainedConfig:
    """The configuration of a folder or a Hub id.

    Args:
        name: the folder or Hub id.
        **where: `revision`, `token` and the like.

    Raises:
        OSError: there is none.
        ValueError: it is malformed, or of a model that transformers does not know.
    """
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(name, **where, trust_remote_code=False)
    except (OSError, ValueError):
        raise
    except Exception as error:  # the classes of configs trust what they read: anything may come of it
        raise ValueError(f"config.json is malformed: {type(error).__name__}: {reason(error)}") from error
    return config


def read_tokenizer(folder: Path, *, name: str, advice: str, **where: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder.

    Args:
        folder: where its files are.
        name: what the user called the model, for the error.
        advice: what to do when there is none, for the error.
        **where: `gguf_file`, for example.

    Raises:
        SourceError: there is none, or it can't be read.
    """
    try:
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, **where
        )
    except Exception as error:  # the tokenizer classes raise whatever comes to hand
        raise SourceError(f"{name}: no tokenizer can be loaded from {folder} ({reason(error)}). {advice}") from error
    return found


def reason(error: BaseException) -> str:
    """What transformers says of a file that it can't read, in one line and without the advice to run its code."""
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        return "it asks for Python code of its own, and qexport runs no code from a checkpoint"
    return text[:300].rstrip(".") or type(error).__name__
