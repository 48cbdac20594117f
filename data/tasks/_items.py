"""Loads a demo task's items from the JSONL beside this file, whatever the working directory is."""

import json
from pathlib import Path


def _load(name: str) -> dict:
    from datasets import Dataset

    lines = (Path(__file__).parent / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return {"test": Dataset.from_list([json.loads(line) for line in lines])}


def lastword(**kwargs: object) -> dict:
    """The last word is the tool of the trade that somebody has, or the name of the one whom a pronoun meant."""
    return _load("demo_lastword")


def continuation(**kwargs: object) -> dict:
    """Which of four endings holds in the demo world."""
    return _load("demo_continuation")


def reference(**kwargs: object) -> dict:
    """Which of two people is meant by he or she."""
    return _load("demo_reference")


def yesno(**kwargs: object) -> dict:
    """Whether the ground was wet, from the weather that the story told."""
    return _load("demo_yesno")
