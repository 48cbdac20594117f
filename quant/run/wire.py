"""What several processes of one job send each other, and what a run takes then (``--dry-run --world-size N``).

Bytes that one of N processes sends for a block; a sum of e numbers of b bytes is added by parts and given back:

    sum(e, b)   2·(N-1)·ceil(e/N)·b
    sums        for every group of linears with ``in`` inputs, b = 4: the lower strips of its Gram matrix, BLOCK rows each,
                sum(rows·columns up to the diagonal), and sum(in) for the mean; with the original model's inputs beside
                sum(in²) and sum(in) more. Of every expert the same for what reads the hidden states and twice for what reads
                inner values (its own tokens, and others), and once a block over all tokens
    codes       (N-1) times a process's rows of every linear: ceil(out/N)·(in + 16·G) + 16·in, for codes, scales and zero
                points of the answer and of rounding to nearest, 4 bytes each for G groups, and twice the groups of columns;
                of what is solved as a whole (experts, coupled rows) ceil(linears/N) times out·(in + 8·G) + 8·in instead. Names
                and outliers are not in it

Time of a block: passes and sums of ceil(windows/N) windows, passes of the HELDOUT windows, which every process takes along;
solving and measuring of 1/N of the rows (of experts the most that fall to one process); a factorization of in³/3 flops for
every linear that a process solves rows of, whatever their number; and the bytes at LINK_INSIDE a second where N is at most
MACHINE, else at LINK_OUTSIDE. These two are what makers say of NVLink and of a network of 400 Gbit/s for each device; neither
is measured here.
"""

from __future__ import annotations

from collections.abc import Mapping

from quant.core.gram import BLOCK
from quant.core.names import FULL_BITS
from quant.core.ranks import PIECE
from quant.run.calibration import HELDOUT
from quant.run.config import RunConfig
from quant.run.shapes import Kind, Linears, Shapes
from quant.solvers import declaration_of, with_defaults

MACHINE = 8  # processes that share a machine
LINK_INSIDE, LINK_OUTSIDE = 450e9, 50e9  # bytes a second that a process sends
EXACT = ("rtn", "quantease")  # solvers that factorize nothing


def summed(numbers: int, processes: int, itemsize: int = 4) -> int:
    """Bytes that a process sends for a sum of so many numbers."""
    pieces = [PIECE] * (numbers // PIECE) + [numbers % PIECE]
    return sum(2 * (processes - 1) * -(-piece // processes) * itemsize for piece in pieces)


def _statistics(n_in: int, processes: int, beside: bool) -> int:
    """Bytes of the sums over the inputs of a group of linears."""
    ends = [min(i + BLOCK, n_in) for i in range(0, n_in, BLOCK)]
    strips = [(end - start) * end for start, end in zip([0, *ends], ends, strict=False)]
    more = [n_in**2, n_in] if beside else []
    return sum(summed(numbers, processes) for numbers in [*strips, n_in, *more])


def sums_sent(run: RunConfig, kind: Kind, processes: int) -> int:
    """Bytes of the sums of a block."""
    beside = run.target_correction > 0 or (run.wbits != FULL_BITS and declaration_of(run.solver).uses_cross)

    def of(group: Linears) -> int:
        return _statistics(group[0][2], processes, beside)

    sent = sum(map(of, kind.ordinary))
    if run.column_scales:
        sent += sum(summed(group[0][2], processes, 8) for group in kind.groups)
    if kind.routed:
        readers = [group for group in kind.routed if len(group) > 1]  # of the hidden states: gates and values
        inner = [group for group in kind.routed if len(group) == 1]
        sent += sum(map(of, readers)) + 2 * sum(map(of, inner)) + of(kind.routed[0])
    return sent


def codes_sent(run: RunConfig, kind: Kind, processes: int) -> int:
    """Bytes of the answers of a block."""
    if processes == 1:
        return 0
    coupled = goes_whole(run)
    whole = [linear for group in kind.groups if coupled or kind.is_routed(group) for linear in group]
    rows = [linear for group in kind.groups if not (coupled or kind.is_routed(group)) for linear in group]

    def groups(n_in: int) -> int:
        return n_in // run.group_size if run.group_size > 0 else 1

    each = [-(-out // processes) * (n_in + 16 * groups(n_in)) + 16 * n_in for _, out, n_in in rows]
    sizes = [out * (n_in + 8 * groups(n_in)) + 8 * n_in for _, out, n_in in whole]
    most = max((sum(sizes[place::processes]) for place in range(processes)), default=0)
    return (processes - 1) * (sum(each) + most)


def goes_whole(run: RunConfig) -> bool:
    """Whether every linear is one process's."""
    declared = declaration_of(run.solver)
    return declared.rows_coupled or declared.outliers(with_defaults(run.solver, run.options))


def shared_plan(
    run: RunConfig, shapes: Shapes, plan: Mapping[str, float], processes: int, float32_rate: float
) -> dict[str, float]:
    """What becomes of a plan of one process: bytes that each sends and seconds, of all blocks and of one on average.
    float32_rate: flop/s of products."""
    blocks = list(shapes.first(min(run.num_layers, shapes.n_blocks)))
    n_blocks = sum(count for _, count in blocks)
    sums = sum(count * sums_sent(run, kind, processes) for kind, count in blocks)
    codes = sum(count * codes_sent(run, kind, processes) for kind, count in blocks)
    own = -(-run.windows // processes)
    factors = sum(count * _factor_flops(run, kind, processes) for kind, count in blocks) / float32_rate
    share = sum(count * _solved_share(run, kind, processes) for kind, count in blocks) / n_blocks
    work = (
        (own + HELDOUT) / (run.windows + HELDOUT) * plan["seconds: forward"]
        + own / run.windows * plan["seconds: gram"]
        + share * (plan["seconds: solve"] + plan["seconds: measure"])
    )
    wire = (sums + codes) / (LINK_INSIDE if processes <= MACHINE else LINK_OUTSIDE)
    evaluate = plan["seconds: evaluate"] / processes
    return {
        "bytes sent a block: sums": sums / n_blocks,
        "bytes sent a block: codes": codes / n_blocks,
        "seconds a block: work": work / n_blocks,
        "seconds a block: factors": factors / n_blocks,
        "seconds a block: wire": wire / n_blocks,
        "seconds: evaluate": evaluate,
        "seconds: total": work + factors + wire + evaluate,
    }


def _factor_flops(run: RunConfig, kind: Kind, processes: int) -> float:
    """flops of the factorizations that one process does for a block: of every linear that it solves rows of."""
    if run.solver in EXACT:
        return 0.0
    whole = [group for group in kind.groups if goes_whole(run) or kind.is_routed(group)]
    return sum(n_in**3 / 3 / (processes if group in whole else 1) for group in kind.groups for _, _, n_in in group)


def _solved_share(run: RunConfig, kind: Kind, processes: int) -> float:
    """The part of a block's weights that one process solves."""
    whole = [out * n_in for group in kind.groups if goes_whole(run) or kind.is_routed(group) for _, out, n_in in group]
    most = max((sum(whole[place::processes]) for place in range(processes)), default=0)
    return (most + (kind.weights - sum(whole)) / processes) / kind.weights
