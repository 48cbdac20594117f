"""Import rules and habits that a reader relies on, held by reading the source."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [p for folder in ("quant", "models", "data") for p in (ROOT / folder).rglob("*.py")]
CORE = {"types", "grid", "stats", "linalg", "registry", "errors", "outliers", "scaling"}
ONLY_IN = {
    "transformers": {"models/load.py"},
    "accelerate": {"models/load.py"},
    "datasets": {
        "data/corpora.py",
        "data/tasks/_items.py",
        "quant/zero_shot.py",
    },  # there: what lm-eval's loader raises
    "lm_eval": {"quant/zero_shot.py"},
    "numba": {"quant/kernels/cpu.py", "quant/kernels/packed_cpu.py"},
    "llvmlite": {"quant/kernels/packed_cpu.py"},
    "triton": {"quant/kernels/cuda.py", "quant/kernels/packed_cuda.py"},
    "jinja2": {"quant/report.py", "quant/zero_shot.py"},  # there: templates of tasks are filled in a sandbox
    "matplotlib": {"quant/report.py"},
    "rich": {"quant/core/cli.py", "quant/core/flags.py", "quant/core/plan.py"},
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path):
    name, found = str(path.relative_to(ROOT)), imports(path)
    for package, places in ONLY_IN.items():
        if any(module.split(".")[0] == package for module in found):
            assert name in places, f"{package} is imported in {name}"
    ours = {module for module in found if module.split(".")[0] in ("quant", "models", "data")}
    text = path.read_text()
    if "@solver(" in text and "def solver(" not in text:  # a solver
        allowed = {f"quant.core.{m}" for m in CORE} | {"quant.kernels", "quant.gptq", "quant.quantease"}
        assert all(any(module.startswith(a) for a in allowed) for module in ours), f"{name} imports {ours}"
    if name.startswith("models/") or name.startswith("data/"):
        ground = ("quant.core.errors", "quant.core.files")
        assert not {m for m in ours if m.startswith("quant") and not m.startswith(ground)}, name
    if path.stem in CORE and path.parent.name == "core":
        assert not {m for m in ours if m.startswith(("models", "data"))}, name


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_habits(path):
    tree, text = ast.parse(path.read_text()), path.read_text()
    assert ".cuda(" not in text and "trust_remote_code=True" not in text
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            names = {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)} if node.type else {"everything"}
            reraises = any(isinstance(n, ast.Raise) for n in ast.walk(node))
            assert reraises or not names & {"everything", "Exception", "BaseException"}, f"line {node.lineno}"
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
        if isinstance(node, ast.FunctionDef) and node.name != "parser":
            assert node.end_lineno - node.lineno < 75, f"{node.name} does not fit a screen"
