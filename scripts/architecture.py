"""Write docs/architecture.md: the storeys, from the test that holds them, and every module with its docstring's first paragraph.

    python -m scripts.architecture            writes it; tests/test_docs.py fails where it is not up to date

A module is described in its own docstring and nowhere else. A storey's paragraph is here.
"""

from __future__ import annotations

import ast
from pathlib import Path

from tests.test_architecture import ONLY_IN, ROOT, STOREYS, modules, room_of

PAGE = ROOT / "docs" / "architecture.md"
ROOMS = {
    "quant.core": "Numbers and files. Types, grids, rounding, the Gram matrix, linear algebra; the machine, paths and plain "
    "files. It imports torch and itself.",
    "models": "Model families as data, and the loader that streams their blocks. A family names its blocks, the order of "
    "their linears and what may be rescaled; no module of a model is written anew.",
    "data": "Text as windows of tokens, by the protocols of the papers, and the demo world: stories from a grammar, with "
    "four zero-shot tasks.",
    "quant.kernels": "Inner loops, once in torch as the reference, once for a CPU (numba) and once for CUDA (Triton): "
    "`columns` for the solvers, `matmul` for products with packed weights.",
    "quant.solvers": "One file a solver: a weight and its Gram matrix in, codes out. Pure functions on tensors, found by "
    "their decorator.",
    "quant.blocks": "A decoder block as a function of its weights: hidden states that are carried from block to block, "
    "activations that are quantized, inputs that are observed.",
    "quant.learn": "Clips and transforms that are learned before a solver rounds, and what each paper makes of them.",
    "quant.tune": "Codes and scales that a solver found, moved on by gradients: of a block's output, or of the whole model's logits.",
    "quant.export": "Checkpoint formats, one file each: what a format refuses, how it writes and reads one linear; and which "
    "software loads what.",
    "quant.evaluate": "Perplexity, divergence from full precision, and tasks. All forms of a model pass the blocks side by "
    "side.",
    "quant.run": "One run, from its configuration to results.json and a checkpoint. Here solvers, learning, formats and "
    "evaluation meet; nothing below knows that there are runs.",
    "quant.report": "A page of finished runs. It reads run directories and starts nothing.",
    "quant.cli": "The terminal: flags, progress, tables, exit codes, and the commands of `python -m quant`.",
    "commands": "What a person starts: flags become configurations, which are handed to a session.",
    "scripts": "Tools of the project: sweeps, golden values, demo models, figures, this page.",
    "benchmarks": "Measurements. Each writes a file of benchmarks/results with the command that made it.",
}
INTRODUCTION = """# Architecture

This page is written by `python -m scripts.architecture` from the docstrings of the modules; change those, not the page.
[what-happens.md](what-happens.md) follows a run through the rooms, [performance.md](performance.md) says where its seconds go,
[adr/](adr/) has the decisions.

A folder is a storey. A module imports its own room and those of lower storeys, never a room beside it, and there is no
circle inside a room ([adr/011](adr/011-a-folder-is-a-storey.md)). `tests/test_architecture.py` holds this by reading the source,
also imports inside functions. Some libraries have one place:
"""


def paragraph(path: Path) -> str:
    """The first paragraph of a module's docstring, on one line."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(docstring.split("\n\n")[0].split()).replace("|", "\\|")


def drawing() -> str:
    """The storeys as a column of text, the highest first."""
    lines = [f" {len(STOREYS) - i}  {'   '.join(sorted(rooms))}" for i, rooms in enumerate(reversed(STOREYS))]
    return "\n".join(["```", *lines, "```"])


def page() -> str:
    """The whole page."""
    known = modules(ROOT)
    libraries = [
        f"- `{name}`: {', '.join(f'`{place}`' for place in sorted(places))}" for name, places in ONLY_IN.items()
    ]
    house = f"`quant/`: {paragraph(known['quant'])}"
    parts = [INTRODUCTION.rstrip(), "\n".join(libraries), drawing(), house]
    for level, rooms in reversed(list(enumerate(STOREYS, 1))):
        for room in sorted(rooms):
            inside = sorted(name for name in known if room_of(name) == room)
            rows = [f"| `{known[name].relative_to(ROOT)}` | {paragraph(known[name])} |" for name in inside]
            title = "The commands" if room == "commands" else f"`{room.replace('.', '/')}/`"
            parts += [f"## {level}. {title}", ROOMS[room], "\n".join(["| module | |", "|-|-|", *rows])]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
