"""Measure the activations of every linear: largest |x| and moving middle of each channel, for main.py.

Blocks stream through the device one at a time. Two safetensors files are written, one entry a linear under its full
module path: <model>.safetensors under --scales-output-path and under --shifts-output-path. main.py measures the same
by itself where it is not given them (--act-scales, --act-shifts).
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from quant.cli.arguments import (
    build_parser,
    flag_mistakes,
    in_words_of,
    parse,
    place_mistakes,
    source_mistakes,
    values_of,
)
from quant.cli.errors import exit_code_of
from quant.cli.flags import SCALES
from quant.core.errors import InputError

EXAMPLES = """examples:
  # the embedded demo, no network
  python generate_act_scale_shift.py --model models/demo/opt --calib_dataset demo --seq-len 256 --num-samples 32
  python main.py --model models/demo/opt --wbits 4 --abits 4 --lwc --let --calib_dataset demo --seqlen 256 \\
      --act-scales act_scales/opt.safetensors --act-shifts act_shifts/opt.safetensors

  # as OmniQuant's users do
  python generate_act_scale_shift.py --model facebook/opt-6.7b
"""


def parser() -> argparse.ArgumentParser:
    """Flags of the original keep name, meaning and default."""
    return build_parser(SCALES, __doc__, EXAMPLES)


def measure(session: Any, run: Any, progress: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Largest |x| and shift of every linear's input channels, float32 [in] by full module path."""
    from quant.blocks.weights import BlockWeights
    from quant.learn.parametrization import InputRange

    model = session.model
    if model.family.experts:
        raise InputError(f"learned methods are not for mixtures of experts ({model.config.model_type})")
    stream = session.calibration_stream(run)
    scales, shifts = {}, {}
    for index in range(len(model.blocks)):
        weights = BlockWeights.read(model, index, session.device)
        spans = {group[0]: InputRange() for group in model.groups}
        stream.run(index, weights, observe={name: span.update for name, span in spans.items()}, advance=True)
        for group in model.groups:
            for name in group:
                key, span = f"{model.family.blocks}.{index}.{name}", spans[group[0]]
                scales[key], shifts[key] = span.absmax.cpu().clone(), span.shift.cpu().clone()
        progress("measure", index + 1, len(model.blocks), "")
    return scales, shifts


def main() -> None:
    """Parse, check, measure, write."""
    args = parse(parser())
    if lines := flag_mistakes(args, SCALES) + source_mistakes((), args.calib_dataset) + place_mistakes(args):
        raise InputError(*lines)
    measure_and_write(args)


def measure_and_write(args: argparse.Namespace) -> None:
    """Measure all blocks; write both files."""
    from safetensors.torch import save

    from quant.cli.console import ProgressBars
    from quant.cli.console import console as make_console
    from quant.core.files import check_owned, write_owned
    from quant.core.places import Place, check_places
    from quant.run.request import Request, cache_place, places_read
    from quant.run.session import Session

    request = Request.of(**values_of(args, SCALES), eval_datasets=())
    opened = replace(request.session, evaluates=False)  # calibration data are read, and the model is in full precision
    name = Path(args.model).resolve().name
    outputs = [Place("--scales-output-path", args.scales_output_path / f"{name}.safetensors"),
               Place("--shifts-output-path", args.shifts_output_path / f"{name}.safetensors")]  # fmt: skip
    check_places(places_read(opened, [request.run]), [*outputs, cache_place(args.cache_dir)])
    for output in outputs:
        check_owned(output.path)
    try:
        session, console = Session(opened), make_console()
        calibration = session.calibration(request.run)
    except InputError as error:
        raise InputError(*(in_words_of(SCALES, line) for line in error.args)) from error
    with ProgressBars(console) as bars:
        scales, shifts = measure(session, request.run, bars.for_method("activations"))
    metadata = {"format": "pt", "model_sha256": session.model_sha256, "calibration": calibration.sha256}
    for output, vectors in zip(outputs, (scales, shifts), strict=True):
        write_owned(output.path.parent, {output.path.name: save(vectors, metadata)})
        console.print(f"{output.path}: {len(vectors)} linears", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
