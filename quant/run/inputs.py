"""What a session works on: model, tokenizer, tokens and tasks, opened and checked once, before any work."""

from __future__ import annotations

import logging
import tempfile
import time
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.calibration import Tokens, calibration_tokens, evaluation_tokens
from data.tokens import check_ids
from data.written import written
from models.load import LazyModel, load_model, load_tokenizer
from models.vocabulary import vocabulary_of
from quant.blocks.fake_quant import ActSpec
from quant.blocks.stream import BlockStream, own_of_batches, own_windows
from quant.blocks.weights import is_online
from quant.core import env, ranks
from quant.core.errors import InputError
from quant.core.grid import largest_of, misfit_float16
from quant.core.names import GGUF
from quant.core.places import check_places
from quant.core.types import LARGEST, QuantSpec
from quant.evaluate.tasks import Tasks, check_tasks, open_tasks
from quant.export.formats import Content
from quant.export.gguf_model import check_model
from quant.export.read import open_checkpoint
from quant.learn.rotation import check_rotation, rotated
from quant.learn.transforms import check_seams
from quant.run.bias import check_biases
from quant.run.config import DEFAULT_MAX_SEQLEN, Output, RunConfig, SessionConfig
from quant.run.content import candidate_widths, check_format, content_of, spec_of
from quant.run.experts import check_mixture
from quant.run.folding import check_turned
from quant.run.likeness import check_family
from quant.run.request import cache_place, places_read
from quant.run.rotating import LearnedRotation, SpinTask, learned_rotation
from quant.run.saliency import check_saliency
from quant.run.solving import Recipe, check_options
from quant.run.writing import author_of
from quant.solvers import declaration_for, get_solver
from quant.tune.limits import check_tuning, recomputes

log = logging.getLogger(__name__)


class Inputs:
    """Model, tokenizer, tokens and tasks of a session, and what they make of the runs on them.

    Raises InputError for whatever is wrong with the configuration or the inputs, before any work.
    """

    def __init__(self, config: SessionConfig) -> None:
        started, self.load_seconds = time.perf_counter(), 0.0
        check_places(places_read(config), [cache_place(config.cache_dir)])
        self.config = config
        if config.deterministic:
            env.be_deterministic()
        self.device = env.pick_device(config.device)
        env.reset_peak(self.device)
        self.original = self._open_model()
        self.model = self.original
        self.rotation: LearnedRotation | None = None
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
        self.evaluation = self._open_evaluation()
        self.tasks: Tasks | None = None
        if config.tasks:
            self.tasks = open_tasks(
                config.tasks, config.task_path, config.num_fewshot, config.limit, config.trust_remote_code
            )
            check_tasks(self.tasks, self.tokenizer, self.model)
        self.model_sha256 = self.model.checkpoint.sha256()
        self._rotate()
        self.load_seconds = time.perf_counter() - started
        self.load_peak = env.peak_bytes(self.device)

    def _open_model(self) -> LazyModel:
        config = self.config
        model = load_model(
            config.model,
            dtype=env.pick_dtype(config.dtype, self.device),
            cache_dir=config.cache_dir,
            trust_remote_code=config.trust_remote_code,
            attn_implementation=config.attn_implementation,
            biases=config.biases,
            opener=open_checkpoint if config.evaluates else None,
            family=config.family,
        )
        if config.family is not None:
            check_family(model, config.trust_remote_code)
        return model

    def _rotate(self) -> None:
        """Put the rotated model in the place of the original, with learned matrices where they are asked for."""
        config, run = self.config, self.config.rotated_for
        if config.rotated is None:
            return
        check_rotation(self.original.family, self.original.config, config.rotated)
        if run is not None and config.rotated.steps:
            tokens, spec = self.calibration(run), spec_of(run, self.original.linear_shapes())
            recomputes(self.original, len(tokens.ids), self.seqlen, self.device, "--rotate-steps")
            key = (self.model_sha256, tokens.sha256)
            task = SpinTask(config.rotated, spec, run.act, tokens.ids, run.seed, key)
            self.rotation = learned_rotation(self.original, task, self.device, config.calib_batch, config.cache_dir)
        matrices = None if self.rotation is None else self.rotation.matrices
        self.model = rotated(self.original, config.rotated, self.device, config.trust_remote_code, matrices)

    def _open_evaluation(self) -> dict[str, Tokens]:
        """The tokens of every corpus to evaluate on, by its name."""
        corpora = [
            evaluation_tokens(source, self.tokenizer, limit=self.config.limit, **self._sources)
            for source in self.config.eval_datasets
        ]
        by_name = {tokens.name: tokens for tokens in corpora}
        if len(by_name) < len(corpora):
            raise InputError("two --eval-datasets have the same name; rename one of the files")
        for tokens in corpora:
            check_ids(tokens.ids, self.model.rows, tokens.name)
        return by_name

    def calibration(self, run: RunConfig) -> Tokens:
        """The calibration windows of a run (runs of one session may have several seeds), kept once read."""
        key = (run.dataset, run.nsamples, run.seed)
        if key not in self._calibration:
            started = time.perf_counter()
            tokens = calibration_tokens(
                run.dataset,
                self.tokenizer,
                nsamples=run.nsamples,
                seed=run.seed,
                author=author_of(self.original, self.device) if written(run.dataset) else None,
                **self._sources,
            )
            check_ids(tokens.ids, self.model.rows, tokens.name)
            self._calibration[key] = tokens
            self.load_seconds += time.perf_counter() - started
        return self._calibration[key]

    def _tell_of_narrow(self, spec: QuantSpec) -> None:
        """Say which linears have another grid than the one asked for."""
        shapes = self.model.linear_shapes()
        narrow = [name for name, (_, n_in) in shapes.items() if spec.for_inputs(n_in) != spec]
        if narrow:
            own = spec.for_inputs(shapes[narrow[0]][1]).described()
            said = "--grid %s: the rows of %d of %d linears (%s, ...) are no whole super-blocks: these have %s, as in llama.cpp's files"
            log.warning(said, spec.kind, len(narrow), len(shapes), narrow[0], own)

    def recipe(self, run: RunConfig) -> Recipe:
        """The recipe of a run, checked against what was opened and against the model's shapes."""
        turned, wanted = (self.config.rotated, self.config.rotated_for), (run.rotation, run.of_rotation)
        if self.config.evaluates or (run.shifts and not self.config.biases) or turned != wanted:
            raise InputError(
                f"{self.config.model} was opened for other runs, not for {run.method}: open it again for that"
            )
        check_mixture(self.model.family, self.model.config, run)
        if run.learning is not None:
            check_seams(self.model.family, self.model.config, run.learning.transform)
            if run.learning.together:
                recomputes(self.model, len(self.calibration(run).ids), self.seqlen, self.device)
        check_turned(self.model, run)
        if run.bias_correction:
            check_biases(self.model)
        spec = spec_of(run, self.model.linear_shapes())
        if spec is not None:  # what is written out, and what is evaluated
            blocks = [(i, self.model.linear_shapes(i)) for i in range(self.n_blocks(run))]
            dtypes = {self.model.storage_of(f"{name}.weight", i) for i, own in blocks for name in own}
            dtypes.add(self.model.dtype)
            spec = replace(spec, largest=min(LARGEST, *(torch.finfo(dtype).max for dtype in dtypes)))
            self._tell_of_narrow(spec)
        recipe = Recipe(
            run.method,
            get_solver(run.solver),
            spec,
            run.options,
            run.true_sequential,
            run.solver_precision,
            run.learning,
            run.act,
            run.correction,
            run.saliency,
            bias_correction=run.bias_correction,
        )
        self._check_correction(recipe, run.method)
        if spec is not None:
            self.content(run)
            if run.avg_bits is not None:
                candidate_widths(run, self.model.linear_shapes())
            sample = check_options(recipe, self.device)
            if run.saliency:
                ids = self.calibration(run).ids
                check_saliency(self.model, run, ids.numel(), self.config.activation_store, self.device)
            if run.tuning is not None:
                if run.tuning.form == "offset" and run.solver != "rtn":
                    raise InputError(f"autoround begins with rounding to nearest, not with {run.solver}: give rtn")
                if run.tuning.form == "offset" and recipe.correction is not None:
                    raise InputError(
                        "--target-correction: autoround begins with the weights themselves; drop the flag, or give --tune "
                        "with another method"
                    )
                windows = len(self.calibration(run).ids)
                check_tuning(self.model, run.tuning, sample, windows, self.seqlen, self.device)
        return recipe

    def _check_correction(self, recipe: Recipe, method: str) -> None:
        """Raise InputError where the target cannot be corrected as it is asked for."""
        if recipe.correction is None:
            return
        if declaration_for(recipe.solver).uses_cross:
            raise InputError(
                f"--target-correction: {method} corrects its target itself; drop the flag or change the method"
            )
        if recipe.correction.residual and not self.model.family.residual_at(self.model.config):
            raise InputError(
                f"--residual-correction: in this {self.model.config.model_type} model a norm stands between the linears "
                "and the residual stream; drop the flag"
            )

    def content(self, run: RunConfig) -> Content:
        """What a checkpoint of this run has to hold."""
        model = self.model
        ends = vocabulary_of(model.module) if run.beyond_blocks else None
        return content_of(run, model.linear_shapes(), len(model.blocks), model.config.model_type, ends)

    def check_export(self, run: RunConfig, output: Output) -> None:
        """Raise InputError where the format cannot hold the run, or the target does not take it."""
        if output.save is not None or output.target is not None:
            content = self.content(run)
            if not content.online and any(map(is_online, self.model.checkpoint.extra)):
                content = replace(content, online=("matrices of the checkpoint",))
            check_format(output, content)
            if output.format == GGUF:
                check_model(self.model, self.tokenizer)
            if output.save is not None and self.n_blocks(run):
                misfit = self._misfit_linear(run, content)  # where it does not matter, for the sake of damaged tensors
                if output.fallback is None:
                    check_format(output, replace(content, misfit=misfit))

    def _misfit_linear(self, run: RunConfig, content: Content) -> str | None:
        """The first linear of those to be quantized whose scales do not go into float16, and why. Raises what `_largest`
        does, also where weights stay as they are."""
        for index, largest in enumerate(self._largest[: self.n_blocks(run)]):
            for name, weight in largest.items():
                spec = None if content.spec is None else content.spec.for_inputs(content.shapes[name][1])
                why = None if spec is None else misfit_float16(weight, spec.qmax)
                if why is not None:
                    return f"block {index} {name}: {why}"
        for name, _, own in content.of_outside():
            assert own.spec is not None
            weights = self.model.checkpoint.read(self.model.key(f"{name}.weight"))
            if (why := misfit_float16(largest_of(weights), own.spec.qmax)) is not None:
                return f"{name}: {why}"
        return None

    @cached_property
    def _largest(self) -> list[dict[str, float]]:
        """The largest |weight| of every linear, by block. All blocks are read once for that, before anything is solved.
        Raises InputError, with the tensor's name, where a number in them is not finite."""
        largest = []
        for index in range(len(self.model.blocks)):
            linears = self.model.linear_shapes(index)
            weights = self.model.block_weights(index, torch.device("cpu"), torch.float32)
            largest.append({name: largest_of(weights[f"{name}.weight"]) for name in linears})
        return largest

    def n_blocks(self, run: RunConfig) -> int:
        """How many blocks a run quantizes."""
        return min(run.num_layers, len(self.model.blocks)) if run.quantizes else 0

    def _own(self, run: RunConfig, n: int) -> slice | Tensor:
        """This process's part of n calibration windows."""
        if run.learning is None or ranks.size() == 1:
            return own_windows(n, self.config.calib_batch)
        return own_of_batches(n, run.learning.batch)

    def calibration_stream(
        self, run: RunConfig, directory: Path | None = None, ids: Tensor | None = None
    ) -> BlockStream:
        """The calibration samples of a run in front of the first block, of several processes this one's part of them.
        directory: for those that are kept on the disk. ids: windows in place of the calibration's, all of them."""
        if ids is None:
            ids = self.calibration(run).ids
            ids = ids[self._own(run, len(ids))]
        return BlockStream(
            self.model,
            ids,
            device=self.device,
            batch=self.config.calib_batch,
            store=self.config.activation_store,
            directory=directory or Path(tempfile.gettempdir()),
        ).capture(self.model.outside_weights(self.device))
