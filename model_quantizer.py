"""Quantize the weights of a language model after training, block by block, and measure what it cost.

The command line of QuantEase's users. Every finished block is on disk: the same command continues a run that
was interrupted, with identical bits.
"""

from __future__ import annotations

import argparse
import math
import sys
from typing import Any

from quant.cli.arguments import build_parser, flag_mistakes, parse, place_mistakes, source_mistakes, values_of
from quant.cli.errors import exit_code_of
from quant.cli.flags import QUANTIZER, split_words
from quant.cli.options import choices_made, method_mistakes, options_of, solver_of, tuning_of, unused_options
from quant.cli.presets import apply_grid, apply_preset
from quant.cli.rules import quantizer_rules
from quant.core.errors import InputError
from quant.core.names import AUTO_SCOPE, FULL_BITS

EXAMPLES = """examples:
  # the embedded demo: no network, a minute on a laptop; one table compares the methods
  python model_quantizer.py --model models/demo/llama --dataset demo --eval-datasets demo \\
      --wbits 3 --quantization-method rtn,gptq,quantease --nsamples 64 --seqlen 256

  # as in the QuantEase paper
  python model_quantizer.py --model facebook/opt-1.3b --dataset c4 --wbits 3 --num-iter 30 \\
      --quantization-method quantease --nsamples 128 --true-sequential --save out

  # 4 bits, groups of 128, on your own text, no network
  python model_quantizer.py --model ./my-llama --dataset notes.txt --eval-datasets notes.txt,more.jsonl \\
      --wbits 4 --group-size 128 --quantization-method gptq --act-order

  # a checkpoint for vLLM or GPTQModel; refused at once if they could not load it
  python model_quantizer.py --model ./my-llama --dataset notes.txt --wbits 4 --group-size 128 --sym \\
      --quantization-method gptq_quantease --save my-llama-w4 --format gptq --target vllm

  # what would it take? nothing is run
  python model_quantizer.py --model meta-llama/Llama-2-7b-hf --wbits 3 --dry-run

Exit codes: 0 done, 2 bad arguments or unusable input, 1 a failure after work began, 130 interrupted.
"""


def parser() -> argparse.ArgumentParser:
    """Flags of the original keep name, meaning and default (except that calibration on C4 uses its train split)."""
    return build_parser(QUANTIZER, __doc__, EXAMPLES)


def prepare(args: argparse.Namespace, here: bool = True) -> None:
    """What flags imply. Raises InputError for everything that is wrong with them. here: the run is to be on this machine,
    which must have the model and the device."""
    if args.avg_bits is not None:
        if args.wbits != FULL_BITS:
            raise InputError(f"--avg-bits {args.avg_bits:g} chooses the widths: drop --wbits {args.wbits}")
        args.wbits = min(8, max(2, int(args.avg_bits))) if math.isfinite(args.avg_bits) else 2
    apply_grid(args, parser())
    if args.wbits != FULL_BITS:
        apply_preset(args, parser())
    args.methods = list(split_words(args.quantization_method)) if args.wbits != FULL_BITS else ["quantease"]
    args.corpora = split_words(args.eval_datasets)
    if lines := mistakes(args) + (place_mistakes(args) if here else []):
        raise InputError(*lines)


def mistakes(args: argparse.Namespace) -> list[str]:
    """Everything that can be said to be wrong before a file is opened."""
    lines = flag_mistakes(args, QUANTIZER) + [line for broken, line in quantizer_rules(args) if broken]
    lines += method_mistakes(args, args.methods, "--quantization-method: ")
    return lines + source_mistakes(args.corpora, args.dataset if args.wbits != FULL_BITS else None)


def requests_of(args: argparse.Namespace) -> list[Any]:
    """One request for each method."""
    from quant.blocks.fake_quant import ActSpec
    from quant.learn.config import Rotation
    from quant.run.choice import in_packed_format, with_groups, with_own_text, with_residual_where_added, with_scope
    from quant.run.request import Request

    several, given = len(args.methods) > 1, values_of(args, QUANTIZER)
    requests = []
    for method in args.methods:
        own = {
            "solver": solver_of(method),
            "options": options_of(args, method),
            "tuning": tuning_of(args, QUANTIZER, method),
        }
        own["act"] = ActSpec.on(args.act_grid) if args.act_grid else ActSpec()
        own["rotation"] = Rotation(**values_of(args, QUANTIZER, "rotation")) if args.rotate else None
        own |= {name: given[name] / method for name in ("run_dir", "save") if given[name] and several}
        request = with_groups(Request.of(**(given | own)))
        if args.preset and request.run.residual_correction:
            request = with_residual_where_added(request)
        request = with_scope(request) if args.tune == AUTO_SCOPE else request
        requests.append(with_own_text(request) if args.preset == "best" else request)
    packs = (
        args.real_quant and args.format is None and args.wbits != FULL_BITS and (args.save is not None or args.dry_run)
    )
    return [in_packed_format(request) for request in requests] if packs else requests


def _bits(args: argparse.Namespace) -> str:
    """Of the title of a table."""
    if args.avg_bits is not None:
        return f"{args.avg_bits:g} bits on average"
    return f"{args.wbits} bits" if args.wbits != FULL_BITS else "base model"


def request_from(words: list[str]) -> Any:
    """The request of a command of one method given as words, for sweeps. Raises InputError for what is wrong with it."""
    args = parser().parse_args(words)
    prepare(args, here=False)
    if len(args.methods) != 1:
        raise InputError("--quantization-method: a row of a sweep has one method")
    return requests_of(args)[0]


def main() -> None:
    """Parse, check, run."""
    if (args := parse(parser())) is None:
        return
    prepare(args)
    from quant.cli.running import carry_out, compare_layers

    requests = requests_of(args)
    notes = unused_options(args, parser(), args.methods) if args.wbits != FULL_BITS else []
    notes += choices_made(args, requests)
    if args.compare_layers and not args.dry_run:
        compare_layers(args, requests, notes)
        return
    carry_out(args, requests, _bits(args), notes)


if __name__ == "__main__":
    sys.exit(exit_code_of(main, shared=True))
