"""What the toolkit knows of a model family: its blocks, the order of their linears, and what may be rescaled.

A *seam* is a place where one tensor writes what others read, so that the values between them may be transformed
without changing the model's function: x' = (x - shift) A, taken back by its consumers. `quant/learn/affine.py`
does the algebra; a family only names the places.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from models.stored import Layout
from quant.core.errors import InputError

if TYPE_CHECKING:  # the command lines name families before torch is there
    import torch
    from torch import Tensor

Groups = tuple[tuple[str, ...], ...]


class Outside(str):
    """The name of a module outside the blocks, in the whole model: embedding, norm behind the last block, head."""

    __slots__ = ()


@dataclass(frozen=True)
class Seam:
    """kind: ``norm`` (a norm and the linears that read it), ``vo`` (values and the output projection), ``qk`` (queries
    and keys), ``mul`` (a linear whose outputs reach the next one through a positively homogeneous function of each),
    ``residual`` (all that add to the stream between the blocks, and all that read it behind a norm).

    producers and consumers: modules of the block by name, or `Outside` of it. For ``vo`` and ``qk`` the rows are the head
    layout's. A producer of ``residual`` outside is an embedding: its rows are values of the stream. second_half: of a
    producer of ``mul`` that holds the gate's rows first, the rows behind them alone write the values.
    """

    kind: str
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    second_half: bool = False

    @property
    def producer(self) -> str:
        """The producer of a seam that has one."""
        (only,) = self.producers
        return only


def places(names: tuple[str, ...], outside: bool) -> tuple[str, ...]:
    """Those of the modules that are outside the blocks, or those inside."""
    return tuple(name for name in names if isinstance(name, Outside) == outside)


@dataclass(frozen=True)
class ResidualStream:
    """The stream that every block adds to, as a place for one orthogonal matrix in the whole model.

    seam: who writes it and who reads it. norms: those between the stream and its readers, as seams of their own; they
    have to be without weights before the stream is rotated.
    """

    seam: Seam
    norms: tuple[Seam, ...]


@dataclass(frozen=True)
class HeadLayout:
    """Where the heads are. q, k, v: (linear, its rows as int64 [heads, head_dim]); k and v may have fewer heads, each
    read by heads / kv_heads consecutive ones. output: the linear behind the heads. rope: whether rows i and
    i + head_dim / 2 of a head are rotated against each other before the product of queries and keys.
    """

    q: tuple[str, Tensor]
    k: tuple[str, Tensor]
    v: tuple[str, Tensor]
    output: str
    rope: bool

    def rotating(self, rotated: int, interleaved: bool = False) -> HeadLayout:
        """The same layout where only the first ``rotated`` rows of a head of queries or keys are rotated, and, if
        ``interleaved``, neighbours (0 and 1, 2 and 3, ...) against each other.

        The rows are listed in another order, in which i and i + head_dim / 2 are rotated together again; those that are
        not rotated form pairs too.
        """
        (q, q_rows), (k, k_rows) = self.q, self.k
        head_dim = q_rows.shape[1]
        turned, rest = list(range(rotated)), list(range(rotated, head_dim))
        first = turned[::2] if interleaved else turned[: rotated // 2]
        second = turned[1::2] if interleaved else turned[rotated // 2 :]
        order = [*first, *rest[: len(rest) // 2], *second, *rest[len(rest) // 2 :]]
        return replace(self, q=(q, q_rows[:, order]), k=(k, k_rows[:, order]))

    @property
    def repeats(self) -> int:
        """Query heads that share one head of keys and values."""
        return self.q[1].shape[0] // self.k[1].shape[0]

    def to(self, device: torch.device) -> HeadLayout:
        """The same layout with its rows on a device."""
        (q, q_rows), (k, k_rows), (v, v_rows) = self.q, self.k, self.v
        return replace(self, q=(q, q_rows.to(device)), k=(k, k_rows.to(device)), v=(v, v_rows.to(device)))


def separate_heads(prefix: str, output: str, heads: int, kv_heads: int, head_dim: int, rope: bool) -> HeadLayout:
    """The layout of linears q_proj, k_proj, v_proj and ``output`` under a prefix."""

    import torch

    def rows(name: str, n: int) -> tuple[str, Tensor]:
        return f"{prefix}.{name}", torch.arange(n * head_dim).view(n, head_dim)

    return HeadLayout(
        rows("q_proj", heads), rows("k_proj", kv_heads), rows("v_proj", kv_heads), f"{prefix}.{output}", rope
    )


def fused_heads(linear: str, output: str, groups: int, per_group: int, head_dim: int, rope: bool) -> HeadLayout:
    """The layout of one linear with rows [groups, per_group query heads + a key head + a value head, head_dim]."""
    import torch

    rows = torch.arange(groups * (per_group + 2) * head_dim).view(groups, per_group + 2, head_dim)
    q, k, v = rows[:, :-2].reshape(-1, head_dim), rows[:, -2], rows[:, -1]
    return HeadLayout((linear, q), (linear, k), (linear, v), output, rope)


def stacked_heads(linear: str, output: str, heads: int, kv_heads: int, head_dim: int, rope: bool) -> HeadLayout:
    """The layout of one linear with all rows of queries first, then those of keys, then those of values."""
    import torch

    rows = torch.arange((heads + 2 * kv_heads) * head_dim).view(-1, head_dim)
    q, k, v = rows.split((heads, kv_heads, kv_heads))
    return HeadLayout((linear, q), (linear, k), (linear, v), output, rope)


def rotated_rows(config: Any, head_dim: int) -> int:
    """How many rows of a head rotary embeddings turn (``partial_rotary_factor``)."""
    return int(head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))


@dataclass(frozen=True)
class ModelFamily:
    """Declares a family; dispatch is on ``config.model_type`` alone.

    blocks: path of the list of decoder blocks in the causal-LM module. groups(config): names of the linears
    inside a block in order of execution; linears of one group read the same input and share one Gram matrix. Where blocks
    differ, groups_at(config, index) says those of one, and groups(config) those of the last.
    seams(config), heads(config): what transforms may use. norm_offset: a norm multiplies by weight + norm_offset.
    no_norm_seams(config): why the norms cannot be rescaled, or an empty text. no_eager(config): why the
    library's eager attention must not be used, or an empty text. biases: what to set in the
    configuration for linears that have no bias to get one (shifts need them). residual(config): the stream between the
    blocks, or why it cannot be rotated. residual_at(config): for linears whose outputs are added to that stream as they
    are, the module of the block whose input it is just before; empty where something else comes between. layout: how
    checkpoints store the tensors. experts: the module of a block that holds the experts of a mixture; empty where there are
    none. gates: modules of a mixture's block that say how much something counts, and are never quantized.
    """

    model_types: tuple[str, ...]
    blocks: str
    groups: Callable[[Any], Groups]
    seams: Callable[[Any], tuple[Seam, ...]]
    heads: Callable[[Any], HeadLayout]
    norm_offset: float = 0.0
    no_norm_seams: Callable[[Any], str] = lambda config: ""
    no_eager: Callable[[Any], str] = lambda config: ""
    biases: Mapping[str, Any] = field(default_factory=dict)
    residual: Callable[[Any], ResidualStream | str] = lambda config: (
        "its norms subtract the mean, which a rotation moves"
    )
    residual_at: Callable[[Any], Mapping[str, str]] = lambda config: {}
    groups_at: Callable[[Any, int], Groups] | None = None
    layout: Layout = Layout()
    experts: str = ""
    gates: tuple[str, ...] = ()

    def groups_of(self, config: Any, index: int) -> Groups:
        """The groups of one block."""
        return self.groups(config) if self.groups_at is None else self.groups_at(config, index)


def residual_stream(family: ModelFamily, config: Any) -> ResidualStream:
    """The residual stream of a model as a seam. Raises InputError that says why where it cannot be rotated."""
    stream = family.residual(config)
    if isinstance(stream, ResidualStream) and config.tie_word_embeddings:
        stream = "its head is tied to its embedding, and only one of them reads a norm"
    if isinstance(stream, str):
        raise InputError(f"the residual stream of this {config.model_type} model cannot be rotated: {stream}")
    return stream
