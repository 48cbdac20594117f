"""Model families as data, and the loader that streams their blocks. See docs/adding-a-family.md."""

from models import bloom, falcon, gemma, llama, mixtures, opt
from models.family import ModelFamily
from models.unsupported import UNREAD
from quant.core.errors import InputError

FAMILIES = (opt.FAMILY, bloom.FAMILY, falcon.FAMILY, llama.FAMILY, gemma.FAMILY, *mixtures.FAMILIES)


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
