"""What a run is told, and whether a checkpoint format can hold what comes of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from data.corpora import is_file
from quant.blocks.fake_quant import ActSpec
from quant.core.errors import InputError, first_line
from quant.core.files import resolved
from quant.core.places import AROUND, INSIDE, Place
from quant.core.types import QuantSpec
from quant.export import DEQUANTIZED, refusal
from quant.export.formats import Content
from quant.export.runtimes import nearest, objections
from quant.learn.config import Learning, TransformSpec
from quant.run.directory import Record
from quant.run.stored import Allowed, taken
from quant.solvers import declaration_of, get_solver, solver_options

FULL_BITS = 16  # --wbits 16: nothing is quantized, the base model is evaluated
DEFAULT_MAX_SEQLEN = 2048


@dataclass(frozen=True)
class RunConfig:
    """Everything that a run is told. Paths are as given; ``options`` are the solver's own keyword options.

    method names the run; solver, where it is not the method itself, rounds. learning, act: see `Recipe`. resume: a run
    directory whose learned parameters are the start. format: of the checkpoint in ``save``; fallback: the format to
    save in where an answer turns out not to fit the first (None: that is a failure); target: the software that is to
    load it. packed: evaluate with packed weights, as they would be used. act_scales, act_shifts: files of
    generate_act_scale_shift.py. deterministic: on CUDA, only deterministic algorithms.
    """

    model: str
    dataset: str = "c4"
    seed: int = 0
    nsamples: int = 128
    seqlen: int | None = None
    method: str = "quantease"
    wbits: int = FULL_BITS
    group_size: int = -1
    symmetric: bool = False
    range: str = "minmax"
    levels: int | None = None
    solver: str | None = None
    learning: Learning | None = None
    act: ActSpec = field(default_factory=ActSpec)
    resume: Path | None = None
    act_scales: Path | None = None
    act_shifts: Path | None = None
    attn_implementation: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    true_sequential: bool = False
    num_layers: int = 1000
    eval_datasets: tuple[str, ...] = ("wikitext2", "ptb", "c4")
    limit: int | None = None
    full_precision_eval: bool = True
    tasks: tuple[str, ...] = ()
    task_path: Path | None = None
    num_fewshot: int | None = None
    data_dir: Path | None = None
    cache_dir: Path = Path.home() / ".cache" / "llm-quantizer"
    device: str = "auto"
    dtype: str = "auto"
    solver_precision: str = "highest"
    activation_store: str = "cpu"
    calib_batch: int = 4
    runs: Path = Path("runs")
    run_dir: Path | None = None
    save: Path | None = None
    format: str = DEQUANTIZED
    fallback: str | None = None
    target: str | None = None
    packed: bool = False
    overwrite: bool = False
    trust_remote_code: bool = False
    deterministic: bool = False

    def to_json(self) -> Record:
        """The configuration as JSON can hold it; `from_json` takes it back."""
        plain = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()}
        as_json: Record = json.loads(json.dumps(plain))
        return as_json

    @classmethod
    def from_json(cls, stored: Mapping[str, Any], origin: str, allowed: Allowed) -> RunConfig:
        """A configuration that was kept by `to_json`, as far as it may count: see `taken`; places to write are this
        version's defaults. Raises InputError where an entry is unknown."""
        entries = taken(stored, origin, allowed)
        kinds = {f.name: str(f.type) for f in fields(cls)}
        unknown = sorted(set(entries) - set(kinds))
        if unknown:
            raise InputError(f"the run was made by another version: unknown entry {unknown[0]!r}")
        try:
            values = {name: _as_field(kinds[name], name, value) for name, value in entries.items()}
            return cls(**values)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{origin} is not a request of this version ({first_line(error)})") from error

    @property
    def quantizes(self) -> bool:
        """False where only the base model is evaluated."""
        return self.wbits != FULL_BITS or self.act.active or self.learning is not None


def _as_field(kind: str, name: str, value: Any) -> Any:
    """A stored value as a field of RunConfig has it. Raises TypeError or KeyError for one of another type."""
    if name == "act":
        return ActSpec(**value)
    if name == "learning" and value is not None:
        transform = value["transform"]
        return Learning(**{**value, "transform": TransformSpec(**{**transform, "kinds": tuple(transform["kinds"])})})
    if value is None and kind.endswith("None"):
        return None
    plain: dict[str, type] = {"str": str, "int": int, "bool": bool, "tuple": list, "Path": str, "Mapping": dict}
    wanted = next(own for start, own in plain.items() if kind.startswith(start)) if name != "learning" else dict
    if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
        raise TypeError(f"{name} is {value!r}")
    given: Any = value
    return tuple(given) if wanted is list else Path(given) if kind.startswith("Path") else given


def stores_of(config: RunConfig) -> int:
    """How many sets of hidden states of the calibration windows a run holds at a time."""
    learning = config.learning
    return 1 if learning is None else 2 + learning.augmented + learning.attention


def places_read(config: RunConfig) -> list[Place]:
    """The paths that a run reads: what the hub or the project holds under a name has none."""
    model = Path(config.model)
    places = [Place("--model", model)] if model.is_dir() else []
    links = [file for file in model.iterdir() if file.is_symlink()] if model.is_dir() else []
    places += [Place("a file of --model,", target) for target in dict.fromkeys(map(resolved, links))]
    data = (*((config.dataset,) if config.quantizes else ()), *config.eval_datasets)
    places += [Place("the data file", Path(source)) for source in dict.fromkeys(data) if is_file(source)]
    named = (("--act-scales", config.act_scales), ("--act-shifts", config.act_shifts), ("--resume", config.resume))
    places += [Place(flag, path) for flag, path in named if path is not None]
    roots = (("--data-dir", config.data_dir), ("--task-path", config.task_path))
    return places + [Place(flag, path, root=True) for flag, path in roots if path is not None]


def places_written(config: RunConfig, run_dir: Path | None = None) -> list[Place]:
    """The paths that a run writes to. run_dir: the run directory where no flag names it; it may lie inside what is read."""
    places = [Place("--run-dir", config.run_dir, adds=True)] if config.run_dir is not None else []
    if config.run_dir is None and run_dir is not None:
        places.append(Place("the run directory", run_dir, frozenset((INSIDE,)), adds=True))
    places += [Place("--save", config.save)] if config.save is not None else []
    return [*places, cache_place(config.cache_dir)]


def cache_place(path: Path) -> Place:
    """The cache as a place that is written: its files have names of their own, so that it may lie almost anywhere."""
    return Place("--cache-dir", path, frozenset((INSIDE, AROUND)), adds=True)


def spec_of(config: RunConfig, shapes: Mapping[str, tuple[int, int]]) -> QuantSpec | None:
    """The grid asked for; None where weights stay. Raises InputError for none that there is, or that does not fit a linear."""
    if config.wbits == FULL_BITS:
        return None
    where = "the grid"
    try:
        spec = QuantSpec(config.wbits, config.group_size, config.symmetric, config.range, config.levels)
        for where, (_, n_in) in shapes.items():  # noqa: B007
            spec.n_groups(n_in)
    except ValueError as error:
        raise InputError(f"{where}: {error}") from error
    return spec


def content_of(config: RunConfig, shapes: Mapping[str, tuple[int, int]], n_blocks: int, model_type: str) -> Content:
    """What a checkpoint of a configuration has to hold, before work begins. Raises InputError where `spec_of` does."""
    options, name = config.options, config.solver or config.method
    ordered = options.get("static_groups") or options.get("group_aware") or config.group_size == -1
    return Content(
        spec_of(config, shapes),
        shapes,
        config.act,
        reordered=bool(options.get("act_order")) and not ordered,
        outliers=declaration_of(name).outliers(solver_options(get_solver(name)) | dict(options)),
        online=config.learning is not None and config.learning.transform.norm_matrix,
        whole=config.num_layers >= n_blocks,
        model_type=model_type,
        true_sequential=config.true_sequential,
        static_groups=bool(options.get("static_groups")),
    )


def check_format(config: RunConfig, content: Content) -> None:
    """Raise InputError where the format cannot hold the content, or the target does not take it in that format."""
    if against := refusal(config.format, content):
        raise InputError(f"format {config.format}: {against}")
    if config.target is not None and (reasons := objections(config.target, config.format, content)):
        near = nearest(config.target, config.format, content)
        hint = f"; it takes {near}" if near else ""
        raise InputError(f"--target {config.target}: with --format {config.format}, it {'; '.join(reasons)}{hint}")
