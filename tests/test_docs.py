"""The pages say what is so: links, paths, commands, snippets, figures, and the page that is written from the source."""

import importlib
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from quant.cli.commands import COMMANDS
from quant.solvers import solver_options, solvers
from scripts import architecture, figures

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PLACES = "quant|models|data|scripts|benchmarks|tests|docs"
FIRST = ["make demo", "make test"]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def fences(page: Path, language: str = "") -> list[str]:
    """The fenced blocks of a page in one language."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [block for named, block in blocks if named == language]


def commands(page: Path) -> list[list[str]]:
    """The commands of a page's plain blocks, as words."""
    lines = "\n".join(fences(page)).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith(("python ", "make ", "pip "))]


def test_readme_is_as_long_as_a_person_reads():
    assert 900 <= len(README.read_text().split()) <= 1100


def test_two_commands_come_first():
    assert [words[:2] for words in commands(README)[:2]] == [command.split() for command in FIRST]
    assert [line.split("#")[0].strip() for line in fences(README)[0].splitlines()] == FIRST
    assert README.read_text().index("make demo ") < README.read_text().index("pip install")


@every_page
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if not link.startswith(("http://", "https://")):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), f"{page.name} links to {link}"
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE) if anchor else []
            names = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert not anchor or anchor in names, f"{page.name} links to {link}"


@every_page
def test_paths_are_there(page):
    text = page.read_text()
    # a page may name a file that its reader is to write: quant/solvers/x.py, models/x.py
    named = set(
        re.findall(rf"(?<![\w/.-])((?:{PLACES})(?:/[\w-]+)*/(?:[\w-]+\.(?:py|md|sh|tsv|yaml|json|svg|j2))?)", text)
    )
    missing = [path for path in named if not (ROOT / path).exists() and Path(path).stem != "x"]
    assert not missing, f"{page.name} names {missing}"


@every_page
def test_commands_are_understood(page):
    for words in commands(page):
        if words[0] == "make":
            assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text(), words
        elif words[1:3] == ["-m", "quant"]:
            assert words[3] in COMMANDS, words
        elif words[1] == "-m":
            assert importlib.util.find_spec(words[2]), words
        elif words[1] in ("model_quantizer.py", "main.py", "generate_act_scale_shift.py"):
            importlib.import_module(words[1].removesuffix(".py")).parser().parse_args(words[2:])
        elif words[0] == "python":
            assert (ROOT / words[1]).exists() and (not words[2:] or (ROOT / words[2]).exists()), words


@pytest.mark.parametrize(
    ("page", "after"),
    [
        ("README.md", "assert answer.bits_per_weight() < 3.2"),
        (
            "docs/adding-a-method.md",
            "import torch\n"
            "from quant.solvers import get_solver\n"
            "stats = GramStats(8)\n"
            "stats.update(torch.randn(32, 8))\n"
            "answer = get_solver('mymethod')(torch.randn(4, 8), stats, QuantSpec(3), strength=0.5)\n"
            "assert answer.check().codes.shape == (4, 8) and answer.info == {'strength': 0.5}",
        ),
        (
            "docs/adding-a-family.md",
            "from types import SimpleNamespace\n"
            "config = SimpleNamespace(hidden_size=8, num_attention_heads=2, num_key_value_heads=1)\n"
            "assert len(FAMILY.groups(config)) == 4 and len(FAMILY.seams(config)) == 5 and FAMILY.heads(config)",
        ),
    ],
)
def test_snippets_run(page, after):
    first = fences(ROOT / page, "python")[0]  # what follows it on a page continues another file
    done = subprocess.run(
        [sys.executable, "-c", f"{first}\n{after}\n"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_no_snippet_is_left_out():
    assert {page.name for page in PAGES if fences(page, "python")} == {
        "README.md",
        "adding-a-method.md",
        "adding-a-family.md",
    }


def test_page_of_the_architecture_is_up_to_date():
    assert architecture.PAGE.read_text() == architecture.page(), "run python -m scripts.architecture"


def test_every_module_and_storey_is_described():
    known = architecture.modules(ROOT)
    assert all(architecture.paragraph(path) for path in known.values())
    page = architecture.PAGE.read_text()
    assert [name for name, path in known.items() if f"| `{path.relative_to(ROOT)}` |" not in page] == ["quant"]
    assert set(architecture.ROOMS) == set().union(*architecture.STOREYS)


def test_every_option_of_a_solver_is_described():
    page = (ROOT / "docs" / "algorithms.md").read_text()
    options = {name for function in solvers().values() for name in solver_options(function)}
    assert [name for name in options if name not in page and f"--{name.replace('_', '-')}" not in page] == []


def test_figure_is_drawn_from_the_tables():
    for name, drawing in figures.pictures().items():
        assert (ROOT / "docs" / name).read_text() == drawing, "run python -m scripts.figures"


def test_a_requirement_says_where_it_is_used():
    for name in ("requirements.txt", "requirements-dev.txt", "requirements-pack.txt", "requirements-ray.txt"):
        for line in (ROOT / name).read_text().splitlines():
            assert line.startswith(("#", "-r ")) or " # " in line, f"{name}: {line}"


def test_package_has_its_commands_and_files():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 and later read TOML")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for entry in project["project"]["scripts"].values():
        module, _, function = entry.partition(":")
        assert callable(getattr(importlib.import_module(module), function)), entry
    tools = project["tool"]["setuptools"]
    assert all((ROOT / f"{module}.py").exists() for module in tools["py-modules"])
    patterns = [(package, pattern) for package, patterns in tools["package-data"].items() for pattern in patterns]
    packed = {file for package, pattern in patterns for file in (ROOT / package).glob(pattern)}
    listed = subprocess.run(
        ["git", "ls-files", "quant", "models", "data"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    files = {ROOT / line for line in listed.stdout.splitlines()}
    left_out = {f for f in files - packed if f.suffix != ".py" or not (f.parent / "__init__.py").exists()}
    assert left_out <= {ROOT / "models/demo/README.md"}, left_out
