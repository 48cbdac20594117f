"""Damaged configurations and tokenizers: either what transformers itself makes of them, or one line that names the file."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from models.load import load_model, load_tokenizer
from quant.blocks.stream import BlockStream
from quant.blocks.weights import BlockWeights
from quant.core.errors import InputError
from tests.damage import odd_files, odd_objects
from tests.helpers import CPU

IDS = torch.arange(2 * 12).view(2, 12) * 7 % 250
TEXT = "It works, twice: 3 + 4 = 7."
CASES = 12  # of each kind; all 5,395 of eight configurations were run once


def some(declared: dict, seed: int, count: int = CASES) -> list[tuple[str, bytes]]:
    """Damaged forms of a JSON file: a sample of those with one odd entry."""
    cases = [(name, json.dumps(value).encode()) for name, value in odd_objects(declared)]
    return random.Random(seed).sample(cases, count)


def our_logits(path: Path) -> torch.Tensor:
    model = load_model(str(path), dtype=torch.float32, cache_dir=path.parent / "cache")
    outside = model.outside_weights(CPU)
    stream = BlockStream(model, IDS, device=CPU, batch=2).capture(outside)
    for index in range(len(model.blocks)):
        stream.run(index, BlockWeights.read(model, index, CPU), advance=True)
    return stream.logits(slice(0, 2), outside)


def is_right_or_refused(path: Path, file: str) -> bool:
    """Whether the model is refused in one line; asserts that it is computed as transformers computes it otherwise."""
    try:
        logits = our_logits(path)
    except InputError as error:
        assert "\n" not in str(error)
        assert any(word in str(error) for word in (file, "config.json", "model family", "NaN or infinite")), error
        return True
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()(IDS).logits
    torch.testing.assert_close(logits, theirs, rtol=1e-3, atol=1e-3, equal_nan=True)
    return False


@pytest.mark.parametrize("name", ["llama", "opt", "bloom", "falcon 40b", "mistral", "gemma2"])
def test_an_odd_entry_of_a_configuration(name, model_dir, tmp_path):
    path = Path(shutil.copytree(model_dir(name), tmp_path / "model"))
    declared = json.loads((path / "config.json").read_text())
    refused = 0
    for case, content in some(declared, seed=len(name), count=2 * CASES):
        (path / "config.json").write_bytes(content)
        try:
            refused += is_right_or_refused(path, "config.json")
        except Exception as error:
            raise AssertionError(f"{name}, {case}") from error
    assert 0 < refused < 2 * CASES, "both ways are seen"


def test_a_configuration_that_is_damaged_as_a_whole(model_dir, tmp_path):
    path = Path(shutil.copytree(model_dir("llama"), tmp_path / "model"))
    accepted = []
    for case, content in odd_files(json.loads((path / "config.json").read_text())):
        (path / "config.json").write_bytes(content)
        if not is_right_or_refused(path, "config.json"):
            accepted.append(case)
    assert accepted == ["half a surrogate"], "an entry that nobody reads"


SIZES = {
    "num_hidden_layers": (10**12, "asks for 1000000000000 blocks, where 1 to 3 can be"),
    "num_attention_heads": (0, "config.json"),
    "vocab_size": (10**12, "vocab_size is 1000000000000, where 1 to 264 can be"),
    "max_position_embeddings": (10**12, "embed_positions.weight has shape"),
    "pad_token_id": (10**6, "describes no model that can be built .Padding_idx"),
    "activation_function": ("x", "describes no model that can be built"),
    "dropout": (3, "block 0 does not run: .* .dropout probability"),
}


@pytest.mark.parametrize("key", SIZES)
def test_absurd_sizes_are_refused_before_anything_is_built_in_them(key, model_dir, tmp_path):
    path = Path(shutil.copytree(model_dir("opt"), tmp_path / "model"))
    value, message = SIZES[key]
    declared = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(declared | {key: value}))
    with pytest.raises(InputError, match=message):
        our_logits(path)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_an_odd_entry_of_a_tokenizer(file, model_dir, tmp_path):
    """A tokenizer that is taken gives the tokens that the library gives."""
    path = Path(shutil.copytree(model_dir("llama"), tmp_path / "model"))
    declared = json.loads((path / file).read_text())
    small = declared | {"model": declared["model"] | {"vocab": {"a": 0}}} if "model" in declared else declared
    cases = [*some(small, seed=len(file), count=2 * CASES), *odd_files(declared)]
    cases += [("x", json.dumps(declared | {"model_max_length": "x", "padding": "x"}).encode())]
    refused = 0
    for case, content in cases:
        (path / file).write_bytes(content)
        try:
            ids = load_tokenizer(path).encode(TEXT)
        except InputError as error:
            assert "\n" not in str(error) and "tokenizer" in str(error)
            refused += 1
        except Exception as error:
            raise AssertionError(f"{file}, {case}") from error
        else:
            assert ids == AutoTokenizer.from_pretrained(path).encode(TEXT), case
    assert 0 < refused < len(cases)
