"""A run from configuration to results.json: open, quantize block by block, evaluate, save; all of it resumable."""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from data.calibration import Tokens, calibration_tokens, evaluation_tokens
from models.load import LazyModel, Weights, load_model, load_tokenizer
from quant.blocks.actquant import ONLINE, ActSpec, Deployed
from quant.blocks.stream import BlockStream
from quant.core import env
from quant.core.errors import InputError, RunError
from quant.core.files import check_space, write_json
from quant.core.places import check_places
from quant.core.types import LARGEST, QuantizedWeight
from quant.evaluate.perplexity import FULL, Scores, Variant, evaluate, report
from quant.evaluate.tasks import Scorer, Tasks, TaskScore, open_tasks, run_tasks
from quant.evaluate.tasks import report as task_report
from quant.export.formats import Content
from quant.export.read import QuantizedCheckpoint, open_checkpoint
from quant.export.target import check_target, settle, size_on_disk
from quant.export.write import (
    entries,
    model_config,
    model_side_files,
    packed_entries,
    save_checkpoint,
)
from quant.kernels.matmul.pack import pack_block
from quant.learn.learner import LearnedBlock
from quant.learn.loop import learn_block
from quant.learn.transforms import check_seams
from quant.run.config import (
    DEFAULT_MAX_SEQLEN,
    FULL_BITS,
    RunConfig,
    check_format,
    content_of,
    places_read,
    places_written,
    spec_of,
    stores_of,
)
from quant.run.directory import BlockSummary, Record, RunDirectory
from quant.run.quantize import Recipe, check_options, compare_block, deploy, quantize_block
from quant.run.results import is_saved, manifest_of, results_of
from quant.run.resume import check_ranges, configuration_sha256, input_ranges, resumed
from quant.solvers import get_solver

TASK_BATCH = 16  # sequences of a task that pass a block at a time; they are short
Progress = Callable[[str, int, int, str], None]  # stage, done, total, note


log = logging.getLogger(__name__)


def silent(stage: str, done: int, total: int, note: str) -> None:
    """Progress that nobody watches."""


@dataclass
class Job:
    """One configuration on its way: what was decided before work began, and what became of it."""

    config: RunConfig
    recipe: Recipe | None
    target: RunDirectory
    digest: str
    n_blocks: int
    results: Record | None
    blocks: list[BlockSummary] = field(default_factory=list)
    seconds: float = 0.0
    peaks: dict[str, Mapping[str, int]] = field(default_factory=dict)  # bytes by stage
    packed_bytes: dict[int, int] = field(default_factory=dict)  # by block, where it was evaluated packed


@dataclass
class FullPrecision:
    """What is kept of full precision between calls of `Session.run_all`, so that it is evaluated once: hidden states
    behind the last block by corpus, and scores by task."""

    streams: dict[str, BlockStream] = field(default_factory=dict)
    tasks: dict[str, TaskScore] = field(default_factory=dict)


class Session:
    """Model, tokenizer and tokens, opened and checked once; ``run`` may then be called for several methods.

    Raises InputError for whatever is wrong with the configuration or the inputs, before any work.
    """

    def __init__(self, config: RunConfig) -> None:
        started = time.perf_counter()
        check_places(places_read(config), places_written(config))
        self.config = config
        if config.deterministic:
            env.be_deterministic()
        self.device = env.pick_device(config.device)
        env.reset_peak(self.device)
        self.model: LazyModel = load_model(
            config.model,
            dtype=env.pick_dtype(config.dtype, self.device),
            cache_dir=config.cache_dir,
            trust_remote_code=config.trust_remote_code,
            attn_implementation=config.attn_implementation,
            biases=config.learning is not None and config.learning.transform.shift,
            opener=None if config.quantizes else open_checkpoint,
        )
        self.act: ActSpec = getattr(
            self.model.checkpoint, "act", ActSpec()
        )  # of a checkpoint that is quantized already
        self.seqlen = config.seqlen or min(self.model.max_length, DEFAULT_MAX_SEQLEN)
        if self.seqlen > self.model.max_length:
            raise InputError(f"--seqlen {self.seqlen}: {config.model} takes at most {self.model.max_length} tokens")
        self.tokenizer = load_tokenizer(self.model.checkpoint.path, config.trust_remote_code)
        self._sources: dict[str, Any] = {
            "seqlen": self.seqlen,
            "data_dir": config.data_dir,
            "cache_dir": config.cache_dir / "tokens",
        }
        self._calibration: dict[tuple[str, int, int], Tokens] = {}
        self.calibration(config)
        evaluation = [
            evaluation_tokens(s, self.tokenizer, limit=config.limit, **self._sources) for s in config.eval_datasets
        ]
        self.evaluation = {tokens.name: tokens for tokens in evaluation}
        if len(self.evaluation) < len(evaluation):
            raise InputError("two --eval-datasets have the same name; rename one of the files")
        for tokens in evaluation:
            self._check_vocabulary(tokens)
        self.tasks: Tasks | None = None
        if config.tasks:
            self.tasks = open_tasks(
                config.tasks, config.task_path, config.num_fewshot, config.limit, config.trust_remote_code
            )
        self.model_sha256 = self.model.checkpoint.sha256()
        self.load_seconds = time.perf_counter() - started
        self.load_peak = env.peak_bytes(self.device)

    def calibration(self, config: RunConfig) -> Tokens | None:
        """The calibration windows of a configuration (runs of one session may have several seeds), kept once read."""
        if not config.quantizes:
            return None
        key = (config.dataset, config.nsamples, config.seed)
        if key not in self._calibration:
            tokens = calibration_tokens(
                config.dataset, self.tokenizer, nsamples=config.nsamples, seed=config.seed, **self._sources
            )
            self._check_vocabulary(tokens)
            self._calibration[key] = tokens
        return self._calibration[key]

    def _check_vocabulary(self, tokens: Tokens | None) -> None:
        vocabulary = self.model.config.vocab_size
        if tokens is not None and int(tokens.ids.max()) >= vocabulary:
            raise InputError(
                f"the tokenizer gives token {int(tokens.ids.max())}, the model has {vocabulary}: "
                "tokenizer and model do not belong together"
            )

    def recipe(self, config: RunConfig) -> Recipe:
        """The recipe of a configuration, checked against the model's shapes."""
        if config.learning is not None:
            check_seams(self.model.family, self.model.config, config.learning.transform)
        spec = spec_of(config, self.model.linear_shapes())
        if spec is not None:  # what is written out, and what is evaluated
            dtypes = (self.model.storage_dtype, self.model.dtype)
            spec = replace(spec, largest=min(LARGEST, *(torch.finfo(dtype).max for dtype in dtypes)))
        recipe = Recipe(
            config.method,
            get_solver(config.solver or config.method),
            spec,
            config.options,
            config.true_sequential,
            config.solver_precision,
            config.learning,
            config.act,
        )
        if spec is not None:
            check_options(recipe, self.device)
        return recipe

    def configuration(self, config: RunConfig) -> Record:
        """What decides the codes: two runs with equal configurations on one machine give the same bits."""
        tokens = self.calibration(config)
        decided = {
            "model_sha256": self.model_sha256,
            "calibration": None if tokens is None else f"{tokens.name} ({tokens.protocol}) {tokens.sha256[:16]}",
            "nsamples": config.nsamples,
            "seqlen": self.seqlen,
            "seed": config.seed,
            "method": config.method,
            "options": dict(config.options),
            "wbits": config.wbits,
            "group_size": config.group_size,
            "symmetric": config.symmetric,
            "range": config.range,
            "levels": config.levels,
            "solver": config.solver or config.method,
            "learning": config.learning.to_json() if config.learning else None,
            "act": asdict(config.act),
            "start": None,
            "act_ranges": [_file_digest(path) for path in (config.act_scales, config.act_shifts)],
            "attn_implementation": config.attn_implementation,
            "true_sequential": config.true_sequential,
            "blocks": min(config.num_layers, len(self.model.blocks)) if config.quantizes else 0,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "solver_precision": config.solver_precision,
            "device": self.device.type,
            "calib_batch": config.calib_batch,
        }
        if self.device.type == "cuda":
            decided["deterministic"] = config.deterministic  # a CPU always is
        found: Record = json.loads(json.dumps(decided))  # as it will be read back: tuples are lists
        if config.resume is not None:
            found["start"] = resumed(config.resume, found, self.model_sha256)
        return found

    def run_path(self, config: RunConfig) -> Path:
        """``--run-dir``, or a name under ``runs`` that the configuration decides."""
        if config.run_dir is not None:
            return config.run_dir
        digest = configuration_sha256(self.configuration(config))[:8]
        bits = f"w{config.wbits}" + (f"a{config.act.bits}" if config.act.active else "")
        bits += f"g{config.group_size}" if config.group_size > 0 else ""
        name = Path(config.model).resolve().name if Path(config.model).exists() else config.model.replace("/", "--")
        return config.runs / f"{name}-{config.method if config.quantizes else 'base'}-{bits}-{digest}"

    def run(self, config: RunConfig, progress: Progress = silent) -> Record:
        """Quantize, evaluate, save; return what results.json holds. Continues a run that was interrupted."""
        return self.run_all([config], lambda _: progress)[0]

    def quantize(self, config: RunConfig, progress: Progress = silent) -> None:
        """Quantize alone: every block is in the run directory afterwards, and ``run`` only evaluates."""
        with ExitStack() as held:
            self._quantize_job(self._checked([config], held)[0], progress)

    def run_all(
        self,
        configs: Sequence[RunConfig],
        progress: Callable[[str], Progress] = lambda _: silent,
        kept: FullPrecision | None = None,
    ) -> list[Record]:
        """`run` for several methods: all are quantized, then evaluated side by side, so full precision runs once.

        progress: gives the callback for a method's name. kept: what the session's earlier calls left of full precision;
        filled by the first.
        """
        with ExitStack() as held:
            return self._run_jobs(self._checked(configs, held), progress, kept or FullPrecision())

    def _run_jobs(self, jobs: Sequence[Job], progress: Callable[[str], Progress], kept: FullPrecision) -> list[Record]:
        for job in jobs:
            job.blocks = self._quantize_job(job, progress(job.config.method))
        waiting = [job for job in jobs if job.results is None]
        shown = progress(waiting[0].config.method if len(waiting) == 1 else "all")
        with self._measured(waiting, "evaluate") as evaluating:
            scores = self._evaluate(waiting, shown, kept.streams)
        with self._measured(waiting, "tasks") as answering:
            zero_shot = self._run_tasks(waiting, shown, kept.tasks)
        for job in waiting:
            scored = self._scored(job, scores, zero_shot)
            job.results = results_of(job.config, job.blocks, self.model) | scored
            job.results |= {"configuration_sha256": job.digest, "evaluation": self._evaluation_request(job.config)}
            job.results["seconds"] |= evaluating | answering
            job.results["packed_bytes"] = sum(job.packed_bytes.values())  # 0 where nothing was evaluated packed
            self._write_results(job, job.results)  # before anything is saved: where that fails, no score is lost
        return [self._finished(job, progress(job.config.method)) for job in jobs]

    def _checked(self, configs: Sequence[RunConfig], held: ExitStack) -> list[Job]:
        """Everything that can be wrong with configurations, before any work; their directories are opened, and no other
        process's until ``held`` ends."""
        written = (place for config in configs for place in places_written(config, self.run_path(config)))
        check_places(places_read(self.config), list(dict.fromkeys(written)))
        return [self._checked_job(config, held) for config in configs]

    def _checked_job(self, config: RunConfig, held: ExitStack) -> Job:
        recipe = self.recipe(config) if config.quantizes else None
        if config.learning is not None:
            check_ranges(config, self.model, self.model_sha256)
        configuration = self.configuration(config)
        target = RunDirectory(self.run_path(config))
        previous = None if config.overwrite else target.read("results.json")
        if previous is not None and previous.get("evaluation") != self._evaluation_request(config):
            previous = None
        digest = configuration_sha256(configuration)
        self.check_export(config)
        stay: list[Path] = []
        if config.save is not None:
            settle(config.save)
            if config.overwrite or not is_saved(config.save, digest, _kinds(config)):
                model_side_files(self.model, self.tokenizer)  # raises for files that must not be copied
                stay += check_target(config.save, config.overwrite)
        self._check_space(config, target.path)
        calibration, evaluated = self.calibration(config), self.evaluation.values()
        manifest = manifest_of(config, configuration, self.model, self.device, calibration, evaluated)
        held.enter_context(target.held())
        others = target.open(manifest, config.overwrite)
        stay += others if config.overwrite else []
        if stay:
            log.warning("these are not of a run or checkpoint of this toolkit and stay: %s", ", ".join(map(str, stay)))
        return Job(config, recipe, target, digest, configuration["blocks"], previous)

    def _quantize_job(self, job: Job, progress: Progress) -> list[BlockSummary]:
        with self._measured([job], "quantize") as spent:
            blocks = self._quantize(job, progress) if job.recipe else []
        job.seconds = spent["quantize"]
        return blocks

    @contextmanager
    def _measured(self, jobs: Sequence[Job], stage: str) -> Iterator[dict[str, float]]:
        """Keep the peak memory of a stage with the jobs that share it; give a job's share of its seconds, once known."""
        seconds: dict[str, float] = {}
        env.reset_peak(self.device)
        started = time.perf_counter()
        yield seconds
        seconds[stage] = (time.perf_counter() - started) / max(1, len(jobs))
        for job in jobs:
            job.peaks[stage] = env.peak_bytes(self.device)

    def _finished(self, job: Job, progress: Progress) -> Record:
        """Save the checkpoint if asked for, and say so in results.json."""
        config, results = job.config, job.results
        assert results is not None
        if config.save is None:
            return results | {"run_dir": str(job.target.path)}
        if config.overwrite or not is_saved(config.save, job.digest, _kinds(config)):
            progress("save", 0, 1, str(config.save))
            with self._measured([job], "export") as spent:
                self._save(job, config.save)
            results["seconds"] |= spent
            progress("save", 1, 1, str(config.save))
        size = size_on_disk(config.save)
        if size != results["checkpoint_bytes"]:
            results["checkpoint_bytes"] = size
            self._write_results(job, results)
        return results | {"run_dir": str(job.target.path)}

    def _write_results(self, job: Job, results: Record) -> None:
        """results.json, with the seconds and the peak memory of all stages so far."""
        seconds = results["seconds"] | {"load": self.load_seconds}
        blocks = sum(seconds[k] for k in ("forward", "gram", "solve", "learn"))  # of earlier processes too
        after = sum(seconds.get(k, 0.0) for k in ("evaluate", "tasks", "export"))
        seconds["total"] = self.load_seconds + max(job.seconds, blocks) + after
        stages = results.get("peak_bytes_by_stage", {}) | {"load": self.load_peak} | job.peaks
        highest = {where: max(peak[where] for peak in stages.values()) for where in ("device", "host")}
        results |= {"seconds": seconds, "peak_bytes": highest, "peak_bytes_by_stage": stages}
        write_json(job.target.path / "results.json", results)

    def content(self, config: RunConfig) -> Content:
        """What a checkpoint of this configuration has to hold."""
        return content_of(config, self.model.linear_shapes(), len(self.model.blocks), self.model.config.model_type)

    def check_export(self, config: RunConfig) -> None:
        """Raise InputError where the format cannot hold the configuration, or the target does not take it."""
        if config.save is not None or config.target is not None:
            online = any(name.endswith(ONLINE) for name in self.model.checkpoint.extra)
            content = self.content(config)
            check_format(config, replace(content, online=content.online or online))

    def _save(self, job: Job, target: Path) -> None:
        """The checkpoint, from the codes on disk. Raises RunError where the format turns out not to hold them."""
        config, content = job.config, self.content(job.config)

        def replaced(index: int) -> Mapping[str, Any]:
            if index >= job.n_blocks:
                return {}
            solved = job.target.read_weights(index)
            return job.target.read_changed(index) | {f"{name}.weight": weight for name, weight in solved.items()}

        def write(kind: str) -> None:
            stream = packed_entries(entries(self.model, replaced), kind, content, self.model.storage_dtype)
            described = model_config(self.model, kind, content, job.n_blocks)
            results = dict(job.results or {}) | {"format": kind}
            save_checkpoint(stream, target, described, model_side_files(self.model, self.tokenizer), results,
                            config.overwrite)  # fmt: skip

        try:
            write(config.format)
        except InputError as error:
            if config.fallback in (None, config.format):
                raise RunError(f"{error} ({job.target.path} holds codes and scores)") from error
            write(str(config.fallback))
            log.warning("%s; saved as %s", error, config.fallback)

    def _evaluation_request(self, config: RunConfig) -> Record:
        """What decides the numbers once the codes are there."""
        hashes = {name: tokens.sha256 for name, tokens in self.evaluation.items()}
        tasks = {"names": list(config.tasks), "num_fewshot": config.num_fewshot, "limit": config.limit}
        return {
            "token_sha256": hashes,
            "limit": config.limit,
            "full_precision": config.full_precision_eval,
            "packed": config.packed,
            "tasks": tasks if self.tasks else None,
        }

    def _check_space(self, config: RunConfig, path: Path) -> None:
        """Raise InputError where the blocks, and the checkpoint if asked for, cannot fit on the disk."""
        per_block = sum(out * n_in for out, n_in in self.model.linear_shapes().values())
        need = per_block * min(config.num_layers, len(self.model.blocks)) if config.quantizes else 0
        need += self._stored_bytes(config) if config.activation_store == "disk" else 0
        weights = sum(file.stat().st_size for file in self.model.checkpoint.files)
        for place, size in ((path, need), (config.save, weights)):
            if place is not None:
                check_space(place, size)

    def _stored_bytes(self, config: RunConfig) -> int:
        """Bytes of hidden states that are on the disk at a time where they are kept there: of calibration, then of every
        variant in evaluation."""
        width = self.model.config.hidden_size * self.model.dtype.itemsize
        calibration = self.calibration(config)
        tokens = 0 if calibration is None else calibration.ids.numel()
        evaluated = sum(own.ids.numel() for own in self.evaluation.values())
        return width * max(tokens * stores_of(config), evaluated * 2)

    def calibration_stream(self) -> BlockStream:
        """The calibration samples in front of the first block, as the session's own configuration keeps them."""
        return self._stream(self.config, Path(tempfile.gettempdir()))

    def _stream(self, config: RunConfig, directory: Path) -> BlockStream:
        """The calibration samples in front of the first block."""
        calibration = self.calibration(config)
        assert calibration is not None
        return BlockStream(
            self.model,
            calibration.ids,
            device=self.device,
            batch=config.calib_batch,
            store=config.activation_store,
            directory=directory,
        ).capture(self.model.outside_weights(self.device))

    def _quantize(self, job: Job, progress: Progress) -> list[BlockSummary]:
        """Solve the blocks that are not on disk yet; finished ones only carry the calibration samples forward."""
        target, n_blocks = job.target, job.n_blocks
        results = target.finished_blocks()
        if len(results) == n_blocks:
            progress("quantize", n_blocks, n_blocks, "finished before")
            return results
        assert job.recipe is not None
        recipe, act = job.recipe, job.recipe.act
        stream = self._stream(job.config, target.path)
        pair = _Pair(self, stream, job, progress) if recipe.learning else None
        for index in range(n_blocks):
            weights = self.model.block_weights(index, self.device)
            if index < len(results):
                note = "from disk"
                stream.run(index, self._deployed(target, index, weights), advance=True, act=act)
                if pair is not None:
                    pair.full.run(index, weights, advance=True)
            else:
                before, started = dict(stream.seconds), time.perf_counter()
                learned = pair.learn(index, weights) if pair else None
                learning = time.perf_counter() - started if learned else 0.0
                block = quantize_block(stream, index, weights, recipe, learned)
                if index + 1 < n_blocks:
                    stream.run(index, block.weights, advance=True, act=act)
                forward, gram = (stream.seconds[k] - before[k] for k in ("forward", "observe"))
                seconds = {"forward": forward, "gram": gram, "solve": block.seconds, "learn": learning}
                kept: dict[str, Any] = {"changed": block.changed}
                if learned is not None:
                    kept |= {"learned": learned.parameters, "learning": learned.log}
                results.append(target.write_block(index, block.solved, block.records, seconds, **kept))
                note = _note(block.records, learned)
            progress("quantize", index + 1, n_blocks, note)
        return results

    def _deployed(self, target: RunDirectory, index: int, weights: Weights) -> Weights:
        """The weights that a finished block deploys."""
        solved, changed = target.read_weights(index), target.read_changed(index)
        return deploy(weights, solved, self.model, changed, f"block {index} ")

    def _packed(self, job: Job, index: int, weights: Weights, solved: Mapping[str, QuantizedWeight]) -> Deployed:
        """A block with its solved linears packed; their memory is noted in the job."""
        packed = pack_block(solved, self.device)
        job.packed_bytes[index] = sum(weight.nbytes() for weight in packed.values())
        return {**weights, **packed}

    def _full(self, job: Job) -> Variant:
        """The model itself; a quantized checkpoint may be asked to stay packed."""
        checkpoint = self.model.checkpoint
        if not (job.config.packed and isinstance(checkpoint, QuantizedCheckpoint)):
            return Variant(lambda _, weights: weights, self.act)
        whole = all(
            set(checkpoint.solved(self.model, i)) == set(self.model.linear_shapes())
            for i in range(len(self.model.blocks))
        )

        def own(index: int, weights: Weights) -> Deployed:
            return self._packed(job, index, weights, checkpoint.solved(self.model, index))

        return Variant(own, self.act, whole)

    def _variants(self, jobs: Sequence[Job]) -> dict[str, Variant]:
        """The quantized form of every job, by its directory."""

        def deployed(job: Job) -> Variant:
            packed = job.config.packed and job.config.wbits != FULL_BITS

            def own(index: int, weights: Weights) -> Deployed:
                if index >= job.n_blocks:
                    return weights
                if not packed:
                    return self._deployed(job.target, index, weights)
                changed = deploy(weights, {}, self.model, job.target.read_changed(index), f"block {index} ")
                return self._packed(job, index, changed, job.target.read_weights(index))

            return Variant(own, job.config.act, packed and job.n_blocks == len(self.model.blocks))

        return {str(job.target.path): deployed(job) for job in jobs if job.recipe}

    def _evaluate(
        self, jobs: Sequence[Job], progress: Progress, full_streams: dict[str, BlockStream]
    ) -> dict[str, dict[str, Scores]]:
        """Scores of every job (by its directory) and of full precision on every corpus, in one pass over the blocks."""
        variants = self._variants(jobs)
        full = any(job.config.full_precision_eval for job in jobs)
        if not jobs or not self.evaluation or not (variants or full):
            return {}
        config = jobs[0].config
        return evaluate(
            self.model,
            self.evaluation,
            variants,
            device=self.device,
            batch=config.calib_batch,
            store=config.activation_store,
            directory=jobs[0].target.path,
            full=self._full(jobs[0]) if full else None,
            full_streams=full_streams,
            progress=lambda done, total: progress("evaluate", done, total, ""),
        )

    def _run_tasks(
        self, jobs: Sequence[Job], progress: Progress, full_scores: dict[str, TaskScore]
    ) -> dict[str, dict[str, TaskScore]]:
        """Scores of every job and of full precision on every task. full_scores: full precision's, filled if empty."""
        if not jobs or self.tasks is None:
            return {}
        config = jobs[0].config
        wanted = config.full_precision_eval and not full_scores
        full = {FULL: self._full(jobs[0])} if wanted else {}
        scorer = Scorer(
            self.model,
            full | self._variants(jobs),
            self.device,
            TASK_BATCH,
            config.activation_store,
            jobs[0].target.path,
            lambda done, total: progress("tasks", done, total, ""),
        )
        found = run_tasks(scorer, self.tokenizer, self.tasks)
        if wanted:
            full_scores |= {name: by_variant[FULL] for name, by_variant in found.items()}
        return {n: found.get(n, {}) | ({FULL: full_scores[n]} if n in full_scores else {}) for n in self.tasks.members}

    def _scored(
        self, job: Job, scores: dict[str, dict[str, Scores]], zero_shot: dict[str, dict[str, TaskScore]]
    ) -> Record:
        """What results.json says of a job's evaluation."""
        variant = str(job.target.path) if job.recipe else FULL
        found = report(self.evaluation, scores, variant) if scores else {"perplexity": {}, "fidelity": {}}
        return found | {"zero_shot": task_report(zero_shot, variant)}

    def compare_layers(self, configs: Sequence[RunConfig], progress: Progress = silent) -> list[Record]:
        """Journal records of every method for every linear, all from the Gram matrices of the full-precision stream.

        Nothing is kept on disk; the blocks stay as they are, so that every method sees the same inputs.
        """
        recipes = [self.recipe(config) for config in configs]
        n_blocks = min(configs[0].num_layers, len(self.model.blocks))
        records: list[Record] = []
        with tempfile.TemporaryDirectory() as directory:
            stream = self._stream(configs[0], Path(directory))
            for index in range(n_blocks):
                weights = self.model.block_weights(index, self.device)
                records += compare_block(stream, index, weights, recipes)
                if index + 1 < n_blocks:
                    stream.run(index, weights, advance=True)
                progress("compare", index + 1, n_blocks, "")
        return records


class _Pair:
    """The two streams of learning: full precision, and the quantized prefix in training batches."""

    def __init__(self, session: Session, quantized: BlockStream, job: Job, progress: Progress) -> None:
        assert job.recipe is not None and job.recipe.learning is not None
        self.session, self.job, self.recipe, self.report = session, job, job.recipe, progress
        self.learning = job.recipe.learning
        self.quantized, self.full = quantized, quantized.fork()
        outside = session.model.outside_weights(session.device)
        self.training = quantized.in_batches_of(self.learning.batch, outside)
        self.start = None if job.config.resume is None else RunDirectory(job.config.resume)

    def learn(self, index: int, weights: Weights) -> LearnedBlock:
        """Learn block ``index`` from the usual start, or from the parameters of the run that is resumed."""
        n_blocks, epochs = self.job.n_blocks, self.learning.epochs

        def progress(epoch: int, _: int, now: float, first: float) -> None:
            note = f"block {index + 1} of {n_blocks}: loss {now:.3e} (start {first:.3e})"
            self.report("learn", index * epochs + epoch, n_blocks * epochs, note)

        return learn_block(
            self.full,
            self.quantized,
            self.training,
            index,
            weights,
            self.recipe.spec,
            self.recipe.act,
            self.learning,
            exact=self._exact(index),
            ranges=input_ranges(self.job.config, self.session.model, index),
            start=None if self.start is None else self.start.read_learned(index),
            progress=progress,
        )

    def _exact(self, index: int) -> Weights | None:
        """The block's weights in float32 where the arithmetic would round those of the checkpoint."""
        model = self.session.model
        if model.dtype in (model.storage_dtype, torch.float32, torch.float64):
            return None
        return model.block_weights(index, self.session.device, torch.float32)


def _kinds(config: RunConfig) -> tuple[str, ...]:
    """The formats in which a configuration's checkpoint may have been saved."""
    return (config.format,) if config.fallback is None else (config.format, config.fallback)


def _note(records: Sequence[Record], learned: LearnedBlock | None) -> str:
    """What a person sees of a finished block."""
    errors = [record["relative_error"] for record in records]
    error = f"relative error {sum(errors) / len(errors):.4f}" if errors else ""
    loss = f"loss {learned.log['loss_start']:.3e} -> {learned.log['loss_end']:.3e}" if learned else ""
    return ", ".join(part for part in (loss, error) if part)


def _file_digest(path: Path | None) -> str | None:
    if path is None or not path.exists():
        return None
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
