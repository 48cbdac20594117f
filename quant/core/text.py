"""Names, paths and texts from outside as terminals, CSV files and Markdown tables can show them without obeying them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

# C0, DEL, C1; marks and overrides of the writing direction; separators of lines and paragraphs; halves of
# surrogates and two numbers that are no character, which UTF-8 and XML refuse
ACTIVE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]",
)
NAMED = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
LONG_WORD, LONG_LINE = 300, 1500


def printable(text: str, keep: str = "") -> str:
    r"""The text with every character that a terminal or a page obeys as an escape: \x1b, \n, \u202e.

    keep: characters that stay, such as the line ends of a text of several lines.
    """
    return ACTIVE.sub(lambda match: match[0] if match[0] in keep else _escape(match[0]), text)


def _escape(character: str) -> str:
    code = ord(character)
    return NAMED.get(character) or (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}")


def is_text(text: str) -> bool:
    """Whether UTF-8 can hold the text: bytes of a command line that are none come as halves of surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def brief(text: str, most: int) -> str:
    """The text, or its beginning and its end where it is longer than ``most``."""
    if len(text) <= most:
        return text
    tail = most // 4
    return f"{text[: most - tail - 3]}...{text[len(text) - tail :]}"


def one_line(text: str) -> str:
    """A message as one line that a person can read: printable, without names of thousands of letters in full."""
    shown = re.sub(rf"\S{{{LONG_WORD + 1},}}", lambda word: brief(word[0], LONG_WORD // 2), printable(text))
    return brief(shown, LONG_LINE)


def csv_cell(value: Any) -> Any:
    """A cell of a CSV file: text that a spreadsheet would take for a formula begins with an apostrophe; numbers stay."""
    if not isinstance(value, str):
        return value
    shown = printable(value)
    formula = len(value) > 1 and value.startswith(FORMULA) and not _is_number(shown)
    return f"'{shown}" if formula else shown


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def markdown_cell(text: str) -> str:
    """Text inside a Markdown table: no end of the cell or of the line, no HTML, no link."""
    return re.sub(r"[\\|\[\]`]", r"\\\g<0>", printable(text)).replace("&", "&amp;").replace("<", "&lt;")


def markdown_table(records: Iterable[Mapping[str, str]]) -> Iterator[str]:
    """The lines of a table whose columns are the first record's names; a record's line comes with the record."""
    names: list[str] = []
    for record in records:
        if not names:
            names = list(record)
            yield f"| {' | '.join(map(markdown_cell, names))} |"
            yield "|---" * len(names) + "|"
        yield f"| {' | '.join(markdown_cell(record.get(name, '')) for name in names)} |"
