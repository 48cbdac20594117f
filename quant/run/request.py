"""One run as it was asked for: by flags, or as a manifest keeps it; and the places that it reads and writes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from data.corpora import is_file
from data.written import text_of
from quant.blocks.fake_quant import ActSpec
from quant.core.errors import InputError, first_line
from quant.core.files import resolve_links
from quant.core.places import AROUND, INSIDE, Place
from quant.learn.config import Learning, Rotation, TransformSpec
from quant.run.config import Output, RunConfig, SessionConfig
from quant.run.directory import Record
from quant.run.resume import method_that_learned
from quant.run.stored import Allowed, allowed_entries
from quant.tune.config import Tuning

PARTS = {"session": SessionConfig, "run": RunConfig, "output": Output}
VALUES = {
    "act": ActSpec, "tuning": Tuning, "learning": Learning, "transform": TransformSpec, "rotation": Rotation,
}  # fields with own fields  # fmt: skip
PLAIN: dict[str, Any] = {
    "str": str, "int": int, "float": (int, float), "bool": bool, "tuple": list, "Path": str, "Mapping": dict,
}  # fmt: skip
DERIVED = (
    "biases",
    "evaluates",
    "rotated",
    "rotated_for",
    "learner",
)  # fields that are not kept: they follow from others


@dataclass(frozen=True)
class Request:
    """What is opened for a run, what decides its codes, and where its results go."""

    session: SessionConfig
    run: RunConfig = field(default_factory=RunConfig)
    output: Output = field(default_factory=Output)

    @classmethod
    def of(cls, model: str, **values: Any) -> Request:
        """A request of the fields of all three parts, by name. What the run asks of the session follows from the run.
        Raises TypeError for a name that is no field."""
        return cls(SessionConfig(model)).but(**values)

    def but(self, **changes: Any) -> Request:
        """The request with other values of fields of its parts."""
        parts = {}
        for part, kind in PARTS.items():
            own = {f.name: changes.pop(f.name) for f in fields(kind) if f.name in changes}
            parts[part] = replace(getattr(self, part), **own)
        if changes:
            raise TypeError(f"no field of a request: {', '.join(changes)}")
        run = parts["run"]
        derived = {
            "biases": run.shifts,
            "evaluates": not run.quantizes,
            "rotated": run.rotation,
            "rotated_for": run.of_rotation,
        }
        return Request(replace(parts["session"], **derived), run, parts["output"])

    def to_json(self) -> Record:
        """The request as JSON can hold it, one flat object; `from_json` takes it back."""
        entries = {name: value for part in PARTS for name, value in asdict(getattr(self, part)).items()}
        plain = {k: str(v) if isinstance(v, Path) else v for k, v in entries.items() if k not in DERIVED}
        as_json: Record = json.loads(json.dumps(plain | {"method": self.run.method}))
        return as_json

    @classmethod
    def from_json(cls, stored: Mapping[str, Any], origin: str, allowed: Allowed) -> Request:
        """A request that was kept by `to_json`, as far as it may count: see `allowed_entries`; places to write are this version's
        defaults. Raises InputError where an entry is unknown."""
        entries = allowed_entries(stored, origin, allowed)
        kinds = {f.name: str(f.type) for kind in PARTS.values() for f in fields(kind) if f.name not in DERIVED}
        unknown = sorted(set(entries) - set(kinds) - {"method"})
        if unknown:
            raise InputError(f"the run was made by another version: unknown entry {unknown[0]!r}")
        try:
            method = entries.pop("method", None)
            solver = entries.get("solver") or method or RunConfig.solver  # earlier versions kept none for its own name
            entries["solver"] = solver
            values = {name: _as_field(kinds[name], name, value) for name, value in entries.items()}
            learns = values.get("learning") is not None
            learner = method_that_learned({"method": _as_field("str", "method", method), "solver": solver})
            return cls.of(**values, learner=learner if learns else None)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{origin} is not a request of this version ({first_line(error)})") from error


def _as_field(kind: str, name: str, value: Any) -> Any:
    """A stored value as a field has it, and those of its own fields. Raises TypeError or KeyError for one of another type."""
    if value is None and kind.endswith("None"):
        return None
    if name in VALUES:
        kinds = {f.name: str(f.type) for f in fields(VALUES[name])}
        return VALUES[name](**{key: _as_field(kinds[key], key, entry) for key, entry in value.items()})
    wanted = next(own for start, own in PLAIN.items() if kind.startswith(start))
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        raise TypeError(f"{name} is {value!r}")
    given: Any = value
    return tuple(given) if wanted is list else Path(given) if kind.startswith("Path") else given


def places_read(session: SessionConfig, runs: Iterable[RunConfig] = ()) -> list[Place]:
    """The paths that a session and its runs read: what the hub or the project holds under a name has none."""
    model, runs = Path(session.model), tuple(runs)
    places = [Place("--model", model)] if model.exists() else []
    links = [file for file in model.iterdir() if file.is_symlink()] if model.is_dir() else []
    places += [Place("a file of --model,", target) for target in map(resolve_links, links)]
    calibration = [text for run in runs if not session.evaluates and (text := text_of(run.dataset)) is not None]
    data = (*calibration, *session.eval_datasets)
    places += [Place("the data file", Path(source)) for source in data if is_file(source)]
    named = [(("--act-scales", r.act_scales), ("--act-shifts", r.act_shifts), ("--resume", r.resume)) for r in runs]
    places += [Place(flag, path) for one in named for flag, path in one if path is not None]
    roots = (("--data-dir", session.data_dir), ("--task-path", session.task_path))
    places += [Place(flag, path, root=True) for flag, path in roots if path is not None]
    return list(dict.fromkeys(places))


def places_written(output: Output, run_dir: Path | None = None) -> list[Place]:
    """The paths that a run writes to, besides the cache. run_dir: the run directory where no flag names it; it may lie
    inside what is read."""
    places = [Place("--run-dir", output.run_dir, adds=True)] if output.run_dir is not None else []
    if output.run_dir is None and run_dir is not None:
        places.append(Place("the run directory", run_dir, frozenset((INSIDE,)), adds=True))
    places += [Place("--imatrix", output.imatrix)] if output.imatrix is not None else []
    return places + ([Place("--save", output.save)] if output.save is not None else [])


def cache_place(path: Path) -> Place:
    """The cache as a place that is written: its files have names of their own, so that it may lie almost anywhere."""
    return Place("--cache-dir", path, frozenset((INSIDE, AROUND)), adds=True)
