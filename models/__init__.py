"""Model families as data, and the loader that streams their blocks. See docs/adding-a-family.md."""

from collections.abc import Callable
from typing import Any

from models import bloom, falcon, gemma, gpt2, llama, mixtures, neox, opt
from models.family import ModelFamily
from models.stored import Layout
from models.unsupported import UNREAD
from quant.core.errors import InputError

FAMILIES = (
    opt.FAMILY, bloom.FAMILY, falcon.FAMILY, llama.FAMILY, llama.QWEN3, llama.PHI3, gemma.GEMMA2, gemma.GEMMA3,
    gemma.OLMO2, gemma.GLM4, gpt2.FAMILY, neox.NEOX, neox.STARCODER2, neox.STABLELM, neox.COHERE2,
    *mixtures.FAMILIES,
)  # fmt: skip
TAKEN_FOR = "taken_for_family"  # set on the configuration of a model of an unknown type


def family_for(config: Any) -> ModelFamily:
    """The family of a configuration: of its model type, or what it is taken for (``--family``). Raises InputError."""
    return family_of(getattr(config, TAKEN_FOR, None) or config.model_type)


def family_of(model_type: str, advice: Callable[[], str] = str) -> ModelFamily:
    """The family of a ``config.model_type``. Raises InputError that lists what is known, with advice behind it."""
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    if isinstance(model_type, str) and model_type in UNREAD:  # a file may say anything
        raise InputError(f"{model_type} models are not read: {UNREAD[model_type]}")
    known = ", ".join(sorted(name for family in FAMILIES for name in family.model_types))
    raise InputError(
        f"unknown model family {model_type!r}; known: {known} (docs/adding-a-family.md says how to add one){advice()}"
    )


def layout_for(model_type: str | None) -> Layout:
    """How checkpoints of a model type store tensors; as the modules have them where it is of no family."""
    return next((family.layout for family in FAMILIES if model_type in family.model_types), Layout())


def check_taken_for(family: str, model_type: str) -> None:
    """Raise InputError where a model of a type cannot be taken for one of a family, named by a model type of it."""
    own = next((known for known in FAMILIES if model_type in known.model_types), None)
    taken = next((known for known in FAMILIES if family in known.model_types), None)
    if taken is None:
        known = ", ".join(sorted(name for one in FAMILIES for name in one.model_types))
        raise InputError(f"--family {family}: no such family; use one of {known}")
    if own not in (None, taken):
        raise InputError(f"--family {family}: {model_type} models have a family of their own; leave --family out")
    if own is None and not (taken.layout.is_plain and not taken.experts):
        raise InputError(
            f"--family {family}: its checkpoints store tensors in a way of their own, which no other type can be taken for"
        )
