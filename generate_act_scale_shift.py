"""Measure the activations of every linear: largest |x| and moving middle of each channel, for main.py.

Blocks stream through the device one at a time. Two safetensors files are written, one entry a linear under its full
module path: <model>.safetensors under --scales-output-path and under --shifts-output-path. main.py measures the same
by itself where it is not given them (--act-scales, --act-shifts).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

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
    from quant.cli.flags import SOURCES, add_machine_flags
    from quant.cli.parser import Parser

    p = Parser(
        prog="generate_act_scale_shift.py",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--model", metavar="ID|DIR", help="hub id or local directory")
    p.add_argument("--scales-output-path", type=Path, default=Path("./act_scales/"), metavar="DIR")
    p.add_argument("--shifts-output-path", type=Path, default=Path("./act_shifts/"), metavar="DIR")
    p.add_argument("--calib_dataset", "--dataset", default="wikitext2", help=f"{SOURCES} (default: wikitext2)")
    p.add_argument("--num-samples", "--nsamples", type=int, default=128, help="windows (default: 128)")
    p.add_argument("--seq-len", type=int, default=2048, help="tokens of a window (default: 2048)")
    p.add_argument("--seed", type=int, default=2, help="of the sampling (default: 2)")
    p.add_argument("--data-dir", type=Path, metavar="DIR", help="local copies laid out as on the hub")
    p.add_argument("--log-level", default="warning", choices=("debug", "info", "warning", "error"))
    add_machine_flags(p, Path("cache"))
    return p


def measure(session: Any, progress: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Largest |x| and shift of every linear's input channels, float32 [in] by full module path."""
    from quant.learn.parametrization import InputRange

    model, stream = session.model, session.calibration_stream()
    scales, shifts = {}, {}
    for index in range(len(model.blocks)):
        weights = model.block_weights(index, session.device)
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
    from data.corpora import CALIBRATION, check_source
    from quant.cli.errors import set_logging
    from quant.core.errors import InputError

    args = parser().parse_args()
    set_logging(args.log_level)
    if not args.model:
        raise InputError("--model is missing: a hub id or a local directory (models/demo/opt is one)")
    for name, least in (("num_samples", 1), ("seq_len", 2), ("calib_batch", 1)):
        if getattr(args, name) < least:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: use {least} or more")
    check_source(args.calib_dataset, CALIBRATION)
    measure_and_write(args)


def measure_and_write(args: argparse.Namespace) -> None:
    """Measure all blocks; write both files."""
    from safetensors.torch import save

    from quant.cli.console import ProgressBars
    from quant.cli.console import console as make_console
    from quant.core.errors import InputError
    from quant.core.files import check_owned, write_owned
    from quant.core.places import Place, check_places
    from quant.run.config import RunConfig, places_read
    from quant.run.session import Session

    config = RunConfig(
        model=args.model,
        dataset=args.calib_dataset,
        nsamples=args.num_samples,
        seqlen=args.seq_len,
        seed=args.seed,
        wbits=8,  # anything below 16: the calibration tokens are wanted
        eval_datasets=(),
        data_dir=args.data_dir,
        cache_dir=args.cache_dir,
        device=args.device,
        dtype=args.dtype,
        activation_store=args.activation_store,
        calib_batch=args.calib_batch,
        trust_remote_code=args.trust_remote_code,
        deterministic=args.deterministic,
    )
    name = Path(args.model).resolve().name
    outputs = [Place("--scales-output-path", args.scales_output_path / f"{name}.safetensors"),
               Place("--shifts-output-path", args.shifts_output_path / f"{name}.safetensors")]  # fmt: skip
    check_places(places_read(config), [*outputs, Place("--cache-dir", args.cache_dir)])
    for output in outputs:
        check_owned(output.path)
    try:
        session, console = Session(config), make_console()
    except InputError as error:  # a run calls them otherwise
        lines = (line.replace("--seqlen", "--seq-len").replace("--nsamples", "--num-samples") for line in error.args)
        raise InputError(*lines) from error
    with ProgressBars(console) as bars:
        scales, shifts = measure(session, bars.for_method("activations"))
    metadata = {"format": "pt", "model_sha256": session.model_sha256, "calibration": session.calibration(config).sha256}
    for output, vectors in zip(outputs, (scales, shifts), strict=True):
        write_owned(output.path.parent, {output.path.name: save(vectors, metadata)})
        console.print(f"{output.path}: {len(vectors)} linears", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    from quant.cli.errors import exit_code_of

    sys.exit(exit_code_of(main))
