"""What the journal says of one linear: its answer's errors and size, what makes it hard, and a verdict."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor

from quant.core.gram import GramStats
from quant.core.names import FULL_BITS
from quant.core.scaling import exponent_outside

LOOK_ABOVE = 0.1  # relative error of a linear from which a person should look


@dataclass(frozen=True)
class LinearRecord:
    """A line of the journal. shape: (out, in). The fields are the keys of its JSON, in this order.

    relative_error: ‖(W-Ŵ)X‖² / ‖WX‖² over the calibration tokens that were solved with, and of rounding to nearest;
    with ``_heldout`` over windows that no solver saw, None where there were none. n_tokens: of calibration, of an expert those that were
    routed to it. input_rms:
    of the input channels, median and largest. weight_peak: the largest weight over the root mean square of all.
    outlier_share: of weights beside the codes. seconds: of the solver alone. rank: directions in which the calibration
    inputs vary, where they are fewer than the columns and the solver reads them. info: what the solver tells.
    peak_bytes: of the process's memory so far; None where methods are only compared.
    """

    block: int
    name: str
    shape: tuple[int, int]
    method: str
    bits: int
    relative_error: float
    relative_error_rtn: float
    relative_error_heldout: float | None
    relative_error_rtn_heldout: float | None
    bits_per_weight: float
    storage_bits: int
    scale_bits: int
    n_tokens: int
    verdict: str
    kernels: str
    input_rms: tuple[float, float]
    weight_peak: float
    outlier_share: float
    seconds: float
    rank: int | None = None
    info: Mapping[str, float] = field(default_factory=dict)
    peak_bytes: int | None = None

    def to_json(self) -> dict[str, Any]:
        """As the journal holds it; what there is nothing to say of is left out."""
        entries = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        entries |= {"shape": list(self.shape), "input_rms": list(self.input_rms), "info": dict(self.info)}
        return {key: value for key, value in entries.items() if value is not None and value != {}}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> LinearRecord:
        """A line of this version or an earlier one. Raises TypeError or KeyError for what is none."""
        heldout = dict.fromkeys(("relative_error_heldout", "relative_error_rtn_heldout"))
        pairs = {key: tuple(stored[key]) for key in ("shape", "input_rms")}
        return cls(**{**heldout, **stored, **pairs})

    @property
    def n_weights(self) -> int:
        """Entries of the weight."""
        return self.shape[0] * self.shape[1]


def besides(started: float, records: Iterable[LinearRecord]) -> float:
    """Seconds since ``started`` (of `time.perf_counter`) that were not those of solving: what measuring the answers took."""
    return max(0.0, time.perf_counter() - started - sum(record.seconds for record in records))


def verdict(error: float, error_rtn: float, bits: float, is_short: bool = False) -> str:
    """``bad``: not finite, no output left, worse than round-to-nearest, or stored in as many bits as weights have that
    are not quantized; ``look``: above LOOK_ABOVE, or solved from too little (is_short); else ``ok``. The errors are those
    of held-out windows where there are any."""
    if not math.isfinite(error) or error >= 1 or error > error_rtn * 1.05 + 1e-12 or bits >= FULL_BITS:
        return "bad"
    return "look" if error > LOOK_ABOVE or is_short else "ok"


def input_rms(stats: GramStats) -> tuple[float, float]:
    """Root mean square of the input channels: the median one, and the largest."""
    rms = (stats.diagonal / max(1, stats.n_tokens)).clamp(min=0).sqrt()
    return float(rms.median()), float(rms.max())


def weight_peak(weight: Tensor) -> float:
    """The largest |weight| over the root mean square of all; 0 for zeros."""
    if k := exponent_outside(weight):
        weight = weight * 2.0**-k  # its squares would overflow or vanish
    spread = float(weight.square().mean().sqrt())
    return float(weight.abs().max()) / spread if spread else 0.0
