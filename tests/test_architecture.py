"""Import rules and habits that a reader relies on, held by reading the source."""

import ast
import shutil
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [p for folder in ("quant", "models", "data") for p in (ROOT / folder).rglob("*.py")]
COMMANDS = {"main", "model_quantizer", "generate_act_scale_shift", "quant.generate", "quant.repeat"}
STOREYS = (  # a module imports its own room and those of lower storeys
    {"quant.core"},
    {"models", "data", "quant.kernels"},
    {"quant.solvers", "quant.blocks"},
    {"quant.learn", "quant.tune", "quant.export", "quant.evaluate"},
    {"quant.run"},
    {"quant.report"},
    {"quant.cli"},
    {"commands"},
    {"scripts", "benchmarks"},
)
LEVEL = {room: level for level, rooms in enumerate(STOREYS) for room in rooms}
EDGE = Path("quant/cli/errors.py")  # the edge of every command: what nobody foresaw becomes a line and exit code 1
ONLY_IN = {
    "transformers": {"models/cache.py", "models/load.py", "models/gguf_config.py"},
    "gguf": {
        *(f"models/gguf_{what}.py" for what in ("header", "file", "config", "writer", "importance")),
        "quant/export/gguf_types.py",
    },
    "accelerate": {"models/load.py"},
    "datasets": {"data/corpora.py", "data/tasks/_items.py", "quant/evaluate/tasks.py"},  # there: what lm-eval raises
    "lm_eval": {"quant/evaluate/tasks.py"},
    "numba": {
        "quant/kernels/threads.py",
        "quant/kernels/columns/cpu.py",
        "quant/kernels/matmul/cpu.py",
        "quant/kernels/matmul/cpu_fields.py",
        "quant/kernels/matmul/cpu_bytes.py",
        "quant/kernels/matmul/one_token.py",
        "quant/kernels/rounding/cpu.py",
        "quant/kernels/steps/loops.py",
    },
    "llvmlite": {
        f"quant/kernels/{name}.py" for name in ("matmul/cpu", "matmul/cpu_bytes", "matmul/cpu_fields", "steps/loops")
    },
    "triton": {"quant/kernels/columns/cuda.py", "quant/kernels/matmul/cuda.py"},
    "jinja2": {"quant/report/page.py", "quant/evaluate/tasks.py"},  # there: templates of tasks are filled in a sandbox
    "matplotlib": {"quant/report/plots.py"},
}


def modules(root: Path) -> dict[str, Path]:
    """Every module of the house by name; a package is its __init__."""
    folders = ("quant", "models", "data", "scripts", "benchmarks")
    files = [*root.glob("*.py"), *(p for folder in folders for p in (root / folder).rglob("*.py"))]
    return {".".join(p.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): p for p in files}


def room_of(module: str) -> str:
    """The folder that is a storey, or a part of one; a ``__main__`` is a command."""
    if module in COMMANDS or module.endswith("__main__"):
        return "commands"
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "quant" else parts[0]


@cache
def imports_of(text: str) -> tuple[tuple[str, str], ...]:
    """What a file imports anywhere in it, also inside functions: modules, and (with the module) names of modules."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [(alias.name, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [(f"{node.module}.{alias.name}", node.module) for alias in node.names]
    return tuple(found)


def imported(path: Path, known: dict[str, Path]) -> set[str]:
    """Modules of the house that a file imports, also by the names of packages."""
    targets = {name if name in known else module for name, module in imports_of(path.read_text())}
    return {name for name in targets if name in known}


def wrong_imports(root: Path) -> list[str]:
    """Imports of a higher storey or of a room beside, and of a file's own circle, as lines."""
    known = modules(root)
    arrows = {name: imported(path, known) for name, path in known.items() if name != "quant"}
    lines = [
        f"{name} imports {other}, which is no lower storey"
        for name, others in arrows.items()
        for other in others
        if room_of(other) != room_of(name) and not LEVEL.get(room_of(other), 99) < LEVEL.get(room_of(name), -1)
    ]
    inside = {name: {o for o in others if room_of(o) == room_of(name)} for name, others in arrows.items()}
    return sorted(lines) + [f"circle: {' -> '.join(circle)}" for circle in circles(inside)]


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """A way back to itself for every module that has one."""
    closed = []
    for start in sorted(arrows):
        ways = [[start]]
        seen = set()
        while ways:
            way = ways.pop()
            for following in arrows.get(way[-1], ()):
                if following == start:
                    closed.append([*way, start])
                    ways = []
                    break
                if following not in seen:
                    seen.add(following)
                    ways.append([*way, following])
    return closed


def test_imports_go_down():
    assert wrong_imports(ROOT) == []


@pytest.mark.parametrize(
    ("file", "line", "says"),
    [
        ("quant/core/grid.py", "from quant.run.config import RunConfig", "quant.core.grid imports quant.run.config"),
        ("quant/core/grid.py", "import data.corpora", "quant.core.grid imports data.corpora"),
        ("models/load.py", "def f():\n    from data import corpora", "models.load imports data.corpora"),
        (
            "quant/learn/affine.py",
            "from quant.export import formats",
            "quant.learn.affine imports quant.export.formats",
        ),
        ("quant/run/config.py", "import main", "quant.run.config imports main"),
        ("quant/core/errors.py", "from quant.core import files", "circle: quant.core.errors -> quant.core.files"),
        ("quant/new/thing.py", "import quant.core.errors", "no lower storey"),
    ],
)
def test_a_planted_import_is_found(file, line, says, tmp_path):
    for folder in ("quant", "models", "data", "scripts", "benchmarks"):
        shutil.copytree(
            ROOT / folder,
            tmp_path / folder,
            ignore=lambda _, names: {n for n in names if n.endswith((".safetensors", ".json", ".jsonl"))},
        )
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    assert wrong_imports(tmp_path) == []
    planted = tmp_path / file
    planted.parent.mkdir(exist_ok=True)
    planted.write_text((planted.read_text() if planted.exists() else "") + f"\n{line}\n")
    assert any(says in wrong for wrong in wrong_imports(tmp_path)), wrong_imports(tmp_path)


def wrong_test_imports(path: str, text: str) -> list[str]:
    """Modules that a test may not import: other tests, and the benchmarks, which tests/test_benchmarks.py alone is of."""
    modules = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    of_tests = {m for m in modules if m.startswith("tests.") and any(part.startswith("test_") for part in m.split("."))}
    of_benchmarks = {m for m in modules if m.split(".")[0] == "benchmarks" and path != "tests/test_benchmarks.py"}
    return sorted(of_tests | of_benchmarks)


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_tests_share_helpers_and_not_each_other(path):
    assert wrong_test_imports(str(path.relative_to(ROOT)), path.read_text()) == []


@pytest.mark.parametrize(
    "line", ["from tests.test_run import run", "import tests.quant.core.test_grid", "from tests import test_run",
             "def f():\n    from benchmarks import loaders", "import benchmarks.loaders as l"]
)  # fmt: skip
def test_a_planted_import_of_a_test_is_found(line):
    assert wrong_test_imports("tests/test_x.py", line) != []


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_libraries_have_their_places(path):
    name = str(path.relative_to(ROOT))
    nodes = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Import | ast.ImportFrom)]
    names = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module for n in nodes if isinstance(n, ast.ImportFrom) and n.module}
    for package, places in ONLY_IN.items():
        if any(module.split(".")[0] == package for module in names):
            assert name in places, f"{package} is imported in {name}"
    if any(module.split(".")[0] == "rich" for module in names):
        assert name.startswith("quant/cli/"), "terminals are met in quant/cli alone"
    if name.startswith("quant/solvers/"):  # a solver sees numbers and the loops over columns, and solvers it composes
        allowed = ("quant.core", "quant.kernels.columns", "quant.solvers")
        assert all(
            module.startswith(allowed) for module in names if module.split(".")[0] in ("quant", "models", "data")
        )
    text = path.read_text()
    if not name.endswith("__main__.py") and room_of(name[:-3].replace("/", ".")) != "commands":
        assert "def main(" not in text or name.startswith("quant/cli/"), "commands are on top"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_habits(path):
    tree, text = ast.parse(path.read_text()), path.read_text()
    assert ".cuda(" not in text and "trust_remote_code=True" not in text
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            reads = node.func.attr in ("read_text", "write_text")
            encoded = any(k.arg == "encoding" for k in node.keywords)
            assert encoded or not reads, f"line {node.lineno}: the encoding of a locale is not that of our files"
        if isinstance(node, ast.ExceptHandler):
            names = {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)} if node.type else {"everything"}
            reraises = any(isinstance(n, ast.Raise) for n in ast.walk(node))
            ends = path.relative_to(ROOT) == EDGE and "return code" in ast.unparse(node)
            assert ends or reraises or not names & {"everything", "Exception", "BaseException"}, f"line {node.lineno}"
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno <= 60, f"{node.name} does not fit a screen"
