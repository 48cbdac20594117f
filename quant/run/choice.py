"""What the shapes of the model decide where a command leaves it open: the group size, the scope of --tune, and the format of
--real_quant."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from data.written import written
from models import family_for
from models.load import load_config
from quant.core import env
from quant.core.errors import InputError
from quant.core.names import AUTO_GROUPS, FULL_BITS
from quant.export import first_holding
from quant.run.config import DEFAULT_MAX_SEQLEN, SessionConfig
from quant.run.content import content_of
from quant.run.plan import tuning_cost
from quant.run.request import Request
from quant.run.shapes import Shapes, shapes_of

MOST_GROUPED = 128  # columns of a group, a power of two
OWN, OWN_TOKENS = 7, 1 << 17  # what measured best on a text that nothing was decided on otherwise; docs/which-method.md
SHARE = 0.6  # of all memory, beside what the machine does otherwise
HALF = torch.bfloat16  # of a checkpoint's own dtype, which is not read here
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


def with_residual_where_added(request: Request) -> Request:
    """The request, which makes up for the residual stream's error where the model's family says how. Raises InputError
    where the model cannot be described."""
    session = request.session
    declared = _declared(session)
    return request.but(residual_correction=bool(family_for(declared).residual_at(declared)))


def with_scope(request: Request) -> Request:
    """The request, which tunes the whole model, or its blocks where the whole would take more than SHARE of the memory that
    the machine or the device has: the same command on one machine means the same, whatever is free. Raises InputError where
    the model cannot be described."""
    run, session = request.run, request.session
    assert run.tuning is not None
    shapes, _ = _shapes(session)
    device = env.pick_device(session.device)
    seqlen = session.seqlen or min(shapes.max_length, DEFAULT_MAX_SEQLEN)
    itemsize = (env.pick_dtype(session.dtype, device) or HALF).itemsize
    need = tuning_cost(run, shapes, seqlen, itemsize)[1]
    fits = need <= SHARE * env.total_bytes(device)
    return request if fits else request.but(tuning=replace(run.tuning, scope="block"))


def with_own_text(request: Request) -> Request:
    """The request, with OWN times as many windows that the model writes itself behind those of the data, up to OWN_TOKENS
    tokens, where the whole model is tuned, and so fits in memory, and nothing is said of windows of its own."""
    run, session = request.run, request.session
    if run.tuning is None or run.tuning.scope != "model" or written(run.dataset):
        return request
    shapes, _ = _shapes(session)
    seqlen = session.seqlen or min(shapes.max_length, DEFAULT_MAX_SEQLEN)
    windows = min(OWN * run.nsamples, OWN_TOKENS // seqlen)
    return request.but(dataset=f"{run.dataset}+self:{windows}") if windows else request


def in_packed_format(request: Request) -> Request:
    """The request with the first packed format that holds what comes of it, by the shapes of the model alone.

    Answers that turn out not to fit are saved in FALLBACK, unless a target is named, which may not load that. Raises
    InputError where no format holds it, or where the model cannot be described.
    """
    shapes, model_type = _shapes(request.session)
    named = {name: (out, n_in) for name, out, n_in in shapes.linears}
    kind = first_holding(content_of(request.run, named, shapes.n_blocks, model_type, shapes.ends))
    return request.but(format=kind, fallback=None if request.output.target else FALLBACK)


def _shapes(session: SessionConfig) -> tuple[Shapes, str]:
    """Sizes of a session's model by its configuration alone, and its type."""
    declared = _declared(session)
    return shapes_of(declared, session.trust_remote_code), declared.model_type


def _declared(session: SessionConfig) -> Any:
    """The configuration of a session's model."""
    return load_config(
        session.model, session.cache_dir, session.trust_remote_code, with_weights=False, family=session.family
    )[0]
