"""Which way packed products take: found by measurement, kept on disk, the same sums on both sides."""

import errno
import json
import os
from contextlib import contextmanager

import pytest
import torch

from quant.core.errors import InputError
from quant.core.files import read_json, write_json
from quant.core.types import QuantSpec
from quant.kernels import ahead
from quant.kernels.matmul import choice, pack
from quant.kernels.matmul.choice import CANDIDATES, best_of, crossover, is_multiplied, up_to
from quant.kernels.matmul.cpu import BitPlanes
from quant.kernels.matmul.cpu_fields import FieldTiles
from quant.kernels.matmul.pack import pack_weight
from quant.run.directory import RunDirectory
from quant.run.finished import read_manifest
from quant.run.repeat import versions_that_differ
from tests.helpers import config_for, perform, random_weight

ENTRY = "fields, 4 bits"


class Costs:
    """Two ways whose seconds are known, and the clock that tells them."""

    def __init__(self, code=1.0, expansion=0.0, library=1.0, extra=()):
        self.code, self.expansion, self.library = code, expansion, library
        self.now, self.calls, self.extra = 0.0, [], list(extra)

    def spend(self, way, seconds):
        self.calls.append(way)
        self.now += seconds + (self.extra.pop(0) if self.extra else 0.0)

    def multiplied(self, n):
        self.spend("multiplied", n * self.code)

    def expanded(self, n):
        self.spend("expanded", self.expansion + n * self.library)

    def clock(self):
        return self.now


@pytest.mark.parametrize(
    ("code", "expansion", "library", "usual", "expected"),
    [
        (1.0, 50.0, 0.5, 1024, 96),  # they meet at 100
        (1.0, 50.0, 0.5, 96, 96),
        (1.0, 50.0, 0.5, 48, 64),  # at 96 it is a tie, which stays as it was
        (1.0, 55.0, 0.5, 48, 96),
        (1.0, 8.0, 0.5, 1024, 16),
        (1.0, 1e9, 0.5, 48, 1024),  # never worth it
        (1.0, 0.0, 0.1, 48, 8),  # always
        (1.0, 0.0, 1.0, 42, 42),  # ties stay what they were, also between candidates
        (1.0, 0.0, 0.96, 96, 96),
        (0.96, 0.0, 1.0, 96, 96),
        (1.0, 0.0, 0.9, 96, 8),
        (0.9, 0.0, 1.0, 96, 1024),
    ],
)
def test_the_crossover_is_found(code, expansion, library, usual, expected):
    costs = Costs(code, expansion, library)
    assert crossover(costs.multiplied, costs.expanded, usual, costs.clock) == expected


def test_the_best_of_calls_in_turn_counts_and_the_first_does_not():
    costs = Costs(1.0, 0.0, 2.0, extra=[900, 900, 5, 0, 0, 7])
    seconds = best_of(lambda: costs.multiplied(10), lambda: costs.expanded(10), costs.clock)
    assert seconds == (10.0, 20.0)
    assert costs.calls == ["multiplied", "expanded"] * (1 + choice.ROUNDS[0])  # the budget is spent
    quick = Costs(1e-6, 0.0, 1e-6)
    best_of(lambda: quick.multiplied(10), lambda: quick.expanded(10), quick.clock)
    assert len(quick.calls) == 2 * (1 + choice.ROUNDS[1])


def test_other_work_does_not_move_the_crossover():
    """Every second call of either way is ten times as long."""
    costs = Costs(1.0, 50.0, 0.5, extra=[0, 0, *[0, 500, 500, 0] * 50])
    assert crossover(costs.multiplied, costs.expanded, 96, costs.clock) == 96


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """Measurements are allowed, of a machine without any; the list of those that are made, each of which says 64."""
    made = []
    monkeypatch.setenv(choice.SWITCH, "1")
    monkeypatch.setattr(choice, "FOLDER", tmp_path / "cache" / "products")
    monkeypatch.setattr(choice, "_chosen", {})
    monkeypatch.setattr(choice, "_measured", lambda layout, bits: made.append((layout.name, bits)) or 64)
    return made


def as_another_process(monkeypatch):
    monkeypatch.setattr(choice, "_chosen", {})


def kept_file():
    (file,) = choice.FOLDER.glob("*.json")
    return file


def test_a_measurement_is_kept_and_read_again(measured, monkeypatch):
    layout = FieldTiles()
    assert [up_to(layout, 4), up_to(layout, 4), up_to(layout, 3)] == [64, 64, 64]
    assert measured == [("fields", 4), ("fields", 3)]
    as_another_process(monkeypatch)
    assert up_to(layout, 4) == up_to(layout, 3) == 64 and len(measured) == 2
    stored = read_json(kept_file())
    assert stored["multiplied_up_to"] == {ENTRY: 64, "fields, 3 bits": 64}
    assert stored["machine"]["torch"] == torch.__version__ and stored["machine"]["cpu"]
    write_json(kept_file(), stored | {"multiplied_up_to": {ENTRY: 128}})
    as_another_process(monkeypatch)
    assert up_to(layout, 4) == 128 and len(measured) == 2  # it is the file that decides
    monkeypatch.setattr(choice, "_threads", lambda: (7, 7))
    assert up_to(layout, 4) == 64 and len(measured) == 3 and len(list(choice.FOLDER.glob("*.json"))) == 2
    monkeypatch.setattr(choice, "version", lambda package: "another")
    as_another_process(monkeypatch)
    assert up_to(layout, 4) == 64 and len(measured) == 4 and len(list(choice.FOLDER.glob("*.json"))) == 3


@pytest.mark.parametrize(("tokens", "multiplied", "measures"), [
    (1, True, 0), (2, True, 0), (CANDIDATES[0], True, 0), (CANDIDATES[0] + 1, True, 1), (64, True, 1), (65, False, 1),
    (CANDIDATES[-1], False, 1), (CANDIDATES[-1] + 1, False, 0),
])  # fmt: skip
def test_only_tokens_that_hang_on_it_measure(tokens, multiplied, measures, measured):
    assert is_multiplied(FieldTiles(), 4, tokens) is multiplied and len(measured) == measures


def test_products_ask_and_one_token_does_not(measured, monkeypatch):
    monkeypatch.setattr(pack, "layout_of", lambda device: FieldTiles())
    packed = pack_weight(random_weight(40, 64, QuantSpec(4, 32)))
    packed.matmul(torch.randn(1, 64))
    assert measured == []
    packed.matmul(torch.randn(20, 64))
    assert measured == [("fields", 4)]


def machine_file():
    here = choice.machine(FieldTiles().instructions())
    return choice.FOLDER / f"{choice.json_sha256(here)[:32]}.json", here


@pytest.mark.parametrize(
    "number", [True, 128.0, "128", 10**400, -1, 0, 7, 65, 2048, None, [128], {"a": 128}, float("nan")]
)
def test_numbers_that_no_measurement_says_are_measured_again(number, measured):
    file, here = machine_file()
    file.parent.mkdir(parents=True)
    others = {"planes, 3 bits": 42}
    whole = {"schema": 1, "machine": here, "multiplied_up_to": others | {ENTRY: number}}
    file.write_text(json.dumps(whole))
    assert up_to(FieldTiles(), 4) == 64 and len(measured) == 1
    assert read_json(file)["multiplied_up_to"] == others | {ENTRY: 64}


@pytest.mark.parametrize("other", [{"schema": 2}, {"schema": "1"}, {"machine": {}}, {"machine": None}, {"multiplied_up_to": [128]},
                                   {"multiplied_up_to": None}])  # fmt: skip
def test_files_of_another_kind_are_measured_again(other, measured):
    file, here = machine_file()
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"schema": 1, "machine": here, "multiplied_up_to": {ENTRY: 128}} | other))
    assert up_to(FieldTiles(), 4) == 64 and len(measured) == 1
    assert read_json(file) == {"schema": 1, "machine": here, "multiplied_up_to": {ENTRY: 64}}


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b"7"])
def test_damaged_files_are_measured_again(content, measured):
    file, _ = machine_file()
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    assert up_to(FieldTiles(), 4) == 64 and len(measured) == 1
    assert read_json(file)["multiplied_up_to"] == {ENTRY: 64}


def test_what_is_in_the_way_stays_and_constants_decide(measured, monkeypatch, tmp_path):
    usual, (file, _) = FieldTiles().usual(4), machine_file()
    assert usual != 64
    file.parent.parent.mkdir()
    file.parent.write_text("a file where the directory belongs")
    assert up_to(FieldTiles(), 4) == usual and file.parent.is_file()
    file.parent.unlink()
    for make in (file.mkdir, lambda: os.mkfifo(file)):
        as_another_process(monkeypatch)
        file.parent.mkdir(exist_ok=True)
        make()
        assert up_to(FieldTiles(), 4) == usual and file.exists() and not file.is_file()
        file.rmdir() if file.is_dir() else file.unlink()
    as_another_process(monkeypatch)
    monkeypatch.setattr(choice, "FOLDER", choice.Path("~/nobody/products"))  # where nobody has a home
    monkeypatch.chdir(tmp_path)
    assert up_to(FieldTiles(), 4) == usual and not choice.Path("~").exists()
    assert measured == []  # in vain
    assert choice.described()[next(iter(choice.described()))]["by"] == "constant"


def test_what_could_not_be_written_is_not_used(measured, monkeypatch):
    """Another process would measure anew, and might take the other way."""

    def full(path, value):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(choice, "write_json", full)
    assert up_to(FieldTiles(), 4) == FieldTiles().usual(4)


def test_the_first_of_two_processes_decides(measured, monkeypatch):
    file, here = machine_file()

    @contextmanager
    def after_another(lock, what, patience):
        write_json(file, {"schema": 1, "machine": here, "multiplied_up_to": {ENTRY: 256}})
        yield

    monkeypatch.setattr(choice, "hold_lock", after_another)
    assert up_to(FieldTiles(), 4) == 256 and measured == []

    def busy(lock, what, patience):
        raise InputError("in use")

    monkeypatch.setattr(choice, "hold_lock", busy)
    assert up_to(FieldTiles(), 3) == FieldTiles().usual(3) and measured == []
    as_another_process(monkeypatch)
    assert up_to(FieldTiles(), 4) == 256  # what is there needs no lock


def test_constants_can_be_asked_for(measured, monkeypatch):
    assert up_to(FieldTiles(), 4) == 64
    monkeypatch.setenv(choice.SWITCH, "0")
    assert up_to(FieldTiles(), 4) == FieldTiles().usual(4) and up_to(BitPlanes(), 3) == 42
    monkeypatch.setenv(choice.SWITCH, "1")
    torch.use_deterministic_algorithms(True)
    try:
        assert up_to(FieldTiles(), 4) == FieldTiles().usual(4) and up_to(FieldTiles(), 8) == FieldTiles().usual(8)
    finally:
        torch.use_deterministic_algorithms(False)
    with monkeypatch.context() as patch:  # processes of one job, perhaps on several machines, take one way
        patch.setattr(choice.ranks, "size", lambda: 2)
        assert up_to(FieldTiles(), 4) == FieldTiles().usual(4) and up_to(FieldTiles(), 2) == FieldTiles().usual(2)
    assert up_to(FieldTiles(), 4) == 64 and len(measured) == 1


def test_nobody_waits_for_a_lock_while_loops_compile(measured, monkeypatch):
    held, ways = [], []
    layout, lock = FieldTiles(), choice.hold_lock

    @contextmanager
    def watched(*given, **options):
        with lock(*given, **options):
            held.append(True)
            yield
            held.pop()

    monkeypatch.setattr(choice, "hold_lock", watched)
    for way in ("multiplied", "expanded"):
        own = getattr(layout, way)
        monkeypatch.setattr(layout, way, lambda x, w, way=way, own=own: (ways.append((way, bool(held))), own(x, w))[1])
    assert up_to(layout, 4) == 64 and ways == [("multiplied", False), ("expanded", False)]


def test_the_weight_that_is_measured_stays_small():
    """Whatever the number of threads."""
    assert choice.TILES * choice.MOST_SHARES * choice.TILE * choice.COLUMNS < 1 << 26
    codes = choice._weight(FieldTiles(), 3, choice.TILE).codes()
    assert codes.shape == (choice.TILE, choice.COLUMNS) and codes.unique().tolist() == list(range(8))


def test_a_real_measurement_says_a_candidate_and_moves_nothing():
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    assert choice._measured(FieldTiles(), 4) in CANDIDATES
    assert torch.equal(before, torch.get_rng_state()) and torch.get_num_threads() == threads


def test_it_is_measured_ahead(measured, monkeypatch):
    monkeypatch.setattr(ahead, "layout_of", lambda device: FieldTiles())
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        ahead.of_choices()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert measured == [("fields", bits) for bits in ahead.WIDTHS] * 2  # for one thread and for two


def test_the_manifest_says_it(measured, model_dir, text, tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "layout_of", lambda device: FieldTiles())
    config = config_for(model_dir("llama"), text, tmp_path, wbits=4, solver="rtn", options={}, nsamples=4, limit=4)
    perform(config)
    assert read_manifest(RunDirectory(config.output.run_dir))["products"] == {} and measured == []
    packed = config.but(packed=True, run_dir=tmp_path / "packed")
    perform(packed)
    manifest = RunDirectory(tmp_path / "packed").read("manifest.json")
    ((name, said),) = manifest["products"].items()
    assert name.startswith("fields, ") and " 4 bits, " in name
    assert said == {"multiplied_up_to": 64, "by": "measurement"} and measured == [("fields", 4)]
    assert manifest["hardware"]["device"] == "cpu"  # what it said before is still there
    other = tmp_path / "other"
    other.mkdir()
    changed = {name: {"multiplied_up_to": 96, "by": "constant"}}
    write_json(other / "manifest.json", manifest | {"products": changed})
    assert versions_that_differ(tmp_path / "packed", other) == [f"{name} {said} -> {changed[name]}"]
