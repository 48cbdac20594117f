"""What is told: what a session opens once, what decides the codes of one run, and where its results go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.written import windows_of
from quant.blocks.backward import Labels
from quant.blocks.fake_quant import ActSpec
from quant.core.names import AUTOROUND, DEFAULT_CACHE, DEQUANTIZED, FULL_BITS, SAMPLED_LABELS
from quant.core.target import Correction
from quant.learn.config import Learning, Rotation
from quant.tune.config import Tuning

DEFAULT_MAX_SEQLEN = 2048
DECIDES_CODES = {"decides": "codes"}  # metadata of a field of a session that is part of a run's identity, as it is
BY_WHAT_IT_NAMES = {"decides": "by what it names"}  # of a field of a run of which not the words count; see `identity`
WHERE_IT_DIFFERS = {"decides": "where it is not the default"}  # of a field that earlier runs have not: their names stay


@dataclass(frozen=True)
class SessionConfig:
    """What is opened once, for several runs: model, data to evaluate on, machine. Runs with equal ones share a session.

    Paths are as given. family: what a model of an unknown type is taken for. biases: the runs need biases that the model may
    not have (a shift ends in them). evaluates: no run quantizes, so that the model may be a quantized checkpoint. rotated: what
    the runs rotate of the model; rotated_for: what of the runs learned rotations depend on. deterministic: on CUDA, only
    deterministic algorithms.
    """

    model: str
    seqlen: int | None = None
    eval_datasets: tuple[str, ...] = ("wikitext2", "ptb", "c4")
    limit: int | None = None
    full_precision_eval: bool = True
    tasks: tuple[str, ...] = ()
    task_path: Path | None = None
    num_fewshot: int | None = None
    data_dir: Path | None = None
    cache_dir: Path = DEFAULT_CACHE
    device: str = "auto"
    dtype: str = "auto"
    activation_store: str = "cpu"
    calib_batch: int = field(default=4, metadata=DECIDES_CODES)
    attn_implementation: str | None = field(default=None, metadata=DECIDES_CODES)
    trust_remote_code: bool = False
    family: str | None = field(default=None, metadata=WHERE_IT_DIFFERS)
    deterministic: bool = False
    biases: bool = False
    evaluates: bool = False
    rotated: Rotation | None = None
    rotated_for: RunConfig | None = None


@dataclass(frozen=True)
class RunConfig:
    """What decides the codes of one run: every field is part of its identity, some by what they name.

    learner: the paper's method whose recipe ``learning`` is; solver: what rounds, with its own keyword ``options``.
    grid_kind: of the weights' grid (see `QuantSpec`). learning, act: see `Recipe`. target_correction, residual_correction:
    strength of a `Correction` (0: none), and whether it takes the residual stream's error in. saliency: parts of a linear's
    rows with weights of tokens (0: none), from the gradients for saliency_labels. tuning: of what was solved (None: it
    stays). resume: a run directory whose learned parameters are the start. act_scales, act_shifts:
    files of generate_act_scale_shift.py.
    rotation: of the model before anything is solved (None: it stays as it is).
    bias_correction: of what was solved. column_scales: folded into every block before it is learned or solved.
    avg_bits: stored bits of a weight, scales and all, that widths of the linears keep to; wbits is then a number near it.
    head_bits, embedding_bits: of the matrices outside the blocks (None: they stay); see `quant.run.outside`.
    """

    dataset: str = field(default="c4", metadata=BY_WHAT_IT_NAMES)
    seed: int = 0
    nsamples: int = 128
    solver: str = "quantease"
    options: Mapping[str, Any] = field(default_factory=dict)
    wbits: int = FULL_BITS
    group_size: int = -1
    symmetric: bool = False
    range: str = "minmax"
    levels: int | None = None
    grid_kind: str = field(default="integer", metadata=WHERE_IT_DIFFERS)
    learner: str | None = field(default=None, metadata=BY_WHAT_IT_NAMES)
    learning: Learning | None = None
    tuning: Tuning | None = field(default=None, metadata=WHERE_IT_DIFFERS)
    rotation: Rotation | None = field(default=None, metadata=WHERE_IT_DIFFERS)
    act: ActSpec = field(default_factory=ActSpec)
    resume: Path | None = field(default=None, metadata=BY_WHAT_IT_NAMES)
    act_scales: Path | None = field(default=None, metadata=BY_WHAT_IT_NAMES)
    act_shifts: Path | None = field(default=None, metadata=BY_WHAT_IT_NAMES)
    true_sequential: bool = False
    target_correction: float = field(default=0.0, metadata=WHERE_IT_DIFFERS)
    residual_correction: bool = field(default=False, metadata=WHERE_IT_DIFFERS)
    saliency: int = field(default=0, metadata=WHERE_IT_DIFFERS)
    saliency_labels: str = field(default=SAMPLED_LABELS, metadata=WHERE_IT_DIFFERS)
    bias_correction: bool = field(default=False, metadata=WHERE_IT_DIFFERS)
    avg_bits: float | None = field(default=None, metadata=WHERE_IT_DIFFERS)
    column_scales: bool = field(default=False, metadata=WHERE_IT_DIFFERS)
    head_bits: int | None = field(default=None, metadata=WHERE_IT_DIFFERS)
    embedding_bits: int | None = field(default=None, metadata=WHERE_IT_DIFFERS)
    num_layers: int = field(default=1000, metadata=BY_WHAT_IT_NAMES)
    solver_precision: str = "highest"

    @property
    def method(self) -> str:
        """What the run is called: by its solver, its learner, or both where the solver does not only round to nearest; by
        AutoRound where its parameters are tuned."""
        if self.tuning is not None and self.tuning.form == "offset":
            return AUTOROUND
        if self.learner is None:
            return self.solver
        return self.learner if self.solver == "rtn" else f"{self.learner}+{self.solver}"

    @property
    def width(self) -> str:
        """Bits of its weights, as names and tables have them."""
        return str(self.wbits) if self.avg_bits is None else f"{self.avg_bits:g}"

    @property
    def windows(self) -> int:
        """How many windows it is calibrated on."""
        return windows_of(self.dataset, self.nsamples)

    @property
    def quantizes(self) -> bool:
        """False where only the base model is evaluated."""
        return self.wbits != FULL_BITS or self.act.active or self.learning is not None

    @property
    def beyond_blocks(self) -> bool:
        """Whether head or embedding are quantized."""
        return self.head_bits is not None or self.embedding_bits is not None

    @property
    def shifts(self) -> bool:
        """Whether something is learned that ends in biases."""
        return self.learning is not None and self.learning.transform.shift

    @property
    def of_rotation(self) -> RunConfig | None:
        """What learned rotations depend on: calibration, and what is quantized to how many bits; None where none are learned."""
        if self.rotation is None or not self.rotation.steps:
            return None
        names = ("dataset", "seed", "nsamples", "wbits", "group_size", "symmetric", "levels", "act", "rotation")
        return RunConfig(**{name: getattr(self, name) for name in names})

    @property
    def gradient_labels(self) -> Labels | None:
        """What gradients of the original model are taken for; None where they are not asked for."""
        return Labels(self.saliency_labels, seed=self.seed) if self.saliency else None

    @property
    def correction(self) -> Correction | None:
        """Of what is solved for."""
        if not self.target_correction:
            return None
        return Correction(self.target_correction, float(self.residual_correction))

    def hidden_states(self, n_blocks: int) -> int:
        """How many sets of hidden states of the calibration windows are held at a time. n_blocks: of the model."""
        learning, labels = self.learning, self.gradient_labels
        solving = 1 if learning is None else 2 + learning.augmented + learning.attention
        if self.tuning is not None:  # full precision, and what stays in front of a window
            solving += 1 + (self.tuning.scope == "window" and self.tuning.together(n_blocks) > 1)
        return solving if labels is None else max(solving, labels.states_held(n_blocks))


@dataclass(frozen=True)
class Output:
    """Where the results of one run go. runs: where its directory is made if ``run_dir`` is not given.

    format: of the checkpoint in ``save``; fallback: the format to save in where an answer turns out not to fit the first
    (None: that is a failure); target: the software that is to load it. packed: evaluate with packed weights, as they
    would be used. imatrix: a file for llama.cpp's quantizer, of what inputs weigh.
    """

    runs: Path = Path("runs")
    run_dir: Path | None = None
    save: Path | None = None
    format: str = DEQUANTIZED
    fallback: str | None = None
    target: str | None = None
    packed: bool = False
    overwrite: bool = False
    imatrix: Path | None = None
