"""A block for the length of a call: quantized inputs of its linears, packed linears, matrices behind norms, in front of
linears and of heads, and quantized queries, keys and values where attention multiplies them.

Nothing in a family knows of it: linears get a hook for the length of a call, and the products of attention are
seen by a torch function mode, whichever of the library's implementations runs them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from quant.blocks.fake_quant import ActSpec, integer_inputs, quantize_activations, quantize_to_levels
from quant.blocks.online import AND, HeadForm, RunningAttention, SharedProduct
from quant.blocks.weights import BlockWeights
from quant.core.names import FULL_BITS
from quant.kernels.matmul.weight import PackedLinear, PackedWeight

BYTE = 8  # bits up to which inputs are multiplied as integers, where weights are packed
MATMULS = {torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__}
SOFTMAX = {F.softmax, torch.softmax, torch.Tensor.softmax}


class AttentionProducts(TorchFunctionMode):
    """Sees the two products of an attention: transforms and quantizes what enters them, and shows its logits to ``watch``.

    Covers scaled_dot_product_attention, the eager matmul pair, and BLOOM's baddbmm and bmm.
    """

    def __init__(
        self, spec: ActSpec, watch: Callable[[Tensor], None] | None = None, running: RunningAttention | None = None
    ) -> None:
        super().__init__()
        self.spec, self.watch, self.running = spec, watch, running or RunningAttention()
        self.with_values = False  # of the eager pair, the second product is next

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Replace the operands of the products of attention; everything else passes."""
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            q, k, v = self._query(args[0]), self._key(args[1]), self._value(args[2])
            if self.watch is not None:
                self.watch(_logits(q, k, *args[3:], **kwargs))
            return func(q, k, v, *args[3:], **kwargs)
        if func in MATMULS and args[0].dim() == 4:
            args = (args[0], self._value(args[1])) if self.with_values else self._query_and_keys(*args)
            self.with_values = not self.with_values
        elif func is torch.Tensor.baddbmm:
            kwargs["batch1"], kwargs["batch2"] = self._query_and_keys(kwargs["batch1"], kwargs["batch2"])
        elif func is torch.bmm:
            args = (args[0], self._value(args[1]))
        elif func in SOFTMAX and self.watch is not None:
            self.watch(args[0])
        return func(*args, **kwargs)

    def _query(self, x: Tensor) -> Tensor:
        form = self.running.form
        x = x if form.query is None else x @ form.query
        bits = self.spec.bits if self.spec.kv_bits < FULL_BITS else FULL_BITS
        return quantize_activations(x, bits, clip=form.clip(0))

    def _key(self, x: Tensor) -> Tensor:
        form = self.running.form
        x = x if form.key is None else x @ form.key
        return quantize_activations(x, self.spec.kv_bits, clip=form.clip(1))

    def _value(self, x: Tensor) -> Tensor:
        return quantize_activations(x, self.spec.kv_bits, clip=self.running.form.clip(2))

    def _query_and_keys(self, query: Tensor, transposed: Tensor) -> tuple[Tensor, Tensor]:
        return self._query(query), self._key(transposed.transpose(-1, -2)).transpose(-1, -2)


def _logits(
    q: Tensor,
    k: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The attention logits [..., heads, T, T] of a scaled_dot_product_attention call; masked ones at the dtype's end."""
    if enable_gqa:
        k = k.repeat_interleave(q.shape[-3] // k.shape[-3], -3)
    logits = (q * (scale or q.shape[-1] ** -0.5)) @ k.transpose(-1, -2)  # the largest tensor of a block: touched once
    lowest = torch.finfo(logits.dtype).min
    if is_causal:
        hidden = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        return logits.masked_fill_(hidden, lowest)
    if attn_mask is None:
        return logits
    return logits.masked_fill_(~attn_mask, lowest) if attn_mask.dtype == torch.bool else logits.add_(attn_mask)


class _InputQuantizer:
    """Hook for linears; linears that read one tensor share its quantized form."""

    def __init__(self, spec: ActSpec) -> None:
        self.spec = spec
        self.seen: tuple[Tensor | None, Tensor | None] = (None, None)
        self.quantized: Tensor | None = None

    def hook(self, span: Tensor | None, clip: Tensor | None) -> Callable[[nn.Module, tuple], tuple[Tensor]]:
        spec = self.spec
        whole = spec.method != "per_token"

        def act(module: nn.Module, args: tuple) -> tuple[Tensor]:
            if spec.kind == "integer" and span is not None:
                return (quantize_activations(args[0], spec.bits, span=span, symmetric=spec.symmetric, clip=clip),)
            if self.seen[0] is not args[0] or self.seen[1] is not clip:
                self.seen = (args[0], clip)
                self.quantized = (
                    quantize_activations(args[0], spec.bits, whole=whole, symmetric=spec.symmetric, clip=clip)
                    if spec.kind == "integer"
                    else quantize_to_levels(args[0], spec.kind)
                )
            assert self.quantized is not None
            return (self.quantized,)

        return act


@contextmanager
def instrument(
    block: nn.Module,
    weights: BlockWeights,
    spec: ActSpec | None = None,
    watch: Callable[[Tensor], None] | None = None,
) -> Iterator[dict[str, Tensor]]:
    """For the length of a `with`: packed linears, matrices behind norms, in front of linears and of heads, quantized
    activations, attention logits given to ``watch``.

    Yields the weights that are the block's own parameters and buffers.
    """
    with ExitStack() as stack:

        def keep(handle: Any) -> None:
            stack.callback(handle.remove)

        own, spans = dict(weights.parameters), weights.input_ranges
        clips = {linear: clip for readers, clip in weights.input_clips.items() for linear in readers.split(AND)}
        for linear, packed in weights.packed.items():
            bias = own.pop(f"{linear}.bias", None)
            mount(stack, block, linear, packed_linear(packed, bias, spec, spans.get(linear), clips.get(linear)))
        for norm, matrix in weights.online.items():
            keep(block.get_submodule(norm).register_forward_hook(lambda module, args, out, m=matrix: out @ m))
        for readers in {**weights.lefts, **weights.rights}:
            product = SharedProduct(weights.lefts.get(readers), weights.rights.get(readers))
            for linear in readers.split(AND):
                keep(block.get_submodule(linear).register_forward_pre_hook(product))
        if spec is not None and spec.bits < FULL_BITS:
            shared = _InputQuantizer(spec)
            for name, module in block.named_modules():
                if isinstance(module, nn.Linear):
                    keep(module.register_forward_pre_hook(shared.hook(spans.get(name), clips.get(name))))
        quantized = spec is not None and spec.kv_bits < FULL_BITS
        if watch is not None or quantized or weights.head_matrices:
            running = RunningAttention()
            for name in {**weights.head_matrices, **weights.head_clips}:
                form = HeadForm.of(weights.head_matrices.get(name), weights.head_clips.get(name))
                enter, leave = running.hooks(form)
                keep(block.get_submodule(name).register_forward_pre_hook(enter))
                keep(block.get_submodule(name).register_forward_hook(leave))
            stack.enter_context(AttentionProducts(spec or ActSpec(), watch, running))
        yield own


def packed_linear(
    weight: PackedWeight,
    bias: Tensor | None = None,
    spec: ActSpec | None = None,
    span: Tensor | None = None,
    clip: Tensor | None = None,
) -> PackedLinear:
    """A linear with packed weights that quantizes its inputs: to integers where they have at most 8 bits."""
    if spec is None or spec.bits >= FULL_BITS:
        return PackedLinear(weight, bias)

    def floats(x: Tensor) -> Tensor:
        if spec.kind != "integer":
            return quantize_to_levels(x, spec.kind)
        whole = spec.method != "per_token"
        return quantize_activations(x, spec.bits, whole=whole, span=span, symmetric=spec.symmetric, clip=clip)

    integers = (lambda x: integer_inputs(x, spec, span, clip)) if spec.bits <= BYTE and spec.kind == "integer" else None
    return PackedLinear(weight, bias, floats, integers)


def mount(stack: ExitStack, block: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in another's place until the stack is closed."""
    parent_name, _, own_name = name.rpartition(".")
    parent = block.get_submodule(parent_name)
    before = getattr(parent, own_name)
    setattr(parent, own_name, module)
    stack.callback(setattr, parent, own_name, before)
