"""What --dry-run prints."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rich.table import Table

from models.load import load_config
from quant.cli.console import Console
from quant.cli.tables import loadability_table
from quant.core import env
from quant.core.places import check_places
from quant.export.runtimes import loadability
from quant.run.calibration import shortage
from quant.run.config import DEFAULT_MAX_SEQLEN
from quant.run.plan import check_contents, estimate, with_process
from quant.run.rates import machine_rates, solver_cost
from quant.run.request import Request, cache_place, places_read, places_written
from quant.run.shapes import shapes_of
from quant.run.sharing import check_sharing
from quant.run.wire import shared_plan


def show_plan(requests: Sequence[Request], console: Console, processes: int | None = None) -> None:
    """Print the estimates of every method side by side, and those of so many processes. Raises InputError for what a run would
    refuse."""
    for request in requests:
        check_sharing(request.run, processes or 1)
    first = requests[0].session
    places = dict.fromkeys(place for request in requests for place in places_written(request.output))
    check_places(places_read(first, [request.run for request in requests]), [*places, cache_place(first.cache_dir)])
    device = env.pick_device(first.device)
    model_config, path = load_config(
        first.model, first.cache_dir, first.trust_remote_code, with_weights=False, family=first.family
    )
    dtype = env.pick_dtype(first.dtype, device) or getattr(model_config, "dtype", None) or torch.float16
    shapes = shapes_of(model_config, first.trust_remote_code)
    contents = check_contents(requests, shapes, model_config)
    rates = machine_rates(device, dtype)
    quantizing = [request for request in requests if request.run.quantizes]
    plans = [estimate(r, shapes, dtype.itemsize, rates, solver_cost(device, r.run, rates)) for r in quantizing]
    if device.type == "cpu":
        stored = getattr(model_config, "dtype", None) or torch.float16
        resident = env.resident_bytes()  # behind the solvers' trials, which load what a run loads
        plans = [with_process(plan, shapes, stored.itemsize, resident) for plan in plans]
    parameters = shapes.parameters / 1e9
    console.print(
        f"{first.model}: {model_config.model_type}, {parameters:.2f}B parameters, {shapes.n_blocks} blocks, "
        f"{device} in {str(dtype).removeprefix('torch.')}; {requests[0].run.windows} calibration windows; nothing is run",
        soft_wrap=True,
    )
    table = Table("estimate", header_style="bold")
    for run in (request.run for request in requests):
        table.add_column(f"{run.method} w{run.width}", justify="right")
    for key in plans[0] if plans else ():
        table.add_row(key.replace(" bytes", ""), *(_readable(key, plan[key]) for plan in plans))
    console.print(table)
    if processes is not None:
        shared = [
            shared_plan(r.run, shapes, plan, processes, rates[1]) for r, plan in zip(quantizing, plans, strict=True)
        ]
        _show_shared(quantizing, shared, processes, console)
    linears = {name: (out, n_in) for name, out, n_in in shapes.linears}
    length = first.seqlen or min(shapes.max_length, DEFAULT_MAX_SEQLEN)
    for line in dict.fromkeys(shortage(request.run, linears, length) for request in quantizing):
        if line is not None:
            console.print(line, soft_wrap=True)
    told: list[object] = []
    for kind, content in contents:
        answer = (kind, loadability(kind, content))
        if answer not in told:  # several methods, one answer
            console.print(loadability_table(*answer))
            told.append(answer)
    console.print(f"configuration: {path}; formulas: quant/run/plan.py", soft_wrap=True)


def _show_shared(
    requests: Sequence[Request], plans: Sequence[dict[str, float]], processes: int, console: Console
) -> None:
    """The plans of several processes side by side."""
    table = Table(f"{processes} processes", header_style="bold")
    for run in (request.run for request in requests):
        table.add_column(f"{run.method} w{run.width}", justify="right")
    for key in plans[0] if plans else ():
        table.add_row(key, *(_readable(key, plan[key]) for plan in plans))
    console.print(table)
    console.print("links are as their makers say, not measured; formulas: quant/run/wire.py", soft_wrap=True)


def _readable(key: str, value: float) -> str:
    if "bytes" in key:
        return f"{value / 1e9:.3f} GB"
    if key.startswith("seconds"):
        return (
            f"{value:.1f} s" if value < 600 else f"{value / 60:.1f} min" if value < 36000 else f"{value / 3600:.1f} h"
        )
    return f"{value:.3f}"
