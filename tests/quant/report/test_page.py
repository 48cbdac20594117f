"""The page: its numbers, its form, its behaviour in a browser; differences between runs; mistakes."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from html import escape, unescape
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

import model_quantizer
from quant.cli.console import Console
from quant.cli.errors import exit_code_of
from quant.cli.report import main as report_command
from quant.cli.report import show_differences
from quant.cli.tables import STAGES
from quant.core.errors import InputError
from quant.core.text import ACTIVE, printable
from quant.report import page as report
from quant.report import plots
from quant.report.compare import differences
from quant.report.runs import Run, open_run, told_apart
from quant.run.request import Request
from tests.helpers import asked, config_for, long, perform, replace

VOID = {"meta", "br", "hr", "img", "input", "link", "path", "use", "rect", "circle", "line"}


class Page(HTMLParser):
    """Balanced tags, cells of tables by id, text, attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.links: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.table: list[list[str]] | None = None
        self.cell = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self._note(attributes)
        if tag == "table":
            self.table = self.tables.setdefault(attributes.get("id", "heat"), [])
        if tag == "tr" and self.table is not None:
            self.table.append([])
        if tag in ("td", "th") and self.table is not None:
            self.table[-1].append("")
            self.cell = True
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in VOID:
            return
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()
        self.cell = self.cell and tag not in ("td", "th")

    def handle_startendtag(self, tag, attrs):
        self._note(dict(attrs))

    def _note(self, attributes):
        """Identities, and references to them or to elsewhere, of one element."""
        self.ids += [attributes["id"]] if "id" in attributes else []
        for name, value in attributes.items():
            if name == "aria-label":  # text
                continue
            if name in ("href", "src", "xlink:href") and value:
                (self.references if value.startswith("#") else self.links).append(value.removeprefix("#"))
            self.references += re.findall(r"url\(#([^)]+)\)", value or "")

    def check(self):
        """Every element is closed, every id is one element's, every reference has its element."""
        assert self.open == [] and len(self.ids) == len(set(self.ids)), "duplicated ids"
        assert set(self.references) <= set(self.ids)
        return self

    def handle_data(self, data):
        if self.cell and self.table:
            self.table[-1][-1] += data


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model_dir, text) -> dict[str, Path]:
    """A plain run, another method, a learned one, and one of another model."""
    base = tmp_path_factory.mktemp("runs")
    plain = replace(config_for(model_dir("llama"), text, base), run_dir=base / "plain")
    configs = {
        "plain": plain,
        "gptq": replace(plain, solver="gptq", options={}, wbits=2, run_dir=base / "gptq"),
        "learned": replace(plain, learner="omniquant", solver="rtn", options={}, learning=asked(epochs=2, batch=6), run_dir=base / "learned"),
        "other": replace(plain, model=str(model_dir("opt")), run_dir=base / "other"),
    }  # fmt: skip
    for config in configs.values():
        perform(config)
    return {name: config.output.run_dir for name, config in configs.items()}


def test_numbers_are_those_of_the_run(finished, tmp_path):
    run = open_run(finished["plain"])
    html = report.write_report([run], tmp_path).read_text()
    page = Page(html).check()
    assert page.links == [] and html.startswith("<!DOCTYPE html>") and "<metadata" not in html and "rdf:" not in html
    pictures = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len(pictures) == 3 and len(page.ids) > 100
    for picture in pictures:
        ElementTree.fromstring(picture)
    assert ", deterministic; " in html
    scores = run.results["perplexity"]["words"]
    for shown in (f"{scores['quantized']:.3f}", f"before {scores['fp']:.3f}", f"{run.results['bits_per_weight']:.3f}",
                  f"{run.results['fidelity']['words']['kl_divergence']:.4f}", f"{run.results['mean_relative_error']:.4f}"):  # fmt: skip
        assert shown in html, shown
    head, *rows = page.tables["linears"]
    assert len(rows) == len(run.records) == 21 and head[0] == "block"
    for row, record in zip(rows, run.records, strict=True):
        assert row[:4] == [
            str(record["block"]),
            record["name"],
            f"{record['relative_error']:.5f}",
            f"{record['relative_error_rtn']:.5f}",
        ]
        assert row[6] == f"{record['peak_bytes'] / 1e9:.2f}"
        assert row[7] == record["verdict"] and bool(row[8]) == (record["verdict"] != "ok")
    _, *blocks = page.tables["heat"]
    assert [float(cell) for cell in blocks[2][1:]] == [
        round(r["relative_error"], 4) for r in run.records if r["block"] == 2
    ]
    lines = list(csv.DictReader((tmp_path / "report.csv").open()))
    assert [float(line["relative_error"]) for line in lines] == [r["relative_error"] for r in run.records]
    assert json.loads(re.search(r"<pre>(.*?)</pre>", html, re.S)[1].replace("&#34;", '"').replace("&#39;", "'").replace("&gt;", ">").replace("&lt;", "<").replace("&amp;", "&")) == run.manifest  # fmt: skip
    assert (tmp_path / "seconds.png").read_bytes().startswith(b"\x89PNG")


def test_several_runs_share_a_page(finished, tmp_path):
    runs = [open_run(finished[name]) for name in ("plain", "gptq", "learned", "other")]
    html = report.write_report(runs, tmp_path).read_text()
    page = Page(html).check()
    assert page.links == [Path(os.path.relpath(run.path, tmp_path)).as_posix() for run in runs]
    _, *rows = page.tables["runs"]
    for row, run in zip(rows, runs, strict=True):
        assert row[0] == run.model and row[1] == run.label
        assert row[3] == f"{run.results['model_bits_per_weight']:.3f}"
        assert row[4] == str(run.manifest["seed"])
        assert row[7] == f"{run.results['perplexity']['words']['quantized']:.3f}"
    assert "Quality against size, words" in html and (tmp_path / "perplexity-words.png").exists()
    assert len(list(csv.reader((tmp_path / "report.csv").open()))) == 5
    shown = [float(cell) for row in page.tables["heat"] for cell in row[1:] if re.fullmatch(r"[\d.]+", cell)]
    errors = [round(record["relative_error"], 4) for run in runs for record in run.records]
    losses = [log[k] for log in runs[2].results["learning"] for k in ("loss_start", "loss_end")]
    assert set(errors) <= set(shown) and {float(f"{loss:.4g}") for loss in losses} <= set(shown)


def test_runs_of_one_method_that_were_asked_for_differently_are_told_apart(finished, tmp_path):
    """A line of the picture is the mean of what is of one name."""
    plain = open_run(finished["plain"])
    request = plain.manifest["request"]
    other = dict(request, range="mse", true_sequential=True, target_correction=1.0, nsamples=5, seed=7, tuning={"scope": "block", "steps": 9},
                 options={**request["options"], "refit_grid": True, "num_iter": 99})  # fmt: skip
    searched = replace(plain, manifest=plain.manifest | {"request": other})
    again = replace(plain, manifest=plain.manifest | {"request": dict(request, seed=8)})
    wide = open_run(finished["gptq"])
    told = told_apart([plain, searched, again, wide])
    iterations, start = request["options"]["num_iter"], request["range"]
    ours = f"quantease, nsamples {request['nsamples']}, range {start}, num-iter {iterations}"
    theirs = "quantease, nsamples 5, range mse, true-sequential, target-correction 1, tuning scope block, tuning steps 9, num-iter 99, refit-grid"
    assert [run.method for run in told[::2]] == [ours, ours] and told[3].method == "gptq"
    assert sorted(told[1].method.split(", ")) == sorted(theirs.split(", "))
    assert told_apart([plain, again])[0].method == told_apart([plain])[0].method == "quantease"
    named = [plain, replace(searched, named="preset balanced")]
    assert [run.label for run in told_apart(named)] == [
        plain.label,
        plain.label.replace("quantease", "preset balanced"),
    ]
    html = report.write_report([plain, searched, again, wide], tmp_path).read_text()
    assert [row[1] for row in Page(html).check().tables["runs"][1:]] == [run.label for run in told]
    (picture,) = re.findall(r"<svg.*?</svg>", html.split("Quality against size")[1].split("</section>")[0], re.DOTALL)
    assert picture.count("quantease, ") >= 2 and picture.count("gptq") >= 1, "a name for each line"


def test_scores_and_memory_are_on_the_page(finished, tmp_path):
    """Tasks in the table of runs, in the CSV and against bits; peaks by stage; more runs than one plot shows."""
    runs = [open_run(finished[name]) for name in ("plain", "gptq")]
    for run, score in zip(runs, (0.75, 0.25), strict=True):
        entry = {"metric": "acc", "items": 20, "fp": 0.8, "quantized": score, "stderr": 0.1, "difference": score - 0.8,
                 "difference_ci95": [-0.9, 0.9], "chance": 0.25, "at_chance": score == 0.25, "others": {}}  # fmt: skip
        run.results["zero_shot"] = {"quiz": entry}
    page = Page(report.write_report(runs, tmp_path).read_text()).check()
    head, *rows = page.tables["runs"]
    assert [row[head.index("quiz")] for row in rows] == ["0.750", "0.250"]
    assert [row[6] for row in page.tables["tasks"][1:]] == ["0.800", "0.800"], "before"
    assert page.tables["tasks"][2][-1] == "0.25 (at chance)"
    assert [line["quiz"] for line in csv.DictReader((tmp_path / "report.csv").open())] == ["0.75", "0.25"]
    assert (tmp_path / "scores.png").exists() and (tmp_path / "zero-shot.png").exists()
    stages = runs[0].results["peak_bytes_by_stage"]
    assert list(stages) == ["load", "quantize", "evaluate", "tasks"]
    assert runs[0].results["peak_bytes"] == {k: max(s[k] for s in stages.values()) for k in ("device", "host")}
    report.write_report(runs[:1], tmp_path / "one")
    assert (tmp_path / "one" / "memory.png").exists()
    html = report.write_report([runs[0]] * 25, tmp_path / "many").read_text()
    assert "The 24 longest of 25 runs" in html and "without a plot" in html and "zero-shot" not in html


def test_tasks_are_timed_apart_from_perplexity(model_dir, text, tmp_path, monkeypatch):
    def slow(*_: object) -> dict:
        time.sleep(0.4)
        return {}

    monkeypatch.setattr("quant.run.scoring.score_tasks", slow)
    config = replace(config_for(model_dir("llama"), text, tmp_path, solver="rtn", options={}), nsamples=4, limit=4)
    seconds = perform(config)["seconds"]
    assert 0.4 <= seconds["tasks"] <= seconds["total"] - seconds["evaluate"] - seconds["load"]
    assert "tasks" in plots.STAGES and "tasks" in STAGES


def test_a_command_writes_its_pages(model_dir, text, tmp_path, monkeypatch, capsys):
    flags = ["--model", model_dir("llama"), "--dataset", text, "--eval-datasets", text, "--seqlen", 32, "--nsamples", 4,
             "--limit", 4, "--wbits", 3, "--cache-dir", tmp_path / "cache", "--run-dir", tmp_path / "runs"]  # fmt: skip

    def command(*words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["model_quantizer.py", *map(str, flags), *map(str, words)])
        assert exit_code_of(model_quantizer.main) == 0
        return capsys.readouterr().out

    out = command("--quantization-method", "rtn,gptq")
    assert f"report: {tmp_path / 'runs' / 'report.html'}" in out
    page = Page((tmp_path / "runs" / "report.html").read_text()).check()
    assert page.links == ["rtn/report.html", "gptq/report.html"]
    assert all((tmp_path / "runs" / link).exists() for link in page.links)
    out = command("--quantization-method", "rtn", "--run-dir", tmp_path / "bare", "--no-report")
    assert "report:" not in out and not (tmp_path / "bare" / "report.html").exists()


def test_losses_are_shown_where_there_are_any(finished, tmp_path):
    html = report.write_report([open_run(finished["learned"])], tmp_path).read_text()
    assert "Loss of every block over its epochs" in html and (tmp_path / "losses.png").exists()
    assert "Loss of every block" not in report.write_report([open_run(finished["plain"])], tmp_path / "p").read_text()


HOSTILE = (
    '"><svg onload=alert(1)>',
    "'><img src=x onerror=alert(1)>",
    "</text></svg><script>alert(1)</script>",
    "--></title></style></pre><script>document.title='owned'</script>",
    "]]><a href=javascript:alert(1)>x</a>",
    "&lt;script&gt;&#34; {{ 7 * 7 }}{% raw %}",
    "$\\frac{$ $x",
    'a id="b" url(#c) #010203',
    "\x1b[31m\x00\ufffe a\nb\rc\u2028d \u202egnp.exe\u2066 \udcff",
    "javascript:alert(1)",
    "..%2f?x#y",
    "n" * 5000,
)
FORMULAS = ("=cmd|' /C calc'!A0", "@SUM(A1)", "+1+cmd", "-2+3", "\t=1", "\r=1")
ELEMENTS = {
    "html", "head", "meta", "title", "style", "body", "header", "main", "section", "h1", "h2", "p", "dl", "div", "dt", "dd",
    "small", "figure", "figcaption", "table", "thead", "tbody", "tr", "th", "td", "a", "details", "summary", "pre", "script",
    "button", "svg", "g", "defs", "path", "use", "text", "tspan", "clippath", "rect",
}  # fmt: skip


class Strict(Page):
    """A page that has nothing but its own elements: no handler, no reference to elsewhere, one script, no invisible text."""

    def handle_starttag(self, tag, attrs):
        super().handle_starttag(tag, attrs)
        self.counted(tag, attrs)

    def handle_startendtag(self, tag, attrs):
        super().handle_startendtag(tag, attrs)
        self.counted(tag, attrs)

    def counted(self, tag, attrs):
        assert tag in ELEMENTS, tag
        self.tags = [*getattr(self, "tags", ()), tag]
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)) and not [name for name in names if name.startswith("on")], (tag, attrs)
        for name, value in attrs:
            assert not ACTIVE.findall((value or "").replace("\n", "")), (name, value)
            if name in ("href", "src", "xlink:href"):
                assert re.fullmatch(r"#[\w.-]+|[\w./%~-]*", value), value

    def handle_data(self, data):
        super().handle_data(data)
        assert set(ACTIVE.findall(data)) <= {"\n"}, data

    def check(self):
        assert self.tags.count("script") == self.tags.count("title") == 1
        return super().check()


def hostile(run: Run, name: str, path: Path) -> Run:
    """A copy of a run in which every name that comes from outside is the given one."""
    manifest, results = json.loads(json.dumps([run.manifest, run.results]))
    task = {"metric": name, "items": 20, "fp": 0.8, "quantized": 0.5, "stderr": 0.1, "difference": -0.3,
            "difference_ci95": [-0.9, 0.9], "chance": 0.25, "at_chance": False, "others": {}}  # fmt: skip
    manifest["model"] |= {"id": f"a/{name.replace('/', '-')}", "model_type": name}
    manifest["calibration"]["name"] = manifest["calibration"]["protocol"] = manifest["created"] = name
    manifest["configuration"][name] = name
    results |= {"method": name, "zero_shot": {name: task}}
    for part in ("perplexity", "fidelity", "peak_bytes_by_stage"):
        results[part] = {name if key in ("words", "quantize") else key: value for key, value in results[part].items()}
    for log in results["learning"]:
        log["events"] = [name]
    records = [record | {"name": f"{i % 7} {name}", "method": name} for i, record in enumerate(run.records)]
    return Run(path, manifest, results, records)


def pages(finished: dict[str, Path], name: str, out: Path) -> list[str]:
    """The page of one run, and that of two, in which every name is the given one."""
    runs = [hostile(open_run(finished[kind]), name, finished[kind]) for kind in ("learned", "gptq")]
    return [report.write_report(own, out / str(len(own))).read_text() for own in (runs[:1], runs)]


@pytest.fixture(scope="module")
def harmless(finished, tmp_path_factory) -> list[Strict]:
    return [Strict(html).check() for html in pages(finished, "name", tmp_path_factory.mktemp("harmless"))]


@pytest.mark.parametrize("name", [*HOSTILE[:4], *long(*HOSTILE[4:])], ids=lambda name: ascii(name)[:24])
def test_hostile_names_are_text_on_every_page(name, finished, harmless, tmp_path):
    for html, expected in zip(pages(finished, name, tmp_path / "out"), harmless, strict=True):
        page = Strict(html).check()
        assert set(page.tags) == set(expected.tags) and page.tags.count("text") > 20
        for tag in ("table", "tr", "td", "a", "svg", "pre"):
            assert page.tags.count(tag) == expected.tags.count(tag), tag
        assert printable(name) in page.tables["tasks"][1], "letter by letter"
        assert "mathdefault" not in html, "numbers of the axes are typeset"
        assert len(html.split("<p>block 2: ")) == len(html.split("<p>block 0: ")), "every block has its own events"
        for picture in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
            ElementTree.fromstring(picture)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["1", "2"], "files lie in their directory"
    assert {p.suffix for p in (tmp_path / "out").rglob("*.*")} == {".html", ".csv", ".png", ".json"}


def test_links_are_places_of_this_disk(tmp_path):
    runs = [Run(tmp_path / name, {}, {}, []) for name in ("javascript:alert(1)", "a?b#c", 'x"y', "n\udcff")]
    assert [report._link(run, tmp_path) for run in runs] == ["javascript%3Aalert%281%29", "a%3Fb%23c", "x%22y", "n%FF"]


@pytest.mark.parametrize("name", HOSTILE + FORMULAS, ids=lambda name: ascii(name)[:24])
def test_hostile_names_are_no_formulas_in_the_csv(name, finished):
    kind = open_run(finished["gptq"])
    runs = [hostile(kind, name, Path(f"runs/{name}")) for _ in range(2)]
    for own in (runs[:1], runs):
        text = report._csv(own)
        assert set(ACTIVE.findall(text)) <= {"\n"}
        rows = list(csv.reader(text.splitlines()))
        assert len({len(row) for row in rows}) == 1 and len(rows) == 1 + (21 if len(own) == 1 else 2)
        for cell in (cell for row in rows for cell in row):
            assert not cell.startswith(("=", "+", "@")) and (cell[:1] != "-" or cell == "-" or float(cell) < 0), cell
        assert any(printable(name) in cell for row in rows[1:] for cell in row)


@pytest.mark.parametrize("name", HOSTILE, ids=lambda name: ascii(name)[:24])
def test_hostile_names_in_differences(name, finished):
    runs = [hostile(open_run(finished[kind]), name, Path(f"runs/{name}")) for kind in ("plain", "gptq")]
    runs[1].manifest["configuration"][f"only {name}"] = name
    console = Console(file=io.StringIO(), width=20_000, color_system=None)
    show_differences(runs, console)
    text = console.file.getvalue()
    assert set(ACTIVE.findall(text)) <= {"\n"} and f"only {printable(name)}" in text


def test_a_data_file_whose_name_is_an_element(model_dir, text, tmp_path):
    """The whole way: a run's own names of files end as text in the pages of one run and of two."""
    data = tmp_path / 'x"><svg onload=alert(1)>.txt'
    shutil.copy(text, data)
    base = replace(config_for(model_dir("llama"), data, tmp_path, solver="rtn", options={}), nsamples=4, limit=4)
    configs = [replace(base, wbits=bits, run_dir=tmp_path / str(bits)) for bits in (3, 4)]
    for config in configs:
        perform(config)
    path = report.write_pages([config.output.run_dir for config in configs], tmp_path / "both")
    for page in (path, tmp_path / "3" / "report.html"):
        assert Strict(page.read_text()).check() and data.stem in unescape(page.read_text())
    assert 'aria-label="Perplexity on x&quot;&gt;&lt;svg onload' in path.read_text()


def test_only_the_page_s_own_script_may_run(finished, tmp_path):
    html = report.write_report([open_run(finished["plain"])], tmp_path).read_text()
    policy = unescape(re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', html)[1])
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules.pop("script-src") == report._script_source(re.search(r"<script>(.*?)</script>", html, re.DOTALL)[1])
    assert rules == {
        "default-src": "'none'",
        "style-src": "'unsafe-inline'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }


def test_differences(finished):
    a, b = open_run(finished["plain"]), open_run(finished["gptq"])
    rows = differences([a, b])
    assert ["method", "quantease", "gptq"] in rows["configuration"] and ["wbits", 3, 2] in rows["configuration"]
    assert not any(name == "nsamples" for name, *_ in rows["configuration"])
    ratios = [row[2] / row[1] for row in rows["linears"]]
    assert ratios == sorted(ratios, reverse=True) and len(ratios) == 21
    same = differences([a, a])
    assert same == {"configuration": [], "numbers": [], "linears": []}
    with pytest.raises(InputError, match="runs of different models"):
        differences([a, open_run(finished["other"])])


def test_reasons():
    line = {
        "relative_error": 0.2,
        "relative_error_rtn": 0.3,
        "verdict": "look",
        "relative_error_heldout": None,
        "rank": None,
        "n_tokens": 512,
    }
    assert report.reason(line) == "relative error above 0.1"
    assert report.reason(line | {"relative_error": 0.4, "verdict": "bad"}) == "33% worse than rounding to nearest"
    assert report.reason(line | {"relative_error": 1.5, "verdict": "bad"}) == "nothing of the output is left"
    assert report.reason(line | {"verdict": "ok"}) == ""
    heldout = {"relative_error_heldout": 0.6, "relative_error_rtn_heldout": 0.4}
    assert report.reason(line | heldout | {"verdict": "bad"}) == "50% worse than rounding to nearest"
    few = {"relative_error": 0.05, "rank": 64}
    assert report.reason(line | few) == "too little calibration: its inputs vary in 64 directions only"
    assert report.reason(line | few | {"n_tokens": 0}).startswith("no calibration token was routed to this expert")


def test_mistakes(finished, tmp_path, monkeypatch, capsys, model_dir, text):
    def command(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["report", *map(str, words)])
        return exit_code_of(report_command), capsys.readouterr().err

    assert command(tmp_path) == (2, f"error: {tmp_path} is not a run directory (it has no manifest.json)\n")
    code, err = command("compare", finished["plain"])
    assert code == 2 and "compare needs two" in err

    def stop(stage: str, done: int, total: int, note: str) -> None:
        if stage == "quantize" and done == 2:
            raise KeyboardInterrupt

    config: Request = replace(config_for(model_dir("llama"), text, tmp_path), run_dir=tmp_path / "half")
    with pytest.raises(KeyboardInterrupt):
        perform(config, stop)
    code, err = command(tmp_path / "half")
    assert code == 2 and "is not finished: 2 of 3 blocks are there" in err
    shutil.copytree(finished["plain"], tmp_path / "damaged")
    (tmp_path / "damaged" / "journal.jsonl").write_text("{]\n")
    code, err = command(tmp_path / "damaged")
    assert code == 2 and "damaged" in err and "Traceback" not in err


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next((path for name in BROWSERS if (path := shutil.which(name))), None)
PROBE = """<script>
onload = () => {
  const table = document.querySelector('#linears, #runs');
  const column = [...table.tHead.rows[0].cells].findIndex(c => c.textContent === 'relative error');
  const head = table.tHead.rows[0].cells[column].querySelector('button');
  const values = () => [...table.tBodies[0].rows].map(r => parseFloat(r.cells[column].textContent));
  head.click(); const up = values(); head.click(); const down = values();
  const page = document.documentElement;
  page.dataset.up = up.length > 1 && up.every((v, i) => !i || v >= up[i - 1]);
  page.dataset.down = down.every((v, i) => !i || v <= down[i - 1]);
  page.dataset.sort = head.parentElement.getAttribute('aria-sort');
  page.dataset.fits = page.scrollWidth <= innerWidth;
  page.dataset.paper = getComputedStyle(document.body).backgroundColor;
  if (window !== top) for (const [name, value] of Object.entries(page.dataset)) parent.document.documentElement.dataset[name] = value;
};
</script></body>"""


@pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(BROWSERS)} is installed")
@pytest.mark.parametrize(
    ("names", "phone", "dark"), [(["plain"], False, False), (["plain", "gptq", "learned", "other"], True, True)]
)
def test_in_a_browser_tables_sort_and_nothing_complains(names, phone, dark, finished, tmp_path):
    """A run's page as on a laptop; a sweep's page as on a phone (390 points wide), in the dark."""
    path = report.write_report([open_run(finished[name]) for name in names], tmp_path)
    allowed = report._script_source(PROBE.removeprefix("<script>").removesuffix("</script></body>"))
    page = path.read_text().replace("</body>", PROBE).replace("script-src ", f"script-src {allowed} ")
    if phone:  # a window cannot be as narrow; a frame can
        page = f'<!DOCTYPE html><title>phone</title><iframe width="390" height="844" srcdoc="{escape(page)}"></iframe>'
    (tmp_path / "probe.html").write_text(page)
    done = subprocess.run(
        [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=5000",
         f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--dump-dom", (tmp_path / "probe.html").as_uri()],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    paper = "rgb(21, 25, 30)" if dark else "rgb(255, 255, 255)"
    shown = re.search(r"<html[^>]*>", done.stdout)[0]
    for expected in (
        'data-up="true"',
        'data-down="true"',
        'data-sort="descending"',
        'data-fits="true"',
        f'data-paper="{paper}"',
    ):
        assert expected in shown, (expected, shown)
    assert "CONSOLE" not in done.stderr, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(BROWSERS)} is installed")
def test_hostile_names_do_nothing_in_a_browser(finished, tmp_path):
    """As the browser reads the page; and even if an element came in, the page's policy would let none of it run."""
    names = [name.replace("alert(1)", "document.title=/owned/") for name in HOSTILE if "<" in name]
    name, kinds = "".join(names), ("learned", "gptq")
    runs = [hostile(open_run(finished[kind]), name, finished[kind]) for kind in kinds]
    path = report.write_report(runs, tmp_path)
    (tmp_path / "injected.html").write_text(
        path.read_text().replace("<main>", f"<main><b id=in></b>{name.replace('<', ' <')}")
    )
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom"]
    doms = []
    for page in (path, tmp_path / "injected.html"):
        done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, check=False, timeout=120)
        doms.append(done.stdout)
    dom, injected = doms
    Strict(dom.replace("<!DOCTYPE html>", ""))
    title = f"<title>2 runs of {escape(runs[0].model, quote=False)}</title>"
    assert title in dom
    assert title in injected and "onerror=" in injected and '<b id="in">' in injected


def test_published_figures_stand_beside_ours():
    from quant.report.published import method_of, published_figures, rows

    scores = {"wikitext2": {"fp": 14.62, "quantized": 21.0, "seqlen": 2048}}
    results = {"wbits": 3, "group_size": -1, "method": "quantease", "perplexity": scores, "evaluation": {"limit": None}}
    entries = published_figures("facebook/opt-1.3b", results)
    by_method = {entry["method"]: entry for entry in entries}
    assert by_method["full precision"]["perplexity"] == 14.63 and by_method["full precision"]["ours"] == 14.62
    assert by_method["quantease"]["perplexity"] == 21.30 and by_method["quantease"]["ours"] == 21.0
    assert by_method["gptq"]["ours"] is None and all(entry["same_protocol"] for entry in entries)
    assert {entry["setting"] for entry in entries} == {"FP16", "W3"}
    assert published_figures("meta-llama/Llama-2-7b-hf", results)[0]["perplexity"] == 5.47
    assert published_figures("models/demo/opt", results) == []
    kept = {
        entry["method"]: entry["ours"]
        for entry in published_figures("opt-1.3b", results | {"options": {"outlier": 0.01}})
    }
    assert kept["quantease+1%"] == 21.0 and kept["quantease"] is None
    learned = results | {"options": {"outlier": 0.01}, "method": "omniquant+quantease", "solver": "quantease"}
    assert method_of(learned) == "omniquant+quantease+1%"
    assert method_of(learned | {"wbits": 16}) == "omniquant+quantease", "weights that stay have no outliers"
    assert method_of(learned | {"method": "spqr", "solver": "spqr"}) == "spqr", "there it is a threshold"
    columns = learned | {"options": {"outlier": 0.01, "structure_outlier": True}}
    assert method_of(columns) == "omniquant+quantease+1% columns"
    assert method_of(columns | {"solver": "one of before"}) == "omniquant+quantease", (
        "what no file declares is not guessed"
    )
    scores["wikitext2"]["seqlen"] = 1024
    assert not any(entry["same_protocol"] for entry in published_figures("opt-1.3b", results))
    # Five levels are another setting than four; activations, groups and other corpora have their own figures.
    learned = results | {"method": "abq", "wbits": 2, "entropy_bits": 2.32, "options": {}}
    own = {(e["setting"], e["method"]): e["perplexity"] for e in published_figures("Llama-2-7b-hf", learned)}
    assert own["W2*", "abq"] == 7.82 and not any(setting == "W2" for setting, _ in own)
    own = {
        (e["setting"], e["method"]): e["perplexity"]
        for e in published_figures("Llama-2-7b-hf", learned | {"entropy_bits": 2.0})
    }
    assert own["W2", "abq"] == 13.11
    for bits, acts, group, model, method, figure in (
        (4, 4, -1, "llama-7b", "omniquant", 11.26), (6, 6, -1, "llama-2-13b", "abq", 5.00), (2, 8, -1, "llama-13b", "abq", 9.20),
        (2, 16, 128, "llama-2-70b", "omniquant", 6.55), (2, 16, 64, "opt-66b", "omniquant", 10.59)
    ):  # fmt: skip
        asked = results | {"wbits": bits, "abits": acts, "group_size": group}
        assert figure in [e["perplexity"] for e in published_figures(model, asked) if e["method"] == method]
    elsewhere = results | {"perplexity": {"c4": scores["wikitext2"], "ptb": scores["wikitext2"]}}
    entries = {
        (e["data"], e["setting"], e["method"]): e["perplexity"] for e in published_figures("opt-125m", elsewhere)
    }
    assert entries["c4", "FP16", "full precision"] == 24.60 and entries["ptb", "W3", "omniquant"] == 45.29
    assert len({row[:5] for row in rows()}) == len(rows()), "a line stands there twice"
    assert all(len(row[5]) > 0 and row[0] in ("opt", "bloom", "falcon", "llama", "llama-2") for row in rows())
