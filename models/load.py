"""A model that is never in memory as a whole: modules on `meta`, weights streamed from safetensors."""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from models import FAMILIES, TAKEN_FOR, check_taken_for, family_for, family_of
from models.alike import alike, check_linears
from models.checkpoint import Checkpoint, resolve
from models.container import CONFIG, metadata_of
from models.conv1d import plain_linears
from models.declared import LARGEST_SIZE, MOST_BLOCKS, check_declared, check_sizes, quantized_by
from models.experts import separate_experts
from models.family import Groups, ModelFamily
from models.unread import carried_over, own_head, saved_buffers, spellings
from quant.core.errors import InputError, foreign
from quant.core.finite import finite_everywhere

log = logging.getLogger(__name__)

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
IN_BLOCK = re.compile(r"(?:^|\.)(\d+)\.")  # a tensor of a list of modules, by its index
ATTENTION = (None, "eager", "sdpa")
Weights = dict[str, Tensor]
Opener = Callable[[Path], Checkpoint]
Read = Callable[[str], Tensor]  # a tensor of a checkpoint by its name there


@dataclass
class LazyModel:
    """A causal LM on `meta` with its checkpoint.

    added: biases that the checkpoint lacks and that are zero here, so that shifts can be held.
    dtype: of the arithmetic. Weights keep the precision of the checkpoint: what is read, or deployed by a
    method, is rounded to its ``storage`` dtype and then cast to ``dtype``.
    storage: dtype of every parameter in the checkpoint, by name. storage_dtype: that of most numbers in the blocks.
    carried: tensors that no parameter reads, by their names in the checkpoint, for the checkpoints that are saved.
    """

    name: str
    config: Any
    family: ModelFamily
    module: nn.Module
    checkpoint: Checkpoint
    dtype: torch.dtype
    storage_dtype: torch.dtype
    added: frozenset[str] = frozenset()
    storage: Mapping[str, torch.dtype] = field(default_factory=dict)
    carried: tuple[str, ...] = ()
    _shapes: dict[int, dict[str, tuple[int, int]]] = field(default_factory=dict, init=False, repr=False)

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder blocks (on `meta`)."""
        blocks = self.module.get_submodule(self.family.blocks)
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    @property
    def groups(self) -> Groups:
        """Linears of a block in order of execution, grouped by shared input, where all blocks are alike."""
        return self.family.groups(self.config)

    def groups_at(self, index: int) -> Groups:
        """The same of block ``index``."""
        return self.family.groups_of(self.config, index)

    @property
    def max_length(self) -> int:
        """Longest sequence that the position embeddings allow; 2048 where there is no limit (ALiBi)."""
        return int(getattr(self.config, "max_position_embeddings", None) or 2048)

    def storage_of(self, name: str, index: int | None = None) -> torch.dtype:
        """In which dtype a checkpoint holds a parameter of the model, or of block ``index``. What the source lacks has
        that of the weight beside it."""
        full = name if index is None else f"{self.family.blocks}.{index}.{name}"
        beside = f"{full.rpartition('.')[0]}.weight"
        return self.storage.get(full) or self.storage.get(beside) or self.storage_dtype

    @property
    def rows(self) -> int:
        """Rows of the embedding: ids of tokens are below."""
        return int(self.module.get_input_embeddings().weight.shape[0])  # type: ignore[operator]

    def key(self, name: str) -> str:
        """Checkpoint name of a module's tensor, or of the one that it is tied to."""
        ties: dict[str, str] = getattr(self.module, "all_tied_weights_keys", None) or {}
        tied = [target for target, source in ties.items() if source == name]
        for candidate in (spelt for one in (name, *tied) for spelt in spellings(one, self.module)):
            if candidate in self.checkpoint:
                return candidate
        stored = self.family.layout.on_disk(name)
        raise InputError(
            f"{self.checkpoint.path} lacks the tensor {stored}; the checkpoint does not fit its config.json"
        )

    def block_keys(self, index: int, without: Collection[str] = ()) -> list[str]:
        """What `block_weights` reads for the parameters of a block, by its names in the checkpoint, in that order."""
        prefix = f"{self.family.blocks}.{index}."
        names = (prefix + name for name, _ in self.blocks[index].named_parameters() if name not in without)
        return [self.key(name) for name in names if name not in self.added]

    def block_weights(
        self,
        index: int,
        device: torch.device,
        dtype: torch.dtype | None = None,
        without: Collection[str] = (),
        read: Read | None = None,
    ) -> Weights:
        """Parameters and buffers of a block by their names inside it, ready for ``functional_call``.

        dtype: of the parameters, where it is not that of the arithmetic. without: parameters that are not read. read: gives
        tensors of the checkpoint in its place, where they were read before.
        """
        block, prefix = self.blocks[index], f"{self.family.blocks}.{index}."
        wanted = {name: p for name, p in block.named_parameters() if name not in without}
        with _Placing(self, device, read) as placing:
            weights = {name: placing.put(prefix + name, p.shape, dtype or self.dtype) for name, p in wanted.items()}
            extra = {
                name.removeprefix(prefix): self.checkpoint.read(name).to(device, self.dtype)
                for name in self.checkpoint.extra
                if name.startswith(prefix)
            }
            return weights | extra | self._buffers(block, prefix, placing)

    def outside_weights(self, device: torch.device, without: Collection[str] = ()) -> Weights:
        """Everything outside the blocks: embeddings, final norm, head; tied parameters once. without: modules whose weights
        are not read."""
        inside, unread = f"{self.family.blocks}.", {f"{module}.weight" for module in without}
        with self.replaced_blocks([]), _Placing(self, device) as placing:
            weights = {
                name: placing.put(name, p.shape, self.dtype)
                for name, p in self.module.named_parameters()
                if not name.startswith(inside) and name not in unread
            }
            return weights | self._buffers(self.module, "", placing)

    def _buffers(self, module: nn.Module, prefix: str, placing: _Placing) -> Weights:
        """Buffers: those of the checkpoint from there, computed ones exist on the CPU already."""
        saved = saved_buffers(module)
        return {
            name: placing.put(prefix + name, b.shape, b.dtype)
            if b.is_meta or (name in saved and self._holds(prefix + name))
            else b.to(placing.device)
            for name, b in module.named_buffers()
        }

    def _holds(self, name: str) -> bool:
        return any(spelt in self.checkpoint for spelt in spellings(name, self.module))

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

    def linear_shapes(self, index: int | None = None) -> dict[str, tuple[int, int]]:
        """(out, in) of every linear of block ``index``, or of all blocks by their names inside one: a name has one shape.
        Raises InputError where family and module disagree."""
        if index is not None:
            if index not in self._shapes:
                self._shapes[index] = self._shapes_of(index)
            return self._shapes[index]
        shapes: dict[str, tuple[int, int]] = {}
        for block in range(len(self.blocks)):
            shapes |= self.linear_shapes(block)
        return shapes

    def _shapes_of(self, index: int) -> dict[str, tuple[int, int]]:
        linears = {n: m for n, m in self.blocks[index].named_modules() if isinstance(m, nn.Linear)}
        declared = [name for group in self.groups_at(index) for name in group]
        if sorted(linears) != sorted(declared):
            raise InputError(
                f"the family of {self.config.model_type!r} declares {declared}, its block has {list(linears)}; "
                "see docs/adding-a-family.md"
            )
        return {name: (linears[name].out_features, linears[name].in_features) for name in declared}

    def check_tensors(self) -> None:
        """Look at every tensor of the checkpoint (headers only, but for few), and keep what they say. Raises InputError
        if one is missing, has another shape, holds no floating-point numbers, or would be left out of what is computed.
        """
        buffers = (item for item in saved_buffers(self.module).items() if self._holds(item[0]))
        held = [*self.module.named_parameters(), *buffers]
        storage = {}
        for name, tensor in held:
            if name in self.added:
                continue
            key = self.key(name)
            shape, dtype = self.checkpoint.shape(key), self.checkpoint.dtype_of(key)
            if shape != tuple(tensor.shape):
                raise InputError(
                    f"{name} has shape {shape} in {self.checkpoint.path}, but config.json asks for {tuple(tensor.shape)}"
                )
            if tensor.is_floating_point() and dtype not in FLOATS:
                raise InputError(
                    f"{name} holds {str(dtype).removeprefix('torch.')} in {self.checkpoint.path}, where floating-point "
                    "numbers of 16 bits or more belong: give the unquantized model"
                )
            storage[name] = dtype
        self.storage = storage
        self.carried = carried_over(self.module, self.family.blocks, len(self.blocks), self.checkpoint)


class _Placing:
    """Tensors of a model's checkpoint on their way to a device; all are finite where a `with` of it ends without an InputError.
    On a CPU each is looked at as it comes, a device is asked once: a question for every tensor would make the host wait for
    each. read: gives tensors in the place of the checkpoint."""

    def __init__(self, model: LazyModel, device: torch.device, read: Read | None = None) -> None:
        self.device, self._model, self._read = device, model, read or model.checkpoint.read
        self._finite: dict[str, Tensor] = {}

    def __enter__(self) -> _Placing:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if error is None and self._finite:
            for name, finite in zip(self._finite, torch.stack(list(self._finite.values())).tolist(), strict=True):
                self._check(name, finite)

    def put(self, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """The tensor of a parameter or buffer; floats in this dtype."""
        if name in self._model.added:
            return torch.zeros(shape, dtype=dtype, device=self.device)
        tensor = self._read(self._model.key(name)).to(self.device, non_blocking=True)
        finite = finite_everywhere(tensor)
        if self.device.type == "cpu":
            self._check(name, bool(finite))
        else:
            self._finite[name] = finite
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    def _check(self, name: str, finite: bool) -> None:
        if not finite:
            raise InputError(f"{name} holds NaN or infinite values; the checkpoint is damaged")


def load_config(
    model: str,
    cache_dir: Path,
    trust_remote_code: bool = False,
    with_weights: bool = True,
    quantized: bool = False,
    family: str | None = None,
) -> tuple[Any, Path]:
    """The configuration of a model and its local directory. family: what one of an unknown type is taken for. Raises
    InputError for unknown families, and for quantized models where only full precision will do."""
    path = resolve(model, cache_dir, with_weights)
    declared = metadata_of(path)
    model_type = declared.get("model_type", "none")
    if family is None:
        family_of(model_type, lambda: _advice(path, declared, trust_remote_code))
    else:
        check_taken_for(family, model_type)
    check_declared(declared, path / CONFIG)
    with foreign(f"{path / 'config.json'} is not a usable model configuration"):
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    if declared.get("quantization_config") and not quantized:
        raise InputError(f"{model} is quantized already{quantized_by(path, declared)}")
    if family is not None:
        setattr(config, TAKEN_FOR, family)
    return config, path


def _advice(path: Path, declared: Mapping[str, Any], trust_remote_code: bool) -> str:
    """What to do with a model of an unknown type: what it looks like, where the library builds one of its configuration."""
    inner = declared.get("text_config")
    if isinstance(inner, dict) and any(inner.get("model_type") in family.model_types for family in FAMILIES):
        return f"; its language model ({inner['model_type']}) is read where it is saved by itself"
    try:
        with foreign("not known to the library either"):
            config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        names = alike(library_module(config, torch.float32, trust_remote_code), config, FAMILIES)
    except InputError:  # that its type is unknown is what has to be said
        return ""
    if not names:
        return ""
    return f"; its blocks look like those of {' and '.join(names)}: --family {names[0]} takes it for one, at your risk"


def build_meta(config: Any, dtype: torch.dtype, trust_remote_code: bool = False) -> nn.Module:
    """The causal LM of a configuration, parameters on `meta`, computed buffers real; all that is quantized in its blocks is
    plain linears. Raises InputError, naming config.json, where no model can be built of it."""
    module, family = library_module(config, dtype, trust_remote_code), family_for(config)
    with foreign(f"a {config.model_type} model has no blocks where the family {family.model_types[0]} has them"):
        blocks = module.get_submodule(family.blocks)
        assert isinstance(blocks, nn.ModuleList)
    separate_experts(blocks, family)
    plain_linears(blocks, family.layout)
    if getattr(config, TAKEN_FOR, None):
        check_linears(blocks[0], family, config)
    return module.eval().requires_grad_(False)


def library_module(config: Any, dtype: torch.dtype, trust_remote_code: bool = False) -> nn.Module:
    """The library's causal LM of a configuration, parameters on `meta`, computed buffers real. Raises InputError as
    `build_meta`."""
    where = Path(config.name_or_path or ".") / "config.json"
    check_sizes(config, where, MOST_BLOCKS, LARGEST_SIZE)
    hint = "; use --attn_implementation eager" if config._attn_implementation == "sdpa" else ""
    with foreign(f"{where} describes no model that can be built{hint}"):
        with init_empty_weights(), _EmptyOnMeta():
            module: nn.Module = AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=trust_remote_code
            )
        module.tie_weights()  # type: ignore[operator]  # not above: parameters are made anew there
    return module


class _EmptyOnMeta(TorchFunctionMode):
    """Memory that a parameter would be initialized in is not taken: without this, `init_empty_weights` drops parameters
    only after they were made and filled."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        if function is torch.empty and options.get("device") is None:
            options["device"] = "meta"
        return function(*args, **options)


def load_model(
    model: str,
    *,
    dtype: torch.dtype | None,
    cache_dir: Path,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    biases: bool = False,
    opener: Opener | None = None,
    family: str | None = None,
) -> LazyModel:
    """Open a hub id or a local directory. dtype None: the checkpoint's own.

    attn_implementation: of transformers (``eager``, ``sdpa``; None: its own choice). biases: give linears without a
    bias one of zeros where the family can (config.json then says so). opener: opens the tensors, also of a quantized
    checkpoint, given its directory and config.json. family: what a model of an unknown type is taken for.
    """
    if attn_implementation not in ATTENTION:
        raise InputError(f"attention {attn_implementation!r}: use eager or sdpa")
    config, path = load_config(model, cache_dir, trust_remote_code, quantized=opener is not None, family=family)
    if config._attn_implementation not in ATTENTION:
        config._attn_implementation = None  # a name on the hub, of code that would be fetched and run
    kind = family_for(config)
    if attn_implementation is not None:
        if attn_implementation == "eager" and kind.no_eager(config):
            raise InputError(f"{model}: {kind.no_eager(config)}; use --attn_implementation sdpa")
        config._attn_implementation = attn_implementation
    if (path / "adapter_config.json").exists():
        raise InputError(f"{path} holds an adapter (adapter_config.json): merge it into the model first")
    checkpoint = opener(path) if opener else Checkpoint(path)
    storage = blocks_dtype(checkpoint)
    compute = dtype or storage
    check_sizes(config, path / "config.json", *sizes_of(checkpoint))
    module, added = build_meta(config, compute, trust_remote_code), frozenset[str]()
    if tied := own_head(module, checkpoint):
        log.warning("%s: config.json ties %s, which has values of its own: it is not tied here", path, tied)
        config.tie_word_embeddings = False
        module = build_meta(config, compute, trust_remote_code)
    if biases and kind.biases:
        without = {name for name, _ in module.named_parameters()}
        config.update(dict(kind.biases))
        module = build_meta(config, compute, trust_remote_code)
        added = frozenset(name for name, _ in module.named_parameters() if name not in without)
    lazy = LazyModel(model, config, kind, module, checkpoint, compute, storage, added)
    with foreign(f"{path / 'config.json'} does not describe a model of the family {config.model_type}"):
        lazy.linear_shapes()
        kind.heads(config)
        kind.seams(config)
    lazy.check_tensors()
    return lazy


def blocks_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """In which most numbers of the blocks' matrices are stored. Raises InputError where there are none."""
    numbers: Counter[torch.dtype] = Counter()
    for name in checkpoint.names():
        shape = checkpoint.shape(name)
        if IN_BLOCK.search(name) and len(shape) > 1 and checkpoint.dtype_of(name) in FLOATS:
            numbers[checkpoint.dtype_of(name)] += math.prod(shape)
    if not numbers:
        raise InputError(f"{checkpoint.path} holds no weights of blocks in floating-point numbers of 16 bits or more")
    return numbers.most_common(1)[0][0]


def sizes_of(checkpoint: Checkpoint) -> tuple[int, int]:
    """How many blocks there are by the names of the tensors, and the largest dimension of any."""
    blocks = {match[1] for name in checkpoint.names() if (match := IN_BLOCK.search(name))}
    return len(blocks), max((size for name in checkpoint.names() for size in checkpoint.shape(name)), default=0)


def load_tokenizer(path: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model directory. Raises InputError where there is none, or none that works."""
    with foreign(f"{path} has no usable tokenizer; copy tokenizer.json into it"):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        tokenizer.decode(tokenizer.encode("It works."))
    return tokenizer
