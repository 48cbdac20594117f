"""What linears wrote is not computed again by later passes of a block, and nothing that comes out of a run changes by that."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode

from models.load import load_model
from quant.blocks import kept
from quant.blocks.fake_quant import ActSpec
from quant.blocks.kept import KeptOutputs, Room
from quant.blocks.stream import BlockStream
from quant.blocks.weights import BlockWeights
from quant.core.target import Correction
from quant.core.types import QuantSpec
from quant.run.directory import RunDirectory
from quant.run.observe import original_beside
from quant.run.quantize import quantize_block
from quant.run.solving import Recipe
from quant.solvers.gptq import gptq
from tests.helpers import CPU, config_for, perform, replace

CASES = {
    "llama gqa, tied": {"target_correction": 1.0, "residual_correction": True},
    "falcon 7b": {"target_correction": 1.0},  # adds to the output of a linear in place, attention and MLP side by side
    "gpt2": {},
    "opt": {"bias_correction": True, "target_correction": 0.5},
    "qwen2": {"act": ActSpec(4, 4)},
    "phi3": {"act": ActSpec(8, method="static")},
    "mixtral": {"target_correction": 1.0},
    "deepseek_v3": {},
    "gemma3": {"solver": "quantease", "saliency": 2},
}


@pytest.mark.parametrize("name", CASES)
def test_a_run_is_the_same_bit_for_bit(name, model_dir, text, tmp_path, monkeypatch):
    """Codes, perplexity and every line of the journal, with room for what linears write and without."""
    more = {"solver": "gptq", "options": {}, "true_sequential": True, "nsamples": 10, "limit": 4} | CASES[name]
    run = config_for(model_dir(name), text, tmp_path, **more, run_dir=tmp_path / "kept")
    answered = []
    monkeypatch.setattr(Room, "take", lambda room, size, own=Room.take: own(room, size) and not answered.append(size))
    results = perform(run)
    assert bool(answered) == (name != "phi3")  # ranges are known at the end alone
    monkeypatch.setattr(kept, "SHARE", 0.0)
    again = perform(replace(run, run_dir=tmp_path / "computed"))
    assert results["codes_sha256"] == again["codes_sha256"] and results["perplexity"] == again["perplexity"]
    first, second = (
        [r for b in RunDirectory(tmp_path / place).finished_blocks() for r in b.records]
        for place in ("kept", "computed")
    )
    for one, other in zip(first, second, strict=True):
        assert (one.relative_error, one.relative_error_heldout, one.name) == (
            other.relative_error, other.relative_error_heldout, other.name)  # fmt: skip


class Counted(TorchFunctionMode):
    """How often products are made with weights of a shape, and attention is computed."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.linear:
            self.calls[tuple(args[1].shape)] += 1
        if func is F.scaled_dot_product_attention:
            self.calls["attention"] += 1
        return func(*args, **(kwargs or {}))


def stream_of(path, cache):
    model = load_model(str(path), dtype=torch.float32, cache_dir=cache)
    ids = torch.randint(0, 200, (6, 16), generator=torch.Generator().manual_seed(1))
    return BlockStream(model, ids, device=CPU, batch=2).capture(model.outside_weights(CPU))


def test_every_linear_is_multiplied_once_a_batch_and_model(model_dir, tmp_path, monkeypatch):
    """Four steps; in the quantized model also as the original has it, where a step stops behind it."""
    counts = {}
    for case, share in (("kept", kept.SHARE), ("computed", 0.0)):
        monkeypatch.setattr(kept, "SHARE", share)
        stream = stream_of(model_dir("llama"), tmp_path)
        full = original_beside(stream)
        recipe = Recipe("gptq", gptq, QuantSpec(3), true_sequential=True, correction=Correction(1.0))
        weights = BlockWeights.read(stream.model, 0, CPU)
        with Counted() as counted:
            block = quantize_block(stream, 0, weights, recipe, full=full)
            stream.run(0, block.weights, advance=True, act=recipe.act)
            full.run(0, weights, advance=True)
        assert stream.kept is None and full.kept is None
        counts[case] = counted.calls
    once = 3 * 2  # batches, models
    # q, k, v, o have one shape, gate and up another; the runs that observe stop in front of what they observe. Attention is
    # computed for what o reads, and once behind it.
    assert counts["kept"] == {(32, 32): 4 * once, (64, 32): 2 * once, (32, 64): once, "attention": 2 * once}
    assert counts["computed"] == {
        (32, 32): once * (3 + 4 + 4 + 4), (64, 32): once * (2 + 2), (32, 64): once, "attention": 4 * once}  # fmt: skip


class Attention(torch.nn.Module):
    """Two linears and what is between them; calls: how often it was computed."""

    def __init__(self):
        super().__init__()
        self.q, self.o, self.calls = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), 0

    def forward(self, x, scale=1.0):
        self.calls += 1
        return self.o(self.q(x) * scale), None


def answering(room, final):
    """A block of an attention and a linear behind it, and what is kept of it."""
    block = torch.nn.ModuleDict({"attention": Attention(), "down": torch.nn.Linear(4, 4)})
    return block, KeptOutputs(room, ["attention.q", "attention.o", "down"], final)


@torch.no_grad()
def test_a_module_of_solved_linears_answers_as_a_whole():
    """With None where it gave None, and for tensors that nobody else holds; not where something inside it is looked at, and
    not in another batch."""
    room = Room(CPU)
    before = room.left
    block, outputs = answering(room, ["attention.q"])
    weights, x, batch = dict(block.named_parameters()), torch.randn(3, 4), [0]

    def passing(**more):
        with outputs.on(block, weights, None, lambda: batch[0], **more):
            return block.attention(x, scale=2.0)

    first = passing()
    assert room.left == before - first[0].nbytes, "of q alone"
    outputs.final.add("attention.o")
    second = passing(observed=["down"])
    assert room.left == before - first[0].nbytes, "what was kept inside is not kept besides"
    second[0].add_(1)
    third = passing()
    assert torch.equal(third[0], first[0]) and third[1] is None
    assert block.attention.calls == 2
    assert torch.equal(passing(observed=["attention.o"])[0], first[0]) and block.attention.calls == 3
    batch[0] = 1
    passing(last=True)
    passing(last=True)
    assert block.attention.calls == 5, "the last pass keeps nothing"
    assert "forward" not in vars(block.attention) | vars(block.attention.q)


@torch.no_grad()
def test_where_a_module_has_no_room_its_linears_may():
    room = Room(CPU)
    block, outputs = answering(room, ["attention.q", "attention.o"])
    weights, x = dict(block.named_parameters()), torch.randn(3, 4)

    def passing():
        with outputs.on(block, weights, None, lambda: 0):
            return block.attention(x)[0]

    room.left = 0
    first = passing()
    room.left = 2 * first.nbytes
    assert torch.equal(passing(), first) and torch.equal(passing(), first)
    assert room.left == 0 and block.attention.calls == 3


def test_other_weights_or_activations_are_computed(model_dir, tmp_path):
    """Also where they are those of a linear in front."""
    stream = stream_of(model_dir("llama"), tmp_path)
    linears = [name for group in stream.model.groups_at(0) for name in group]
    weights = BlockWeights.read(stream.model, 0, CPU)
    changed = weights.with_parameters({"self_attn.v_proj.weight": weights.weight("self_attn.v_proj") * 2})
    norm = weights.with_parameters({"input_layernorm.weight": weights.parameters["input_layernorm.weight"] * 3})
    stream.kept = KeptOutputs(Room(CPU), linears, linears)

    def seen(own, act=None):
        found = []
        stream.run(0, own, observe={"mlp.down_proj": found.append}, act=act)
        return torch.cat(found)

    first = seen(weights)
    assert torch.equal(seen(weights), first)
    for own, act in ((changed, None), (norm, None), (weights, ActSpec(4)), (weights, None)):
        other = seen(own, act)
        apart = stream.fork()
        alone = []
        apart.run(0, own, observe={"mlp.down_proj": alone.append}, act=act)
        assert torch.equal(other, torch.cat(alone))
        assert torch.equal(other, first) == (own is weights and act is None)


def test_room_is_for_all_streams_together():
    room = Room(CPU)
    room.left = 100
    assert room.take(60) and not room.take(60) and room.take(40) and not room.take(1)
