"""A model that is never in memory as a whole: modules on `meta`, weights streamed from safetensors."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from models import family_of
from models.checkpoint import Checkpoint, resolve
from models.family import ModelFamily
from quant.core.errors import InputError

RECOMPUTED = (r"rotary_emb\.inv_freq$",)  # tensors of older files that the library computes itself
ATTENTION = (None, "eager", "sdpa")
Weights = dict[str, Tensor]
Opener = Callable[[Path, Mapping[str, Any]], Checkpoint]


@dataclass
class LazyModel:
    """A causal LM on `meta` with its checkpoint.

    added: biases that the checkpoint lacks and that are zero here, so that shifts can be held.
    dtype: of the arithmetic. Weights keep the precision of the checkpoint: what is read, or deployed by a
    method, is rounded to ``storage_dtype`` and then cast to ``dtype``.
    """

    name: str
    config: Any
    family: ModelFamily
    module: nn.Module
    checkpoint: Checkpoint
    dtype: torch.dtype
    storage_dtype: torch.dtype
    added: frozenset[str] = frozenset()

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder blocks (on `meta`)."""
        found = self.module.get_submodule(self.family.blocks)
        assert isinstance(found, nn.ModuleList)
        return found

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Linears of a block in order of execution, grouped by shared input."""
        return self.family.groups(self.config)

    @property
    def max_length(self) -> int:
        """Longest sequence that the position embeddings allow; 2048 where there is no limit (ALiBi)."""
        return int(getattr(self.config, "max_position_embeddings", None) or 2048)

    def key(self, name: str) -> str:
        """Checkpoint name of a module's tensor: hub files of older models lack or add the base prefix."""
        prefix = f"{self.module.base_model_prefix}."
        for candidate in (name, name.removeprefix(prefix), prefix + name):
            if candidate in self.checkpoint:
                return candidate
        raise InputError(f"{self.checkpoint.path} lacks the tensor {name}; the checkpoint does not fit its config.json")

    def _read(self, name: str, shape: torch.Size, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self.dtype
        if name in self.added:
            return torch.zeros(shape, dtype=dtype, device=device)
        tensor = self.checkpoint.read(self.key(name))
        if tensor.shape != shape:
            raise InputError(self._misfit(name, tuple(tensor.shape), tuple(shape)))
        tensor = tensor.to(device)
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(f"{name} holds NaN or infinite values; the checkpoint is damaged")
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    def _misfit(self, name: str, found: tuple[int, ...], asked: tuple[int, ...]) -> str:
        return f"{name} has shape {found} in {self.checkpoint.path}, but config.json asks for {asked}"

    def block_weights(
        self, index: int, device: torch.device, dtype: torch.dtype | None = None, without: Collection[str] = ()
    ) -> Weights:
        """Parameters and buffers of a block by their names inside it, ready for ``functional_call``.

        dtype: of the parameters, where it is not that of the arithmetic. without: parameters that are not read.
        """
        block, prefix = self.blocks[index], f"{self.family.blocks}.{index}."
        wanted = {name: p for name, p in block.named_parameters() if name not in without}
        weights = {name: self._read(prefix + name, p.shape, device, dtype) for name, p in wanted.items()}
        extra = {
            name.removeprefix(prefix): self.checkpoint.read(name).to(device, self.dtype)
            for name in self.checkpoint.extra
            if name.startswith(prefix)
        }
        return weights | extra | self._buffers(block, prefix, device)

    def outside_weights(self, device: torch.device) -> Weights:
        """Everything outside the blocks: embeddings, final norm, head; tied parameters once."""
        inside = f"{self.family.blocks}."
        with self.replaced_blocks([]):
            weights = {
                name: self._read(name, p.shape, device)
                for name, p in self.module.named_parameters()
                if not name.startswith(inside)
            }
            return weights | self._buffers(self.module, "", device)

    def _buffers(self, module: nn.Module, prefix: str, device: torch.device) -> Weights:
        """Buffers: computed ones exist on the CPU already, persistent ones on meta come from the checkpoint."""
        return {
            name: self._read(prefix + name, b.shape, device) if b.is_meta else b.to(device)
            for name, b in module.named_buffers()
        }

    @contextmanager
    def replaced_blocks(self, stand_ins: list[nn.Module]) -> Iterator[None]:
        """Put other modules where the blocks are, for the length of a `with`."""
        parent_name, _, name = self.family.blocks.rpartition(".")
        parent, blocks = self.module.get_submodule(parent_name), self.blocks
        setattr(parent, name, nn.ModuleList(stand_ins))
        try:
            yield
        finally:
            setattr(parent, name, blocks)

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of every linear of a block. Raises InputError where family and module disagree."""
        found = {n: m for n, m in self.blocks[0].named_modules() if isinstance(m, nn.Linear)}
        declared = [name for group in self.groups for name in group]
        if sorted(found) != sorted(declared):
            raise InputError(
                f"the family of {self.config.model_type!r} declares {declared}, its block has {list(found)}; "
                "see docs/adding-a-family.md"
            )
        return {name: (found[name].out_features, found[name].in_features) for name in declared}

    def check_tensors(self) -> None:
        """Raise InputError if a tensor is missing in the checkpoint, has another shape, or belongs to a block that is not
        there (headers only, but for biases)."""
        for name, parameter in self.module.named_parameters():
            if name in self.added:
                continue
            shape = self.checkpoint.shape(self.key(name))
            if shape != tuple(parameter.shape):
                raise InputError(self._misfit(name, shape, tuple(parameter.shape)))
        if surplus := next(self._surplus(), None):
            raise InputError(
                f"{self.checkpoint.path}: {surplus} belongs to none of the {len(self.blocks)} blocks that config.json "
                "describes; the checkpoint does not fit its config.json"
            )

    def _surplus(self) -> Iterator[str]:
        """Tensors under the blocks' prefix that the module has no place for, and that would change what it computes."""
        prefix = f"{self.module.base_model_prefix}."
        inside = {
            f"{spelt}."
            for spelt in (self.family.blocks, self.family.blocks.removeprefix(prefix), prefix + self.family.blocks)
        }
        held = [*self.module.named_parameters(), *self.module.named_buffers()]
        known = {spelt for name, _ in held for spelt in (name, name.removeprefix(prefix), prefix + name)}
        ignored = (*RECOMPUTED, *(getattr(self.module, "_keys_to_ignore_on_load_unexpected", None) or ()))
        for name in self.checkpoint.names():
            if name in known or name in self.checkpoint.extra or not name.startswith(tuple(inside)):
                continue
            if any(re.search(pattern, name) for pattern in ignored):
                continue
            # auto-gptq wrote biases of zeros where a model has none
            if not (name.endswith(".bias") and not bool(self.checkpoint.read(name).any())):
                yield name


def load_config(
    model: str, cache_dir: Path, trust_remote_code: bool = False, with_weights: bool = True, quantized: bool = False
) -> tuple[Any, Path]:
    """The configuration of a model and its local directory. Raises InputError for unknown families, and for quantized
    models where only full precision will do."""
    path = resolve(model, cache_dir, with_weights)
    try:
        declared = json.loads((path / "config.json").read_text())
        family_of(declared.get("model_type", "none"))
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (json.JSONDecodeError, OSError, AttributeError, TypeError) as error:
        raise InputError(
            f"{path / 'config.json'} is not a usable model configuration ({error})".splitlines()[0]
        ) from error
    if declared.get("quantization_config") and not quantized:
        raise InputError(f"{model} is quantized already; give the full-precision checkpoint")
    return config, path


def build_meta(config: Any, dtype: torch.dtype, trust_remote_code: bool = False) -> nn.Module:
    """The causal LM of a configuration, parameters on `meta`, computed buffers real."""
    with init_empty_weights():
        module: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    module.tie_weights()  # type: ignore[operator]
    return module.eval().requires_grad_(False)


def load_model(
    model: str,
    *,
    dtype: torch.dtype | None,
    cache_dir: Path,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    biases: bool = False,
    opener: Opener | None = None,
) -> LazyModel:
    """Open a hub id or a local directory. dtype None: the checkpoint's own.

    attn_implementation: of transformers (``eager``, ``sdpa``; None: its own choice). biases: give linears without a
    bias one of zeros where the family can (config.json then says so). opener: opens the tensors, also of a quantized
    checkpoint, given its directory and config.json.
    """
    if attn_implementation not in ATTENTION:
        raise InputError(f"attention {attn_implementation!r}: use eager or sdpa")
    config, path = load_config(model, cache_dir, trust_remote_code, quantized=opener is not None)
    if config._attn_implementation not in ATTENTION:
        config._attn_implementation = None  # a name on the hub, of code that would be fetched and run
    family = family_of(config.model_type)
    if attn_implementation is not None:
        if attn_implementation == "eager" and family.no_eager(config):
            raise InputError(f"{model}: {family.no_eager(config)}; use --attn_implementation sdpa")
        config._attn_implementation = attn_implementation
    checkpoint = opener(path, config.to_dict()) if opener else Checkpoint(path)
    storage = checkpoint.read(next(name for name in checkpoint.names() if name.endswith(".weight"))).dtype
    compute = dtype or storage
    try:
        module, added = build_meta(config, compute, trust_remote_code), frozenset[str]()
    except (ValueError, ImportError) as error:
        if attn_implementation is None:
            raise
        raise InputError(
            f"attention {attn_implementation!r} does not work with {config.model_type}; use eager "
            f"({str(error).strip().splitlines()[0][:120]})"
        ) from error
    if biases and family.biases:
        without = {name for name, _ in module.named_parameters()}
        config.update(dict(family.biases))
        module = build_meta(config, compute, trust_remote_code)
        added = frozenset(name for name, _ in module.named_parameters() if name not in without)
    lazy = LazyModel(model, config, family, module, checkpoint, compute, storage, added)
    lazy.linear_shapes()
    lazy.check_tensors()
    return lazy


def load_tokenizer(path: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model directory. Raises InputError where there is none."""
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError, AttributeError, TypeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path} has no usable tokenizer ({reason[:160]}); copy tokenizer.json into it") from error
