"""A quantized model talks: packed weights in memory, text as it comes, tokens a second and memory at the end."""

from __future__ import annotations

import copy
import gc
import inspect
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from models.cache import fixed_cache
from quant.blocks.instrument import instrument
from quant.core.errors import InputError
from quant.core.recording import NotRecordedError, Recording, recorded
from quant.kernels.steps.graph import Graph
from quant.run.packed_model import Resident

ROUNDED = 0.1  # of the largest logit: what a sum in another order moves where it turns the rounding of an input
RECORDED = 2  # the piece of text that is recorded


@dataclass
class Clock:
    """Seconds of the prompt, and of the tokens after the first. by_modules: why steps are not replayed, where they are not;
    by_operations: why they are replayed on CUDA, but not as a graph."""

    prompt: float = 0.0
    decode: float = 0.0
    tokens: int = 0
    by_modules: str = ""
    by_operations: str = ""


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
    given = ids
    with instrument(resident.blocks, resident.weights, resident.act), _collected_before():
        apart = ROUNDED if resident.round_inputs else None
        step = Steps(resident.module, ids.shape[1] + n, apart, compiled=not resident.act.active)
        for _ in range(n):
            started = time.perf_counter()
            token = _pick(step(given)[0, -1].float(), temperature, generator)
            spent = time.perf_counter() - started
            if clock.tokens:
                clock.decode += spent
            else:
                clock.prompt = spent
            clock.by_modules, clock.by_operations = step.by_modules, step.by_operations
            given, clock.tokens = ids.new_tensor([[token]]), clock.tokens + 1
            yield token
            if token in stop:
                return


@contextmanager
def _collected_before() -> Iterator[None]:
    """Python's collector leaves alone what was there before: a model of thousands of modules is otherwise looked through every
    few tokens, which takes as long as a token."""
    own = gc.get_freeze_count() == 0  # else somebody has done so, and ends it
    if own:
        gc.freeze()
    try:
        yield
    finally:
        if own:
            gc.unfreeze()


class Steps:
    """Logits [1, T, vocabulary] of one piece of a text after the other.

    The prompt goes through the modules; so does the first token behind it, while what they do is recorded, with a cache of fixed
    size, and again with the cache that they have of themselves, which must say the same but for rounding. The second goes
    through the record and, on a copy of the cache, once more through the modules; where both give the same to the last bit, the
    record answers from there on, in float32 on a CPU by compiled loops (`quant.kernels.steps`), each of which was tried beside
    the record by then, on CUDA as one graph that gave the same to the last bit. apart: how far the two caches' logits may be
    apart, of the largest; None: as far as float sums are. by_modules, by_operations: why it does not, and why without a graph.
    compiled: whether loops may take part; where activations are quantized a sum in another order
    turns roundings, and what that gives stays among the keys and values.
    """

    def __init__(self, module: nn.Module, length: int, apart: float | None = None, compiled: bool = True) -> None:
        takes = inspect.signature(module.forward).parameters
        self.argument = "cache" if "cache" in takes else "past_key_values"  # transformers before 5.24
        self.module, self.length, self.apart, self.cache = module, length, apart, cast(Any, None)
        self.compiled, self.by_modules, self.by_operations, self.pieces = compiled, "", "", 0
        self.recording: Recording | None = None  # until it is compared
        self.replay: Callable[[Tensor], Tensor] | None = None  # once it gave the same

    def __call__(self, given: Tensor) -> Tensor:
        """What the modules, or their record, say of the next piece [1, T]."""
        self.pieces += 1
        if self.replay is not None:
            return self.replay(given)
        if self.pieces == RECORDED:
            return self._record(given)
        if self.recording is not None:
            return self._compared(self.recording, given)
        return self._ask(given)

    def _ask(self, given: Tensor) -> Tensor:
        output = self.module(given, use_cache=True, **({} if self.cache is None else {self.argument: self.cache}))
        self.cache = output[self.argument]
        logits: Tensor = output.logits
        return logits

    def _record(self, given: Tensor) -> Tensor:
        before, self.cache = self.cache, fixed_cache(self.module, self.cache, self.length)
        try:
            if self.cache is None:
                raise NotRecordedError("its cache is not one of plain keys and values")
            self.recording = recorded(self._ask, given.clone())  # which a program writes to
            logits = self.recording.result.clone()
        except NotRecordedError as reason:
            self.cache, self.by_modules = before, str(reason)
            return self._ask(given)
        fixed, self.cache = self.cache, before
        own = self._ask(given)
        apart = 100 * torch.finfo(own.dtype).eps if self.apart is None else self.apart
        if float((own - logits).abs().max()) <= apart * float(own.abs().max()):
            self.cache = fixed
            return logits
        self.recording, self.by_modules = None, "a cache of fixed size gives something else"
        return own

    def _compared(self, recording: Recording, given: Tensor) -> Tensor:
        from quant.kernels.steps.program import Program  # numba, which takes a second, is for this alone

        mine, self.cache, self.recording = self.cache, copy.deepcopy(self.cache), None
        expected = self._ask(given)
        tried = (Program.of(recording) if self.compiled else None) or Graph.of(recording)
        replay = tried or recording.replay()
        again = replay(given) if tried is None else tried.checked(given)
        if torch.equal(again, expected):
            self.cache, self.replay = mine, replay
            self.by_operations = tried.instead if isinstance(tried, Graph) else ""
        else:
            self.by_modules = "a recorded step gives something else"
        return expected


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
    if clock.by_modules:
        rate += f" (step by step through the modules: {clock.by_modules})"
    elif clock.by_operations:
        rate += f" (replayed operation by operation: {clock.by_operations})"
    return (
        f"{clock.tokens} tokens, {rate} after {prompt_tokens} tokens of prompt in {clock.prompt:.2f} s; "
        f"weights {full / 1e6:.2f} MB in memory: linears {resident.packed_bytes / 1e6:.2f} packed "
        f"({resident.stored_bytes / 1e6:.2f} counted), the rest {resident.other_bytes / 1e6:.2f}"
    )
