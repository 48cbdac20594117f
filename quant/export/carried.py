"""What a checkpoint takes over from the model that it was made of: config.json but for what changed, and side files.

Nothing is written again by the installed library, which would rename fields, drop files and name classes that other
versions do not know.
"""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from models.checkpoint import RESULTS
from models.container import CONFIG, GPTQ_CONFIG, INDEX, SINGLE
from models.side_files import ABOUT, check_own, is_one_of, side_files
from quant.core.files import check_plain_file, read_json

Json = dict[str, Any]

# Patterns of file names, relative to the model's directory
TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "additional_chat_templates/*",
             "*.model", "*.tiktoken", "tekken.json", "merges.txt", "vocab.*", "*.jinja")  # fmt: skip
CARRIED = (*TOKENIZER, "generation_config.json", *ABOUT)

ROTARY = ("rope_theta", "partial_rotary_factor")  # beside rope_scaling in transformers 4, in rope_parameters in 5
WITH_LENGTH = ("llama3", "yarn", "longrope")  # types that scale from original_max_position_embeddings


def carried_config(declared: Mapping[str, Any], dtype: torch.dtype, changes: Mapping[str, Any]) -> Json:
    """config.json of a checkpoint made of a model with config.json ``declared``: its fields in their order, with the
    dtype in which tensors are stored, and what else changed. Rotary settings, dtype and number of experts in the form of
    transformers 5 alone are there in that of 4 too: 5 reads either, other readers the older one only."""
    older = "torch_dtype" in declared and "dtype" not in declared
    names = dict.fromkeys(("torch_dtype",) if older else ("dtype", "torch_dtype"), str(dtype).removeprefix("torch."))
    experts = {"num_experts": declared["num_local_experts"]} if "num_local_experts" in declared else {}
    return {**experts, **declared, **older_rotary_form(declared), **names, **changes}


def older_rotary_form(declared: Mapping[str, Any]) -> Json:
    """The fields ``rope_theta``, ``rope_scaling`` and ``partial_rotary_factor`` of transformers 4 that ``declared`` lacks,
    from ``rope_parameters`` of 5 (modeling_rope_utils.py, RotaryEmbeddingConfigMixin), which reads the older form itself.
    Empty where nothing is missing, and for settings by layer type, which only 5 has."""
    parameters, scaling = declared.get("rope_parameters"), declared.get("rope_scaling")
    if not parameters or any(isinstance(value, dict) for value in parameters.values()):
        return {}
    added = {key: parameters[key] for key in ROTARY if key in parameters and declared.get(key) is None}
    rest = {key: value for key, value in parameters.items() if key not in ROTARY}
    if rest.get("rope_type", "default") == "default" or scaling:
        return added
    return added | _older_scaling(rest, declared)


def _older_scaling(parameters: Json, declared: Mapping[str, Any]) -> Json:
    """``rope_scaling`` with all that transformers 5 fills in, and 4 does not (or takes from elsewhere)."""
    kind, length = parameters["rope_type"], declared.get("max_position_embeddings")
    if kind not in WITH_LENGTH or length is None:
        return {"rope_scaling": parameters}
    original = declared.get("original_max_position_embeddings") or parameters.get("original_max_position_embeddings")
    original = original or length
    scaling = parameters | {"original_max_position_embeddings": original}
    ratio = length / original
    if kind != "llama3" and scaling.get("factor") is None:
        scaling["factor"] = ratio
    if kind != "longrope":
        return {"rope_scaling": scaling}
    # 4 takes the length from beside rope_scaling and the ratio of lengths for the factor, whatever the factor is
    if scaling["factor"] != ratio and scaling.get("attention_factor") is None:
        factor = scaling["factor"]
        scaling["attention_factor"] = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return {"rope_scaling": scaling, "original_max_position_embeddings": original}


def names_written(source: Path, declared: Mapping[str, Any]) -> set[str]:
    """Names of what a checkpoint of a model has in its directory, besides shards. Raises InputError where
    `carried_files` does."""
    carried = carried_files(source, declared)
    return {SINGLE, INDEX, CONFIG, GPTQ_CONFIG, RESULTS, *(file.relative_to(source).parts[0] for file in carried)}


def carried_files(source: Path, declared: Mapping[str, Any]) -> list[Path]:
    """The files of a model that its checkpoint takes over: tokenizer, generation config, licence, README, and the
    Python that ``auto_map`` names. Raises InputError for links to somewhere else, also of files that are taken over after
    they were read."""
    inside = sorted((*source.iterdir(), *source.glob("additional_chat_templates/*")))
    code = _brings_code(source, declared)
    files = [f for f in inside if (code and f.suffix == ".py") or is_one_of(f.relative_to(source), CARRIED)]
    files = [file for file in files if file.is_file()]
    for file in (*files, *side_files(source)):
        check_own(file, source)
    return files


def _brings_code(source: Path, declared: Mapping[str, Any]) -> bool:
    tokenizer = source / "tokenizer_config.json"
    check_plain_file(tokenizer)
    return bool(declared.get("auto_map") or (tokenizer.is_file() and read_json(tokenizer).get("auto_map")))


def side_file_writer(source: Path, declared: Mapping[str, Any], tokenizer: Any = None) -> Callable[[Path], None]:
    """Copies a model's side files into a directory, byte for byte; a tokenizer that has none there is written."""
    files = carried_files(source, declared)

    def write(directory: Path) -> None:
        for file in files:
            copy = directory / file.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)
        if tokenizer is not None and not any(is_one_of(file.relative_to(source), TOKENIZER) for file in files):
            _save_tokenizer(tokenizer, directory)

    return write


def about_writer(source: Path) -> Callable[[Path], None]:
    """Copies README, licence and the like of a model into a directory."""
    files = [file for file in sorted(source.iterdir()) if is_one_of(Path(file.name), ABOUT) and file.is_file()]
    for file in files:
        check_own(file, source)

    def write(directory: Path) -> None:
        for file in files:
            shutil.copyfile(file, directory / file.name)

    return write


def drop_about(directory: Path, others: Iterable[Path]) -> None:
    """Remove README, licence and the like from a checkpoint whose target has a person's own under the same name."""
    for file in others:
        if is_one_of(Path(file.name), ABOUT):
            (directory / file.name).unlink(missing_ok=True)


def _save_tokenizer(tokenizer: Any, directory: Path) -> None:
    """Write the tokenizer's files. Raises OSError, with the directory's name, where the disk does not take them: the
    tokenizers library then raises a plain Exception."""
    try:
        tokenizer.save_pretrained(directory)
    except Exception as error:
        number = re.search(r"os error (\d+)", str(error))
        if type(error) is Exception and number is not None:
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(directory)) from error
        raise
