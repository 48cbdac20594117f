"""Entries of JSON files as their declared types."""

from __future__ import annotations

import math
from typing import Any, Literal, TypedDict

import pytest

from quant.core.entries import Measured, entries_as
from quant.core.errors import InputError


class Inner(TypedDict):
    """An entry with entries."""

    x: float
    y: Measured | None


class Outer(TypedDict):
    """One entry of every kind."""

    name: str
    count: int
    yes: bool | None
    inner: Inner
    by_name: dict[str, Inner]
    several: list[int]
    pair: tuple[float, float] | None
    colour: Literal["red", "blue"] | None
    anything: Any


GOOD = {"name": "a", "count": 3, "yes": True, "inner": {"x": 1, "y": 2.5}, "by_name": {"k": {"x": 0.5, "y": None}},
        "several": [1, 2], "pair": [1.0, 2], "colour": "red", "anything": {"deep": [1]}}  # fmt: skip


def test_what_is_right_stays_as_it_is():
    value = GOOD | {"of another version": [None, "x"]}
    assert entries_as(Outer, value, "f") == value
    assert entries_as(Outer, GOOD | {"inner": {"x": 1.0, "y": math.inf}}, "f")["inner"]["y"] == math.inf


def test_what_is_not_there_is_none_or_empty():
    bare = {"name": "a", "count": 3, "inner": {"x": 1.0}, "anything": 0}
    empty = {"yes": None, "by_name": {}, "several": [], "pair": None, "colour": None}
    assert entries_as(Outer, bare, "f") == bare | empty | {"inner": {"x": 1.0, "y": None}}


@pytest.mark.parametrize(
    ("entries", "line"),
    [
        ([], "f: all of it is a list, and has to be an object"),
        (GOOD | {"name": None}, "f: name is null, and has to be a text"),
        (
            {k: v for k, v in GOOD.items() if k != "count"},
            "f: count is missing, and has to be a whole number below 2^63",
        ),
        (GOOD | {"count": True}, "f: count is true, and has to be a whole number below 2^63"),
        (GOOD | {"count": 2.0}, "f: count is 2.0, and has to be a whole number below 2^63"),
        (GOOD | {"count": 10**30}, "f: count is larger than 2^63, and has to be a whole number below 2^63"),
        (GOOD | {"yes": 1}, "f: yes is 1, and has to be true or false"),
        (GOOD | {"inner": {}}, "f: inner.x is missing, and has to be a finite number below 1e100"),
        (GOOD | {"inner": {"x": math.nan}}, "f: inner.x is nan, and has to be a finite number below 1e100"),
        (GOOD | {"inner": {"x": 1e200}}, "f: inner.x is 1e+200, and has to be a finite number below 1e100"),
        (GOOD | {"inner": {"x": 1, "y": 1e200}}, "f: inner.y is 1e+200, and has to be a finite number below 1e100"),
        (GOOD | {"by_name": {"k": {"x": "1"}}}, "f: by_name.k.x is '1', and has to be a finite number below 1e100"),
        (GOOD | {"by_name": None}, "f: by_name is null, and has to be an object"),
        (GOOD | {"several": [1, {}]}, "f: several[1] is an object, and has to be a whole number below 2^63"),
        (GOOD | {"pair": [1.0]}, "f: pair is a list, and has to be a list of 2 numbers"),
        (GOOD | {"colour": "green"}, "f: colour is 'green', and has to be 'red' or 'blue'"),
    ],
)
def test_another_type_is_one_line(entries, line):
    with pytest.raises(InputError) as error:
        entries_as(Outer, entries, "f")
    assert error.value.args == (line,)


@pytest.mark.parametrize("where", ["anything", "not declared"])
def test_nesting_has_a_bound(where):
    deep: list = []
    for _ in range(100):
        deep = [deep]
    with pytest.raises(InputError, match=f"f: {where} is nested too deep"):
        entries_as(Outer, GOOD | {where: deep}, "f")
