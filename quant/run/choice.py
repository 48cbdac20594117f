"""What the shapes of the model decide where a command leaves it open: the group size, and the format of --real_quant."""

from __future__ import annotations

import math

from models.load import load_config
from quant.core.errors import InputError
from quant.core.names import AUTO_GROUPS, FULL_BITS
from quant.export import first_holding
from quant.run.config import SessionConfig
from quant.run.content import content_of
from quant.run.plan import Shapes, shapes_of
from quant.run.request import Request

MOST_GROUPED = 128  # columns of a group, a power of two
FALLBACK = "bitplane"  # holds every answer of every solver, also scales that turn out not to be fp16 numbers


def with_groups(request: Request) -> Request:
    """The request with a group size: where it is AUTO_GROUPS, the largest power of two up to MOST_GROUPED that divides the
    inputs of every linear. Raises InputError where none does, or where the model cannot be described."""
    if request.run.group_size != AUTO_GROUPS:
        return request
    if request.run.wbits == FULL_BITS:  # nothing is grouped
        return request.but(group_size=-1)
    shapes, _ = _shapes(request.session)
    common = math.gcd(MOST_GROUPED, *(n_in for _, _, n_in in shapes.linears))
    if common == 1:
        raise InputError(
            "--group-size auto: a linear has an odd number of inputs; leave the flag out for one scale a row"
        )
    return request.but(group_size=common)


def in_packed_format(request: Request) -> Request:
    """The request with the first packed format that holds what comes of it, by the shapes of the model alone.

    Answers that turn out not to fit are saved in FALLBACK, unless a target is named, which may not load that. Raises
    InputError where no format holds it, or where the model cannot be described.
    """
    shapes, model_type = _shapes(request.session)
    named = {name: (out, n_in) for name, out, n_in in shapes.linears}
    kind = first_holding(content_of(request.run, named, shapes.n_blocks, model_type))
    return request.but(format=kind, fallback=None if request.output.target else FALLBACK)


def _shapes(session: SessionConfig) -> tuple[Shapes, str]:
    """Sizes of a session's model by its configuration alone, and its type."""
    declared, _ = load_config(session.model, session.cache_dir, session.trust_remote_code, with_weights=False)
    return shapes_of(declared, session.trust_remote_code), declared.model_type
