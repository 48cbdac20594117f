"""What it means that a command held."""

from __future__ import annotations

import hashlib
import json
import re
import stat
from collections.abc import Collection
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from tests.campaign.processes import CRASHED, Outcome

UNFORESEEN = ("shows how it came to that", "a library failed")  # one line, but of what nobody has thought of
LONGEST = 1500  # letters of a line of a mistake; a path alone may have 255 in each of its names
OBEYED = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def faults_of(outcome: Outcome, codes: Collection[int] = (0, 1, 2), most: int = 1) -> list[str]:
    """What is wrong with how a command ended. codes: exit codes that are right. most: lines for mistakes."""
    if outcome.timed_out:
        return [f"did not end in {outcome.seconds:.0f} s"]
    if outcome.code == CRASHED or "Traceback (most recent call last)" in outcome.err + outcome.out:
        return [f"traceback: {last_of(outcome.err)}"]
    lines = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    said = f": {lines[0][:300]}" if lines else ""
    faults = [] if outcome.code in codes else [f"exit code {outcome.code}{said or ': ' + outcome.err[-200:]}"]
    if outcome.code in (1, 2, 130) and not 1 <= len(lines) <= most:
        faults.append(f"exit code {outcome.code} with {len(lines)} error lines{said}")
    if lines and any(text in lines[-1] for text in UNFORESEEN):
        faults.append(f"nobody foresaw{said}")
    if outcome.code == 0 and lines:
        faults.append(f"exit code 0 with an error line{said}")
    if long := [line for line in lines if len(line) > LONGEST]:
        faults.append(f"a line of {len(long[0])} letters{said}")
    if obeyed := OBEYED.search(outcome.out + outcome.err):
        faults.append(f"{obeyed.group()!r} reaches the terminal")
    return faults + [f"changed what is not its own: {stray}" for stray in outcome.strays]


def last_of(text: str) -> str:
    """Of a traceback: the exception, and the innermost line of this project."""
    lines = text.rstrip().splitlines() or [""]
    places = re.findall(r'File "(\S*?/(?:quant|models|data|scripts)/\S+|\S*?/\w+\.py)", line (\d+)', text)
    own = [
        f"{file.split('/')[-2]}/{file.split('/')[-1]}:{line}" for file, line in places if "site-packages" not in file
    ]
    return f"{lines[-1][:200]} at {own[-1] if own else '?'}"


def contents(path: Path) -> dict[str, str]:
    """Everything below a directory by name: hash of a file, target of a link, kind of what is special."""
    return {str(p.relative_to(path)): _content(p) for p in sorted(path.rglob("*"))} if path.is_dir() else {}


def _content(path: Path) -> str:
    mode = path.lstat().st_mode
    if stat.S_ISREG(mode):
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return f"-> {path.readlink()}" if stat.S_ISLNK(mode) else f"mode {stat.S_IFMT(mode):o}"


def difference(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """What changed below a directory, as faults."""
    lost, new = sorted(before.keys() - after.keys()), sorted(after.keys() - before.keys())
    changed = sorted(name for name in before.keys() & after.keys() if before[name] != after[name])
    return [
        f"input {what}: {names[0]}" for what, names in (("deleted", lost), ("made", new), ("changed", changed)) if names
    ]


def end_of(out: Path) -> dict[str, str]:
    """What a command leaves, without what differs from run to run: names, tensors and what numbers say of them."""
    return {name: _bits(out / name) for name in contents(out) if (out / name).is_file()}


def _bits(path: Path) -> str:
    if path.suffix == ".safetensors":
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            return f"unreadable: {error}"
        parts = (name.encode() + str((t.dtype, t.shape)).encode() + t.flatten().view(-1).numpy(force=True).tobytes()
                 if t.dtype.itemsize != 2 else name.encode() + t.float().numpy().tobytes() for name, t in sorted(tensors.items()))  # fmt: skip
        return hashlib.sha256(b"".join(parts)).hexdigest()
    if path.name == "results.json":
        results = json.loads(path.read_text())
        return json.dumps([results.get(key) for key in ("codes_sha256", "perplexity", "bits_per_weight")])
    if path.name == "journal.jsonl":
        records = map(json.loads, path.read_text().splitlines())
        return json.dumps([(r["block"], r["name"], r.get("relative_error")) for r in records])
    if path.name == "sweep.json":
        return json.dumps([row["status"] for row in json.loads(path.read_text())["rows"]])
    return _content(path) if path.name == "config.json" else "there"


def other_end(expected: dict[str, str], reached: dict[str, str]) -> list[str]:
    """How an end differs from the one without trouble, as faults."""
    lost, new = sorted(expected.keys() - reached.keys()), sorted(reached.keys() - expected.keys())
    other = sorted(name for name in expected.keys() & reached.keys() if expected[name] != reached[name])
    kinds = (("is missing at the end", lost), ("is left over", new), ("has other bits", other))
    return [f"{names[0]} {what}" for what, names in kinds if names]
