"""Generation as a person meets it: where it stops, what stands before it, and what it refuses in one line."""

from __future__ import annotations

import gc
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from quant.blocks.fake_quant import ActSpec
from quant.blocks.instrument import instrument
from quant.cli import generate as command
from quant.core.errors import InputError
from quant.core.recording import Recording
from quant.kernels.matmul.cpu_bytes import ByteTiles
from quant.kernels.matmul.cpu_fields import FieldTiles
from quant.kernels.matmul.pack import layout_of
from quant.kernels.matmul.weight import PackedWeight
from quant.kernels.steps.graph import Graph
from quant.kernels.steps.program import Program
from quant.run import generate as generating
from quant.run.generate import Steps, _pick
from quant.run.packed_model import load_resident, open_quantized
from tests.graphs import Stand
from tests.helpers import DEMO, called, config_for, demo_config, perform

FULL_STOP, EOS = 7, 1
RECORDED_DEMOS = {"llama", "bloom", "falcon"}  # OPT reads its mask, Mistral keeps a window, mixtures choose experts
FILES = ("generation_config.json", "config.json")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DEMO / "llama", tmp_path / "model"))


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Any:
    """Text of the command; ``fails``: its line."""

    def run(model: Path, *words: object, fails: int = 0) -> str:
        code, out, err = called(command, monkeypatch, capsys, "--model", model, *words)
        assert code == fails, err
        if fails:
            assert err.startswith("error: ") and err.count("\n") == 1, err
        return err if fails else out.splitlines()[0]

    return run


def set_ends(model: Path, name: str, ends: Any) -> None:
    content = json.loads((model / name).read_text()) if (model / name).exists() else {}
    (model / name).write_text(json.dumps(content | {"eos_token_id": ends}))


@pytest.mark.parametrize("name", FILES)
def test_any_end_of_any_file_stops_as_in_transformers(name: str, source: Path, talk: Any) -> None:
    for file in FILES:
        set_ends(source, file, EOS)
    words = ("--prompt", "the river", "--max-new-tokens", 30)
    longer = talk(source, *words)
    assert longer.count(".") > 1, "the demo goes on behind a full stop"
    set_ends(source, name, [EOS, FULL_STOP])
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    ids = tokenizer("the river", return_tensors="pt").input_ids
    theirs = model.generate(ids, max_new_tokens=30, do_sample=False, eos_token_id=[EOS, FULL_STOP], pad_token_id=EOS)
    assert talk(source, *words) == tokenizer.decode(theirs[0], skip_special_tokens=True)
    assert talk(source, *words) == longer[: longer.index(".") + 1]


def test_no_end_token_stands_behind_the_prompt(source: Path, talk: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(source)
    answers = []
    for template in ("<s> $A", "<s> $A </s>"):
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=template, special_tokens=[("<s>", 0), ("</s>", 1)]
        )
        tokenizer.save_pretrained(source)
        answers.append(talk(source, "--prompt", "the river", "--max-new-tokens", 12))
    assert answers[0] == answers[1] and answers[0].startswith("the river ")


def test_a_byte_order_mark_is_no_token(source: Path, talk: Any) -> None:
    plain, marked = (talk(source, "--prompt", f"{mark}the river", "--max-new-tokens", 4) for mark in ("", "\ufeff"))
    assert marked.removeprefix("\ufeff") == plain


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--seed", 1 << 64], "--seed"),
        (["--seed", 10**400], "--seed"),
        (["--seed", -1], "--seed"),
        (["--temperature", "nan"], "--temperature"),
        (["--temperature", "inf"], "--temperature"),
        (["--temperature", "-0.5"], "--temperature"),
        (["--prompt", "\udcff"], "--prompt"),
        (["--prompt", "a\udcffb"], "--prompt"),
        (["--max-new-tokens", 5000], "the model takes at most"),
    ],
)
def test_what_no_model_takes_is_one_line(words: list, says: str, talk: Any) -> None:
    assert says in talk(DEMO / "llama", "--prompt", "the river", *words, fails=2)


def test_a_token_that_the_embedding_lacks_is_one_line(source: Path, talk: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_tokens(["<|im_start|>"], special_tokens=True)
    tokenizer.save_pretrained(source)
    assert talk(source, "--prompt", "the river", "--max-new-tokens", 1).startswith("the river ")
    assert "--prompt: the tokenizer gives token 843" in talk(source, "--prompt", "<|im_start|>user", fails=2)


def test_the_smallest_and_the_largest_temperature() -> None:
    logits = torch.tensor([1.0, 3.0, -torch.inf, 2.999])
    for temperature in (0.0, 5e-324, 1e-45, 1e-6):
        assert _pick(logits, temperature, torch.Generator().manual_seed(0)) == 1
    drawn = [_pick(logits, 1e308, torch.Generator().manual_seed(seed)) for seed in range(300)]
    assert 2 not in drawn and all(70 < drawn.count(token) < 130 for token in (0, 1, 3)), "even chances"


def test_logits_that_are_no_numbers_are_one_line() -> None:
    for bad in (torch.nan, torch.inf):
        for temperature in (0.0, 1.0):
            with pytest.raises(InputError, match="logits are not finite"):
                _pick(torch.tensor([1.0, bad]), temperature, None)


def steps_of(
    name: str, n: int, forget: bool = False, dtype: torch.dtype | None = None, rounded: bool = False
) -> tuple[list[torch.Tensor], Steps]:
    """Logits of a demo model's own continuation of three tokens, and what gave them; forget: the record is never taken."""
    opened = open_quantized(str(DEMO / name), Path("unused"), dtype)
    resident = load_resident(opened, torch.device("cpu"), round_inputs=rounded)
    step = Steps(resident.module, 3 + n, generating.ROUNDED if rounded else None)
    given, logits = torch.tensor([[5, 6, 7]]), []
    with torch.inference_mode(), instrument(resident.blocks, resident.weights, resident.act):
        for _ in range(n):
            logits.append(step(given)[0, -1])
            if forget:
                step.recording = None
            given = logits[-1].argmax()[None, None]
    return logits, step


@pytest.mark.parametrize("name", ["llama", "bloom", "falcon", "opt", "mistral", "mixture"])
def test_recorded_steps_are_the_modules(name: str) -> None:
    own, step = steps_of(name, 12)
    expected, _ = steps_of(name, 12, forget=True)
    replayed = step.replay is not None
    assert replayed == (name in RECORDED_DEMOS) and bool(step.by_modules) != replayed
    assert not isinstance(step.replay, Program), "in float16"
    for a, b in zip(own, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["llama", "bloom", "falcon"])
def test_in_float32_compiled_loops_are_the_modules_but_for_rounding(name: str) -> None:
    own, step = steps_of(name, 12, dtype=torch.float32)
    expected, _ = steps_of(name, 12, forget=True, dtype=torch.float32)
    assert isinstance(step.replay, Program)
    compiled = [operation.rows is not None for operation in step.replay.operations]
    assert sum(compiled) > 0.6 * len(compiled)
    for a, b in zip(own, expected, strict=True):
        assert float((a - b).abs().max()) < 2e-6 * float(b.abs().max())


@pytest.mark.parametrize("rounded", [False, True])
def test_packed_products_are_compiled_too(rounded: bool, tmp_path: Path) -> None:
    """Of a run in groups, with a head of its own bits: nothing of a block is left to torch, and the numbers are those of the
    modules, whose products round their inputs by the same loops."""
    if rounded and not ByteTiles.runs_here():
        pytest.skip("this CPU has no products of bytes")
    request = config_for(DEMO / "llama", "demo", tmp_path, solver="rtn", wbits=4, group_size=32, head_bits=8, options={},
                         dtype="float32", limit=2)  # fmt: skip
    perform(request)
    own, step = steps_of(str(tmp_path / "run"), 10, dtype=torch.float32, rounded=rounded)
    expected, _ = steps_of(str(tmp_path / "run"), 10, forget=True, dtype=torch.float32, rounded=rounded)
    assert isinstance(step.replay, Program)
    left = [str(operation.call.function) for operation in step.replay.operations if operation.rows is None]
    if rounded or isinstance(layout_of(torch.device("cpu")), FieldTiles):  # bit planes have no loops of this kind
        assert len(left) < 8, left
    for a, b in zip(own, expected, strict=True):
        assert float((a - b).abs().max()) < (0.02 if rounded else 2e-6) * float(b.abs().max())


def test_quantized_activations_have_no_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum in another order turns their roundings."""
    opened = open_quantized(str(DEMO / "llama"), Path("unused"), torch.float32)
    resident = replace(load_resident(opened, torch.device("cpu")), act=ActSpec(8, 16))
    made: list[Steps] = []

    class Kept(Steps):
        def __init__(self, *given: Any, **options: Any) -> None:
            super().__init__(*given, **options)
            made.append(self)

    monkeypatch.setattr(generating, "Steps", Kept)
    list(generating.generate(resident, torch.tensor([[5, 6, 7]]), 6))
    assert made[0].replay is not None and not isinstance(made[0].replay, Program)


def test_captured_steps_are_the_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the graph answers, its capture fails behind some writes, or it says something else."""
    expected, _ = steps_of("llama", 9, forget=True)
    for options, says in (
        ({}, ""),
        ({"fails_at": 60}, "not captured: operation not"),
        ({"off": 1.0}, "something else"),
    ):
        with monkeypatch.context() as patch:
            stand = Stand(patch, **options)
            own, step = steps_of("llama", 9)
        assert isinstance(step.replay, Graph) and not step.by_modules and stand.undone
        assert says in step.by_operations and bool(says) == bool(step.by_operations)
        assert stand.happened.count("replay") == {"": 7, "something else": 1}.get(says, 0)
        assert all(torch.equal(a, b) for a, b in zip(own, expected, strict=True))


def test_a_record_that_gives_something_else_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = steps_of("llama", 6, forget=True)

    monkeypatch.setattr(Recording, "replay", lambda self: lambda x: expected[0][None, None] * 2)
    own, step = steps_of("llama", 6)
    assert step.replay is None and "something else" in step.by_modules
    assert all(torch.equal(a, b) for a, b in zip(own, expected, strict=True))


def test_rotations_that_change_with_the_length_are_left_to_the_modules(source: Path) -> None:
    """The comparison would not see it: the first tokens lie below the length at which they change."""
    config = json.loads((source / "config.json").read_text())
    config |= {
        "max_position_embeddings": 16,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    }
    (source / "config.json").write_text(json.dumps(config))
    own, step = steps_of(str(source), 24)
    expected, _ = steps_of(str(source), 24, forget=True)
    assert step.replay is None and "is_nonzero" in step.by_modules
    assert all(torch.equal(a, b) for a, b in zip(own, expected, strict=True))


def test_a_collector_that_was_told_before_is_left_alone(talk: Any) -> None:
    gc.freeze()
    try:
        talk(DEMO / "llama", "--prompt", "the river", "--max-new-tokens", 3)
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
    talk(DEMO / "llama", "--prompt", "the river", "--max-new-tokens", 3)
    assert gc.get_freeze_count() == 0


def test_why_steps_are_not_recorded_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    for name, says in (("mistral", "(step by step through the modules: its cache"), ("llama", "")):
        words = ("--model", DEMO / name, "--prompt", "the river", "--max-new-tokens", 5)
        _, out, _ = called(command, monkeypatch, capsys, *words)
        line = out.splitlines()[-1]
        assert "tokens a second" in line and says in line and ("modules" in line) == bool(says)


def test_why_a_step_is_no_graph_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    words = ("--model", DEMO / "llama", "--prompt", "the river", "--max-new-tokens", 5, "--dtype", "float16")
    for options, says in (
        ({}, ""),
        ({"fails_at": 1}, "(replayed operation by operation: a step is not captured: oper"),
    ):
        with monkeypatch.context() as patch:
            Stand(patch, **options)
            _, out, _ = called(command, patch, capsys, *words)
        line = out.splitlines()[-1]
        assert "tokens a second" in line and says in line and ("operation" in line) == bool(says)


def test_rounded_inputs_say_nearly_the_same(tmp_path: Path, talk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    perform(demo_config(tmp_path, DEMO / "llama"))
    words = ("--prompt", "the river", "--max-new-tokens", 16)
    assert talk(tmp_path / "run", *words, "--round-inputs") == talk(tmp_path / "run", *words)
    plain, rounded = logits_of(tmp_path / "run", False), logits_of(tmp_path / "run", True)
    multiply = PackedWeight.matmul

    def by_hand(weight: PackedWeight, x: torch.Tensor) -> torch.Tensor:
        blocks = x.reshape(len(x), -1, 32)
        scale = blocks.abs().amax(-1, keepdim=True) / 127
        return multiply(weight, (torch.round(blocks / scale) * scale).view_as(x))

    monkeypatch.setattr(PackedWeight, "matmul", by_hand)
    expected = logits_of(tmp_path / "run", False)
    assert distance(rounded, expected) < 0.005  # measured 0.001: a rounding that turns
    assert distance(plain, expected) > 0.02


def logits_of(run: Path, rounds: bool) -> torch.Tensor:
    """Of ten tokens one after the other [10, vocabulary], with a record."""
    resident = load_resident(open_quantized(str(run), Path("unused"), torch.float32), torch.device("cpu"), rounds)
    with torch.inference_mode(), instrument(resident.blocks, resident.weights, resident.act):
        step = Steps(resident.module, 12, generating.ROUNDED if rounds else None)
        logits = torch.stack([step(torch.tensor([[token]]))[0, -1] for token in range(2, 12)])
    assert step.replay is not None
    return logits


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_inputs_that_are_rounded_already_are_not_rounded_again(tmp_path: Path, talk: Any) -> None:
    perform(demo_config(tmp_path, DEMO / "llama", act=ActSpec(8, 16)))
    assert "--round-inputs: this model rounds activations" in talk(
        tmp_path / "run", "--prompt", "the", "--round-inputs", fails=2
    )
