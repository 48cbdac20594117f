"""Zero-shot and few-shot tasks through lm-eval, which builds the requests and the metrics; this toolkit encodes the requests
and answers their log-likelihoods.

Requests are made once before any work, with answers of zero: whatever a task, its data or the tokenizer get wrong is said
then, and not behind hours of quantizing.
"""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data.tokens import check_ids, encode_request
from models.load import LazyModel
from quant.core.errors import InputError, first_line
from quant.evaluate.bootstrap import paired_interval
from quant.evaluate.passes import FULL
from quant.evaluate.scorer import Key, Score, Scorer
from quant.evaluate.task_files import check_no_code, with_paths

OWN_TASKS = Path(__file__).parents[2] / "data" / "tasks"
METRICS = ("acc", "acc_norm", "exact_match")  # in the order in which one is shown as the task's score


@dataclass(frozen=True)
class Tasks:
    """Tasks that exist and whose data are at hand. members: lm-eval's tasks by the name given (several for a group).
    trust_remote_code: they may run what they bring. keys: their requests by context and answer, encoded once."""

    members: Mapping[str, tuple[str, ...]]
    manager: Any
    num_fewshot: int | None
    limit: int | None
    trust_remote_code: bool = False
    keys: dict[tuple[str, str], Key] = field(default_factory=dict)


def _key(model: LazyModel, tokenizer: Any, context: str, answer: str, origin: str) -> Key:
    """A request as tokens, the oldest of which go where there are too many. Raises InputError where it has no score."""
    before, scored = encode_request(tokenizer, context, answer, origin)
    check_ids(before + scored, model.rows, origin)
    if len(scored) > model.max_length:
        raise InputError(f"{origin}: an answer has {len(scored)} tokens, the model takes at most {model.max_length}")
    return tuple((before + scored)[-(model.max_length + 1) :]), len(scored)


def _harness(model: LazyModel, tokenizer: Any, tasks: Tasks, answer: Callable[[Sequence[Key]], list[Score]]) -> Any:
    """lm-eval's view of a model that answers log-likelihoods."""
    from lm_eval.api.model import LM

    class StreamedLM(LM):
        """Answers log-likelihoods; cannot generate."""

        tokenizer_name = "model"

        def loglikelihood(self, requests: Any, **_: Any) -> list[Score]:
            for request in requests:
                if request.args not in tasks.keys:
                    context, scored = request.args
                    origin = f"--tasks {request.task_name}"
                    tasks.keys[request.args] = _key(model, tokenizer, context, scored, origin)
            return answer([tasks.keys[request.args] for request in requests])

        def loglikelihood_rolling(self, requests: Any, **_: Any) -> list[float]:
            raise InputError("tasks of rolling perplexity: give their text to --eval-datasets instead of --tasks")

        def generate_until(self, requests: Any, **_: Any) -> list[str]:
            raise InputError("tasks that generate text are not supported by --tasks; choose tasks with given answers")

    return StreamedLM()


def open_tasks(
    names: Sequence[str],
    path: Path | None,
    num_fewshot: int | None,
    limit: int | None,
    trust_remote_code: bool = False,
) -> Tasks:
    """Find the tasks (in the directory ``path`` first, then among lm-eval's own) and load their data.

    Raises InputError for unknown names, with the nearest ones, for data that cannot be reached, naming them, and for
    tasks in ``path`` that bring Python, unless trust_remote_code.
    """
    if path is not None and not trust_remote_code:
        seen: set[Path] = set()
        for file in sorted(path.rglob("*.y*ml")):
            check_no_code(file, seen)
    with sandbox(trust_remote_code, f"--tasks {','.join(names)}"):
        return replace(_open_tasks(names, path, num_fewshot, limit), trust_remote_code=trust_remote_code)


@contextmanager
def sandbox(trust_remote_code: bool = False, origin: str = "--tasks") -> Iterator[None]:
    """Let lm-eval fill in the templates of tasks without their reaching Python, load no metrics that are programs, and take
    the paths in a task's file from where it lies. Raises InputError for a template that reaches for Python, or is none."""
    import evaluate
    import lm_eval
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval import utils
    from lm_eval.tasks import _factory, _yaml_loader

    def refuse(name: str, *_: Any, **__: Any) -> Any:
        raise InputError(f"the metric {name!r} is a program; give --trust-remote-code if you trust the tasks")

    library, load_yaml = Path(lm_eval.__file__).resolve().parent, _yaml_loader.load_yaml

    def locate(path: Path, **options: Any) -> dict[str, Any]:
        config, file = load_yaml(path, **options), Path(path).expanduser().resolve()
        return config if library in file.parents else with_paths(config, file)

    boxed = SandboxedEnvironment(undefined=utils.env.undefined, keep_trailing_newline=utils.env.keep_trailing_newline)
    boxed.filters |= utils.env.filters
    with ExitStack() as stack:
        for module in (_factory, _yaml_loader):  # the second calls itself for what a file includes
            stack.enter_context(_replace(module, "load_yaml", locate))
        stack.enter_context(_replace(utils, "env", boxed))
        if not trust_remote_code:
            stack.enter_context(_replace(evaluate, "load", refuse))
        try:
            yield
        except SecurityError as error:
            raise InputError(f"{origin}: a task's template reaches for Python ({error}); it is not run") from error
        except (TemplateError, OverflowError) as error:
            raise InputError(f"{origin}: a task's template cannot be filled in ({first_line(error)})") from error


@contextmanager
def _replace(module: Any, name: str, value: Any) -> Iterator[None]:
    """A module's attribute replaced for the length of a `with`."""
    own = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, own)


def _open_tasks(names: Sequence[str], path: Path | None, num_fewshot: int | None, limit: int | None) -> Tasks:
    from jinja2.exceptions import TemplateError
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every argument that it passes on
    if path is not None and not path.is_dir():
        raise InputError(f"--task-path {path} is not a directory")
    paths = [str(OWN_TASKS), *([str(path)] if path else [])]
    try:
        manager = TaskManager(include_path=paths, include_defaults=False)
        if any(name not in manager.all_tasks for name in names):  # lm-eval's own 14 thousand take a while to index
            manager = TaskManager(include_path=paths)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise InputError(f"--task-path {path}: a file there is no task ({first_line(error)})") from error
    members = {}
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"did you mean {', '.join(near)}?" if near else "python -m lm_eval ls tasks shows all"
            raise InputError(f"--tasks: unknown task {name!r}; {hint}")
        try:
            members[name] = tuple(manager.load([name])["tasks"])
        except InputError as error:
            raise InputError(f"--tasks {name}: {error}") from error
        except (MemoryError, OverflowError, TemplateError):  # `sandbox` explains the latter two
            raise
        except Exception as error:  # of datasets, pyarrow, lm-eval and what they call
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise InputError(
                f"--tasks {name}: its data cannot be loaded ({reason[:160]}); download them on a machine with a network "
                "(HF_HOME/datasets holds them afterwards), or give --task-path a directory with a task over local files"
            ) from error
    return Tasks(members, manager, num_fewshot, limit)


@dataclass(frozen=True)
class TaskScore:
    """One task under one variant. values: float64 [items], the items' scores; chance: of guessing."""

    metric: str
    values: np.ndarray
    chance: float
    others: Mapping[str, float]

    @property
    def mean(self) -> float:
        """The task's score."""
        return float(self.values.mean())

    @property
    def stderr(self) -> float:
        """Standard error of the mean."""
        return float(self.values.std(ddof=1) / np.sqrt(len(self.values))) if len(self.values) > 1 else 0.0


def check_tasks(tasks: Tasks, tokenizer: Any, model: LazyModel) -> None:
    """Make all requests and score them as if every answer were equally likely. Raises InputError, which names the task, for
    whatever would end `run_tasks`."""
    lm = _harness(model, tokenizer, tasks, lambda keys: [(0.0, False)] * len(keys))
    for name in tasks.members:
        try:
            _scores_of(lm, replace(tasks, members={name: tasks.members[name]}))
        except (InputError, MemoryError):
            raise
        except Exception as error:  # of lm-eval, on a task that is not what it takes for one
            raise InputError(f"--tasks {name}: cannot be used ({type(error).__name__}: {first_line(error)})") from error


def run_tasks(scorer: Scorer, tokenizer: Any, tasks: Tasks) -> dict[str, dict[str, TaskScore]]:
    """Scores by task and variant."""
    scores: dict[str, dict[str, TaskScore]] = {name: {} for name in tasks.members}
    for variant in scorer.variants:
        lm = _harness(scorer.model, tokenizer, tasks, partial(scorer.scores, variant))
        for name, score in _scores_of(lm, tasks).items():
            scores[name][variant] = score
    return scores


def _scores_of(lm: Any, tasks: Tasks) -> dict[str, TaskScore]:
    """Scores by task of what lm-eval takes for a model."""
    import lm_eval

    with (
        sandbox(tasks.trust_remote_code, f"--tasks {','.join(tasks.members)}"),
        Path(os.devnull).open("w", encoding="utf-8") as nowhere,
        redirect_stderr(nowhere),
    ):  # its bars; logging goes on
        results = lm_eval.simple_evaluate(
            model=lm,
            tasks=list(tasks.members),
            task_manager=tasks.manager,
            num_fewshot=tasks.num_fewshot,
            limit=tasks.limit,
            bootstrap_iters=0,
            log_samples=True,
        )
    assert results is not None
    scores = {}
    for name, members in tasks.members.items():
        samples = [sample for member in members for sample in results["samples"][member]]
        samples = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
        scores[name] = _task_score(name, samples, results["results"].get(name, {}))
    return scores


def _task_score(name: str, samples: list[dict[str, Any]], results: Mapping[str, Any]) -> TaskScore:
    if not samples:
        raise InputError(f"--tasks {name}: has no items")
    metric = next((m for m in METRICS if m in samples[0]), None)
    if metric is None:
        raise InputError(f"--tasks {name}: has none of the metrics {', '.join(METRICS)}")
    values = np.array([float(sample[metric]) for sample in samples])
    choices = np.array([len(sample["arguments"]) for sample in samples])
    chance = float(np.where(choices > 1, 1 / choices, 0.0).mean())
    others = {
        key.split(",")[0]: float(value)
        for key, value in results.items()
        if isinstance(value, float) and "stderr" not in key and not key.startswith(f"{metric},")
    }
    return TaskScore(metric, values, chance, others)


def report(scores: Mapping[str, Mapping[str, TaskScore]], variant: str) -> dict[str, Any]:
    """The ``zero_shot`` entry of results.json for one variant (``fp`` for the base model)."""
    entries = {}
    for name, by_variant in scores.items():
        own, full = by_variant[variant], by_variant.get(FULL)
        paired = full is not None and variant != FULL
        entries[name] = {
            "metric": own.metric,
            "items": len(own.values),
            "fp": full.mean if full else None,
            "quantized": own.mean if variant != FULL else None,
            "stderr": own.stderr,
            "difference": own.mean - full.mean if paired and full else None,
            "difference_ci95": paired_interval(own.values, full.values) if paired and full else None,
            "chance": own.chance,
            "at_chance": own.chance > 0 and own.mean - 1.96 * own.stderr <= own.chance,
            "others": dict(own.others),
        }
    return entries
