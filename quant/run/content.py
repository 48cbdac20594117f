"""The grid of a run, what a checkpoint of it has to hold, and whether a format can."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

from models.vocabulary import Vocabulary
from quant.core.errors import InputError
from quant.core.names import FULL_BITS, LEVEL_GRIDS, NARROW_COLUMNS, NARROW_GRIDS, SUPER_COLUMNS, SUPER_GRIDS
from quant.core.types import QuantSpec
from quant.export import refusal
from quant.export.formats import Content, OutsideMatrix
from quant.export.runtimes import nearest, objections
from quant.learn.config import ONLINE
from quant.run.config import Output, RunConfig
from quant.solvers import declaration_of, with_defaults


def spec_of(run: RunConfig, shapes: Mapping[str, tuple[int, int]]) -> QuantSpec | None:
    """The grid asked for; None where weights stay. Raises InputError for none that there is, or that does not fit a linear."""
    if run.wbits == FULL_BITS:
        return None
    for name, (_, n_in) in shapes.items():
        _check_narrow(run, name, n_in)
        if run.group_size > 0 and n_in % run.group_size and run.grid_kind not in SUPER_GRIDS:
            sizes = group_sizes([inputs for _, inputs in shapes.values()])
            auto = ", or auto" if any(size % 2 == 0 for size in sizes) else ""
            raise InputError(
                f"{name}: group_size={run.group_size} does not divide in_features={n_in}; "
                f"use one of {', '.join(map(str, [*sizes, -1]))}, which fit every linear{auto}"
            )
    try:
        return QuantSpec(run.wbits, run.group_size, run.symmetric, run.range, run.levels, run.grid_kind)
    except ValueError as error:
        raise InputError(f"the grid: {error}") from error


def _check_narrow(run: RunConfig, name: str, n_in: int, tuned: bool = True) -> None:
    """Raise InputError where rows are no whole super-blocks of a grid that has them, and smaller ones do not serve either. tuned:
    whether --tune moves this matrix."""
    if run.grid_kind not in SUPER_GRIDS or n_in % SUPER_COLUMNS == 0:
        return
    kind = NARROW_GRIDS[run.grid_kind].kind
    if n_in % NARROW_COLUMNS:
        raise InputError(
            f"{name}: --grid {run.grid_kind} has super-blocks of {SUPER_COLUMNS} columns, in narrow linears blocks of "
            f"{NARROW_COLUMNS}, and it has {n_in}: no type of GGUF's blocks fits; use another --grid and format bitplane"
        )
    if tuned and run.tuning is not None and kind in LEVEL_GRIDS:
        raise InputError(
            f"{name}: its {n_in} columns are no super-blocks of --grid {run.grid_kind}, and --tune does not move codes of "
            f"{kind}, which it has instead: drop --tune (--preset balanced has none)"
        )
    if run.rotation is not None and run.rotation.steps:
        raise InputError(
            f"{name}: its {n_in} columns are no super-blocks of --grid {run.grid_kind}, and --rotate-steps learns for one "
            "kind of grid: drop it"
        )


def group_sizes(inputs: Iterable[int]) -> list[int]:
    """Every size of groups, above 1, that divides all of these numbers of inputs."""
    common = math.gcd(*inputs)
    return [size for size in range(2, common + 1) if common % size == 0]


PART = 1 << 25  # weights of a head that are solved at a time: 128 MB in float32, which solvers hold a few times over
MIXED = range(2, 9)  # bits that linears of a run with mixed bits may have


def expected_bits(run: RunConfig, shapes: Mapping[str, tuple[int, int]], bits: int | None = None) -> float:
    """Stored bits of a block's linears, as far as they are known beforehand: codes, scales in 16 bits, zero points, and
    outliers where their number is asked for. bits: of codes, where not the run's own."""
    spec = QuantSpec(bits or run.wbits, run.group_size, run.symmetric, levels=run.levels, kind=run.grid_kind)
    weights = sum(out * n_in for out, n_in in shapes.values())
    outliers = declaration_of(run.solver).outlier_bits(with_defaults(run.solver, run.options))
    return weights * outliers + sum(_bits_of_codes(spec.for_inputs(n_in), out, n_in) for out, n_in in shapes.values())


def _bits_of_codes(spec: QuantSpec, n_out: int, n_in: int) -> float:
    """Codes, scales and zero points or minima of one linear."""
    weights = n_out * n_in
    if spec.super_kind is not None:
        return weights * 8 * spec.super_kind.size / SUPER_COLUMNS
    if spec.level_kind is not None:
        return weights * spec.bits + spec.level_scale_bits(n_out, spec.n_groups(n_in))
    group_bits = 16 + (16 if spec.kind == "real" else 0 if spec.symmetric else spec.code_bits)  # fractional as integer
    return weights * spec.code_bits + n_out * spec.n_groups(n_in) * group_bits


def candidate_widths(run: RunConfig, shapes: Mapping[str, tuple[int, int]]) -> tuple[int, ...]:
    """Bits that every linear of a run with mixed bits may have: the widest that all could have within the average, one
    below and two above. Raises InputError where the average is out of reach."""
    assert run.avg_bits is not None
    weights = sum(out * n_in for out, n_in in shapes.values())
    uniform = {bits: expected_bits(run, shapes, bits) / weights for bits in MIXED}
    if not uniform[MIXED[0]] <= run.avg_bits <= uniform[MIXED[-1]]:
        raise InputError(
            f"--avg-bits {run.avg_bits:g}: with scales and zero points, linears of {MIXED[0]} to {MIXED[-1]} bits take "
            f"{uniform[MIXED[0]]:.3f} to {uniform[MIXED[-1]]:.3f} bits a weight: use a number between them"
        )
    widest = max(bits for bits, stored in uniform.items() if stored <= run.avg_bits)
    return tuple(bits for bits in range(widest - 1, widest + 3) if bits in MIXED)


def outside_matrices(run: RunConfig, vocabulary: Vocabulary | None) -> dict[str, OutsideMatrix]:
    """What a run quantizes outside the blocks, by the name of the module whose parameter it is. Raises InputError for two
    widths of what is one tensor, and for groups that do not divide."""
    if not run.beyond_blocks:
        return {}
    assert vocabulary is not None
    head, embedding = run.head_bits, run.embedding_bits
    if run.rotation is not None and "residual" in run.rotation.kinds:  # which unties them
        vocabulary = replace(vocabulary, tied=False)
    if vocabulary.tied and None not in (head, embedding) and head != embedding:
        raise InputError(
            f"--head-bits {head} --embedding-bits {embedding}: in this model {vocabulary.head} is tied to "
            f"{vocabulary.embedding}, one tensor of one width: give one of them, or both alike"
        )
    if vocabulary.tied:
        matrix = OutsideMatrix(vocabulary.embedding_shape, int(head or embedding or 0), looked_up=True, multiplied=True)
        asked = {vocabulary.embedding: matrix}
    else:
        both = {
            vocabulary.embedding: (vocabulary.embedding_shape, embedding, False),
            vocabulary.head: (vocabulary.head_shape, head, True),
        }
        asked = {
            name: OutsideMatrix(shape, bits, looked_up=not is_head, multiplied=is_head)
            for name, (shape, bits, is_head) in both.items()
            if bits is not None
        }
    for name, matrix in asked.items():
        if run.group_size > 0 and matrix.shape[1] % run.group_size and run.grid_kind not in SUPER_GRIDS:
            raise InputError(
                f"{name}: group_size={run.group_size} does not divide its {matrix.shape[1]} columns: use another "
                "--group-size, or drop --head-bits and --embedding-bits"
            )
        _check_narrow(run, name, matrix.shape[1], tuned=False)
        spec_outside(run, matrix.bits)
    return asked


def spec_outside(run: RunConfig, bits: int) -> QuantSpec:
    """The grid of head or embedding: the run's, with bits and 2^bits levels of its own. Raises InputError for none that
    there is."""
    try:
        return QuantSpec(bits, run.group_size, run.symmetric, run.range, kind=run.grid_kind)
    except ValueError as error:
        raise InputError(f"--head-bits, --embedding-bits: {error}") from error


def content_of(
    run: RunConfig,
    shapes: Mapping[str, tuple[int, int]],
    n_blocks: int,
    model_type: str,
    vocabulary: Vocabulary | None = None,
) -> Content:
    """What a checkpoint of a run has to hold, before work begins. vocabulary: where embedding and head are, which runs ask
    for that quantize them. Raises InputError where `spec_of`, `candidate_widths` or `outside_matrices` does."""
    options = run.options
    ordered = options.get("static_groups") or options.get("group_aware") or run.group_size == -1
    return Content(
        spec_of(run, shapes),
        shapes,
        run.act,
        reordered=bool(options.get("act_order")) and not ordered,
        outliers=declaration_of(run.solver).outliers(with_defaults(run.solver, options)),
        online=_matrices(run),
        whole=run.num_layers >= n_blocks,
        model_type=model_type,
        true_sequential=run.true_sequential,
        static_groups=bool(options.get("static_groups")),
        mixed=run.avg_bits is not None,
        widths=() if run.avg_bits is None else candidate_widths(run, shapes),
        outside=outside_matrices(run, vocabulary),
    )


def _matrices(run: RunConfig) -> tuple[str, ...]:
    """The flags by which a run has matrices that no weight holds."""
    learning, turned = run.learning, () if run.rotation is None else run.rotation.online
    asked = {
        "--use_ln_matrix": learning is not None and learning.transform.norm_matrix,
        "--method flatquant": learning is not None and not ONLINE.isdisjoint(learning.extra_ingredients),
        f"--rotate {','.join(turned)}": bool(turned),
    }
    return tuple(flag for flag, given in asked.items() if given)


def check_format(output: Output, content: Content) -> None:
    """Raise InputError where the format cannot hold the content, or the target does not take it in that format."""
    if against := refusal(output.format, content):
        raise InputError(f"format {output.format}: {against}")
    if output.target is not None and (reasons := objections(output.target, output.format, content)):
        near = nearest(output.target, output.format, content)
        hint = f"; it takes {near}" if near else ""
        raise InputError(f"--target {output.target}: with --format {output.format}, it {'; '.join(reasons)}{hint}")
