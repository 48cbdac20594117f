"""Golden values: what small runs on the demo models give today, so that a change of structure is held against it.

python -m scripts.golden            write tests/golden.json again, after a change that is meant to move something
python -m scripts.golden --check    name every difference by case and entry; exit code 1 where there is one

A case is the words of one command for one demo model, run in this process: on a CPU, one thread, float32, few windows.
Kept of it: the hash of its codes, a few numbers in 6 digits, the key paths of results.json, of manifest.json's
configuration and of the journal, and for every checkpoint format a hash of its tensors with their names, dtypes and
shapes ("content") and one without their bytes ("layout"), or that it was refused.

Bits are those of one machine and one set of libraries: other vector instructions or another BLAS add floats up in
another order, and a code may flip. golden.json names the environment that it is from, with a hash of some arithmetic
that is likely to tell one path of a library from another. In that environment every entry must be equal. In any other
one the hashes of codes and contents are left out, numbers may differ by TOLERANCE (perplexity and bits) or
ERROR_TOLERANCE (the relative error), and everything else (key paths, layouts, refusals, settings in config.json) must be
equal all the same. Under five other paths (ATEN_CPU_CAPABILITY, MKL_CBWR, DNNL_MAX_CPU_ISA, NUMBA_CPU_NAME) perplexities
moved by 0.7% at most and relative errors by 1.3%.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import re
import shlex
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

import main as main_command
import model_quantizer
from data import demo
from quant.core.errors import InputError
from quant.core.names import FORMATS, GGUF, MLX
from quant.run.config import Output, SessionConfig
from quant.run.convert import convert
from quant.run.request import Request
from quant.run.session import Session

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden.json"
FAMILIES = ("llama", "mistral", "opt", "bloom", "falcon")
TOLERANCE, ERROR_TOLERANCE = 0.02, 0.05  # in another environment; one linear can make much of a mean of errors
BLOCKS = 2  # of the models' 4, so that a checkpoint has blocks of both kinds
SAVED = "bitplane"  # holds every case: what the run itself saves; the other formats are converted from its directory
CONVERTED = tuple(kind for kind in FORMATS if kind not in (GGUF, MLX))  # with a config.json of ours
STORIES = {"train": 200, "test": 100}  # of the demo world; all of them would take longer to write than to quantize with
COMMON = "--nsamples 8 --seqlen 64 --calib-batch 8 --limit 32 --device cpu --dtype float32"

WEIGHTS = {  # model_quantizer.py
    "rtn": "--quantization-method rtn --wbits 4 --sym --group-size 32",
    "gptq": "--quantization-method gptq --wbits 4 --group-size 32 --act-order",
    "gptq, static groups": "--quantization-method gptq --wbits 3 --group-size 64 --act-order --static-groups --range mse",
    "quantease": "--quantization-method quantease --wbits 3 --true-sequential",
    "quantease, outliers": "--quantization-method quantease --wbits 3 --outlier 0.01",
    "quantease, outlier columns": "--quantization-method quantease --wbits 3 --outlier 0.02 --structure-outlier",
    "quantease, searched and refitted": (
        "--quantization-method quantease --wbits 2 --group-size 64 --range mse --search-grid --refit-grid"
    ),
    "gptq_quantease": "--quantization-method gptq_quantease --wbits 4 --sym",
    "spqr": "--quantization-method spqr --wbits 3 --group-size 16 --outlier 0.2",
}
LEARNED = {  # main.py
    "omniquant": "--wbits 4 --abits 6 --lwc --let",
    "omniquant, weights alone": "--wbits 3 --group_size 32 --lwc --let --aug_loss",
    "omniquant + quantease, outliers": "--wbits 3 --lwc --solver quantease --solver-option outlier=0.01 --true-sequential",
    "affinequant": "--wbits 4 --abits 6 --lwc --let --use_matrix --use_ln_matrix --sf 0.1",
    "affinequant, heads": "--wbits 4 --abits 6 --lwc --let --use_matrix --sf 0.5",
    "abq": "--method abq --wbits 2 --abits 8 --lwc --let",
    "integer activations": "--wbits 8 --symmetric --abits 8 --kvbits 16 --a_symmetric --epochs 0",
    "static ranges": "--wbits 8 --symmetric --abits 8 --kvbits 16 --a_symmetric --a_dynamic_method static --epochs 0",
}
EVERYWHERE = ("rtn", "gptq", "quantease", "spqr", "omniquant", "affinequant", "abq")  # the others on LLaMA alone

Record = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One run: a demo model and the words of a command for it."""

    family: str
    method: str

    @property
    def name(self) -> str:
        """As it stands in golden.json."""
        return f"{self.family}: {self.method}"

    def request(self, place: Path, more: str = "") -> Request:
        """As the command line makes it, with the texts of `place`. more: words behind the case's own."""
        train, test = (str(place / f"{split}.txt") for split in STORIES)
        model = str(ROOT / "models" / "demo" / self.family)
        words = ["--model", model, "--cache-dir", str(place / "cache"), "--eval-datasets", test, *shlex.split(COMMON)]
        if self.method in WEIGHTS:
            words += ["--dataset", train, *shlex.split(f"{WEIGHTS[self.method]} {more}")]
            request = model_quantizer.request_from(words)
        else:
            words += [
                "--calib_dataset",
                train,
                *shlex.split(f"--eval_ppl --epochs 2 --batch_size 4 {LEARNED[self.method]} {more}"),
            ]
            request = main_command.request_from(words)
        return request if self.name == "llama: rtn" else request.but(num_layers=BLOCKS)


CASES = {
    case.name: case
    for family in FAMILIES
    for method in (*WEIGHTS, *LEARNED)
    if family == FAMILIES[0] or method in EVERYWHERE
    for case in [Case(family, method)]
}


def replay(cases: Iterable[Case], more: str = "") -> dict[str, Record]:
    """What the cases give now, by name. more: words behind each one's own."""
    with tempfile.TemporaryDirectory() as directory, one_thread():
        place = Path(directory)
        for split, count in STORIES.items():
            (place / f"{split}.txt").write_text(demo.text(split, count))
        sessions: dict[SessionConfig, dict[str, Request]] = {}
        for number, case in enumerate(cases):
            request = case.request(place, more)
            request = request.but(run_dir=place / f"run{number}", save=place / f"saved{number}", format=SAVED)
            sessions.setdefault(request.session, {})[case.name] = request
        records: dict[str, Record] = {}
        for session, requests in sessions.items():
            Session(session).run_all([(request.run, request.output) for request in requests.values()])
            records |= {name: record_of(request.output) for name, request in requests.items()}
        return records


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums of several threads end in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def record_of(output: Output) -> Record:
    """What is kept of a finished run."""
    run, saved = output.run_dir, output.save
    assert run is not None and saved is not None
    results, manifest = (
        json.loads((run / name).read_text(encoding="utf-8")) for name in ("results.json", "manifest.json")
    )
    journal = [json.loads(line) for line in (run / "journal.jsonl").read_text(encoding="utf-8").splitlines()]
    scores = results["perplexity"]["test"]
    numbers = {name: results[name] for name in ("bits_per_weight", "mean_relative_error")}
    numbers |= {"perplexity": scores["quantized"], "perplexity of full precision": scores["fp"]}
    return {
        "codes_sha256": results["codes_sha256"],
        "numbers": {name: float(f"{value:.6g}") for name, value in numbers.items()},
        "checkpoints": {kind: digests(saved) if kind == SAVED else converted(run, kind) for kind in CONVERTED},
        "keys": {
            "results.json": sorted(key_paths(results)),
            "manifest.json, configuration": sorted(key_paths(manifest["configuration"])),
            "journal.jsonl": sorted(key_paths(journal)),
        },
    }


def converted(run: Path, kind: str) -> Record | str:
    """The digests of a run's checkpoint in a format, or that the format cannot hold it."""
    target = run.with_name(f"{run.name}-{kind}")
    try:
        convert(run, kind, target)
    except InputError:
        return "refused"
    return digests(target)


def digests(checkpoint: Path) -> Record:
    """Hashes of a checkpoint's tensors, without and with their bytes, and of what its config.json says of them."""
    layout, content = hashlib.sha256(), hashlib.sha256()
    for path in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in sorted(file.keys()):
                tensor = file.get_tensor(name)
                # How many weights are outliers may hang on a bit, unlike all other shapes
                shape = "any" if name.endswith(("outlier_columns", "outlier_values")) else tuple(tensor.shape)
                layout.update(f"{name} {tensor.dtype} {shape}\n".encode())
                content.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
                content.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    settings = json.loads((checkpoint / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    config = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    return {"layout": layout.hexdigest(), "content": content.hexdigest(), "config": config.hexdigest()}


def key_paths(value: Any, path: str = "") -> set[str]:
    """Dotted paths of all entries of nested records; lists of records are one."""
    if isinstance(value, Mapping) and value:
        return set().union(*(key_paths(entry, f"{path}.{key}" if path else key) for key, entry in value.items()))
    if isinstance(value, list) and any(isinstance(entry, Mapping) for entry in value):
        return set().union(*(key_paths(entry, path) for entry in value))
    return {path}


def environment() -> Record:
    """What bits depend on, besides the code."""
    described = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    vendor = re.search(r"^vendor_id\s*: (.*)$", described, re.MULTILINE)
    flags = re.search(r"^flags\s*: (.*)$", described, re.MULTILINE)
    wide = sorted(flag for flag in (flags[1].split() if flags else []) if re.match(r"(sse4|avx|fma|amx)", flag))
    return {
        "versions": {name: version(name) for name in ("torch", "numpy", "transformers", "numba")},
        "libraries": re.findall(r"- (.*(?:Math Kernel|MKL-DNN|OpenBLAS|OpenMP).*)", torch.__config__.show()),
        "torch's CPU capability": torch.backends.cpu.get_cpu_capability(),
        "processor": f"{platform.machine()} {vendor[1] if vendor else ''}".strip(),
        "processor's flags": " ".join(wide),
        "arithmetic": arithmetic(),
    }


def arithmetic() -> str:
    """A hash of the bits of some float32 arithmetic: products, a factorization, functions, means."""
    digest = hashlib.sha256()
    with one_thread():
        x = torch.arange(384 * 320, dtype=torch.float64).mul(0.6180339887).frac().sub(0.5).float().view(384, 320)
        gram = x.T @ x
        factor = torch.linalg.cholesky(gram + torch.eye(320))
        inverse = torch.cholesky_inverse(factor)
        smooth = [x.softmax(1), x.exp(), torch.nn.functional.silu(x), torch.nn.functional.layer_norm(x, (320,))]
        for tensor in (gram, x[:7] @ gram, factor, inverse, *smooth, x.sum(0), x.square().mean(1)):
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def differences(then: Mapping[str, Record], now: Mapping[str, Record], same_environment: bool) -> list[str]:
    """A line for every entry that is not what it was, with the case's name; cases that only one of them has, too."""
    before, after = entries(then), entries(now)
    return [
        f"{entry}: {before.get(entry, 'absent')} -> {after.get(entry, 'absent')}"
        for entry in sorted(before.keys() | after.keys())
        if not alike(entry, before.get(entry), after.get(entry), same_environment)
    ]


def alike(entry: str, old: Any, new: Any, same_environment: bool) -> bool:
    """Whether an entry may have changed so. None: it is absent."""
    if same_environment or old is None or new is None:
        return old == new
    if entry.endswith(("codes_sha256", ".content")):
        return True
    if isinstance(old, float) and isinstance(new, float):
        loose = entry.endswith("relative_error")
        return math.isclose(old, new, rel_tol=ERROR_TOLERANCE if loose else TOLERANCE)
    return old == new


def entries(value: Any, path: str = "") -> Record:
    """Nested records as one, by dotted paths; every item of a list is an entry of its own."""
    if isinstance(value, Mapping):
        parts = [entries(inner, f"{path}.{key}" if path else key) for key, inner in value.items()]
        return {name: entry for part in parts for name, entry in part.items()}
    if isinstance(value, list):
        return {f"{path}, {item}": "present" for item in value}
    return {path: value}


def packed(cases: Mapping[str, Record]) -> Record:
    """Cases as they are written: keys that all of them have stand there once."""
    files = next(iter(cases.values()))["keys"]
    shared = {file: set.intersection(*(set(case["keys"][file]) for case in cases.values())) for file in files}
    own = {
        name: case | {"keys": {file: sorted(set(keys) - shared[file]) for file, keys in case["keys"].items()}}
        for name, case in cases.items()
    }
    return {"keys of every case": {file: sorted(keys) for file, keys in shared.items()}, "cases": own}


def unpacked(kept: Mapping[str, Any]) -> dict[str, Record]:
    """Cases as `replay` gives them."""
    shared = kept["keys of every case"]
    return {
        name: case | {"keys": {file: sorted(keys + shared[file]) for file, keys in case["keys"].items()}}
        for name, case in kept["cases"].items()
    }


def golden() -> tuple[Record, dict[str, Record]]:
    """The environment that golden.json is from, and its cases."""
    kept = json.loads(GOLDEN.read_text(encoding="utf-8"))
    return kept["environment"], unpacked(kept)


def main() -> int:
    """Write, or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with tests/golden.json instead of writing it")
    args = parser.parse_args()
    now = replay(CASES.values())
    if not args.check:
        written = {"environment": environment()} | packed(now)
        GOLDEN.write_text(json.dumps(written, indent=1, sort_keys=True) + "\n")
        print(f"{GOLDEN.relative_to(ROOT)}: {len(now)} cases")
        return 0
    where, kept = golden()
    same = where == environment()
    moved = differences(kept, now, same)
    how = "bit for bit" if same else f"another environment: perplexities to {TOLERANCE:.0%}, no hashes of codes"
    print("\n".join([*moved, f"{len(now)} cases, {how}: {len(moved)} differences"]))
    return 1 if moved else 0


if __name__ == "__main__":
    sys.exit(main())
