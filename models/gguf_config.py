"""What a GGUF file says of its model, as the config.json and the tokenizer of a directory under the cache: transformers'
own reader of such files, and what it leaves out (`models/gguf_layout.py`). The tensors stay where they are, behind a link."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import transformers
from transformers import AutoConfig, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from models.container import CONFIG
from models.gguf_architectures import BLOCK
from models.gguf_file import LINK, PLAIN, values_of
from models.gguf_header import Header, read_header
from models.gguf_layout import ROTARY, architecture_of, corrections, rotary_scaling, scaled
from quant.core.errors import InputError, foreign
from quant.core.files import hold_lock, write_json
from quant.core.text import brief

log = logging.getLogger(__name__)
LAYOUT = 1  # of what is written here; another number, another directory
READING_SECONDS = 600.0  # that another process may take to read what this one waits for
# How text is cut before merges (tokenizer.ggml.pre), where transformers cuts as llama.cpp does
CUTS = ("gpt-2", "smollm", "llama3", "llama-v3", "llama-bpe", "tekken", "qwen2", "deepseek-r1-qwen", "megrez")


def unpack(file: Path, cache_dir: Path) -> Path:
    """The directory of a GGUF file's model under the cache: config.json, tokenizer, and a link to the file. Raises
    InputError, in one line, for a file that is damaged or holds what is not covered."""
    file = file.resolve()
    header = read_header(file)
    architecture_of(header.facts, header.tensors, file)
    target = cache_dir / "gguf" / f"{file.stem}-{_key(file, header)}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with hold_lock(target.with_name(f".{target.name}.lock"), f"the reading of {file}", patience=READING_SECONDS):
        if not (target / CONFIG).exists():
            target.mkdir(exist_ok=True)
            _write_tokenizer(file, header, target)
            (target / LINK).unlink(missing_ok=True)
            (target / LINK).symlink_to(file)
            write_json(target / CONFIG, _config(file, header))  # last: it marks a whole directory
    return target


def _key(file: Path, header: Header) -> str:
    """By the file's place, its header and size, and by what reads it."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        digest.update(stream.read(header.length))
    read_by = (str(file), file.stat().st_size, LAYOUT, transformers.__version__)
    digest.update(repr(read_by).encode())
    return digest.hexdigest()[:16]


def _config(file: Path, header: Header) -> dict[str, Any]:
    """config.json of the file, as transformers writes one."""
    with foreign(f"{file}: transformers makes no configuration of its header"):
        fields: dict[str, Any] = AutoConfig.from_pretrained(file.parent, gguf_file=file.name).to_dict()
    rotary = None
    if ROTARY in header.tensors:
        if header.tensors[ROTARY].type not in PLAIN or len(header.tensors[ROTARY].shape) != 1:
            raise InputError(f"{file}: {ROTARY} is no list of plain numbers; download it again")
        rotary = values_of(np.memmap(file, np.uint8, "r"), header.tensors[ROTARY]).float()
    changed = corrections(header.facts, header.tensors, file)
    if scaling := rotary_scaling(header.facts, rotary, file):
        changed["rope_parameters"] = scaled(
            changed.get("rope_parameters") or fields.get("rope_parameters") or {}, scaling
        )
    with foreign(f"{file}: no configuration can be made of its header"):
        config = AutoConfig.for_model(fields.pop("model_type"), **fields | changed)
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    config.dtype = _dtype(header)
    written: dict[str, Any] = json.loads(config.to_json_string())
    return {key: value for key, value in written.items() if key not in ("_model_name_or_path", "_name_or_path")}


def _dtype(header: Header) -> Any:
    """In which most numbers of the blocks are read."""
    numbers: Counter[Any] = Counter()
    for name, tensor in header.tensors.items():
        if BLOCK.match(name):
            numbers[PLAIN.get(tensor.type, PLAIN[gguf.GGMLQuantizationType.F32])] += tensor.size
    return numbers.most_common(1)[0][0] if numbers else PLAIN[gguf.GGMLQuantizationType.F32]


def _write_tokenizer(file: Path, header: Header, target: Path) -> None:
    _check_tokens(file, header.facts)
    with foreign(f"{file}: transformers makes no tokenizer of its header"):
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(target)


def _check_tokens(file: Path, facts: Mapping[str, Any]) -> None:
    """Raise InputError where there is no vocabulary; warn where text may be cut otherwise than the model learned it."""
    if facts.get("tokenizer.ggml.tokens") is None:
        raise InputError(f"{file} has no vocabulary (tokenizer.ggml.tokens); give the model as safetensors")
    cut = facts.get("tokenizer.ggml.pre")
    if facts.get("tokenizer.ggml.model") == "gpt2" and cut not in CUTS:
        log.warning("%s: text is cut by %s in a way that transformers may not know", file, brief(repr(cut), 40))
