"""python -m quant generate: a quantized model continues a prompt."""

from __future__ import annotations

import argparse
import sys

from quant.cli.arguments import build_parser, check_device, flag_mistakes, parse
from quant.cli.flags import GENERATE
from quant.core.errors import InputError

EXAMPLES = """examples:
  python -m quant generate --model runs/llama-quantease-w3-1a2b3c4d --prompt "Once upon a time"
  python -m quant generate --model out --prompt "The river" --max-new-tokens 200 --temperature 0.8 --seed 1
"""


def main() -> None:
    """Parse, load, talk."""
    args = parse(build_parser(GENERATE, __doc__, EXAMPLES))
    if lines := flag_mistakes(args, GENERATE):
        raise InputError(*lines)
    check_device(args.device)
    talk(args)


def talk(args: argparse.Namespace) -> None:
    """Load the model and let it continue the prompt."""
    import torch

    from data.tokens import BOM, check_ids, encode_prompt, end_tokens
    from models.load import load_tokenizer
    from quant.cli.console import console
    from quant.core import env
    from quant.core.text import printable
    from quant.run.generate import Clock, generate, summary, text_of
    from quant.run.packed_model import load_resident, open_quantized

    device = env.pick_device(args.device)
    dtype = env.pick_dtype(args.dtype, device)
    quantized = open_quantized(args.model, args.cache_dir, dtype, args.trust_remote_code, args.family)
    tokenizer = load_tokenizer(quantized.model.checkpoint.path, args.trust_remote_code)
    prompt = encode_prompt(tokenizer, args.prompt.removeprefix(BOM), "--prompt")
    if not prompt:
        raise InputError("--prompt is empty: give text to continue")
    check_ids(prompt, quantized.model.rows, "--prompt")
    if len(prompt) + args.max_new_tokens > quantized.model.max_length:
        raise InputError(
            f"{len(prompt)} tokens of --prompt and --max-new-tokens {args.max_new_tokens}: "
            f"the model takes at most {quantized.model.max_length}"
        )
    stop = end_tokens(quantized.model.checkpoint.path, tokenizer)
    resident, clock = load_resident(quantized, device, args.round_inputs), Clock()
    tokens = generate(
        resident, torch.tensor([prompt], device=device), args.max_new_tokens,
        temperature=args.temperature, generator=torch.Generator().manual_seed(args.seed),
        stop=stop, clock=clock,
    )  # fmt: skip
    sys.stdout.write(printable(args.prompt, keep="\n\t"))
    for piece in text_of(tokens, tokenizer, prompt):
        sys.stdout.write(printable(piece, keep="\n\t"))
        sys.stdout.flush()
    sys.stdout.write("\n")
    console().print(summary(resident, clock, len(prompt)), soft_wrap=True)
