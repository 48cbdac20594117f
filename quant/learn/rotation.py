"""A rotated model as a checkpoint: tensors are rotated as they are read, so that all who read the model see the same one.

QuaRot (Ashkboos et al. 2024, arXiv 2404.00456, section 4). ``residual``: norms' weights go into their readers, then the
stream is x' = x Q. ``vo``: values of every head of keys and values are v H, and the output projection takes H back.
``qk``: queries and keys are q R and k R where attention multiplies them, behind rotary embedding. ``down``: the last linear of
a block reads x (H1 ⊗ H2), and its weight takes that back. What no weight holds is a tensor of its own in every block.
Matrices of the stream and of values may be learned ones (`quant.learn.spin`), given by name.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from models.checkpoint import Checkpoint
from models.family import HeadLayout, ModelFamily, ResidualStream, Seam, residual_stream
from models.load import LazyModel, Weights, build_meta
from quant.blocks.weights import ENDINGS, BlockWeights
from quant.core.errors import InputError
from quant.core.hadamard import kronecker_sizes, random_hadamard, seeded
from quant.core.names import ONLINE_ROTATIONS
from quant.learn.affine import Affine, apply_online, rewrite, rotate
from quant.learn.config import Rotation

Matrices = Mapping[str, Tensor]
RESIDUAL, VALUES = (
    "residual",
    ".vo",
)  # names: Q [hidden, hidden], and behind the number of a block [heads, d, d] of values


def check_rotation(family: ModelFamily, config: Any, rotation: Rotation) -> None:
    """Raise InputError, with what to do, for what cannot be rotated in a model of this configuration."""
    if family.experts:
        raise InputError(f"--rotate: not for mixtures of experts ({config.model_type}); drop the flag")
    rope = family.heads(config).rope
    others = f"--rotate {'vo,qk,down' if rope else 'vo,down'}"
    if "residual" in rotation.kinds:
        try:
            residual_stream(family, untied(config))
        except InputError as error:
            raise InputError(f"--rotate residual: {error}; use {others}") from error
    if "qk" in rotation.kinds and not rope:
        raise InputError(
            "--rotate qk: keys are rotated behind rotary embedding, "
            f"and this {config.model_type} model has none (learned positions or ALiBi); use --rotate vo,down"
        )


def untied(config: Any) -> Any:
    """The configuration, or a copy of it whose head is not tied to the embedding."""
    if not config.tie_word_embeddings:
        return config
    config = copy.deepcopy(config)
    config.tie_word_embeddings = False
    return config


def rotated(
    model: LazyModel,
    rotation: Rotation,
    device: torch.device,
    trust_remote_code: bool = False,
    matrices: Matrices | None = None,
) -> LazyModel:
    """The model with everything rotated that is asked for; of a rotated stream the head is not tied. device: where the
    products are computed, in float32 at least; tensors keep the dtype that they are stored in. matrices: learned ones, in the
    place of those of the seed. Raises InputError where `check_rotation` does."""
    check_rotation(model.family, model.config, rotation)
    config, module, storage = model.config, model.module, dict(model.storage)
    ties: dict[str, str] = getattr(module, "all_tied_weights_keys", None) or {}
    keys = {name: model.key(name) for name, _ in module.named_parameters() if name not in model.added}
    if "residual" in rotation.kinds and ties:
        config = untied(config)
        module = build_meta(config, model.dtype, trust_remote_code)
        keys |= {tied: keys[source] for tied, source in ties.items()}
        storage |= {tied: storage[source] for tied, source in ties.items()}
    rewriting = Rewriting.of(model, config, rotation, device)
    if matrices is not None:
        rewriting = rewriting.with_matrices(matrices)
    checkpoint = RotatedCheckpoint(model.checkpoint, keys, rewriting, len(model.blocks))
    return replace(model, config=config, module=module, checkpoint=checkpoint, storage=storage)


def random_matrices(model: LazyModel, rotation: Rotation) -> Matrices:
    """The random Hadamard matrices of a rotation's seed, float64, by name: those of all blocks are alike."""
    matrices: dict[str, Tensor] = {}
    if "residual" in rotation.kinds:
        matrices[RESIDUAL] = random_hadamard(model.config.hidden_size, seeded(rotation.seed, "residual"))
    if "vo" in rotation.kinds:
        (heads, size), generator = model.family.heads(model.config).v[1].shape, seeded(rotation.seed, "vo")
        of_values = torch.stack([random_hadamard(size, generator) for _ in range(heads)])
        matrices |= {f"{index}{VALUES}": of_values for index in range(len(model.blocks))}
    return matrices


@dataclass(frozen=True)
class Rewriting:
    """What becomes of the tensors of a model. blocks: path of the list of blocks; matrices: of the stream and of the values of
    every block; the norm offset of the family; inside: where those of values are folded; down: a linear with H1 and H2 in
    front of it; online: further tensors of a block, in the dtype of the files. device, dtype: of the products."""

    blocks: str
    layout: HeadLayout
    device: torch.device
    dtype: torch.dtype
    stream: ResidualStream | None = None
    matrices: Matrices = field(default_factory=dict)
    norm_offset: float = 0.0
    inside: tuple[Seam, ...] = ()
    down: tuple[str, Tensor, Tensor] | None = None
    online: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, model: LazyModel, config: Any, rotation: Rotation, device: torch.device) -> Rewriting:
        """That of a rotation, with its matrices made of its seed. config: the model's, its head not tied any more."""
        family, layout = model.family, model.family.heads(config)
        dtype = torch.float64 if torch.float64 in model.storage.values() else torch.float32
        generators = {kind: seeded(rotation.seed, kind) for kind in ONLINE_ROTATIONS}

        def matrix(kind: str, n: int) -> Tensor:
            return random_hadamard(n, generators[kind]).to(device, dtype)

        new = cls(family.blocks, layout.to(device), device, dtype, norm_offset=family.norm_offset)
        if "residual" in rotation.kinds:
            new = replace(new, stream=residual_stream(family, config))
        if "vo" in rotation.kinds:
            new = replace(new, inside=tuple(seam for seam in family.seams(config) if seam.kind == "vo"))
        new = new.with_matrices(random_matrices(model, rotation))
        if "qk" in rotation.kinds:
            attention = layout.k[0].rpartition(".")[0] + ENDINGS["head_matrices"]
            new = replace(new, online={attention: matrix("qk", layout.k[1].shape[1]).to(model.storage_dtype)})
        if "down" in rotation.kinds:
            linear = family.groups(config)[-1][-1]
            # rounded as files hold them: the weight takes back what the model runs with
            sizes = kronecker_sizes(model.linear_shapes()[linear][1])
            left, right = (matrix("down", size).to(model.storage_dtype) for size in sizes)
            parts = {linear + ENDINGS["lefts"]: left, linear + ENDINGS["rights"]: right}
            new = replace(new, down=(linear, left, right), online={**new.online, **parts})
        return new

    def with_matrices(self, matrices: Matrices) -> Rewriting:
        """The same with other rotations of the stream and of values."""
        return replace(self, matrices={name: m.to(self.device, self.dtype) for name, m in matrices.items()})

    def norms_of(self, module: str) -> list[str]:
        """Norms whose weights go into a module."""
        seams = () if self.stream is None else self.stream.norms
        return [norm for seam in seams if module in seam.consumers for norm in seam.producers]

    def apply(self, weights: Weights, block: int | None) -> Weights:
        """Some parameters of a block, or of those outside (None), rewritten; norms that they read are among them. Gradients
        reach the matrices."""
        outside = block is None
        weights = {name: tensor.to(self.device, self.dtype) for name, tensor in weights.items()}
        if self.stream is not None:
            norms = tuple(_within(seam, weights) for seam in self.stream.norms)
            stream = ResidualStream(_within(self.stream.seam, weights), norms)
            weights = rotate(weights, stream, self.layout, self.matrices[RESIDUAL], self.norm_offset, outside)
        for seam in () if outside else self.inside:
            folded = Affine(self.matrices[f"{block}{VALUES}"].mT, orthogonal=True)
            weights = rewrite(weights, _within(seam, weights), self.layout, folded)
        if self.down is not None and f"{self.down[0]}.weight" in weights:
            linear, left, right = self.down
            weights = apply_online(BlockWeights(weights), (linear,), left, right).parameters
        return weights


def _within(seam: Seam, weights: Weights) -> Seam:
    """The seam, of the modules alone that have their weights (producers: also only a bias) there."""
    consumers = (name for name in seam.consumers if f"{name}.weight" in weights)
    producers = (name for name in seam.producers if {f"{name}.weight", f"{name}.bias"} & set(weights))
    return replace(seam, producers=tuple(producers), consumers=tuple(consumers))


class RotatedCheckpoint(Checkpoint):
    """The tensors of a model, rotated one by one as they are read.

    names: keys of the checkpoint by names of the model's parameters; a parameter that the files do not hold under its own
    name (the head that was tied) has that of its source, and is a tensor here.
    """

    computes = True

    def __init__(self, base: Checkpoint, names: Mapping[str, str], rewriting: Rewriting, n_blocks: int) -> None:
        self.base, self.rewriting = base, rewriting
        self.path, self.reader, self.files = base.path, base.reader, base.files
        self._keys, uses = names, Counter(names.values())
        self._names = {name if uses[key] > 1 else key: name for name, key in names.items()}
        blocks = [f"{rewriting.blocks}.{index}." for index in range(n_blocks)]
        self._online = {prefix + name: tensor for prefix in blocks for name, tensor in rewriting.online.items()}
        self.extra = (*base.extra, *self._online)

    def __contains__(self, name: str) -> bool:
        return name in self._names or name in self._online or name in self.base

    def names(self) -> Iterable[str]:
        """Names of all tensors, with those that a rotation adds."""
        return dict.fromkeys([*self.base.names(), *self._names, *self._online])

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; no rotation changes one."""
        if name in self._online:
            return tuple(self._online[name].shape)
        return self.base.shape(self._key(name))

    def dtype_of(self, name: str) -> torch.dtype:
        """Dtype of a tensor, which rotated ones keep."""
        if name in self._online:
            return self._online[name].dtype
        return self.base.dtype_of(self._key(name))

    def read(self, name: str) -> Tensor:
        """A tensor as a plain checkpoint of the rotated model would hold it, on the CPU."""
        if name in self._online:
            return self._online[name].cpu().clone()  # every block's own: files hold no tensor twice
        if name not in self._names:
            return self.base.read(name)
        prefix, parameter, block = self._split(self._names[name])
        module = parameter.rpartition(".")[0]
        needed = [parameter, *(f"{norm}.weight" for norm in self.rewriting.norms_of(module))]
        read = {one: self.base.read(self._keys[prefix + one]) for one in dict.fromkeys(needed)}
        changed = self.rewriting.apply(read, block)[parameter]
        return changed.to(self.dtype_of(name)).cpu()

    def sha256(self) -> str:
        """Hash of the files."""
        return self.base.sha256()

    def _split(self, parameter: str) -> tuple[str, str, int | None]:
        """The prefix of the block that a parameter is in, its name there, and the block's number; neither outside."""
        inside = f"{self.rewriting.blocks}."
        if not parameter.startswith(inside):
            return "", parameter, None
        index, _, name = parameter.removeprefix(inside).partition(".")
        return f"{inside}{index}.", name, int(index)

    def _key(self, name: str) -> str:
        """The key in the files of a tensor here."""
        return self._keys[self._names[name]] if name in self._names else name
