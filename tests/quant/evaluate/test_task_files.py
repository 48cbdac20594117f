"""Paths in a task's file: from where the file lies, then from the working directory, then an error that names both."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from quant.core.errors import InputError
from quant.evaluate.task_files import with_paths
from quant.evaluate.tasks import open_tasks

Tree = dict[str, Path]


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    """Rows beside the file, in the working directory, in both, and below both."""
    places = {"beside": tmp_path / "tasks[1]", "here": tmp_path / "here"}
    for place, folder in places.items():
        (folder / "deep").mkdir(parents=True)
        for name in (f"{place}.jsonl", "both.jsonl", f"deep/{place}.jsonl", "a[1].jsonl"):
            (folder / name).write_text("{}\n")
    (places["beside"] / "a1.jsonl").write_text("{}\n")
    monkeypatch.chdir(places["here"])
    return places


def files_of(value: Any, tree: Tree) -> Any:
    config = {"dataset_path": "json", "dataset_kwargs": {"data_files": value, "field": "x"}}
    new = with_paths(config, tree["beside"] / "mine.yaml")
    assert new["dataset_kwargs"]["field"] == "x" and config["dataset_kwargs"]["data_files"] == value
    return new["dataset_kwargs"]["data_files"]


def test_first_beside_the_file_then_here(tree: Tree) -> None:
    beside, here = (
        f"{tree['beside'].parent}/tasks[[]1]",
        str(tree["here"]),
    )  # a bracket is escaped: a name is no pattern
    assert files_of("both.jsonl", tree) == f"{beside}/both.jsonl"
    assert files_of("./deep/beside.jsonl", tree) == f"{beside}/deep/beside.jsonl"
    assert files_of("here.jsonl", tree) == f"{here}/here.jsonl"
    assert files_of({"test": ["both.jsonl", "here.jsonl"], "train": "../here/here.jsonl"}, tree) == {
        "test": [f"{beside}/both.jsonl", f"{here}/here.jsonl"],
        "train": f"{beside}/../here/here.jsonl",
    }
    assert files_of("*.jsonl", tree) == f"{beside}/*.jsonl"
    assert files_of("h*.jsonl", tree) == f"{here}/h*.jsonl"
    assert files_of("a[1].jsonl", tree) == f"{beside}/a[[]1].jsonl"
    assert files_of(f"{here}/here.jsonl", tree) == f"{here}/here.jsonl"
    for address in ("https://x.org/a.jsonl", "hf://datasets/x/a.jsonl", 7, None):
        assert files_of(address, tree) == address


@pytest.mark.parametrize("value", ["no.jsonl", "no*.jsonl", "../no.jsonl", "/no/where.jsonl"])
def test_what_is_nowhere_names_every_place(value: str, tree: Tree) -> None:
    with pytest.raises(InputError) as error:
        files_of({"test": [value]}, tree)
    places = [str(place / value) for place in tree.values()] if value[0] != "/" else [value]
    assert "mine.yaml" in str(error.value) and all(place in str(error.value) for place in places)
    assert str(error.value).count(value) == len(places) + 1


def test_an_empty_file_is_named(tree: Tree) -> None:
    empty = tree["beside"] / "none.jsonl"
    empty.touch()
    with pytest.raises(InputError, match="mine.yaml names none.jsonl, and .*none.jsonl is empty"):
        files_of("none.jsonl", tree)


def test_names_on_the_hub_are_left_alone(tree: Tree) -> None:
    config = {"dataset_path": "allenai/c4", "dataset_kwargs": {"data_files": "both.jsonl"}}
    assert with_paths(config, tree["beside"] / "mine.yaml") == config
    resolved = with_paths({"dataset_path": "deep"}, tree["beside"] / "mine.yaml")
    assert resolved == {"dataset_path": str(tree["beside"] / "deep")}
    resolved = with_paths({"dataset_path": "json", "dataset_kwargs": {"data_dir": "deep"}}, tree["here"] / "mine.yaml")
    assert resolved["dataset_kwargs"] == {"data_dir": str(tree["here"] / "deep")}


def test_a_pipe_is_not_opened(tree: Tree) -> None:
    os.mkfifo(tree["beside"] / "pipe.jsonl")
    with pytest.raises(InputError, match=r"pipe\.jsonl is a pipe"):
        files_of("pipe.jsonl", tree)


def relative(local_task: Path) -> None:
    file = local_task / "mine.yaml"
    file.write_text(file.read_text().replace(str(local_task / "rows.jsonl"), "rows.jsonl"))


def test_tasks_are_loaded_from_where_they_lie(
    local_task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    relative(local_task)
    assert open_tasks(["mine"], local_task, None, 4).members == {"mine": ("mine",)}
    (local_task / "rows.jsonl").rename(tmp_path / "elsewhere" / "rows.jsonl")
    assert open_tasks(["mine"], local_task, None, 4).members == {"mine": ("mine",)}
    (tmp_path / "elsewhere" / "rows.jsonl").unlink()
    with pytest.raises(InputError, match="--tasks mine: its data cannot be loaded") as error:
        open_tasks(["mine"], local_task, None, 4)
    for place in (local_task, tmp_path / "elsewhere"):
        assert f"{place}/rows.jsonl" in str(error.value)


def test_an_included_file_has_its_own_place(local_task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the file that includes it says which kind the data are."""
    monkeypatch.chdir(tmp_path)
    relative(local_task)
    base = tmp_path / "base"
    base.mkdir()
    (local_task / "rows.jsonl").rename(base / "rows.jsonl")
    lines = (local_task / "mine.yaml").read_text().splitlines()
    own = ("task:", "dataset_path:")
    (base / "common.txt").write_text("\n".join(line for line in lines if not line.startswith(own)))
    (local_task / "mine.yaml").write_text("task: mine\ndataset_path: json\ninclude: ../base/common.txt\n")
    assert open_tasks(["mine"], local_task, None, 4).members == {"mine": ("mine",)}
    (base / "rows.jsonl").unlink()
    with pytest.raises(InputError, match="rows.jsonl"):
        open_tasks(["mine"], local_task, None, 4)
