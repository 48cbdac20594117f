"""Model families as data, and the loader that streams their blocks. See docs/adding-a-family.md."""

from models import bloom, falcon, gemma, llama, mixtures, neox, opt
from models.family import ModelFamily
from models.unsupported import UNREAD
from quant.core.errors import InputError

FAMILIES = (
    opt.FAMILY, bloom.FAMILY, falcon.FAMILY, llama.FAMILY, llama.QWEN3, llama.PHI3, gemma.GEMMA2, gemma.GEMMA3,
    gemma.OLMO2, gemma.GLM4, neox.STARCODER2, neox.STABLELM, neox.COHERE2,
    *mixtures.FAMILIES,
)  # fmt: skip


def family_of(model_type: str) -> ModelFamily:
    """The family of a ``config.model_type``. Raises InputError that lists what is known."""
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    if model_type in UNREAD:
        raise InputError(f"{model_type} models are not read: {UNREAD[model_type]}")
    known = ", ".join(sorted(name for family in FAMILIES for name in family.model_types))
    raise InputError(
        f"unknown model family {model_type!r}; known: {known} (docs/adding-a-family.md says how to add one)"
    )
