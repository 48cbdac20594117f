"""Learn clips and transforms that make weights, and activations if asked, easy to quantize; then round and measure.

The command line of the users of OmniQuant, AffineQuant and ABQ-LLM, for every family. Every finished block is on
disk: the same command continues a run that was interrupted, with identical bits.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from typing import Any

from quant.cli.arguments import build_parser, flag_mistakes, parse, place_mistakes, source_mistakes, values_of
from quant.cli.errors import exit_code_of
from quant.cli.flags import LEARNER, split_words
from quant.cli.options import choices_made, method_mistakes, options_of, tuning_of
from quant.cli.rules import learner_rules
from quant.core import ranks
from quant.core.errors import InputError
from quant.core.names import AUTO_SCOPE

EXAMPLES = """examples:
  # the embedded demo, 3-bit weights, learnable clipping: no network, a few minutes on a laptop
  python main.py --model models/demo/llama --calib_dataset demo --eval-datasets demo --eval_ppl --seqlen 256 \\
      --nsamples 32 --wbits 3 --lwc --epochs 5

  # OmniQuant, weights and activations in 4 bits
  python main.py --model meta-llama/Llama-2-7b-hf --wbits 4 --abits 4 --lwc --let --aug_loss --alpha 0.75 \\
      --epochs 20 --eval_ppl

  # AffineQuant, 2-bit weights in groups of 64, a matrix behind every norm
  python main.py --model facebook/opt-125m --wbits 2 --abits 16 --group_size 64 --lwc --let --use_ln_matrix \\
      --sf 0.1 --epochs 40 --aug_loss --eval_ppl

  # ABQ-LLM at 2 bits (five levels) with 8-bit activations; then QuantEase instead of rounding to nearest
  python main.py --model huggyllama/llama-7b --method abq --wbits 2 --abits 8 --lwc --let --solver quantease --eval_ppl

  # codes moved by gradients once they are solved, with the quantized activations in the loop
  python main.py --model meta-llama/Llama-2-7b-hf --wbits 4 --abits 4 --method flatquant --lwc --let --tune block --eval_ppl

  # evaluate what another run learned
  python main.py --model facebook/opt-125m --wbits 4 --lwc --let --epochs 0 --resume ../log/RUN --eval_ppl

Exit codes: 0 done, 2 bad arguments or unusable input, 1 a failure after work began, 130 interrupted.
"""


def parser() -> argparse.ArgumentParser:
    """Flags of the originals keep name, meaning and default."""
    return build_parser(LEARNER, __doc__, EXAMPLES)


def resolve(args: argparse.Namespace) -> None:
    """Defaults that depend on other flags."""
    implied = "affinequant" if args.use_matrix or args.use_ln_matrix else "omniquant"
    args.method = args.method or implied
    if args.abits is None:
        args.abits = 4 if args.method == "affinequant" else 16
    args.kvbits = args.abits if args.kvbits is None else args.kvbits
    args.methods = [args.method]
    args.left_out, args.seams = split_words(args.without), split_words(args.let_seams)
    args.corpora = split_words(args.eval_datasets) if args.eval_ppl else ()


def prepare(args: argparse.Namespace, here: bool = True) -> None:
    """What flags imply. Raises InputError for all that is wrong with them. here: model and device must be on this machine."""
    resolve(args)
    if lines := mistakes(args) + (place_mistakes(args) if here else []):
        raise InputError(*lines)


def mistakes(args: argparse.Namespace) -> list[str]:
    """Everything that can be said to be wrong before a file is opened."""
    lines = flag_mistakes(args, LEARNER) + [line for broken, line in learner_rules(args) if broken]
    return lines + method_mistakes(args, [args.solver]) + source_mistakes(args.corpora, args.calib_dataset)


def learning_of(args: argparse.Namespace) -> Any:
    """What is learned, by the method's recipe; None if nothing is."""
    from quant.learn import recipes
    from quant.learn.config import Learning, TransformSpec

    if not (args.lwc or args.let):
        return None
    transform = TransformSpec(**values_of(args, LEARNER, "transform"))
    learning = Learning(transform=transform, **values_of(args, LEARNER, "learning"))
    row = recipes()[args.method](learning, args.wbits, min(args.abits, args.kvbits))
    return replace(row, **dict.fromkeys(args.left_out, False))


def requests_of(args: argparse.Namespace) -> list[Any]:
    """The request of these flags."""
    from quant.blocks.fake_quant import ActSpec
    from quant.learn.abq import balanced_levels
    from quant.learn.config import Rotation
    from quant.run.choice import in_packed_format, with_groups, with_scope
    from quant.run.request import Request

    learning = learning_of(args)
    balance = args.bit_balance if args.method == "abq" or args.bit_balance == "on" else "off"
    given = values_of(args, LEARNER) | {
        "learner": args.method if learning is not None else None,
        "symmetric": args.symmetric or args.disable_zero_point,
        "levels": balanced_levels(args.wbits, balance),
        "learning": learning,
        "act": ActSpec(**values_of(args, LEARNER, "act")),
        "rotation": Rotation(**values_of(args, LEARNER, "rotation")) if args.rotate else None,
        "options": options_of(args, args.solver),
        "tuning": tuning_of(args, LEARNER, args.method),
        "eval_datasets": args.corpora,
        "dtype": dtype_of(args),
    }
    request = with_groups(Request.of(**given))
    request = with_scope(request) if args.tune == AUTO_SCOPE else request
    packs = args.real_quant and args.format is None and args.save_dir is not None
    return [in_packed_format(request) if packs else request]


def dtype_of(args: argparse.Namespace) -> str:
    """The arithmetic's dtype; on a GPU bfloat16, or float32 with --deactive_amp, unless --dtype says otherwise."""
    from quant.core import env

    if args.dtype == "auto" and env.pick_device(args.device).type == "cuda":
        return "float32" if args.deactive_amp else "bfloat16"
    dtype: str = args.dtype
    return dtype


def request_from(words: list[str]) -> Any:
    """The request of a command given as words, for sweeps. Raises InputError for what is wrong with it."""
    args = parser().parse_args(words)
    prepare(args, here=False)
    return requests_of(args)[0]


def notes_on(args: argparse.Namespace) -> list[str]:
    """What flags do not do that a person may expect of them."""
    notes = (
        (args.net, "--net is not needed: the family comes from the model's configuration"),
        (
            args.multigpu and ranks.size() == 1,
            "--multigpu: one process was started; torchrun --nproc-per-node N starts N",
        ),
        (not args.eval_ppl and not args.tasks, "no evaluation: give --eval_ppl for perplexity, --tasks for accuracy"),
    )
    return [note for given, note in notes if given]


def main() -> None:
    """Parse, check, run."""
    if (args := parse(parser())) is None:
        return
    prepare(args)
    from quant.cli.running import carry_out

    bits = f"W{args.wbits}A{args.abits}" + (f"KV{args.kvbits}" if args.kvbits != args.abits else "")
    requests = requests_of(args)
    carry_out(args, requests, bits, notes_on(args) + choices_made(args, requests))


if __name__ == "__main__":
    sys.exit(exit_code_of(main, shared=True))
