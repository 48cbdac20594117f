"""Damage by kind: bytes, JSON, YAML, tensors, and things that are no files. Each says what it did."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file, save_file

ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2, 7, 10**6, 10**12, 2**63, -(10**20), 0.5, 1e308, float("nan"), float("inf"), "", "x", "../../x",
    "/etc/passwd", "a" * 5000, "\ud800", "\x1b[31m", "[/b]", "\u202e", "nan", "1", [], [[]], [None], [1, "x"], {}, {"x": {}}, {"": None},
]  # fmt: skip
YAML = [
    "2020-13-45", "!!int abc", "!!float x", "!!timestamp x", "!foo 3", "!!python/name:os.system", "*nothing", "&a [*a]", "{", "[", "'",
    "|", "~", ".nan", "-.inf", "1e400", "0x", "0o9", "1:60:61", "!!binary x", "? ", "<<: 1", "- - - x", '"\\ud800"', "\x07", "%YAML 9",
    "!!set {a, b}", "10" * 40, "yes", "2001-01-01", "[" * 2000,
]  # fmt: skip
DTYPES = [
    torch.int8,
    torch.uint8,
    torch.int64,
    torch.bool,
    torch.float8_e4m3fn,
    torch.float64,
    torch.complex64,
    torch.bfloat16,
]


def pick(rng: Random, items: Sequence[Any], name: Callable[[Any], object] = repr) -> Any:
    """One of the items; an item more among them moves no other choice than those that fall on it."""
    salt = rng.random()
    return min(items, key=lambda item: hashlib.sha256(f"{salt} {name(item)}".encode(errors="replace")).digest())


def deep(levels: int = 5000) -> str:
    return "[" * levels + "]" * levels


def bytes_of(rng: Random, path: Path) -> str:
    """Change the bytes of a file."""
    data = bytearray(path.read_bytes())
    at = rng.randrange(len(data) + 1)
    kind = rng.choice(
        ["flip", "cut", "insert", "utf-8", "empty", "zeros", "whole", "twice", "BOM", "CRLF", "surrogate"]
    )
    if kind == "flip":
        for _ in range(rng.choice([1, 1, 8])):
            data[rng.randrange(max(1, len(data)))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del data[at:]
    elif kind == "insert":
        data[at:at] = rng.randbytes(rng.choice([1, 40]))
    elif kind == "utf-8":
        data[at:at] = rng.choice([b"\xff\xfe", b"\xc3", b"\xed\xa0\x80", b"\x80" * 9])
    elif kind == "surrogate":
        data[at:at] = b"\\ud800"
    elif kind == "zeros":
        data[at : at + 64] = bytes(64)
    elif kind == "whole":
        data[:] = rng.choice(["null", "[]", "{}", "3", '"x"', deep(), '{"a":' * 3000, "NaN", "{}{}", " "]).encode()
    elif kind == "BOM":
        data[:0] = b"\xef\xbb\xbf"
    else:
        data[:] = {"empty": b"", "twice": data * 2, "CRLF": data.replace(b"\n", b"\r\n")}[kind]
    path.write_bytes(data)
    return f"{path.name}: {kind} at {at}"


def thing_of(rng: Random, path: Path) -> str:
    """Put something else in the place of a file."""
    kind = rng.choice(
        ["a pipe", "a directory", "a loop of links", "a link to nothing", "nothing", "a device", "a socket"]
    )
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
    make_thing(path, kind)
    return f"{path.name}: {kind} in its place"


def make_thing(path: Path, kind: str) -> None:
    """Something that is no file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a directory":
        path.mkdir()
    elif kind == "a socket":
        os.mknod(path, 0o140600)
    elif kind != "nothing":
        path.symlink_to({"a loop of links": path.name, "a link to nothing": "nowhere", "a device": "/dev/zero"}[kind])


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Every entry of a JSON value, as keys from the root."""
    for key, child in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(child, (*path, key))


def changed_value(rng: Random, value: Any, wide: bool = False) -> tuple[Any, str]:
    """A copy of a JSON value with one entry damaged, and what was done. wide: choose among the places of the first two
    levels half of the time, where a long list would have nearly all."""
    value = json.loads(json.dumps(value))
    where = list(places(value))
    if wide and rng.random() < 0.5:
        where = [place for place in where if len(place) <= 2]
    if not where:
        return rng.choice(ODD), "the whole"
    *path, last = pick(rng, where)
    holder = value
    for key in path:
        holder = holder[key]
    kind, name = rng.choice(["missing", "odd", "odd", "odd", "typed", "deep"]), ".".join(map(str, (*path, last)))
    old = holder[last]
    if kind == "missing":
        del holder[last]
        return value, f"{name} missing"
    if kind == "typed":  # another value of its type, or its type as another
        numeric = isinstance(old, (int, float)) and not isinstance(old, bool)
        new = (
            rng.choice([-old, old * 2, old + 1, str(old), float(old), 10**9 * old])
            if numeric
            else rng.choice([str(old), [old], {"x": old}])
        )
    else:
        new = rng.choice(ODD) if kind == "odd" else json.loads(deep(400))
    holder[last] = new
    return value, f"{name}: {json.dumps(old)[:60]} -> {json.dumps(new)[:60]}"


def json_of(rng: Random, path: Path) -> str:
    """Damage one or two entries of a JSON file; of a JSON-lines file those of one line."""
    text = path.read_text()
    lines = text.splitlines() if path.suffix == ".jsonl" else [text]
    at = rng.randrange(len(lines))
    value, about = changed_value(rng, json.loads(lines[at]), wide=True)
    if rng.random() < 0.2 and isinstance(value, dict):
        value, more = changed_value(rng, value)
        about += f"; {more}"
    lines[at] = json.dumps(value)
    path.write_text("\n".join(lines) + "\n")
    return f"{path.name}: {about}"


def yaml_of(rng: Random, path: Path) -> str:
    """Put an odd value or a broken line into a YAML or TSV file."""
    lines = path.read_text().splitlines()
    at, odd = rng.randrange(len(lines)), rng.choice(YAML)
    cut = max(lines[at].find(": "), lines[at].rfind("\t"))
    kind = rng.choice(["value", "value", "line", "lost", "twice", "indent", "key"])
    lines[at : at + 1] = {
        "value": [lines[at][: cut + 1] + (" " if ": " in lines[at] else "") + odd],
        "line": [lines[at], odd],
        "lost": [],
        "twice": [lines[at], lines[at]],
        "indent": ["   " + lines[at]],
        "key": [odd + lines[at][max(cut, 0) :]],
    }[kind]
    path.write_bytes("\n".join(lines).encode(errors="surrogatepass"))
    return f"{path.name}, line {at + 1}: {kind} {odd[:30]!r}"


def tensor_of(rng: Random, path: Path) -> str:
    """Change one tensor of a safetensors file: its dtype, its shape, its values, its name; or leave it out."""
    from safetensors import safe_open

    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    name = pick(rng, sorted(tensors))
    tensor = tensors.pop(name)
    kind = rng.choice(["dtype", "dtype", "shape", "values", "name", "lost", "surplus", "all lost", "all dtypes"])
    dtype, wide = rng.choice(DTYPES), tensor.float()
    if kind == "dtype":
        tensors[name] = wide.to(dtype)
    elif kind == "shape":
        shapes = [
            tensor[None],
            tensor.flatten(),
            tensor[:-1],
            tensor[:0],
            tensor.t() if tensor.dim() == 2 else tensor[..., None],
        ]
        tensors[name] = rng.choice(shapes).contiguous()
    elif kind == "values":
        tensors[name] = torch.full_like(wide, rng.choice([float("nan"), float("inf"), 0.0, 3e38, 1e-45, -1e6])).to(
            tensor.dtype
        )
    elif kind == "name":
        tensors[rng.choice([f"x.{name}", name.upper(), name.replace(".", "", 1), "\x1b[31m", "a" * 3000])] = tensor
    elif kind == "surplus":
        tensors |= {
            name: tensor,
            rng.choice([f"{name}.bias", "lm_head.bias", "x", name.replace("0", "99")]): wide.contiguous(),
        }
    elif kind == "all lost":
        tensors = {}
    elif kind == "all dtypes":
        tensors = {n: t.to(dtype) for n, t in (tensors | {name: tensor}).items()}
    save_file({n: t.clone() for n, t in tensors.items()}, path, metadata)
    return f"{path.name}: {kind} of {name} {dtype if 'dtype' in kind else ''}"


def header_of(rng: Random, path: Path) -> str:
    """Damage an entry of a safetensors header, or its length."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    if rng.random() < 0.2:
        new = rng.choice([0, 1, size - 1, size + 1, len(data), 2**31, 2**63])
        path.write_bytes(new.to_bytes(8, "little") + data[8:])
        return f"{path.name}: header of {new} bytes"
    value, about = changed_value(rng, json.loads(data[8 : 8 + size]))
    header = json.dumps(value).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])
    return f"{path.name}: header, {about}"


def pickle_of(rng: Random, path: Path) -> str:
    """Another content of a .bin file."""
    state = torch.load(path, weights_only=True)
    name = pick(rng, sorted(state))
    kind = rng.choice(["nested", "list", "tensor", "entry", "integer key", "sparse", "meta", "empty", "legacy", "half"])
    new: Any = {
        "nested": {"model": state}, "list": list(state.values()), "tensor": state[name], "entry": state | {name: "x"},
        "integer key": {3: state[name]}, "sparse": state | {name: torch.eye(4).to_sparse()},
        "meta": state | {name: torch.empty(4, 4, device="meta")}, "empty": {}, "half": state | {name: state[name].half()},
    }.get(kind, state)  # fmt: skip
    torch.save(new, path, _use_new_zipfile_serialization=kind != "legacy")
    return f"{path.name}: {kind}"
