"""One job on 8 and 64 H200: bytes on the wire and seconds a block, by the formulas of quant/run/wire.py and quant/run/plan.py.

    python -m benchmarks.sharing [--out FILE]

GPTQ with 4 bits, groups of 128, 128 windows of 2048 tokens. Nothing is run and nothing here is measured: rates are half of what
the maker says of an H200 (989 TFLOP/s in bfloat16, 67 in float32), links are those of quant/run/wire.py. A solver is taken
for one flop for every out x in x in.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from benchmarks.measuring import about, flags, report
from models.load import load_config
from quant.run.plan import estimate
from quant.run.rates import Rates, SolverCost
from quant.run.request import Request
from quant.run.shapes import shapes_of
from quant.run.wire import shared_plan

MODELS = {"LLaMA-3-405B": "llama-3-405b", "DeepSeek-V3": "deepseek-v3", "Qwen3-235B-A22B": "qwen3-235b-a22b"}
RATES = Rates(989e12 / 2, 67e12 / 2)  # flop/s of products in bfloat16 and in float32


def rows() -> Iterator[dict[str, str]]:
    """A row for a model and a number of processes."""
    for name, directory in MODELS.items():
        config, _ = load_config(f"benchmarks/configs/{directory}", Path("unused"), with_weights=False)
        shapes = shapes_of(config)
        request = Request.of(
            "x", wbits=4, group_size=128, solver="gptq", nsamples=128, seqlen=2048, eval_datasets=("wikitext2",)
        )
        plan = estimate(request, shapes, 2, RATES, SolverCost(square=1 / RATES.float32))
        for processes in (1, 8, 64):
            shared = shared_plan(request.run, shapes, plan, processes, RATES.float32)
            sizes = {
                f"GB sent a block: {what}": f"{shared[f'bytes sent a block: {what}'] / 1e9:.2f}"
                for what in ("sums", "codes")
            }
            seconds = {
                f"s a block: {what}": f"{shared[f'seconds a block: {what}']:.2f}"
                for what in ("work", "factors", "wire")
            }
            yield {
                "model": name,
                "processes": str(processes),
                **sizes,
                **seconds,
                "hours in all": f"{shared['seconds: total'] / 3600:.2f}",
            }


def main() -> None:
    """Print the table."""
    args = flags(__doc__).parse_args()
    report(["# One job on many devices", "", about(__doc__), ""], rows(), args.out)


if __name__ == "__main__":
    main()
