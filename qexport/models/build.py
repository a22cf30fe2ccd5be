"""Empty models: the right class for a config, on the meta device or with real buffers and no weights."""

import copy
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.utils import logging

from qexport.errors import PlanError
from qexport.models.auto import reason

_patching = threading.Lock()


def model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class that a config stands for: what `architectures` names if transformers generates text with it.

    Raises:
        PlanError: an encoder-decoder, or a model that transformers has no text-generating class for.
    """
    named = (config.architectures or [""])[0]
    if getattr(config, "is_encoder_decoder", False):
        raise PlanError(
            f"{named or config.model_type} is an encoder-decoder: its blocks do not form one chain. "
            "qexport quantizes decoder-only language models and the text decoder of vision-language models."
        )
    known: set[str] = set()
    for table in (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES):
        for names in table.values():
            known.update((names,) if isinstance(names, str) else names)
    if named in known and hasattr(transformers, named):
        found: type[PreTrainedModel] = getattr(transformers, named)
        return found
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING):
        if type(config) in mapping:
            entry = mapping[type(config)]
            chosen: type[PreTrainedModel] = entry[0] if isinstance(entry, tuple) else entry
            return chosen
    raise PlanError(
        f"{named or config.model_type}: transformers {transformers.__version__} has no text-generating class for "
        f"model_type {config.model_type!r}. qexport runs no code from a checkpoint; a newer transformers may know it."
    )


def _create(config: PretrainedConfig, dtype: torch.dtype | None) -> PreTrainedModel:
    # `_from_config` writes the dtype into the config that it is given.
    own = copy.deepcopy(config)
    cls = model_class(config)
    try:
        model: PreTrainedModel = cls._from_config(own, dtype=dtype or torch.float32)
    except Exception as error:  # a constructor trusts its config: sizes below zero, heads that divide nothing ...
        raise PlanError(
            f"transformers can't build {cls.__name__} from its config.json ({type(error).__name__}: {reason(error)}). "
            "Compare config.json with the original."
        ) from error
    return model.eval().requires_grad_(False)


def hollow(config: PretrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A model whose parameters and buffers all lie on the meta device; tied parameters are one object."""
    with torch.device("meta"):
        return _create(config, dtype)


def shell(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A model with parameters on the meta device and real buffers.

    Buffers such as a rotary embedding's frequencies are in no checkpoint: only the constructor knows their values.
    """
    with _parameters_on_meta():
        return _create(config, dtype)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    register: Callable[..., None] = nn.Module.register_parameter

    def moved(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    with _patching:  # the patch is seen by every thread
        nn.Module.register_parameter = moved  # type: ignore[method-assign]
        try:
            yield
        finally:
            nn.Module.register_parameter = register  # type: ignore[method-assign]


def wanted_dtype(model: PreTrainedModel, name: str, dtype: torch.dtype) -> torch.dtype:
    """What `from_pretrained(dtype=...)` would cast a tensor to: some models keep some modules in float32."""
    plan: dict[str, torch.dtype] = model._get_dtype_plan(dtype)
    for pattern, kept in plan.items():
        if re.search(pattern.replace("*", ".*"), name):
            return kept
    created: Any = model.get_parameter_or_buffer(name)
    return created.dtype


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' own progress bars: progress goes to the observer."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def striped(shape: Sequence[int]) -> Tensor:
    """A weight whose rows differ, in the memory of one column."""
    column = torch.linspace(0.5, 1.0, shape[0] if shape else 1)
    return column.reshape(-1, *[1] * (len(shape) - 1)).expand(*shape) if shape else column[0]
