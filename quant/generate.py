"""A quantized model talks: packed weights in memory, text as it comes, tokens a second and memory at the end."""

from __future__ import annotations

import argparse
import inspect
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant.core.actquant import instrumented
from quant.core.resident import Resident
from quant.core.text import printable

EXAMPLES = """examples:
  python -m quant.generate --model runs/llama-quantease-w3-1a2b3c4d --prompt "Once upon a time"
  python -m quant.generate --model out --prompt "The river" --max-new-tokens 200 --temperature 0.8 --seed 1
"""


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
    stop: int | None = None,
    clock: Clock | None = None,
) -> Iterator[int]:
    """Up to n tokens that follow ids [1, T], one at a time; ``stop`` ends it. temperature 0: the most likely one."""
    clock = Clock() if clock is None else clock
    takes = inspect.signature(resident.module.forward).parameters
    argument = "cache" if "cache" in takes else "past_key_values"  # transformers before 5.24
    kept: dict[str, Any] = {}
    given = ids
    with instrumented(resident.blocks, resident.weights, resident.act):
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
            if token == stop:
                return
            yield token


def _pick(logits: Tensor, temperature: float, generator: torch.Generator | None) -> int:
    if temperature == 0:
        return int(logits.argmax())
    p = torch.softmax(logits / temperature, -1).cpu()
    return int(torch.multinomial(p, 1, generator=generator))


def _text(tokens: Iterator[int], tokenizer: Any, prompt: list[int]) -> Iterator[str]:
    """What every token adds to the text; a character of several tokens comes with its last one."""
    so_far, shown = list(prompt), tokenizer.decode(prompt, skip_special_tokens=True)
    for token in tokens:
        so_far.append(token)
        text = tokenizer.decode(so_far, skip_special_tokens=True)
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text


def _summary(resident: Resident, clock: Clock, prompt_tokens: int) -> str:
    full = resident.packed_bytes + resident.other_bytes
    rate = f"{(clock.tokens - 1) / clock.decode:.1f} tokens a second" if clock.tokens > 1 else "one token"
    return (
        f"{clock.tokens} tokens, {rate} after {prompt_tokens} tokens of prompt in {clock.prompt:.2f} s; "
        f"weights {full / 1e6:.2f} MB in memory: linears {resident.packed_bytes / 1e6:.2f} packed "
        f"({resident.stored_bytes / 1e6:.2f} counted), the rest {resident.other_bytes / 1e6:.2f}"
    )


def main() -> None:
    """Parse, load, talk."""
    from models.load import load_tokenizer
    from quant.core import cli, machine
    from quant.core.errors import InputError
    from quant.core.flags import DEFAULT_CACHE
    from quant.core.resident import load_resident, open_quantized

    raw = argparse.RawDescriptionHelpFormatter
    parser: Any = cli.Parser(prog="python -m quant.generate", description=__doc__, epilog=EXAMPLES, formatter_class=raw)
    parser.add_argument("--model", required=True, metavar="RUN|DIR|ID", help="a run directory or any checkpoint")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=100, metavar="N", help="(default: 100)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the most likely token (default: 0)")
    parser.add_argument("--seed", type=int, default=0, help="of --temperature above 0 (default: 0)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--dtype", default="auto", choices=("auto", *machine.DTYPES), help="float32 on a CPU")
    parser.add_argument("--cache-dir", type=Path, default=DEFAULT_CACHE, help="of models (default: %(default)s)")
    parser.add_argument("--trust-remote-code", action="store_true")
    args = parser.parse_args()
    cli.set_logging("warning")
    found = [
        message
        for bad, message in (
            (args.max_new_tokens < 1, f"--max-new-tokens {args.max_new_tokens}: use 1 or more"),
            (args.temperature < 0, f"--temperature {args.temperature:g}: use 0 or more"),
        )
        if bad
    ]
    if found:
        raise InputError(*found)
    device = machine.pick_device(args.device)
    dtype = machine.pick_dtype(args.dtype, device)
    quantized = open_quantized(args.model, args.cache_dir, dtype, args.trust_remote_code)
    tokenizer = load_tokenizer(quantized.model.checkpoint.path, args.trust_remote_code)
    prompt = tokenizer.encode(args.prompt)
    if not prompt:
        raise InputError("--prompt is empty: give text to continue")
    if len(prompt) + args.max_new_tokens > quantized.model.max_length:
        raise InputError(
            f"{len(prompt)} tokens of --prompt and --max-new-tokens {args.max_new_tokens}: "
            f"the model takes at most {quantized.model.max_length}"
        )
    resident, clock = load_resident(quantized, device), Clock()
    tokens = generate(
        resident, torch.tensor([prompt], device=device), args.max_new_tokens,
        temperature=args.temperature, generator=torch.Generator().manual_seed(args.seed),
        stop=tokenizer.eos_token_id, clock=clock,
    )  # fmt: skip
    sys.stdout.write(printable(args.prompt, keep="\n\t"))
    for piece in _text(tokens, tokenizer, prompt):
        sys.stdout.write(printable(piece, keep="\n\t"))
        sys.stdout.flush()
    sys.stdout.write("\n")
    cli.console().print(_summary(resident, clock, len(prompt)), highlight=False, soft_wrap=True)


if __name__ == "__main__":
    from quant.core.cli import guarded

    sys.exit(guarded(main))
