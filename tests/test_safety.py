"""What is never deleted, overwritten, executed or half-written: docs/promises.md names these tests."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import generate_act_scale_shift
import main as main_command
import model_quantizer
from models.checkpoint import Checkpoint, resolve
from quant.blocks.stream import Activations
from quant.cli import convert as convert_command
from quant.cli import evaluate, generate, repeat
from quant.cli.errors import exit_code_of
from quant.core import files
from quant.core.errors import InputError
from quant.core.files import RECORD, check_owned, hold_lock, read_json, resolve_links, write_atomically, write_owned
from quant.core.names import DEFAULT_CACHE
from quant.core.places import Place, check_places
from quant.export import target as target_module
from quant.export.target import HIDDEN, OWN, replacing
from quant.run.convert import convert
from quant.run.directory import LOCK, RunDirectory
from quant.run.request import Request, places_written
from quant.run.session import open_session
from quant.run.stored import Allowed, allowed_entries, ordered_places
from scripts import sweep
from tests.helpers import called, config_for, perform, replace

ROOT = Path(__file__).parents[1]


@pytest.fixture
def command(monkeypatch, capsys):
    """Any command in this process, from the project's directory."""

    def call(of, *words: object) -> tuple[int, str, str]:
        monkeypatch.chdir(ROOT)
        return called(of, monkeypatch, capsys, *words)

    return call


@pytest.fixture
def quick(text, tmp_path) -> list[object]:
    """Flags of a run that takes a second."""
    return ["--dataset", text, "--eval-datasets", "", "--seqlen", 16, "--nsamples", 2, "--wbits", 3, "--no-report",
            "--quantization-method", "rtn", "--cache-dir", tmp_path / "cache"]  # fmt: skip


def tree(path: Path) -> dict[str, bytes | None]:
    """Everything below a directory, with the content of the files."""
    paths = sorted(path.rglob("*"))
    return {str(p.relative_to(path)): p.read_bytes() if p.is_file() and not p.is_symlink() else None for p in paths}


def one_line(result: tuple[int, str, str], *parts: object) -> None:
    code, _, err = result
    assert code == 2 and len(err.splitlines()) == 1 and err.startswith("error: "), result
    assert all(str(part) in err for part in parts), err


# Nothing that comes from elsewhere is executed, or says what to open


def with_code(model: Path, target: Path) -> Path:
    """A copy of a model that brings Python; running it leaves a file PWNED beside."""
    shutil.copytree(model, target)
    config = json.loads((target / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    (target / "config.json").write_text(json.dumps(config))
    mark = target.parent / "PWNED"
    (target / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass C: pass\nclass M: pass\n")
    return target


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_manifest_does_not_run_code(command, quick, model_dir, tmp_path):
    model, run = with_code(model_dir("llama"), tmp_path / "m"), tmp_path / "r"
    assert command(model_quantizer, "--model", model, *quick, "--run-dir", run)[0] == 0
    edit_json(run / "manifest.json", lambda m: m["request"].update(trust_remote_code=True))
    says = (run / "manifest.json", "--trust-remote-code")
    one_line(command(generate, "--model", run, "--prompt", "x", "--max-new-tokens", 2), *says)
    one_line(command(convert_command, run, "--to", "bitplane", "--out", tmp_path / "o"), *says)
    one_line(command(repeat, run, "--allow-paths", "--cache-dir", tmp_path / "cache"), *says)
    again = command(model_quantizer, "--model", model, *quick, "--run-dir", run)
    assert again[0] == 0, "the run's own command asks its own flag"
    assert not (tmp_path / "PWNED").exists() and not (tmp_path / "o").exists()


def test_a_model_does_not_choose_code_for_its_attention(model_dir, text, tmp_path, monkeypatch):
    """config.json may name an implementation on the hub, which transformers would fetch and run."""
    from transformers.integrations import hub_kernels

    monkeypatch.setattr(hub_kernels, "load_and_register_attn_kernel", lambda *_: pytest.fail("fetched a kernel"))
    model = shutil.copytree(model_dir("llama"), tmp_path / "m")
    for name in ("attn_implementation", "_attn_implementation", "_attn_implementation_internal"):
        edit_json(model / "config.json", lambda c, name=name: c.update({name: "someone/kernel"}))
    assert open_session(config_for(model, text, tmp_path, solver="rtn", options={})).model.config.vocab_size > 0
    with pytest.raises(InputError, match="attention 'someone/kernel': use eager or sdpa"):
        open_session(config_for(model, text, tmp_path, options={}, attn_implementation="someone/kernel"))


REQUESTS = {  # a stored entry, and the flag that allows it
    "trust_remote_code": (True, {"trust_remote_code": True}),
    "dataset": ("/etc/passwd.txt", {"paths": True}),
    "eval_datasets": (["wikitext2", "notes.jsonl"], {"paths": True}),
    "data_dir": ("/data", {"paths": True}),
    "task_path": ("tasks", {"paths": True}),
    "act_scales": ("a", {"paths": True}),
    "act_shifts": ("a", {"paths": True}),
    "resume": ("runs/x", {"paths": True}),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_a_stored_request_orders_nothing(name):
    value, allows = REQUESTS[name]
    stored = {name: value, "wbits": 3}
    with pytest.raises(InputError, match="a manifest (asks for|names a file)"):
        allowed_entries(stored, "a manifest", Allowed())
    assert allowed_entries(stored, "a manifest", Allowed(**allows)) == stored
    other = {"paths": True} if "paths" not in allows else {"trust_remote_code": True}
    with pytest.raises(InputError):
        allowed_entries(stored, "a manifest", Allowed(**other))


def test_places_of_a_stored_request_are_left_out():
    stored = {"save": "/s", "run_dir": "/r", "runs": "/x", "cache_dir": "/c", "overwrite": True, "dataset": "c4",
              "calib_dataset": "demo", "output_dir": "/o", "wbits": 3, "eval_datasets": ["ptb"], "task_path": None}  # fmt: skip
    kept = {"dataset", "calib_dataset", "wbits", "eval_datasets", "task_path"}
    assert set(allowed_entries(stored, "a manifest", Allowed())) == kept
    assert set(ordered_places(stored)) == set(stored) - kept
    config = Request.from_json(Request.of("m", save=Path("/s"), overwrite=True).to_json(), "m", Allowed())
    assert config.output.save is None and not config.output.overwrite and config.session.cache_dir == DEFAULT_CACHE


def test_a_run_is_repeated_from_named_files_only_on_demand(command, quick, model_dir, text, tmp_path):
    run = tmp_path / "r"
    assert command(model_quantizer, "--model", model_dir("llama"), *quick, "--run-dir", run)[0] == 0
    one_line(command(repeat, run, "--cache-dir", tmp_path / "cache"), run / "manifest.json", text, "--allow-paths")
    code, out, _ = command(repeat, run, "--allow-paths", "--cache-dir", tmp_path / "cache")
    assert code == 0 and "identical" in out


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("trust-remote-code: true", "--trust-remote-code"),
        ("save: /tmp/x", "save says where to write"),
        ("overwrite: true", "overwrite says where to write"),
        ("run_dir: /tmp/x", "run_dir says where to write"),
        ("cacheDir: /tmp/x", "cache_dir says where to write"),
        ("data-dir: data", "--allow-paths"),
        ("eval-datasets: 'demo,mine.txt'", "--allow-paths"),
        ("trust-rem: true", "unknown argument"),
        ("sav: /tmp/x", "unknown argument"),
        ("sym: --trust-remote-code", "ignored explicit argument"),
        ("sym: '--save=/tmp/x'", "ignored explicit argument"),
    ],
)
def test_a_table_orders_nothing(command, tmp_path, entry, says):
    table = tmp_path / "t.yaml"
    table.write_text(f"fixed:\n  model: models/demo/llama\n  {entry}\nrows: [{{wbits: 3}}]\n")
    one_line(command(sweep, table, "--out", tmp_path / "o", "--dry-run"), f"{table}, line 3, column", says)
    assert not (tmp_path / "o").exists()


def test_a_table_has_names_of_flags_alone(command, tmp_path):
    table = tmp_path / "t.yaml"
    for name in ("save=/tmp/x", "a b", "", "-x", "--save"):
        table.write_text(json.dumps({"fixed": {"model": "models/demo/llama", name: True}, "rows": [{"wbits": 3}]}))
        code, _, err = command(sweep, table, "--out", tmp_path / "o", "--dry-run")
        assert code == 2 and len(err.splitlines()) == 1, (name, err)


# Places are checked against each other


@pytest.mark.parametrize(
    ("first", "second", "relation"),
    [
        ("a", "a", "is the same place as"),
        ("a", "a/.", "is the same place as"),
        ("a/b/..", "a", "is the same place as"),
        ("link", "a", "is the same place as"),
        ("link/new", "a", "lies inside"),
        ("a", "link/new/deep", "contains"),
        ("new", "new/x", "contains"),
        ("a/file.txt", "a", "lies inside"),
        ("", "a", "contains"),
        ("a", "b", None),
        ("a", "ab", None),
        ("new/x", "new/y", None),
    ],
)
def test_relations_of_places(first, second, relation, tmp_path):
    for name in ("a/b", "b", "ab"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "a" / "file.txt").touch()
    (tmp_path / "link").symlink_to("a")
    one, two = Place("--one", tmp_path / first), Place("--two", tmp_path / second)
    for reads, writes, kind in (([two], [one], "which is read"), ([], [one, two], "which is written too")):
        if relation is None:
            check_places(reads, writes)
        else:
            with pytest.raises(InputError) as error:
                check_places(reads, writes)
            assert f"{one} {relation} {two}, {kind}" in str(error.value)
    check_places([one, two], [])


def test_one_directory_under_two_names_is_one_place(tmp_path, monkeypatch):
    """Names alone would not tell: other letters on some systems, mounts on others."""
    (tmp_path / "a").mkdir()
    same = Path.samefile
    monkeypatch.setattr(Path, "samefile", lambda self, other: same(Path(str(self).lower()), Path(str(other).lower())))
    there = Path.exists
    monkeypatch.setattr(Path, "exists", lambda self: there(Path(str(self).lower())))
    with pytest.raises(InputError, match="lies inside"):
        check_places([Place("--model", tmp_path / "a")], [Place("--save", tmp_path / "A" / "new")])


def test_places_that_no_system_takes_are_one_line(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    for name, says in (
        ("loop", "a loop of symbolic links"),
        ("loop/x", "a loop"),
        ("x" * 5000, "longer than"),
        ("a\0b", "not a usable path"),
    ):
        with pytest.raises(InputError, match=says) as error:
            check_places([], [Place("--save", tmp_path / name)])
        assert len(str(error.value)) < 400
    with pytest.raises(InputError, match="not UTF-8"):
        check_places([], [Place("--save", tmp_path / os.fsdecode(b"\xff"))])
    assert resolve_links(tmp_path / "x" / ".." / "y") == tmp_path.resolve() / "y"


def contradictions(base: Path) -> Iterator[tuple[object, list[object], tuple[str, str]]]:
    """Command, flags, and the two places that the line must name. In base: model, data.txt, tasks, run, ckpt, scales."""
    model, data, run, link = base / "model", base / "data.txt", base / "run", base / "to-model"
    quantizer, learner = model_quantizer, main_command
    yield quantizer, ["--run-dir", base / "a", "--save", base / "a"], ("--run-dir", "--save")
    yield quantizer, ["--run-dir", base / "a" / "run", "--save", base / "a"], ("--run-dir", "--save")
    yield quantizer, ["--run-dir", base / "a", "--save", base / "a" / "blocks"], ("--run-dir", "--save")
    yield quantizer, ["--run-dir", base / "a", "--save", base / "a" / "."], ("--run-dir", "--save")
    yield quantizer, ["--run-dir", run, "--save", base / "to-run"], ("--run-dir", "--save")
    yield quantizer, ["--run-dir", base / "a", "--save", base, "--overwrite"], ("--run-dir", "--save")
    yield quantizer, ["--run-dir", base.parent / "a", "--save", base, "--overwrite"], ("--save", "--model")
    yield quantizer, ["--run-dir", base / "a", "--save", model, "--overwrite"], ("--save", "--model")
    yield quantizer, ["--run-dir", base / "a", "--save", link / "new"], ("--save", "--model")
    yield quantizer, ["--run-dir", model, "--overwrite"], ("--run-dir", "--model")
    yield quantizer, ["--run-dir", base, "--overwrite"], ("--run-dir", "--model")
    yield quantizer, ["--run-dir", model / "runs"], ("--run-dir", "--model")
    yield quantizer, ["--run-dir", base / "a", "--save", data], ("--save", "the data file")
    yield (
        quantizer,
        ["--run-dir", base / "a", "--task-path", base / "tasks", "--save", base / "tasks" / "x"],
        ("--save", "--task-path"),
    )
    yield quantizer, ["--run-dir", base / "a", "--cache-dir", base / "a"], ("--run-dir", "--cache-dir")
    yield quantizer, ["--run-dir", base / "a", "--cache-dir", model], ("--cache-dir", "--model")
    yield quantizer, ["--run-dir", base / "a", "--save", base / "a" / "rtn",
                      "--quantization-method", "rtn,gptq"], ("--run-dir", "--save")  # fmt: skip
    yield quantizer, ["--run-dir", base / "a", "--save", base / "a", "--dry-run"], ("--run-dir", "--save")
    learned = ["--lwc", "--let", "--epochs", 0]
    yield learner, [*learned, "--run-dir", base / "a", "--save_dir", base / "a"], ("--run-dir", "--save")
    yield learner, [*learned, "--run-dir", run, "--resume", run, "--overwrite"], ("--run-dir", "--resume")
    yield (
        learner,
        [*learned, "--run-dir", base / "a", "--save_dir", run, "--resume", run, "--overwrite"],
        ("--save", "--resume"),
    )
    yield (
        learner,
        [*learned, "--run-dir", base / "s", "--act-scales", base / "s" / "x.safetensors"],
        ("--run-dir", "--act-scales"),
    )
    yield evaluate, ["--out", model / "numbers.json"], ("--out", "--model")
    yield evaluate, ["--out", data], ("--out", "the data file")
    yield (
        generate_act_scale_shift,
        ["--scales-output-path", base / "o", "--shifts-output-path", base / "o"],
        ("--scales", "--shifts"),
    )
    yield (
        generate_act_scale_shift,
        ["--scales-output-path", model, "--shifts-output-path", base / "o"],
        ("--scales", "--model"),
    )
    yield convert_command, [base / "ckpt", "--out", base, "--overwrite"], ("--out", "the source")
    yield convert_command, [run, "--out", run / "ckpt"], ("--out", "the source")
    yield convert_command, [run, "--out", model, "--overwrite"], ("--out", "the model of the run")
    yield repeat, [run, "--allow-paths", "--into", run / "again"], ("--into", "the run")


def test_contradictory_places_are_refused_before_anything_is_touched(command, quick, model_dir, text, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(model_dir("llama"), base / "model")
    for file in (base / "model").iterdir():  # base itself is a checkpoint too, which --overwrite could take
        shutil.copy(file, base)
    (base / "tasks").mkdir()
    shutil.copy(text, base / "data.txt")
    (base / "to-model").symlink_to("model")
    (base / "to-run").symlink_to("run")
    (base / "s").mkdir()
    save_file({"x": torch.ones(1)}, base / "s" / "x.safetensors")
    done = ["--model", base / "model", *quick, "--run-dir", base / "run", "--save", base / "ckpt"]
    assert command(model_quantizer, *done, "--format", "bitplane")[0] == 0
    before = tree(base)
    shared = ["--model", base / "model", "--seqlen", 16, "--cache-dir", tmp_path / "cache"]
    data = {model_quantizer: ["--dataset", base / "data.txt", "--eval-datasets", "", "--wbits", 3, "--no-report",
                              "--quantization-method", "rtn", "--nsamples", 2],
            main_command: ["--calib_dataset", base / "data.txt", "--wbits", 3, "--nsamples", 2],
            evaluate: ["--eval-datasets", base / "data.txt"],
            generate_act_scale_shift: ["--calib_dataset", base / "data.txt", "--nsamples", 2]}  # fmt: skip
    for of, flags, names in contradictions(base):
        usual = [*shared, *data[of]] if of in data else ["--to", "bitplane"] if of is convert_command else []
        if of is generate_act_scale_shift:
            usual[usual.index("--seqlen")] = "--seq-len"
        result = command(of, *usual, *flags)
        assert result[0] == 2 and len(result[2].splitlines()) == 1, (flags, result)
        assert all(name in result[2] for name in names), (flags, result[2])
        assert tree(base) == before, flags


# Only what this toolkit wrote is deleted or replaced, file by file


def test_overwrite_discards_files_of_a_run_and_nothing_else(command, quick, model_dir, tmp_path, caplog):
    run = tmp_path / "r"
    usual = ["--model", model_dir("llama"), *quick, "--run-dir", run]
    assert command(model_quantizer, *usual)[0] == 0
    mine = {"notes.txt": "mine", "blocks/mine.safetensors": "mine", "model/weights.bin": "mine", "blocks/deep/x": "x"}
    for name, content in mine.items():
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text(content)
    stamp = (run / "blocks" / "00000.safetensors").stat().st_mtime_ns
    assert command(model_quantizer, *usual, "--wbits", 4, "--overwrite")[0] == 0
    assert all(
        str(run / name) in caplog.text for name in ("notes.txt", "model", "blocks/mine.safetensors", "blocks/deep")
    )
    assert {name: (run / name).read_text() for name in mine} == mine
    assert (run / "blocks" / "00000.safetensors").stat().st_mtime_ns > stamp
    assert read_json(run / "manifest.json")["configuration"]["wbits"] == 4


@pytest.mark.parametrize(
    "manifest",
    ['{"name": "web app", "icons": []}', "{}", '{"schema": 1}', '{"schema": 1, "configuration": {}}', "{", "[]",
     '{"schema": 2, "configuration": {}, "request": {}, "model": {}, "versions": {}}'],
)  # fmt: skip
def test_a_directory_of_another_program_is_no_run(command, quick, model_dir, tmp_path, manifest):
    place = tmp_path / "app"
    place.mkdir()
    (place / "manifest.json").write_text(manifest)
    (place / "thesis.txt").write_text("precious")
    (place / "blocks").mkdir()
    (place / "blocks" / "00000.safetensors").write_text("theirs")
    before = tree(place)
    for flags in ([], ["--overwrite"]):
        result = command(model_quantizer, "--model", model_dir("llama"), *quick, "--run-dir", place, *flags)
        one_line(result, place / "manifest.json")
        assert tree(place) == before


def test_a_run_directory_with_links_is_not_written(command, quick, model_dir, tmp_path):
    run, elsewhere = tmp_path / "r", tmp_path / "elsewhere"
    usual = ["--model", model_dir("llama"), *quick, "--run-dir", run]
    assert command(model_quantizer, *usual)[0] == 0
    shutil.copytree(run / "blocks", elsewhere)
    for name in ("blocks", "journal.jsonl"):
        kept = run / f"{name}.kept"
        (run / name).rename(kept)
        (run / name).symlink_to(elsewhere if name == "blocks" else elsewhere / "00000.safetensors")
        before = tree(elsewhere)
        for flags in ([], ["--overwrite"]):
            one_line(command(model_quantizer, *usual, *flags), run / name, "is a link")
        assert tree(elsewhere) == before
        (run / name).unlink()
        kept.rename(run / name)


def saved_by_us(command, quick, model: Path, save: Path, tmp_path: Path, *flags: object) -> tuple[int, str, str]:
    return command(
        model_quantizer, "--model", model, *quick, "--run-dir", tmp_path / f"run-of-{save.name}", "--save", save, *flags
    )


def test_overwrite_replaces_checkpoints_of_this_toolkit_alone(command, quick, model_dir, tmp_path):
    theirs = shutil.copytree(model_dir("opt"), tmp_path / "theirs")  # whole, but of others
    before = tree(theirs)
    one_line(
        saved_by_us(command, quick, model_dir("llama"), theirs, tmp_path, "--overwrite"), theirs, "this toolkit wrote"
    )
    assert tree(theirs) == before
    (theirs / "results.json").write_text(json.dumps({"files_sha256": {"model.safetensors": "0" * 64}}))
    before = tree(theirs)
    one_line(
        saved_by_us(command, quick, model_dir("llama"), theirs, tmp_path, "--overwrite"), theirs, "this toolkit wrote"
    )
    assert tree(theirs) == before


def test_what_others_put_beside_a_checkpoint_stays(command, quick, model_dir, tmp_path, caplog):
    save = tmp_path / "s"
    assert saved_by_us(command, quick, model_dir("llama"), save, tmp_path)[0] == 0
    (save / "README.md").write_text("mine")
    (save / "figures").mkdir()
    (save / "empty").mkdir()
    (save / "figures" / "a.png").write_text("mine")
    (save / "link").symlink_to("/nowhere")
    code, _, err = saved_by_us(command, quick, model_dir("llama"), save, tmp_path, "--overwrite", "--wbits", 4)
    assert code == 0 and all(str(save / name) in caplog.text for name in ("README.md", "figures", "link", "empty")), err
    assert (save / "empty").is_dir()
    assert (save / "README.md").read_text() == (save / "figures" / "a.png").read_text() == "mine"
    assert str((save / "link").readlink()) == "/nowhere" and read_json(save / "results.json")["wbits"] == 4
    edited = save / "generation_config.json"
    edited.write_text(edited.read_text() + "\n") if edited.exists() else (save / "tokenizer.json").write_text("{}")
    changed = edited if edited.exists() else save / "tokenizer.json"
    before = tree(save)
    one_line(
        saved_by_us(command, quick, model_dir("llama"), save, tmp_path, "--overwrite", "--wbits", 3),
        changed,
        "was changed",
    )
    assert tree(save) == before
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")], "nothing hidden is left"


def test_loose_files_of_others_are_not_overwritten(command, model_dir, text, tmp_path):
    """Outputs that are single files: numbers, layers, ranges, tables."""
    model = model_dir("llama")
    out = tmp_path / "numbers.json"
    measured = [
        "--model",
        model,
        "--eval-datasets",
        text,
        "--seqlen",
        16,
        "--limit",
        2,
        "--cache-dir",
        tmp_path / "cache",
        "--out",
        out,
    ]
    out.write_text("precious")
    one_line(command(evaluate, *measured), out, "was not written by this toolkit")
    assert out.read_text() == "precious"
    out.unlink()
    assert command(evaluate, *measured)[0] == 0 and command(evaluate, *measured)[0] == 0
    out.write_text(out.read_text() + " ")
    one_line(command(evaluate, *measured), out, "was changed since")
    ranges = ["--model", model, "--calib_dataset", text, "--seq-len", 16, "--num-samples", 2, "--cache-dir", tmp_path / "cache",
              "--scales-output-path", tmp_path / "scales", "--shifts-output-path", tmp_path / "shifts"]  # fmt: skip
    (tmp_path / "shifts").mkdir()
    (tmp_path / "shifts" / f"{model.name}.safetensors").write_text("precious")
    one_line(command(generate_act_scale_shift, *ranges), model.name, "was not written by this toolkit")
    assert not (tmp_path / "scales").exists()
    layers = tmp_path / "layers" / "layers.json"
    layers.parent.mkdir()
    layers.write_text("[]")
    compared = ["--model", model, "--dataset", text, "--eval-datasets", "", "--seqlen", 16, "--nsamples", 2, "--wbits", 3,
                "--quantization-method", "rtn", "--compare-layers", "--run-dir", layers.parent, "--cache-dir", tmp_path / "cache"]  # fmt: skip
    one_line(command(model_quantizer, *compared), layers)
    table = tmp_path / "t.yaml"
    table.write_text("rows: [{model: models/demo/llama, wbits: 3, dataset: demo}]\n")
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.md").write_text("my notes")
    one_line(command(sweep, table, "--out", tmp_path / "sweep"), tmp_path / "sweep" / "sweep.md")


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("file", "is a file"),
        ("fifo", "is a pipe"),
        ("dangling", "is a link to nothing"),
        ("device", "is a device"),
        ("loop", "is a loop"),
    ],
)
def test_what_is_no_directory_is_said_before_work(kind, says, tmp_path):
    place = tmp_path / "place"
    if kind == "file":
        place.write_text("precious")
    elif kind == "fifo":
        os.mkfifo(place)
    else:
        place.symlink_to({"dangling": "nowhere", "device": "/dev/null", "loop": "place"}[kind])
    for below in (place, place / "deeper" / "still"):
        for work in (lambda at: check_owned(at / "page.html"), lambda at: write_owned(at, {"page.html": b""})):
            with pytest.raises(InputError, match=says) as error:
                work(below)
            assert str(place) in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["place"] and (kind != "file" or place.read_text() == "precious")


def test_owned_files_survive_a_kill_between_any_two_steps(tmp_path):
    """Whatever was written last, the next call knows its own files and no others."""
    for steps in range(8):
        directory = tmp_path / str(steps)
        write_owned(directory, {"a": b"1", "b": b"1"})
        done = []

        def step(path: Path, data: bytes, done: list = done, steps: int = steps) -> None:
            if len(done) == steps:
                raise KeyboardInterrupt
            done.append(path)
            write_atomically(path, data)

        with pytest.MonkeyPatch.context() as patch, suppress(KeyboardInterrupt):
            patch.setattr(files, "write_atomically", step)
            write_owned(directory, {"a": b"2", "b": b"2", "c": b"2"})
        write_owned(directory, {"a": b"3", "b": b"3", "c": b"3"})
        assert {name: (directory / name).read_bytes() for name in "abc"} == dict.fromkeys("abc", b"3")
        (directory / "b").write_bytes(b"mine")
        with pytest.raises(InputError, match="was changed since"):
            write_owned(directory, {"b": b"4"})
        assert (directory / "b").read_bytes() == b"mine"
    for name in ("../x", "a/b", "", "..", RECORD):
        with pytest.raises(InputError, match="is not the name of a file"):
            write_owned(tmp_path / "0", {name: b""})
    (tmp_path / "0" / RECORD).write_text(json.dumps({"files": {"../precious": ["0"]}}))
    with pytest.raises(InputError, match="is damaged"):
        check_owned(tmp_path / "0" / "a")


# Names in a checkpoint's index; special files


BAD_NAMES = [
    "../outside.safetensors",
    "/etc/passwd",
    "a/b.safetensors",
    "..",
    "",
    ".",
    "a\\b",
    "a\0b",
    "a\nb",
    3,
    None,
    ["x"],
    {},
]


@pytest.mark.parametrize("name", BAD_NAMES)
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards_are_plain_files_beside_the_index(name, kind, model_dir, tmp_path):
    model = shutil.copytree(model_dir("llama"), tmp_path / "m")
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    save_file(tensors, tmp_path / "outside.safetensors")
    index = "model.safetensors.index.json" if kind == "safetensors" else "pytorch_model.bin.index.json"
    (model / index).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, name)}))
    before = tree(tmp_path)
    with pytest.raises(InputError, match="is not the name of a file in"):
        Checkpoint(resolve(str(model), tmp_path / "cache"))
    assert tree(tmp_path) == before


@pytest.mark.parametrize("content", ["[]", '"x"', "null", "3", "{}", '{"weight_map": []}', '{"weight_map": null}',
                                     '{"weight_map": {}}', "[" * 100_000, "\udcff"])  # fmt: skip
def test_an_index_of_another_shape_is_one_line(content, model_dir, tmp_path):
    model = shutil.copytree(model_dir("llama"), tmp_path / "m")
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match="index.json") as error:
        Checkpoint(resolve(str(model), tmp_path / "cache"))
    assert "\n" not in str(error.value)


def make_special(path: Path, kind: str) -> None:
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as own:
            own.bind(str(path))
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()


SPECIAL = {
    "model.safetensors",
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "results.json",
}


@pytest.mark.parametrize("kind", ["pipe", "socket", "loop", "device", "directory"])
@pytest.mark.parametrize("name", sorted(SPECIAL))
def test_special_files_are_refused_before_they_are_opened(name, kind, model_dir, text, tmp_path, monkeypatch):
    """A pipe that is opened waits for ever: this test would not end."""
    model = shutil.copytree(model_dir("llama"), tmp_path / "m")
    monkeypatch.chdir(model)  # the name of a socket is short
    make_special(Path(name), kind)
    with pytest.raises(InputError) as error:
        open_session(config_for(model, text, tmp_path, solver="rtn", options={}))
    assert name in str(error.value) or str(model) in str(error.value)
    assert stat.S_ISFIFO(os.lstat(name).st_mode) == (kind == "pipe")


@pytest.mark.parametrize("name", ["manifest.json", "results.json", "blocks/00000.safetensors"])
def test_special_files_in_a_run_are_refused(name, command, quick, model_dir, tmp_path):
    run = tmp_path / "r"
    usual = ["--model", model_dir("llama"), *quick, "--run-dir", run]
    assert command(model_quantizer, *usual)[0] == 0
    make_special(run / name, "pipe")
    one_line(command(model_quantizer, *usual), run / name)
    one_line(command(convert_command, run, "--to", "bitplane", "--out", tmp_path / "o"), run / name)


def test_links_out_of_a_model_are_not_copied(command, quick, model_dir, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text('{"SECRET": 1}')
    model = shutil.copytree(model_dir("llama"), tmp_path / "m")
    make_special(model / "generation_config.json", "loop")
    (model / "generation_config.json").unlink()
    (model / "generation_config.json").symlink_to(secret)
    code, _, err = saved_by_us(command, quick, model, tmp_path / "s", tmp_path)
    assert code == 2 and "is a link to" in err and str(secret) in err
    assert not (tmp_path / "s").exists() and not (tmp_path / "run-of-s").exists(), "said before work"
    hub = tmp_path / "hub"  # as the hub's cache lays it out: all links, to the blobs of the same model
    (hub / "blobs").mkdir(parents=True)
    (hub / "snapshots" / "main").mkdir(parents=True)
    for number, file in enumerate(model_dir("llama").iterdir()):
        shutil.copy(file, hub / "blobs" / str(number))
        (hub / "snapshots" / "main" / file.name).symlink_to(Path("../../blobs") / str(number))
    assert saved_by_us(command, quick, hub / "snapshots" / "main", tmp_path / "h", tmp_path)[0] == 0


@pytest.mark.parametrize(
    "name", ["chat_template.jinja", "tokenizer_config.json", "config.json", "additional_chat_templates/a.jinja"]
)
def test_no_link_of_a_model_leads_into_a_checkpoint(name, command, quick, model_dir, tmp_path):
    model = shutil.copytree(model_dir("llama"), tmp_path / "m")
    secret = tmp_path / "secret" / Path(name).name
    secret.parent.mkdir()
    secret.write_text((model / name).read_text() if (model / name).exists() else "secret")
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(secret)
    one_line(saved_by_us(command, quick, model, tmp_path / "s", tmp_path), "is a link to", secret)
    assert not (tmp_path / "s").exists()
    everyday = tmp_path / "links"  # all of another model's files: what it says is that model's
    everyday.mkdir()
    for file in model_dir("llama").iterdir():
        (everyday / file.name).symlink_to(file)
    assert saved_by_us(command, quick, everyday, tmp_path / "t", tmp_path)[0] == 0


def test_no_link_of_a_run_or_checkpoint_leads_into_a_conversion(command, source, tmp_path):
    secret = tmp_path / "secret.json"
    secret.write_text('{"SECRET": 1}')
    run, packed = shutil.copytree(source, tmp_path / "r"), tmp_path / "packed"
    convert(source, "gptq_v2", packed, cache_dir=tmp_path / "cache")
    for place in (run, packed):
        (place / "results.json").unlink()
        (place / "results.json").symlink_to(secret)
        one_line(
            command(convert_command, place, "--to", "bitplane", "--out", tmp_path / "o"),
            place / "results.json",
            "is a link",
        )
        assert not (tmp_path / "o").exists()


def test_a_model_with_another_programs_manifest_is_a_model(command, quick, model_dir, tmp_path):
    model = shutil.copytree(model_dir("llama"), tmp_path / "m")
    (model / "manifest.json").write_text('{"name": "an app"}')
    assert command(generate, "--model", model, "--prompt", "ab", "--max-new-tokens", 2)[0] == 0


WRONG = ["x", 7, None, [], {}, True, -1.5]


def test_edited_requests_are_one_line(command, source, tmp_path):
    """Every entry of a request, of another type or gone."""
    run = shutil.copytree(source, tmp_path / "r")
    whole = json.loads((run / "manifest.json").read_text())
    tried = 0
    for name in whole["request"]:
        for value in (*WRONG, "gone"):
            request = {k: v for k, v in whole["request"].items() if k != name or value != "gone"}
            request |= {name: value} if value != "gone" else {}
            if request.get(name, "gone") == whole["request"][name]:
                continue
            (run / "manifest.json").write_text(json.dumps(whole | {"request": request}))
            try:
                Request.from_json(request, "the manifest", Allowed(True, True))
            except InputError as error:
                assert "\n" not in str(error)
            tried += 1
    assert tried > 200
    for blocks in ("x", None, [], 10**9):
        (run / "manifest.json").write_text(
            json.dumps(whole | {"configuration": whole["configuration"] | {"blocks": blocks}})
        )
        code, _, err = command(convert_command, run, "--to", "bitplane", "--out", tmp_path / "o")
        assert code in (1, 2) and len(err.splitlines()) == 1, err


# What is saved is whole


def test_values_that_the_dtype_does_not_hold_are_not_saved(tmp_path):
    from quant.export.write import save_checkpoint

    save = tmp_path / "s"
    for value in (float("inf"), float("nan")):
        tensors = {"a": torch.ones(2), "b": torch.tensor([1.0, value], dtype=torch.float16)}
        with pytest.raises(InputError, match="b has values that float16 does not hold"):
            save_checkpoint(iter(tensors.items()), save, {"model_type": "x"}, lambda _: None)
        assert list(tmp_path.iterdir()) == []


def in_a_process(work: Callable[[], object], kill_at: int) -> tuple[int, int]:
    """Fork, and SIGKILL the child in front of its ``kill_at``-th change of a file system. Returns its exit code (negative: the
    signal) and how many it had made."""
    import signal

    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        count = 0

        def see(event: str, args: tuple) -> None:
            nonlocal count
            writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writes or event in ("os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.link", "ctypes.dlsym"):
                if count == kill_at:
                    os.write(writing, count.to_bytes(4, "little"))
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1

        code = 1
        try:
            sys.addaudithook(see)
            work()
            code = 0
        finally:
            os.write(writing, count.to_bytes(4, "little"))
            os._exit(code)
    os.close(writing)
    _, status = os.waitpid(pid, 0)
    seen = int.from_bytes(os.read(reading, 4), "little")
    os.close(reading)
    return os.waitstatus_to_exitcode(status), seen


@pytest.fixture(scope="module")
def source(model_dir, text, tmp_path_factory) -> Path:
    """A finished run."""
    base = tmp_path_factory.mktemp("convert")
    config = config_for(model_dir("llama"), text, base, solver="rtn", options={})
    perform(config)
    return config.output.run_dir


@pytest.mark.parametrize(
    "exchange", [pytest.param(True, id="exchange"), pytest.param(False, id="two renames", marks=pytest.mark.long)]
)
@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
def test_convert_killed_at_any_moment_continues(overwrite, exchange, source, tmp_path, monkeypatch):
    """After a kill in front of every change of the file system: a whole checkpoint under the name at every moment where the
    system can exchange names, what others had there is kept, and the same command ends with the whole of it."""
    cache = tmp_path / "cache"
    if not exchange:
        monkeypatch.setattr(target_module, "_exchange", lambda *_: False)
    convert(source, "bitplane", tmp_path / "expected", cache_dir=cache)
    expected = tree(tmp_path / "expected")
    convert(source, "gptq_v2", tmp_path / "older", cache_dir=cache)
    old = tree(tmp_path / "older")
    kills = 0
    while True:
        out = tmp_path / f"out-{kills}"
        if overwrite:
            shutil.copytree(tmp_path / "older", out)
            (out / "notes").mkdir()
            (out / "notes" / "mine.txt").write_text("mine")
            (out / "mine.md").write_text("mine")
        work = lambda out=out: convert(source, "bitplane", out, overwrite, cache_dir=cache)  # noqa: E731
        code, seen = in_a_process(work, kills)
        if code == 0:
            break
        assert (code, seen) == (-9, kills)
        if overwrite and exchange:
            left = {k: v for k, v in tree(out).items() if "mine" not in k and k != "notes" and not k.startswith(HIDDEN)}
            assert left in (old, expected), f"kill {kills}: neither the old nor the new checkpoint is whole"
        kept = [*tmp_path.glob(f"*out-{kills}*/mine.md"), *tmp_path.glob(f".*out-{kills}*/mine.md")]
        assert not overwrite or [p.read_text() for p in {p.resolve() for p in kept}] == ["mine"], f"kill {kills}"
        work()
        now = tree(out)
        mine = {"mine.md": b"mine", "notes": None, "notes/mine.txt": b"mine"} if overwrite else {}
        assert now == expected | mine, f"kill {kills}"
        assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")], (
            f"kill {kills}: something hidden is left"
        )
        kills += 1
    assert kills > 12 and seen == kills


def test_convert_again_changes_nothing(source, tmp_path):
    cache, out = tmp_path / "cache", tmp_path / "o"
    convert(source, "gptq_v2", out, cache_dir=cache)
    stamps = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    convert(source, "gptq_v2", out, cache_dir=cache)
    assert stamps == {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    with pytest.raises(InputError, match="is not empty; use another directory or --overwrite"):
        convert(source, "bitplane", out, cache_dir=cache)
    packed = tmp_path / "packed"
    convert(out, "bitplane", packed, cache_dir=cache)
    stamp = (packed / "model.safetensors").stat().st_mtime_ns
    convert(out, "bitplane", packed, cache_dir=cache)
    assert (packed / "model.safetensors").stat().st_mtime_ns == stamp
    (packed / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(InputError, match="is not empty"):
        convert(out, "bitplane", packed, cache_dir=cache)


@pytest.mark.parametrize("part", ["new", "old"])
@pytest.mark.parametrize("kind", ["files", "link", "dangling", "file"])
def test_hidden_neighbours_of_others_are_left_alone(part, kind, source, tmp_path):
    """Under the very name that this toolkit would take: it proves its own by a mark, and follows no link."""
    out, cache = tmp_path / "s", tmp_path / "cache"
    convert(source, "gptq_v2", tmp_path / "v1", cache_dir=cache)
    place = tmp_path / f"{HIDDEN}{part}-of-s"
    if kind == "files":
        place.mkdir()
        (place / "mine").write_text("mine")
    elif kind == "file":
        place.write_text("mine")
    else:
        place.symlink_to("v1" if kind == "link" else "nowhere")
    before = tree(tmp_path)
    with pytest.raises(InputError, match="was not made by this toolkit: move it away"):
        convert(source, "bitplane", out, cache_dir=cache)
    assert not out.exists()
    assert {k: v for k, v in tree(tmp_path).items() if k in before} == before


def test_backups_and_locks_of_the_person_are_not_taken(source, tmp_path):
    out, cache = tmp_path / "ck", tmp_path / "cache"
    convert(source, "bitplane", out, cache_dir=cache)
    for name in (".ck.old", ".ck.tmp"):
        shutil.copytree(out, tmp_path / name)
    (tmp_path / ".ck.lock").write_text("mine")
    before = tree(tmp_path)
    for overwrite in (False, True):
        convert(source, "bitplane", out, overwrite, cache_dir=cache)
        assert tree(tmp_path) == before
    lock = tmp_path / f"{HIDDEN}lock-of-ck"
    lock.write_text("mine")
    with pytest.raises(InputError, match="is not a lock of this toolkit"):
        convert(source, "bitplane", out, True, cache_dir=cache)
    assert lock.read_text() == "mine"


def test_what_comes_while_a_checkpoint_is_made_is_not_replaced(tmp_path):
    target = tmp_path / "s"
    with pytest.raises(InputError, match="is not empty"), replacing(target, overwrite=False) as new:
        (new / "config.json").write_text("{}")
        target.mkdir()
        (target / "theirs").write_text("theirs")
    assert tree(tmp_path) == {"s": None, "s/theirs": b"theirs"}


def test_an_empty_directory_is_filled_where_it_is(command, quick, model_dir, source, tmp_path, monkeypatch):
    """It may be the working directory, or a mount: its name cannot be given to another."""
    out = tmp_path / "out"
    out.mkdir()
    inode = out.stat().st_ino
    monkeypatch.setattr(target_module, "_exchange", lambda *_: pytest.fail("exchanged"))
    convert(source, "bitplane", out, cache_dir=tmp_path / "cache")
    assert out.stat().st_ino == inode and not [p for p in out.iterdir() if p.name.startswith(".")]
    kills = 0
    convert(source, "bitplane", tmp_path / "expected", cache_dir=tmp_path / "cache")
    while True:
        place = tmp_path / f"mount-{kills}"
        place.mkdir()
        work = lambda place=place: convert(source, "bitplane", place, cache_dir=tmp_path / "cache")  # noqa: E731
        code, _ = in_a_process(work, kills)
        if code == 0:
            break
        loads = (place / "config.json").exists()
        assert not loads or tree(tmp_path / "expected").items() <= tree(place).items(), "config.json comes last"
        work()
        assert tree(place) == tree(tmp_path / "expected"), f"kill {kills}"
        kills += 1
    assert kills > 10


def test_a_finished_checkpoint_that_lost_a_file_is_said(command, quick, model_dir, tmp_path):
    save = tmp_path / "s"
    assert saved_by_us(command, quick, model_dir("llama"), save, tmp_path)[0] == 0
    (save / "tokenizer.json").unlink()
    one_line(saved_by_us(command, quick, model_dir("llama"), save, tmp_path), save, "is not empty")
    assert saved_by_us(command, quick, model_dir("llama"), save, tmp_path, "--overwrite")[0] == 0
    for hashes in ([1], {"a\0b": "0"}, {"../../x": "0"}, None):
        edit_json(save / "results.json", lambda r, hashes=hashes: r.update({OWN: hashes}))
        code, _, err = saved_by_us(command, quick, model_dir("llama"), save, tmp_path)
        assert code in (0, 2) and "Traceback" not in err
    edit_json(save / "results.json", lambda r: r.pop(OWN))
    assert saved_by_us(command, quick, model_dir("llama"), save, tmp_path)[0] == 0, "of an earlier version"


def test_several_chat_templates_are_saved(command, quick, model_dir, tmp_path):
    model = shutil.copytree(model_dir("llama"), tmp_path / "m")
    (model / "additional_chat_templates").mkdir()
    (model / "chat_template.jinja").write_text("a")
    (model / "additional_chat_templates" / "rag.jinja").write_text("b")
    save = tmp_path / "s"
    for flags in ([], [], ["--overwrite", "--wbits", 4]):
        assert saved_by_us(command, quick, model, save, tmp_path, *flags)[0] == 0
        assert (save / "additional_chat_templates" / "rag.jinja").read_text() == "b"


def test_files_behind_links_count_as_read(command, quick, model_dir, tmp_path):
    """--save would take the weights that --model links to."""
    save, model = tmp_path / "ck", tmp_path / "m"
    assert saved_by_us(command, quick, model_dir("llama"), save, tmp_path)[0] == 0
    shutil.copytree(model_dir("llama"), model)
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to(save / "model.safetensors")
    before = tree(save)
    one_line(saved_by_us(command, quick, model, save, tmp_path, "--overwrite"), "--save", "a file of --model")
    assert tree(save) == before


def test_a_run_directory_of_others_is_looked_at_before_anything_is_made(command, quick, model_dir, tmp_path):
    place = tmp_path / "d"
    place.mkdir()
    (place / "run.lock").write_text("precious")
    one_line(command(model_quantizer, "--model", model_dir("llama"), *quick, "--run-dir", place), "run.lock")
    (place / "thesis").write_text("precious")
    one_line(command(model_quantizer, "--model", model_dir("llama"), *quick, "--run-dir", place), "run.lock")
    assert tree(place) == {"run.lock": b"precious", "thesis": b"precious"}
    (place / "run.lock").unlink()
    one_line(command(model_quantizer, "--model", model_dir("llama"), *quick, "--run-dir", place), "thesis")
    assert tree(place) == {"thesis": b"precious"}


def test_everyday_places_are_taken(command, quick, model_dir, text, tmp_path, monkeypatch):
    """The model's directory as the working directory, data beside runs, a cache anywhere."""
    model = shutil.copytree(model_dir("llama"), tmp_path / "m")
    at_default = quick[:-2]

    def here(directory: Path, *words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["x.py", *map(str, words)])
        monkeypatch.chdir(directory)
        return exit_code_of(model_quantizer.main), "", ""

    assert here(model, "--model", ".", *at_default, "--cache-dir", "cache")[0] == 0
    assert (model / "runs").is_dir() and (model / "cache").is_dir()
    (tmp_path / "data").mkdir()
    shutil.copy(text, tmp_path / "data")
    words = [
        "--model",
        model_dir("llama"),
        *at_default,
        "--data-dir",
        ".",
        "--cache-dir",
        "cache",
        "--run-dir",
        "out/run",
    ]
    assert here(tmp_path / "data", *words)[0] == 0
    empty = tmp_path / "empty"
    empty.mkdir()
    assert here(empty, "--model", model_dir("llama"), *quick, "--run-dir", tmp_path / "r", "--save", ".")[0] == 0
    assert (empty / "config.json").exists() and Path.cwd() == empty


# One process a run directory


HOLDER = """
import sys, time
from pathlib import Path
from quant.run.directory import RunDirectory
with RunDirectory(Path(sys.argv[1])).hold():
    print("held", flush=True)
    time.sleep(300)
"""


def test_a_second_process_is_told_who_holds_a_run_directory(command, quick, model_dir, tmp_path):
    run = tmp_path / "r"
    usual = ["--model", model_dir("llama"), *quick, "--run-dir", run]
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(run)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        one_line(command(model_quantizer, *usual), run, f"process {holder.pid} on {socket.gethostname()}")
        one_line(command(model_quantizer, *usual, "--overwrite"), run, f"process {holder.pid}")
    finally:
        holder.kill()
        holder.wait()
    assert (run / LOCK).exists(), "a process that was killed leaves its file"
    assert command(model_quantizer, *usual)[0] == 0, "and its lock is free"
    assert not (run / LOCK).exists()


def test_a_lock_is_held_once_a_process_and_by_any_depth(tmp_path):
    lock = tmp_path / "x.lock"
    with hold_lock(lock, "x"), hold_lock(lock, "x"):
        assert json.loads(lock.read_text()) == {"process": os.getpid(), "host": socket.gethostname()}
        pid = os.fork()
        if not pid:
            files._held.clear()  # as a process of its own would begin
            with suppress(InputError), hold_lock(lock, "x"):
                os._exit(1)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert not lock.exists()
    victim = tmp_path / "precious"
    victim.write_text("precious")
    lock.symlink_to(victim)
    with suppress(OSError), hold_lock(tmp_path / "x.lock", "x"):
        pass
    assert victim.read_text() == "precious"


def _run_both(config: Request, waiting, answers) -> None:
    waiting.wait()
    try:
        perform(config)
        answers.put("done")
    except InputError as error:
        answers.put(str(error))


@pytest.mark.slow
def test_two_processes_on_one_run_directory(model_dir, text, tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["quant.run.session", "quant.solvers.quantease"])
    for attempt in range(3):
        config = config_for(model_dir("llama"), text, tmp_path / str(attempt), save=tmp_path / str(attempt) / "s")
        waiting, answers = context.Barrier(2), context.Queue()
        both = [context.Process(target=_run_both, args=(config, waiting, answers)) for _ in range(2)]
        for process in both:
            process.start()
        said = sorted(answers.get(timeout=120) for _ in both)
        for process in both:
            process.join()
        # One after the other is right too: the second then finds everything done.
        assert "done" in said and all(s == "done" or "is in use by process" in s for s in said)
        names = [(r["block"], r["name"]) for r in map(json.loads, (config.output.run_dir / "journal.jsonl").open())]
        assert len(names) == len(set(names)) == 21
        assert (
            len(RunDirectory(config.output.run_dir).finished_blocks()) == 3
            and (config.output.save / "model.safetensors").exists()
        )


# Full disk


def test_the_store_on_disk_reserves_its_space(tmp_path, monkeypatch):
    store = Activations("disk", (2, 3, 4), torch.float32, torch.device("cpu"), tmp_path)
    store[slice(0, 2)] = torch.arange(24.0).view(2, 3, 4)
    assert float(store[slice(1, 2)].sum()) == sum(range(12, 24)) and list(tmp_path.iterdir()) == []

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left") as error:
        Activations("disk", (2, 3, 4), torch.float32, torch.device("cpu"), tmp_path)
    assert str(tmp_path) in str(error.value.filename) and list(tmp_path.iterdir()) == []


def test_the_store_on_disk_is_counted_before_work(model_dir, text, tmp_path, monkeypatch):
    from quant.run import job as job_module

    asked: dict[str, int] = {}
    monkeypatch.setattr(job_module, "check_space", lambda place, size: asked.update({place.name: size}))
    sizes = {}
    for store in ("cpu", "disk"):
        config = config_for(model_dir("llama"), text, tmp_path, solver="rtn", options={}, activation_store=store)
        session = open_session(config)
        with ExitStack() as held:
            job_module.open_jobs(session, [(config.run, replace(config.output, run_dir=tmp_path / store))], held)
        sizes[store] = asked[store]
    hidden = 32 * 32 * 4  # bytes of a window: tokens, width, float32
    assert sizes["disk"] - sizes["cpu"] == hidden * max(12, 2 * 12)
    assert [place.flag for place in places_written(config.output)] == ["--run-dir"]


SMALL_DISK = """
import sys
from pathlib import Path
import torch
from quant.cli.errors import exit_code_of
from quant.blocks.stream import Activations
sys.exit(exit_code_of(lambda: Activations("disk", (64, 256, 256), torch.float32, torch.device("cpu"), Path(sys.argv[1]))))
"""


def test_a_disk_that_fills_under_the_store_is_one_line(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting a small disk is not allowed here")
    try:
        done = subprocess.run([sys.executable, "-c", SMALL_DISK, str(disk)], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "No space left" in done.stderr, done
        assert str(disk) in done.stderr and list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_write_that_fails_names_its_file_and_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    path.write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as error:
        write_atomically(path, b"new")
    assert error.value.filename == str(path) and path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_lock_that_cannot_be_written_is_not_left(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "pwrite", full)
    with pytest.raises(OSError, match="No space left") as error, hold_lock(tmp_path / "x.lock", "x"):
        pass
    assert error.value.filename == str(tmp_path / "x.lock") and list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_of_a_file_goes(tmp_path):
    path, other = tmp_path / "x.json", tmp_path / f".x.json.{'0' * 11}g.tmp"
    left, busy = (tmp_path / f".x.json.{digit * 12}.tmp" for digit in "01")
    for file in (left, busy, other):
        file.write_text("half")
    with busy.open("rb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        write_atomically(path, b"new")
    assert sorted(tmp_path.iterdir()) == sorted([path, busy, other]) and path.read_bytes() == b"new"
    write_atomically(path, b"newer")
    assert sorted(tmp_path.iterdir()) == sorted([path, other])


def test_every_promise_names_tests_that_are_there():
    text = (ROOT / "docs" / "promises.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ") and "promise | test" not in line]
    assert len(rows) > 25
    for row in rows:
        cell = row.split("|")[-2]
        names, places = re.findall(r"`(test_\w+)`", cell), re.findall(r"`(tests/\S+)`", cell)
        assert names or places, row
        source = (ROOT / (places[0] if places else "tests/test_safety.py")).read_text()
        assert all(f"def {name}(" in source for name in names), row


def test_a_holder_that_has_not_said_who_it_is_yet_is_waited_for(tmp_path):
    import threading

    lock = tmp_path / "x.lock"
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)  # as a process that was stopped between its two calls
    said = threading.Timer(0.2, lambda: os.pwrite(descriptor, b'{"process": 7, "host": "there"}', 0))
    said.start()
    with pytest.raises(InputError, match="x is in use by process 7 on there"), hold_lock(lock, "x"):
        pass
    said.join()
    os.close(descriptor)
