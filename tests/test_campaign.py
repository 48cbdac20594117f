"""A slice of the campaign, and that its verdicts can fall the other way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.campaign.processes import CRASHED, Outcome
from tests.campaign.verdicts import contents, difference, faults_of, other_end

ROOT = Path(__file__).parents[1]
PARTS = ("flags", "conflicts", "config", "tokenizer", "tensors", "tables", "runs", "kills", "two", "disk")


def campaign(*words: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "tests.campaign", *map(str, words)],
        cwd=ROOT,
        env=os.environ | (env or {}),
        capture_output=True,
        text=True,
    )


def test_a_slice_of_the_campaign_holds(tmp_path):
    only = [word for part in PARTS for word in ("--only", part)]
    done = campaign("--cases", 24, "--seed", 1, "--jobs", 1, "--json", tmp_path / "numbers.json", *only)
    assert done.returncode == 0, done.stdout + done.stderr
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    tried = {row["part"]: row["tried"] for row in numbers["parts"]}
    assert tried.keys() == set(PARTS) and min(tried.values()) >= 1 and sum(tried.values()) >= 20


def outcome(**changes: object) -> Outcome:
    right = {"words": ("x",), "code": 2, "out": "", "err": "error: x.json is not JSON\n", "seconds": 0.1, "timed_out": False,
             "strays": (), "events": 0}  # fmt: skip
    return Outcome(**(right | changes))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, None),
        ({"code": 0, "err": ""}, None),
        ({"err": ""}, "exit code 2 with 0 error lines"),
        ({"err": "error: a\nerror: b\n"}, "exit code 2 with 2 error lines"),
        ({"code": 0}, "exit code 0 with an error line"),
        ({"code": -11}, "exit code -11"),
        ({"code": CRASHED, "err": "KeyError: 'x'"}, "traceback: KeyError: 'x'"),
        ({"err": "Traceback (most recent call last):\nKeyError: 'x'\nerror: x\n"}, "traceback"),
        ({"timed_out": True}, "did not end"),
        ({"err": "error: " + "x" * 5000}, "a line of 5007 letters"),
        ({"err": "error: \x1b[31m"}, "reaches the terminal"),
        ({"strays": ("open /etc/passwd",)}, "changed what is not its own: open /etc/passwd"),
    ],
)
def test_a_verdict_says_what_is_wrong(changes, says):
    faults = faults_of(outcome(**changes))
    assert faults == [] if says is None else len(faults) == 1 and says in faults[0]


def test_changed_inputs_and_other_ends_are_seen(tmp_path):
    (tmp_path / "a").write_text("1")
    (tmp_path / "b").mkdir()
    before = contents(tmp_path)
    assert difference(before, contents(tmp_path)) == [] == other_end(before, before)
    (tmp_path / "a").write_text("2")
    (tmp_path / "b").rmdir()
    (tmp_path / "c").symlink_to("a")
    assert difference(before, contents(tmp_path)) == ["input deleted: b", "input made: c", "input changed: a"]
    assert other_end(before, contents(tmp_path)) == ["b is missing at the end", "c is left over", "a has other bits"]
