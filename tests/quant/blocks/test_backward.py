"""Gradients that are streamed block by block are those of the whole model, differentiated at once in float64."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from models.load import load_model
from quant.blocks.backward import Labels, backward, sample
from quant.blocks.saliency import CLAMP, Sensitivities, TokenWeights, normalized
from quant.blocks.stream import BlockStream
from quant.core.errors import InputError
from quant.core.parts import row_parts
from tests.conftest import DISTINCT, VOCABULARY

CPU = torch.device("cpu")
N, T = 5, 12


class Everything:
    """Keeps all that it is shown: inputs and gradients by block, linear, draw and windows."""

    def __init__(self, names):
        self.names, self.seen, self.order = names, {}, []

    def begin(self, index, weights, stream):
        self.index = index
        return {name: self.see(name) for name in self.names}

    def see(self, name):
        def keep(rows, draw, x, gradient):
            self.seen[self.index, name, draw, rows.start] = (x.clone(), gradient.clone())

        return keep

    def end(self, index):
        self.order.append(index)

    def of(self, index, name, draw, which):
        parts = [v[which] for k, v in sorted(self.seen.items(), key=lambda i: i[0][3]) if k[:3] == (index, name, draw)]
        return torch.cat(parts)


def opened(path: Path, tmp_path: Path, ids: torch.Tensor, dtype=torch.float64, **options) -> BlockStream:
    model = load_model(str(path), dtype=dtype, cache_dir=tmp_path)
    stream = BlockStream(model, ids, device=CPU, **({"batch": 2, "directory": tmp_path} | options))
    return stream.capture(model.outside_weights(CPU))


def whole(
    path: Path, ids: torch.Tensor, labels: Labels
) -> dict[tuple[int, str, int], tuple[torch.Tensor, torch.Tensor]]:
    """(x, ∂ℓ/∂y) of every linear and draw: one graph of transformers' own model."""
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
    reference.requires_grad_(False)
    reference.get_input_embeddings().weight.requires_grad_()
    blocks = next(m for m in reference.modules() if isinstance(m, torch.nn.ModuleList))
    kept = {}
    for index, block in enumerate(blocks):
        for name, module in block.named_modules():
            if isinstance(module, torch.nn.Linear | Conv1D):
                module.register_forward_hook(
                    lambda m, args, out, key=(index, name): kept.__setitem__(key, (args[0].detach(), out))
                )
    log_p = torch.log_softmax(reference(ids, use_cache=False).logits, -1)
    answers = {}
    for draw in range(labels.count):
        loss = 0.0
        for n in range(ids.shape[0]):
            for t in range(ids.shape[1]):
                if labels.kind == "data":
                    label = int(ids[n, t + 1]) if t + 1 < ids.shape[1] else None
                else:
                    chance, total = float(labels.chances(ids.shape)[draw, n, t]), 0.0
                    for label in range(VOCABULARY):  # noqa: B007
                        total += float(log_p[n, t, label].detach().exp())
                        if total > chance:
                            break
                loss = loss - (0 if label is None else log_p[n, t, label])
        gradients = torch.autograd.grad(loss, [out for _, out in kept.values()], retain_graph=True)
        answers |= {(*key, draw): (kept[key][0], g) for key, g in zip(kept, gradients, strict=True)}
    return answers


@pytest.mark.parametrize("kind", ["sampled", "data"])
@pytest.mark.parametrize("name", DISTINCT)
def test_gradients_are_those_of_the_whole_model(name, kind, model_dir, tmp_path):
    ids = torch.randint(1, VOCABULARY, (N, T))
    labels = Labels(kind, draws=2, seed=3)
    expected = whole(model_dir(name), ids, labels)
    stream = opened(model_dir(name), tmp_path, ids)
    watcher, done = Everything(list(stream.model.linear_shapes())), []
    before = stream.hidden.data.clone()
    backward(stream, labels, [watcher], lambda at, of: done.append((at, of)))
    assert watcher.order == [2, 1, 0] and done == [(i, 6) for i in range(1, 7)]
    assert torch.equal(stream.hidden.data, before), "the stream stays where it is"
    assert {k[:3] for k in watcher.seen} == set(expected)
    for (index, linear, draw), (x, gradient) in expected.items():
        size = float(gradient.abs().max())
        assert size > 1e-6
        shown = [watcher.of(index, linear, draw, which) for which in (0, 1)]
        assert shown[0].shape[:2] == shown[1].shape[:2] == (N, T)
        torch.testing.assert_close(shown[0], x.view(N, T, -1), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(shown[1], gradient.view(N, T, -1), rtol=1e-8, atol=1e-9 * size)
    assert not any(m._forward_hooks for m in stream.model.module.modules())


@pytest.mark.parametrize("name", ["llama gqa, tied", "opt", "bloom", "falcon 7b"])
def test_token_weights_are_mean_squares_of_gradients(name, model_dir, tmp_path):
    """A loop over tokens and rows; the falcon's key and value heads leave parts of unequal size."""
    ids, labels, parts = torch.randint(1, VOCABULARY, (N, T)), Labels(seed=4), 3
    expected = whole(model_dir(name), ids, labels)
    stream = opened(model_dir(name), tmp_path, ids)
    weights = TokenWeights(stream, parts, 2)
    backward(stream, labels, [weights])
    for linear, (n_out, _) in stream.model.linear_shapes().items():
        for index in range(2):
            s = torch.zeros(N * T, parts, dtype=torch.float64)
            for part in range(parts):
                rows = range(n_out * part // parts, n_out * (part + 1) // parts)
                for token in range(N * T):
                    for draw in range(2):
                        gradient = expected[index, linear, draw][1].reshape(-1, n_out)[token]
                        s[token, part] += sum(float(gradient[row]) ** 2 for row in rows) / len(rows)
                s[:, part] *= N * T / s[:, part].sum()
                for token in range(N * T):
                    s[token, part] = min(s[token, part], CLAMP)
                s[:, part] *= N * T / s[:, part].sum()
            found = torch.cat([weights.of(index, linear, rows) for rows in stream.rows])
            torch.testing.assert_close(found.double(), s, rtol=1e-4, atol=1e-6)
            assert float(s.std()) > 0.1, "tokens differ"
    with pytest.raises(KeyError):
        weights.of(2, linear, slice(0, 2))  # not quantized


def test_sensitivities_are_those_of_a_loop(model_dir, tmp_path):
    ids, labels = torch.randint(1, VOCABULARY, (N, T)), Labels(draws=3, seed=5)
    expected = whole(model_dir("llama"), ids, labels)
    stream = opened(model_dir("llama"), tmp_path, ids)
    asked = {1: ["mlp.down_proj", "self_attn.k_proj"], 2: ["self_attn.o_proj"]}
    changes = {}

    def candidates(index, weights, stream):
        for name in asked.get(index, []):
            generator = torch.Generator().manual_seed(index)
            changes[index, name] = [torch.randn(weights.weight(name).shape, generator=generator) for _ in range(2)]
        return {name: changes[index, name] for name in asked.get(index, [])}

    found = Sensitivities(stream, labels.count, candidates)
    backward(stream, labels, [found])
    assert {(i, n) for i, own in found.by_block.items() for n in own} == set(changes)
    for (index, name), own in changes.items():
        for k, change in enumerate(own):
            per_window = per_token = 0.0
            for draw in range(3):
                x, g = expected[index, name, draw]
                for n in range(N):
                    moves = [float(g[n, t] @ change.double() @ x[n, t]) for t in range(T)]
                    per_window += sum(moves) ** 2
                    per_token += sum(move**2 for move in moves)
            answer = found.by_block[index][name]
            assert float(answer.per_window[k]) == pytest.approx(per_window / (3 * N * T), rel=1e-8)
            assert float(answer.per_token[k]) == pytest.approx(per_token / (3 * N * T), rel=1e-8)


def test_half_a_sensitivity_is_the_divergence_of_a_small_change(model_dir, tmp_path):
    """With many draws: the Fisher information is the Hessian of the divergence."""
    ids, labels, name = torch.randint(1, VOCABULARY, (N, T)), Labels(draws=400, seed=6), "mlp.up_proj"
    change = 1e-3 * torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    stream = opened(model_dir("llama"), tmp_path, ids, batch=N)
    found = Sensitivities(stream, labels.count, lambda index, weights, stream: {name: [change]} if index == 1 else {})
    backward(stream, labels, [found])
    reference = AutoModelForCausalLM.from_pretrained(model_dir("llama"), dtype=torch.float64).eval()
    with torch.no_grad():
        log_p = torch.log_softmax(reference(ids).logits, -1)
        reference.model.layers[1].mlp.up_proj.weight += change
        log_q = torch.log_softmax(reference(ids).logits, -1)
    divergence = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    assert float(found.by_block[1][name].per_window) / 2 == pytest.approx(divergence, rel=0.1)  # 2000 windows: 3%


@pytest.mark.parametrize(("store", "batch"), [("disk", 3), ("device", 1), ("cpu", 8)])
def test_store_and_batch_decide_nothing(store, batch, model_dir, tmp_path):
    ids = torch.randint(1, VOCABULARY, (N, T))
    found = []
    for options in ({}, {"store": store, "batch": batch, "directory": tmp_path / "store"}):
        stream = opened(model_dir("qwen2"), tmp_path, ids, torch.float32, **options)
        weights = TokenWeights(stream, 4, 3)
        backward(stream, Labels(seed=7), [weights])
        found.append(torch.cat([weights.of(1, "mlp.up_proj", rows) for rows in stream.rows]))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)
    assert not list(tmp_path.glob("store/*"))
    weights.drop(1)
    with pytest.raises(KeyError):
        weights.of(1, "mlp.up_proj", slice(0, 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_about_the_same_weights(dtype, model_dir, tmp_path):
    ids = torch.randint(1, VOCABULARY, (N, T))
    found = []
    for own in (torch.float32, dtype):
        stream = opened(model_dir("llama"), tmp_path, ids, own)
        weights = TokenWeights(stream, 2, 3)
        backward(stream, Labels("data"), [weights])
        found.append(torch.cat([weights.of(0, "self_attn.o_proj", rows) for rows in stream.rows]))
    assert torch.corrcoef(torch.stack([one.flatten() for one in found]))[0, 1] > 0.98
    torch.testing.assert_close(found[1].mean(0), torch.ones(2), rtol=2e-3, atol=0)


def test_gradients_beyond_float16_are_neither_lost_nor_infinite(model_dir, tmp_path, monkeypatch):
    """A loss of any size gives the same weights: what is carried between blocks has an exponent of its own."""
    ids = torch.randint(1, VOCABULARY, (N, T))
    plain, found = Labels.loss, []
    for factor in (1.0, 2.0**14, 2.0**-12):
        monkeypatch.setattr(Labels, "loss", lambda self, *given, by=factor: by * plain(self, *given))
        stream = opened(model_dir("opt"), tmp_path, ids, torch.float16)
        weights = TokenWeights(stream, 2, 3)
        backward(stream, Labels("data"), [weights])
        found.append(torch.cat([weights.of(0, "fc1", rows) for rows in stream.rows]))
    torch.testing.assert_close(found[0], found[1], rtol=0.02, atol=1e-3)
    torch.testing.assert_close(found[0], found[2], rtol=0.2, atol=0.05)  # the head's own gradients lose digits


def test_what_is_not_finite_names_its_block(model_dir, tmp_path, monkeypatch):
    ids = torch.randint(1, VOCABULARY, (N, T))
    stream = opened(model_dir("llama"), tmp_path, ids, torch.float32)

    class Broken(Everything):
        def begin(self, index, weights, stream):
            if index == 1:
                weights.parameters["mlp.down_proj.weight"] = torch.full((32, 64), torch.inf)
            return {}

    with pytest.raises(InputError, match="block 1: gradients are not finite in torch.float32; use --dtype"):
        backward(stream, Labels(), [Broken([])])
    monkeypatch.setattr(Labels, "loss", lambda self, log_p, ids, chance: log_p.sum() * torch.inf)
    with pytest.raises(InputError, match="the model's head: gradients are not finite"):
        backward(stream, Labels(), [])


def test_labels_follow_the_softmax():
    log_p = torch.log_softmax(torch.tensor([2.0, -torch.inf, 1.0, 0.0, -torch.inf]), -1).expand(20000, 5)
    drawn = sample(log_p, torch.rand(20000, generator=torch.Generator().manual_seed(0)))
    counts = torch.bincount(drawn, minlength=5) / 20000
    torch.testing.assert_close(counts, log_p[0].exp(), rtol=0, atol=0.012)
    assert counts[1] == counts[4] == 0
    ends = sample(log_p[:2], torch.tensor([0.0, 1 - 2.0**-24]))
    assert ends.tolist() == [0, 3], "the ends are labels that can be"


def test_normalized_weights_have_mean_one_and_a_ceiling():
    generator = torch.Generator().manual_seed(0)
    raw = torch.rand(6, 50, 3, generator=generator) * torch.tensor([1e-12, 1.0, 0.0])
    raw[0, 0, 1] = 1e6  # one token that would decide everything
    found = normalized(raw)
    torch.testing.assert_close(found.mean((0, 1)), torch.ones(3))
    assert torch.equal(found[..., 2], torch.ones(6, 50)), "no gradient: all count alike"
    assert found[0, 0, 1] / found.flatten(0, 1)[1:, 1].max() < 1e6 / 10
    torch.testing.assert_close(found[..., 0], raw[..., 0] / raw[..., 0].mean())
    assert [len(range(*rows.indices(10))) for rows in row_parts(10, 4)] == [2, 3, 2, 3]
    assert [(rows.start, rows.stop) for rows in row_parts(2, 8)] == [(0, 1), (1, 2)]
