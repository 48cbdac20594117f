"""Configurations, runs and weights that several tests ask for."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.func import functional_call

from models.load import LazyModel
from quant.blocks.fake_quant import ActSpec
from quant.blocks.instrument import instrument
from quant.blocks.stream import BlockStream
from quant.blocks.weights import BlockWeights
from quant.cli.errors import exit_code_of
from quant.core.grid import fit_grid
from quant.core.types import QuantizedWeight, QuantSpec
from quant.learn import recipes
from quant.learn.config import Learning, TransformSpec
from quant.run.job import Progress, silent
from quant.run.request import Request
from quant.run.session import Session, open_session

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "models" / "demo"
CPU = torch.device("cpu")
SEQLEN = 32


def config_for(model: Path, text: Path, tmp_path: Path, **options) -> Request:
    """A small run of a model on a text."""
    small = {
        "model": str(model),
        "dataset": str(text),
        "eval_datasets": (str(text),),
        "nsamples": 12,
        "seqlen": SEQLEN,
        "limit": 12,
        "cache_dir": tmp_path / "cache",
        "run_dir": tmp_path / "run",
        "wbits": 3,
        "options": {"num_iter": 4},
    }
    return Request.of(**(small | options))


def perform(request: Request, progress: Progress = silent) -> dict[str, Any]:
    """What results.json holds of a request, carried out in a session of its own."""
    return open_session(request).run(request.run, request.output, progress)


def perform_all(requests: Sequence[Request]) -> list[dict[str, Any]]:
    """The same of several requests, in one session."""
    return open_session(*requests).run_all([(request.run, request.output) for request in requests])


def replace(value: Any, **changes: Any) -> Any:
    """`dataclasses.replace`, which takes the fields of all parts of a request by name."""
    return value.but(**changes) if isinstance(value, Request) else dataclasses.replace(value, **changes)


def learned_config(model: Path, text: Path, tmp_path: Path, **options) -> Request:
    """A small run that learns clips and transforms, then rounds to nearest."""
    learned = {"nsamples": 6, "limit": 6, "learner": "omniquant", "solver": "rtn", "options": {}}
    learned["learning"] = asked(epochs=2, batch=2, lwc_lr=0.05)
    return config_for(model, text, tmp_path, **(learned | options))


def demo_config(tmp_path: Path, model: Path, **more) -> Request:
    """A small run of a demo model: rounding to four bits in groups of 32."""
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog again and again " * 400)
    return Request.of(
        model=str(model), dataset=str(text), nsamples=2, seqlen=32, solver="rtn", wbits=4, group_size=32,
        eval_datasets=(str(text),), limit=4, cache_dir=tmp_path / "cache", run_dir=tmp_path / "run", **more,
    )  # fmt: skip


def in_float32(family: str, target: Path) -> Path:
    """A copy of a demo model with its weights in float32."""
    shutil.copytree(DEMO / family, target)
    weights = {name: tensor.float() for name, tensor in load_file(target / "model.safetensors").items()}
    save_file(weights, target / "model.safetensors", {"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    return target


def perplexity(path: Path, tmp_path: Path) -> tuple[float, float]:
    """Perplexity of a checkpoint on the text of `demo_config`, and its bits per weight."""
    config = replace(demo_config(tmp_path, path), wbits=16, run_dir=tmp_path / f"eval-{Path(path).name}")
    results = perform(config)
    return results["perplexity"]["text"]["fp"], results["bits_per_weight"]


def direct_perplexity(model: torch.nn.Module, windows: Tensor) -> float:
    """The published loop: loss of each window by transformers itself, weighted equally."""
    with torch.no_grad():
        losses = [model(window[None], labels=window[None]).loss.double() for window in windows]
    return float(torch.stack(losses).mean().exp())


def reference_logits(session: Session, ids: Tensor) -> Tensor:
    """Our logits of some windows, in float32."""
    outside = session.model.outside_weights(CPU)
    stream = BlockStream(session.model, ids, device=CPU, batch=4).capture(outside)
    for index in range(len(session.model.blocks)):
        stream.run(index, BlockWeights.read(session.model, index, CPU), advance=True, act=session.act)
    with torch.inference_mode():
        return stream.logits(slice(0, len(ids)), outside).float()


def asked(method="omniquant", wbits=3, abits=16, *, lwc=True, let=True, **options) -> Learning:
    """Learning as main.py asks a recipe for it."""
    spec = TransformSpec(
        let=let, **{k: options.pop(k) for k in list(options) if k in TransformSpec.__dataclass_fields__}
    )
    return recipes()[method](Learning(transform=spec, clip=lwc, **options), wbits, abits)


def random_weight(n_out: int, n_in: int, spec: QuantSpec, scale: float = 0.05, seed: int = 0) -> QuantizedWeight:
    """A Gaussian weight, rounded to nearest."""
    weight = torch.randn(n_out, n_in, generator=torch.Generator().manual_seed(seed)) * scale
    grid = fit_grid(weight, spec)
    return QuantizedWeight(grid.quantize(weight), grid, spec)


def called(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *words: object
) -> tuple[int, str, str]:
    """A command in this process: exit code, standard output, standard error."""
    capsys.readouterr()  # what fixtures printed
    monkeypatch.setattr("sys.argv", ["x.py", *map(str, words)])
    try:
        code = exit_code_of(module.main)
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def same_codes(first: QuantizedWeight, second: QuantizedWeight) -> bool:
    """Whether two answers hold the same codes, scales, zero points, groups and outliers on the same grid. How the range
    of a grid was found is not told by a checkpoint, and not compared; a grid is its codes and groups, whatever named them.
    """
    grids = [(w.spec.bits, w.spec.levels, w.spec.group_size, w.spec.symmetric, w.grid.qmax) for w in (first, second)]
    pairs = [(first.codes, second.codes), (first.grid.scale, second.grid.scale), (first.grid.zero, second.grid.zero),
             (first.grid.g_idx, second.grid.g_idx)]  # fmt: skip
    minima = (first.grid.minimum, second.grid.minimum)
    if (minima[0] is None) != (minima[1] is None):
        return False
    if minima[0] is not None and minima[1] is not None:
        pairs.append((minima[0], minima[1]))
    if grids[0] != grids[1] or (first.outliers is None) != (second.outliers is None):
        return False
    if first.outliers is not None and second.outliers is not None:
        pairs += [(first.outliers.index, second.outliers.index), (first.outliers.value, second.outliers.value)]
    return all(a.shape == b.shape and bool((a == b).all()) for a, b in pairs)


def streamed_logits(model: LazyModel, ids: Tensor) -> Tensor:
    """Logits [n, T, vocabulary] of windows as every run reads a model: outside weights, then block by block."""
    outside = model.outside_weights(CPU)
    stream = BlockStream(model, ids, device=CPU, batch=len(ids)).capture(outside)
    for index in range(len(model.blocks)):
        stream.run(index, BlockWeights.read(model, index, CPU), advance=True)
    return stream.logits(slice(0, len(ids)), outside)


def whole_model_logits(
    model: LazyModel, weights: BlockWeights, ids: torch.Tensor, act: ActSpec | None = None
) -> Tensor:
    """Logits float32 [batch, T, vocabulary] as the library's own model gives them. weights: of all blocks, by
    ``<index>.<name>``."""
    with instrument(model.blocks, weights, act) as own:
        named = {f"{model.family.blocks}.{name}": tensor for name, tensor in own.items()}
        given = {**model.outside_weights(CPU), **named}
        return functional_call(model.module, given, (ids,), {"use_cache": False}).logits.float()


def long(*values):
    """Values of a parameter that are left to `make test-all`."""
    return [pytest.param(value, marks=pytest.mark.long) for value in values]
