"""A quantized model talks: packed weights in memory, text as it comes, tokens a second and memory at the end."""

from __future__ import annotations

import inspect
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quant.blocks.instrument import instrument
from quant.core.errors import InputError
from quant.run.packed_model import Resident


@dataclass
class Clock:
    """Seconds of the prompt, and of the tokens after the first."""

    prompt: float = 0.0
    decode: float = 0.0
    tokens: int = 0


@torch.inference_mode()
def generate(
    resident: Resident,
    ids: Tensor,
    n: int,
    *,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    stop: Collection[int] = (),
    clock: Clock | None = None,
) -> Iterator[int]:
    """Up to n tokens that follow ids [1, T], one at a time; any of ``stop`` is the last. temperature 0: the most likely one.

    Raises InputError where the model computes no numbers.
    """
    clock = Clock() if clock is None else clock
    takes = inspect.signature(resident.module.forward).parameters
    argument = "cache" if "cache" in takes else "past_key_values"  # transformers before 5.24
    kept: dict[str, Any] = {}
    given = ids
    with instrument(resident.blocks, resident.weights, resident.act):
        for _ in range(n):
            started = time.perf_counter()
            output = resident.module(given, use_cache=True, **kept)
            token = _pick(output.logits[0, -1].float(), temperature, generator)
            spent = time.perf_counter() - started
            if kept:
                clock.decode += spent
            else:
                clock.prompt = spent
            kept = {argument: output[argument]}
            given, clock.tokens = ids.new_tensor([[token]]), clock.tokens + 1
            yield token
            if token in stop:
                return


def _pick(logits: Tensor, temperature: float, generator: torch.Generator | None) -> int:
    best = logits.max()
    if not bool(torch.isfinite(best)):
        raise InputError("the model's logits are not finite: use --dtype float32 or check the checkpoint")
    if temperature == 0:
        return int(logits.argmax())
    p = torch.softmax((logits - best).double() / temperature, -1).float().cpu()  # the smallest temperature divides too
    return int(torch.multinomial(p, 1, generator=generator))


def text_of(tokens: Iterator[int], tokenizer: Any, prompt: list[int]) -> Iterator[str]:
    """What every token adds to the text; a character of several tokens comes with its last one."""
    so_far, shown = list(prompt), tokenizer.decode(prompt, skip_special_tokens=True)
    for token in tokens:
        so_far.append(token)
        text = tokenizer.decode(so_far, skip_special_tokens=True)
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text


def summary(resident: Resident, clock: Clock, prompt_tokens: int) -> str:
    """Tokens a second, and what the weights take in memory."""
    full = resident.packed_bytes + resident.other_bytes
    rate = f"{(clock.tokens - 1) / clock.decode:.1f} tokens a second" if clock.tokens > 1 else "one token"
    return (
        f"{clock.tokens} tokens, {rate} after {prompt_tokens} tokens of prompt in {clock.prompt:.2f} s; "
        f"weights {full / 1e6:.2f} MB in memory: linears {resident.packed_bytes / 1e6:.2f} packed "
        f"({resident.stored_bytes / 1e6:.2f} counted), the rest {resident.other_bytes / 1e6:.2f}"
    )
