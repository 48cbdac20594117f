"""Conversions: they lose nothing, replace nobody's files, and leave nothing behind where they fail."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from models import container
from quant.blocks.weights import INPUT_RANGE, ONLINE
from quant.core.errors import InputError
from quant.export.read import QuantizedCheckpoint
from quant.run.convert import convert
from tests.damage import (
    add_to_blocks,
    broken,
    damaged,
    edit_config,
)
from tests.helpers import ROOT, demo_config, perform, perplexity

CT = "compressed-tensors"


def test_conversions_lose_nothing(exported):
    base, _ = exported
    path = base / "saved"
    for number, kind in enumerate(("gptq", "compressed-tensors", "bitplane", "gptq_v2")):
        convert(path, kind, base / f"chain-{number}")
        path = base / f"chain-{number}"
    first, last = (load_file(p / "model.safetensors") for p in (base / "saved", path))
    assert first.keys() == last.keys()
    assert all(torch.equal(first[name], last[name]) for name in first)
    with pytest.raises(InputError, match="is not empty"):
        convert(path, "gptq", base / "saved")


@pytest.mark.parametrize("name", ["config.json", "results.json"])
def test_a_broken_file_is_one_line_when_converting(name, exported, tmp_path):
    path = damaged(exported[0], tmp_path, broken(name))
    with pytest.raises(InputError, match=f"{name} is truncated or not JSON"):
        convert(path, "bitplane", tmp_path / "out")


FULL_DISK = """
import resource, sys
from pathlib import Path
import torch
from quant.cli.errors import exit_code_of
from quant.run.convert import convert
from models.checkpoint import resolve

source, out = map(Path, sys.argv[1:])
torch.save({"a.weight": torch.randn(200, 200)}, out / "pytorch_model.bin")
(out / "config.json").write_text("{}")
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
print(exit_code_of(lambda: convert(source, "gptq_v2", out / "checkpoint")))
print(exit_code_of(lambda: resolve(str(out), out / "cache")))
"""


def test_a_full_disk_is_one_line_and_leaves_nothing(exported, tmp_path):
    """The limit on a file's size is met as a full disk is: inside of the library that writes the tensors."""
    command = [sys.executable, "-c", FULL_DISK, str(exported[0] / "run"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == ["1", "1"] and "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 2 and all("File too large: " in line for line in lines)
    left = [file.relative_to(tmp_path).name for file in tmp_path.rglob("*") if file.is_file()]
    assert sorted(left) == ["config.json", "pytorch_model.bin"]


def test_space_is_looked_for_before_work(exported, tmp_path, monkeypatch):
    free = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    for source in ("run", "saved"):
        with pytest.raises(InputError, match="out needs about 0.00 GB, the disk has 0.00 GB free"):
            convert(exported[0] / source, "bitplane", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_only_checkpoints_are_overwritten(exported, tmp_path, monkeypatch):
    notes, out = tmp_path / "notes", tmp_path / "out"
    notes.mkdir()
    (notes / "diary.txt").write_text("mine")
    with pytest.raises(
        InputError, match="holds no checkpoint that this toolkit wrote, and --overwrite replaces nothing else"
    ):
        convert(exported[0] / "saved", "bitplane", notes, overwrite=True)
    assert (notes / "diary.txt").read_text() == "mine"
    with pytest.raises(InputError, match="--out .*saved is the same place as the source"):
        convert(exported[0] / "saved", "bitplane", exported[0] / "saved", overwrite=True)
    convert(exported[0] / "saved", "bitplane", out)
    before = (out / "config.json").read_text()

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(container, "write_tensors", full)
        convert(exported[0] / "saved", "gptq_v2", out, overwrite=True)
    assert (out / "config.json").read_text() == before and {p.name for p in tmp_path.iterdir()} == {"notes", "out"}
    convert(exported[0] / "saved", "gptq_v2", out, overwrite=True)
    assert QuantizedCheckpoint(out).format.name == "gptq_v2" and {p.name for p in tmp_path.iterdir()} == {
        "notes",
        "out",
    }
    modes = {file.name: file.stat().st_mode & 0o777 for file in out.iterdir()}
    assert modes["model.safetensors"] == modes["config.json"], "readable as any new file, not by its owner alone"


def test_side_files_come_along(exported, tmp_path):
    source = damaged(exported[0], tmp_path, lambda path: None)
    for name in ("added_tokens.json", "chat_template.json", "chat_template.jinja"):
        (source / name).write_text("{}")
    convert(source, "bitplane", tmp_path / "out")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names >= {"added_tokens.json", "chat_template.json", "chat_template.jinja", "tokenizer.json"}
    assert "quantize_config.json" not in names


def test_what_a_plain_checkpoint_cannot_hold_is_not_dropped(exported, tmp_path):
    online = damaged(exported[0], tmp_path, add_to_blocks(ONLINE), "bitplane")
    with pytest.raises(InputError, match="cannot hold matrices behind norms .*: use format bitplane"):
        convert(online, "dequantized", tmp_path / "out")
    (tmp_path / "static").mkdir()
    static = damaged(exported[0], tmp_path / "static", add_to_blocks(INPUT_RANGE, bits=8, method="static"), "bitplane")
    with pytest.raises(InputError, match="activations of 8 bits per token"):
        convert(static, "compressed-tensors", tmp_path / "out")
    convert(static, "dequantized", tmp_path / "out")
    assert not any(name.endswith(INPUT_RANGE) for name in load_file(tmp_path / "out/model.safetensors"))


def test_part_of_a_model(tmp_path, whole):
    """Which linears are left alone is known after any chain of conversions."""
    config = demo_config(tmp_path, whole, num_layers=2, save=tmp_path / "part", format="gptq_v2")
    expected = perform(config)["perplexity"]["text"]["quantized"]
    assert perplexity(tmp_path / "part", tmp_path)[0] == expected

    def quantization(name):
        return json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]

    written = quantization("part")
    assert written["dynamic"] == {r"-:model\.layers\.(2|3)\..*": {}}
    (modules,) = written["modules_in_block_to_quantize"]
    assert len(modules) == 2 * 7 and "model.layers.1.mlp.up_proj" in modules
    for source, kind in (("run", "compressed-tensors"), ("part", "compressed-tensors"), ("part", "bitplane")):
        convert(tmp_path / source, kind, tmp_path / "ct", overwrite=True)
        ignored = quantization("ct")["ignore"]
        assert "lm_head" in ignored and "model.layers.3.mlp.up_proj" in ignored and len(ignored) == 1 + 2 * 7
    convert(tmp_path / "ct", "gptq_v2", tmp_path / "back")
    assert quantization("back") == written
    assert perplexity(tmp_path / "back", tmp_path)[0] == expected


def test_part_of_a_block(exported, tmp_path):
    """A linear that others left alone, ignored by a pattern."""
    path, name = damaged(exported[0], tmp_path, lambda path: None, CT), "model.layers.1.mlp.up_proj"
    value = QuantizedCheckpoint(path).read(f"{name}.weight")
    tensors = {k: v for k, v in load_file(path / "model.safetensors").items() if not k.startswith(name)}
    save_file(tensors | {f"{name}.weight": value}, path / "model.safetensors", {"format": "pt"})
    edit_config(ignore=["re:.*lm_head", f"re:{name}"])(path)
    convert(path, "gptq_v2", tmp_path / "gptq")
    written = json.loads((tmp_path / "gptq/config.json").read_text())["quantization_config"]
    assert written["dynamic"] == {r"-:model\.layers\.1\.mlp\.up_proj$": {}}
    assert len(written["modules_in_block_to_quantize"][0]) == 4 * 7 - 1 and written["lm_head"] is False
    convert(tmp_path / "gptq", "bitplane", tmp_path / "planes")
    written = json.loads((tmp_path / "planes/config.json").read_text())["quantization_config"]
    assert written["ignore"] == [name, "lm_head"]


def test_convert_as_a_process(exported, tmp_path):
    """What a person types: a table of who loads it, the flags of this command in its messages, exit codes."""

    def convert_command(*words):
        command = [sys.executable, "-m", "quant.export", "convert", *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)

    done = convert_command(exported[0] / "run", "--to", "compressed-tensors", "--out", tmp_path / "ct")
    assert done.returncode == 0 and "transformers" in done.stdout and "MB" in done.stdout, done.stderr
    assert perplexity(tmp_path / "ct", tmp_path)[0] == exported[1]["perplexity"]["text"]["quantized"]
    again = convert_command(tmp_path / "ct", "--to", "gptq_v2", "--out", tmp_path / "ct")
    assert (
        again.returncode == 2
        and again.stderr
        == f"error: --out {tmp_path / 'ct'} is the same place as the source {tmp_path / 'ct'}, which is read: use another place for --out\n"
    )
    full = convert_command(exported[0] / "run", "--to", "gptq_v2", "--out", tmp_path / "ct")
    assert full.returncode == 2 and "is not empty; use another directory or --overwrite" in full.stderr
    online = damaged(exported[0], tmp_path, add_to_blocks(ONLINE), "bitplane")
    refused = convert_command(online, "--to", "gptq", "--out", tmp_path / "x")
    assert (
        refused.returncode == 2
        and "cannot hold matrices behind norms or in front of linears: use format bitplane" in refused.stderr
    )
    for ended in (again, full, refused):
        assert not any(flag in ended.stderr for flag in ("--save", "--format", "Traceback")), ended.stderr
