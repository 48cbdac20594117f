"""Zero-shot and few-shot tasks through lm-eval, on models that pass the blocks one at a time.

lm-eval builds the requests and the metrics; this module only answers log-likelihoods. All forms of a model (full
precision, quantized ones, with their quantized activations) are scored together, so every block is read once for a
set of requests. Sequences are padded on the right, which a causal model does not see.
"""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.load import LazyModel
from quant.blocks.stream import BlockStream
from quant.core.errors import InputError, first_line
from quant.core.files import check_plain_file, resolved
from quant.evaluate.bootstrap import paired_interval
from quant.evaluate.passes import FULL, HEAD_ELEMENTS, Variant, pass_blocks

HIDDEN_BYTES = 4 << 30  # of hidden states held at a time, all variants together
PAD_TO = 32
OWN_TASKS = Path(__file__).parents[2] / "data" / "tasks"
METRICS = ("acc", "acc_norm", "exact_match")  # in the order in which one is shown as the task's score
Key = tuple[tuple[int, ...], int]  # tokens, how many at the end are scored
Score = tuple[float, bool]  # log-likelihood of them, whether each was the likeliest token


@dataclass
class Scorer:
    """Log-likelihoods under several variants of a model, remembered by request."""

    model: LazyModel
    variants: Mapping[str, Variant]
    device: torch.device
    batch: int
    store: str
    directory: Path
    progress: Callable[[int, int], None] = lambda done, total: None

    def __post_init__(self) -> None:
        self.known: dict[str, dict[Key, Score]] = {name: {} for name in self.variants}

    def scores(self, variant: str, requests: Sequence[Key]) -> list[Score]:
        """Scores of requests under one variant; what is new is computed for all of them."""
        known = self.known[variant]
        new = sorted({key for key in requests if key not in known}, key=lambda key: (len(key[0]), key))
        width = self.model.config.hidden_size * self.model.dtype.itemsize * len(self.variants)
        chunk: list[Key] = []
        chunks, held = [chunk], 0
        for key in new:
            if chunk and held + self._padded(key) * width > HIDDEN_BYTES:
                chunk, held = [], 0
                chunks.append(chunk)
            chunk.append(key)
            held += self._padded(key) * width
        for number, part in enumerate(chunks):
            if part:
                self._score(part, number, len(chunks))
        return [known[key] for key in requests]

    def _padded(self, key: Key) -> int:
        """Length of the window that holds all tokens but the last, which nothing follows."""
        return min(-(-(len(key[0]) - 1) // PAD_TO) * PAD_TO, self.model.max_length)

    def _score(self, keys: list[Key], number: int, n_chunks: int) -> None:
        """Pass the blocks with all sequences of a chunk, then read the logits."""
        lengths: dict[int, list[Key]] = {}
        for key in keys:
            lengths.setdefault(self._padded(key), []).append(key)
        outside = self.model.outside_weights(self.device)
        streams: dict[int, dict[str, BlockStream]] = {}
        for length, group in lengths.items():
            ids = torch.zeros(len(group), length, dtype=torch.long)
            for row, (tokens, _) in enumerate(group):
                ids[row, : len(tokens) - 1] = torch.tensor(tokens[:-1])
            first = BlockStream(
                self.model, ids, device=self.device, batch=self.batch, store=self.store, directory=self.directory
            ).capture(outside)
            streams[length] = {name: first if i == 0 else first.fork() for i, name in enumerate(self.variants)}
        del outside

        def progress(done: int, total: int) -> None:
            self.progress(number * total + done, n_chunks * total)

        pass_blocks(self.model, self.variants, streams.values(), self.device, progress)
        outside = self.model.outside_weights(self.device)
        for length, group in lengths.items():
            for name, stream in streams[length].items():
                self.known[name].update(zip(group, _read(stream, group, outside), strict=True))


@torch.inference_mode()
def _read(stream: BlockStream, group: Sequence[Key], outside: Mapping[str, Tensor]) -> list[Score]:
    """Scores of the sequences of one stream, in order."""
    n, length = stream.tokens.shape
    step = max(1, HEAD_ELEMENTS // (length * stream.model.config.vocab_size))
    answers: list[Score] = []
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        log_p = torch.log_softmax(stream.logits(rows, dict(outside)), -1)
        for row, (tokens, scored) in enumerate(group[rows]):
            end = len(tokens)
            part = log_p[row, end - scored - 1 : end - 1]
            target = torch.tensor(tokens[end - scored :], device=part.device)
            likely = bool((part.argmax(-1) == target).all())
            answers.append((float(part.gather(-1, target[:, None]).double().sum()), likely))
    return answers


def _harness(scorer: Scorer, tokenizer: Any, variant: str) -> Any:
    """lm-eval's view of one variant of the model."""
    from lm_eval.api.model import TemplateLM

    class StreamedLM(TemplateLM):
        """Answers log-likelihoods; cannot generate."""

        eot_token_id = tokenizer.eos_token_id
        prefix_token_id = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        max_length = scorer.model.max_length
        tokenizer_name = "model"

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            bos = tokenizer.bos_token
            if add_special_tokens is None and not (bos and string.startswith(bos)):
                return tokenizer.encode(string)
            return tokenizer.encode(string, add_special_tokens=bool(add_special_tokens))

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[Score]:
            keys = []
            for _, context, continuation in requests:
                kept = (context + continuation)[-(self.max_length + 1) :]
                keys.append((tuple(kept), len(continuation)))
            return scorer.scores(variant, keys)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            raise InputError("tasks of rolling perplexity: give their text to --eval-datasets instead of --tasks")

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            raise InputError("tasks that generate text are not supported by --tasks; choose tasks with given answers")

    return StreamedLM()


@dataclass(frozen=True)
class Tasks:
    """Tasks that exist and whose data are at hand. members: lm-eval's tasks by the name given (several for a group).
    trust_remote_code: they may run what they bring."""

    members: Mapping[str, tuple[str, ...]]
    manager: Any
    num_fewshot: int | None
    limit: int | None
    trust_remote_code: bool = False


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
    with sandboxed(trust_remote_code):
        return replace(_open_tasks(names, path, num_fewshot, limit), trust_remote_code=trust_remote_code)


def check_no_code(file: Path, seen: set[Path]) -> None:
    """Raise InputError where a task's YAML, or one that it includes, names Python to run (``!function``). seen: the files
    that were read, links resolved as lm-eval does; filled."""
    import yaml

    file = resolved(file)
    if file in seen:
        return
    seen.add(file)
    check_plain_file(file)
    try:
        root = yaml.compose(file.read_bytes(), Loader=yaml.SafeLoader)
    except (OSError, yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{file} is not a readable task ({first_line(error).splitlines()[0]})") from error
    nodes, known = [root] if root is not None else [], set()
    while nodes:
        node = nodes.pop()
        if id(node) in known:  # an alias
            continue
        known.add(id(node))
        if node.tag.startswith(("!", "tag:yaml.org,2002:python")):
            where = f"{file}, line {node.start_mark.line + 1}"
            raise InputError(f"{where}: {node.tag} runs Python; give --trust-remote-code if you trust the tasks")
        if isinstance(node, yaml.MappingNode):
            nodes += [part for pair in node.value for part in pair]
            included = [value for key, value in node.value if key.value == "include"]
            names = [part for value in included for part in (value.value if value.id == "sequence" else [value])]
            for name in names:
                check_no_code(file.parent / str(name.value), seen)
        elif isinstance(node, yaml.SequenceNode):
            nodes += node.value


@contextmanager
def sandboxed(trust_remote_code: bool = False) -> Iterator[None]:
    """Let lm-eval fill in the templates of tasks without their reaching Python, and load no metrics that are programs.
    Raises InputError for a template that tries, or that is none."""
    import evaluate
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval import utils

    def refuse(name: str, *_: Any, **__: Any) -> Any:
        raise InputError(f"--tasks: the metric {name!r} is a program; give --trust-remote-code if you trust the tasks")

    own, load = utils.env, evaluate.load
    boxed = SandboxedEnvironment(undefined=own.undefined, keep_trailing_newline=own.keep_trailing_newline)
    boxed.filters |= own.filters
    utils.env, evaluate.load = boxed, load if trust_remote_code else refuse
    try:
        yield
    except SecurityError as error:
        raise InputError(f"--tasks: a task's template reaches for Python ({error}); it is not run") from error
    except (TemplateError, OverflowError) as error:
        raise InputError(f"--tasks: a task's template cannot be filled in ({first_line(error)})") from error
    finally:
        utils.env, evaluate.load = own, load


def _open_tasks(names: Sequence[str], path: Path | None, num_fewshot: int | None, limit: int | None) -> Tasks:
    from datasets.exceptions import DatasetsError
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every argument that it passes on
    if path is not None and not path.is_dir():
        raise InputError(f"--task-path {path} is not a directory")
    paths = [str(OWN_TASKS), *([str(path)] if path else [])]
    manager = TaskManager(include_path=paths, include_defaults=False)
    if any(name not in manager.all_tasks for name in names):  # lm-eval's own 14 thousand take a while to index
        manager = TaskManager(include_path=paths)
    members = {}
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"did you mean {', '.join(near)}?" if near else "python -m lm_eval ls tasks shows all"
            raise InputError(f"--tasks: unknown task {name!r}; {hint}")
        try:
            members[name] = tuple(manager.load([name])["tasks"])
        except (DatasetsError, OSError, RuntimeError, TypeError, KeyError, ValueError) as error:
            if isinstance(error, InputError):
                raise
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


def run_tasks(scorer: Scorer, tokenizer: Any, tasks: Tasks) -> dict[str, dict[str, TaskScore]]:
    """Scores by task and variant."""
    import lm_eval

    scores: dict[str, dict[str, TaskScore]] = {}
    for variant in scorer.variants:
        with (
            sandboxed(tasks.trust_remote_code),
            Path(os.devnull).open("w") as nowhere,
            redirect_stderr(nowhere),
        ):  # its bars; logging goes on
            results = lm_eval.simple_evaluate(
                model=_harness(scorer, tokenizer, variant),
                tasks=list(tasks.members),
                task_manager=tasks.manager,
                num_fewshot=tasks.num_fewshot,
                limit=tasks.limit,
                bootstrap_iters=0,
                log_samples=True,
            )
        assert results is not None
        for name, members in tasks.members.items():
            samples = [sample for member in members for sample in results["samples"][member]]
            samples = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
            scores.setdefault(name, {})[variant] = _task_score(name, samples, results["results"].get(name, {}))
    return scores


def _task_score(name: str, samples: list[dict[str, Any]], results: Mapping[str, Any]) -> TaskScore:
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
