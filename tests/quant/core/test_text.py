"""Text from outside in terminals, CSV files and Markdown tables; failures as lines."""

import pickle

import pytest

from quant.core.errors import InputError, RunError, first_line
from quant.core.text import LONG_LINE, brief, csv_cell, markdown_cell, markdown_table, one_line, printable


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("a\nb\rc\td", r"a\nb\rc\td"),
        ("\x1b[31mred\x07", r"\x1b[31mred\x07"),
        ("\x00\x7f\x9b31m", r"\x00\x7f\x9b31m"),
        ("\u2028\u2029", r"\u2028\u2029"),
        ("\u202egnp.exe\u2066\u2069\u200e\u200f\u061c", r"\u202egnp.exe\u2066\u2069\u200e\u200f\u061c"),
        ("\udcff\uffff", r"\udcff\uffff"),
        ("漢字 é [red]x[/red] 'C:\\new'", "漢字 é [red]x[/red] 'C:\\new'"),
        ("", ""),
    ],
)
def test_printable(given, shown):
    assert printable(given) == shown and printable(shown) == shown


def test_every_control_character_becomes_an_escape():
    for code in [
        *range(0x20),
        *range(0x7F, 0xA0),
        0x61C,
        *range(0x202A, 0x202F),
        *range(0x2066, 0x206A),
        0xD800,
        0xDFFF,
    ]:
        shown = printable(f"a{chr(code)}b")
        assert shown.isascii() and shown.isprintable() and shown.startswith("a\\") and shown.endswith("b"), hex(code)
    assert all(
        printable(chr(code)) == chr(code) for code in (*range(0x20, 0x7F), 0xA0, 0x202F, 0xD7FF, 0xE000, 0x1F600)
    )


def test_what_is_kept():
    assert printable("a\n\tb\x1b", keep="\n\t") == "a\n\tb\\x1b"


def test_long_names_are_cut():
    assert brief("abc", 3) == "abc" and brief("a" * 50 + "z" * 50, 20) == "a" * 12 + "..." + "z" * 5
    line = one_line(f"no such file: {'n' * 5000}.txt; use another")
    assert len(line) < 250 and line.startswith("no such file: nnn") and line.endswith(".txt; use another")
    assert len(one_line("n " * 5000)) == LONG_LINE
    assert one_line("a\nerror: b") == r"a\nerror: b"


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ("=1+1", "'=1+1"),
        ("+cmd", "'+cmd"),
        ("-cmd|' /C calc'!A0", "'-cmd|' /C calc'!A0"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("\t=1", "'\\t=1"),
        ("\r=1", "'\\r=1"),
        ("-1.5", "-1.5"),
        ("+3e-4", "+3e-4"),
        ("-1\n=2", "'-1\\n=2"),
        ("-", "-"),
        ("llama=x", "llama=x"),
        ("a\x1b", "a\\x1b"),
        (-1.5, -1.5),
        (None, None),
    ],
)
def test_a_cell_of_a_csv_is_no_formula(given, written):
    assert csv_cell(given) == written


def test_a_cell_of_a_markdown_table_stays_one():
    assert markdown_cell("a|b\nc") == "a\\|b\\\\nc"
    assert markdown_cell("a\\|b") == "a\\\\\\|b", "a backslash in front does not open the cell"
    assert markdown_cell("<img src=x onerror=alert(1)>") == "&lt;img src=x onerror=alert(1)>"
    assert markdown_cell("[x](javascript:alert(1)) & `y`") == "\\[x\\](javascript:alert(1)) &amp; \\`y\\`"
    assert markdown_cell("W4A4 lwc+let_2, 0.5 ± 1") == "W4A4 lwc+let_2, 0.5 ± 1"


def test_a_markdown_table_has_the_columns_of_its_first_record():
    records = iter([{"a|b": "1", "c": "x\ny"}, {"c": "2", "d": "left out"}])
    lines = markdown_table(records)
    assert [next(lines) for _ in range(3)] == ["| a\\|b | c |", "|---|---|", "| 1 | x\\\\ny |"]
    assert list(lines) == ["|  | 2 |"] and list(markdown_table([])) == []


@pytest.mark.parametrize("kind", [InputError, RunError])
def test_a_failure_has_a_line_for_each_mistake(kind):
    one, several = kind("a\nb"), kind("a\nb", "c")
    assert one.args == ("a\nb",) and str(one) == "a\nb"
    assert several.args == ("a\nb", "c") and str(several) == "a\nb\nc"
    assert pickle.loads(pickle.dumps(several)).args == several.args
    assert first_line(several) == "a\nb" and isinstance(one, ValueError | RuntimeError)


def test_the_first_line_of_other_errors():
    assert first_line(OSError()) == "OSError" and first_line(OSError(2, "gone", "x")) == "[Errno 2] gone: 'x'"
