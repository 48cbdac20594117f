"""Checkpoints that are changed on purpose: what is edited, missing or cut."""

import json
import shutil

import torch
from safetensors.torch import load_file, save_file

from quant.blocks.weights import ONLINE


def damaged(base, tmp_path, change, kind="gptq_v2"):
    target = tmp_path / "damaged"
    shutil.copytree(base / f"as-{kind}", target)
    change(target)
    return target


def edit_tensors(ending, change, hashed=False):
    """Replace the first tensor of that name; change returns None to delete it."""

    def edit(path):
        file = path / "model.safetensors"
        tensors = load_file(file)
        name = next(n for n in tensors if n.endswith(ending))
        new = change(tensors.pop(name))
        save_file(tensors | ({} if new is None else {name: new.contiguous()}), file, {"format": "pt"})
        if not hashed:
            (path / "results.json").unlink()

    return edit


def edit_config(hashed=False, **changes):
    """Change entries of the quantization_config, those of compressed-tensors' weights by `weights=`, or of bitplane's
    spec by `spec=`.
    """

    def edit(path):
        config = json.loads((path / "config.json").read_text())
        quantization = config["quantization_config"]
        for name, value in changes.items():
            where = quantization["config_groups"]["group_0"] if name == "weights" else quantization
            where[name] = where[name] | value if name in ("weights", "spec") else value
        (path / "config.json").write_text(json.dumps(config))
        if not hashed:
            (path / "results.json").unlink()

    return edit


def model_entry(hashed=True, **changes):
    """Change entries of config.json itself."""

    def edit(path):
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | changes))
        if not hashed:
            (path / "results.json").unlink()

    return edit


def edit_group(**changes):
    """Change entries of the only group of compressed-tensors' settings."""

    def edit(path):
        config = json.loads((path / "config.json").read_text())
        config["quantization_config"]["config_groups"]["group_0"] |= changes
        (path / "config.json").write_text(json.dumps(config))
        (path / "results.json").unlink()

    return edit


def second_group(**changes):
    """Give one linear a group of settings of its own."""

    def edit(path):
        config = json.loads((path / "config.json").read_text())
        groups = config["quantization_config"]["config_groups"]
        groups["group_1"] = groups["group_0"] | {"targets": ["model.layers.0.mlp.up_proj"]} | changes
        (path / "config.json").write_text(json.dumps(config))
        (path / "results.json").unlink()

    return edit


def broken(name, text="{"):
    return lambda path: (path / name).write_text(text)


def set_dtype(path):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"dtype": "auto"}))


def cut(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def both(version):
    return {"checkpoint_format": version, "format": version}


def add_to_blocks(ending, **act):
    """A bitplane checkpoint with tensors that no parameter holds, and activation settings."""

    def edit(path):
        file = path / "model.safetensors"
        tensors = load_file(file)
        name = "model.layers.0.input_layernorm" if ending == ONLINE else "model.layers.0.mlp.up_proj"
        tensors[name + ending] = torch.eye(128).half() if ending == ONLINE else torch.tensor([-1.0, 1.0])
        save_file(tensors, file, {"format": "pt"})
        edit_config(activations=act)(path)

    return edit


MISSING = object()
NESTED = json.loads("[" * 400 + "]" * 400)
# What an entry of a JSON file can have become: gone, another type, a number beyond all sizes, no number, without end
BAD = {
    "missing": MISSING, "null": None, "text": "x", "list": [1], "empty list": [], "object": {"a": 1}, "empty object": {},
    "true": True, "negative": -1, "zero": 0, "fraction": 0.5, "int beyond": 10**400, "float beyond": 1e308, "tiny": 5e-324,
    "nan": float("nan"), "inf": float("inf"), "long": "n" * 5000, "nested": NESTED, "lone": "\udcff\x1b[31m\n",
}  # fmt: skip


def entry_paths(value, path=()):
    """The path of every entry of a JSON value; of lists, their first and their last."""
    keys = list(value) if isinstance(value, dict) else []
    if isinstance(value, list) and value:
        keys = sorted({0, len(value) - 1})
    for key in keys:
        yield (*path, key)
        yield from entry_paths(value[key], (*path, key))


def with_entry(value, path, entry):
    """A copy of a JSON value in which one entry is another, or gone."""
    value = json.loads(json.dumps(value))
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    if entry is MISSING:
        del inner[path[-1]]
    else:
        inner[path[-1]] = entry
    return value


NUMBERS = {"one": 1, "three": 3, "more than a part": 1.5, "large": 10**12}  # that a size or a share could be


def odd_objects(declared):
    """(name, JSON object): a JSON object with one entry that is missing or odd."""
    for path in entry_paths(declared):
        for name, entry in (BAD | NUMBERS).items():
            yield f"{'.'.join(map(str, path))} {name}", with_entry(declared, path, entry)


def odd_files(declared):
    """(name, bytes): a JSON file that is damaged as a whole."""
    text = json.dumps(declared).encode()
    deep = b'{"a": ' * 100_000 + b"1" + b"}" * 100_000
    yield from {
        "empty": b"", "nothing but spaces": b" \n", "a list": b"[1, 2]", "null": b"null", "a number": b"1e999", "a string": b'"x"',
        "cut": text[: len(text) // 2], "twice": text + text, "not UTF-8": b"\xff\xfe" + text, "UTF-16": text.decode().encode("utf-16"),
        "invalid in a string": text.replace(b"model_type", b"model\xff_type"), "zeros": bytes(4096), "deep": deep,
        "deep inside": text[:-1] + b', "x": ' + deep + b"}", "half a surrogate": text[:-1] + b', "\\ud800": "\\ud800"}',
        "long number": text[:-1] + b', "x": ' + b"9" * 5000 + b"}",
    }.items()  # fmt: skip
