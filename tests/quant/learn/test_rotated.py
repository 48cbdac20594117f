"""A rotated model, read through its checkpoint, gives the logits of the original; a wrong matrix does not."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from models.load import load_model
from quant.blocks.fake_quant import ActSpec
from quant.blocks.instrument import AttentionProducts
from quant.blocks.online import HeadForm, RunningAttention
from quant.core.errors import InputError
from quant.core.hadamard import random_hadamard, seeded
from quant.core.names import ROTATIONS
from quant.learn import rotation as rotation_module
from quant.learn.config import Rotation
from quant.learn.rotation import RotatedCheckpoint, check_rotation, rotated
from tests.helpers import CPU, streamed_logits

IDS = torch.arange(2 * 12).view(2, 12) * 7 % 250
LLAMA_LIKE = ["llama", "mistral", "qwen2", "qwen3", "llama gqa, tied"]
SETS = {"residual": ("residual",), "vo": ("vo",), "qk": ("qk",), "down": ("down",), "all": ROTATIONS}


def logits(model) -> torch.Tensor:
    """Logits of the model as every run reads it."""
    return streamed_logits(model, IDS)


def difference(model, kinds: tuple[str, ...], seed: int = 0) -> float:
    """Relative difference between the logits of a model and those of it rotated."""
    right = logits(model)
    return float((logits(rotated(model, Rotation(kinds, seed), CPU)) - right).norm() / right.norm())


@pytest.mark.parametrize("kinds", SETS)
@pytest.mark.parametrize("name", LLAMA_LIKE)
def test_a_rotated_model_gives_the_same_logits(name, kinds, exact):
    assert difference(exact(name), SETS[kinds]) < 1e-13


@pytest.mark.parametrize("name", ["llama", "falcon 7b", "falcon 40b"])
def test_keys_are_rotated_in_the_library_s_eager_attention_too(name, exact):
    assert difference(exact(name, "eager"), ("qk",)) < 1e-13


@pytest.mark.parametrize(
    "name", ["opt", "opt post-norm, projected", "bloom", "falcon 7b", "falcon 40b", "falcon 11b", "falcon rw", "gemma2"]
)
@pytest.mark.parametrize("kind", ["vo", "down"])
def test_values_and_the_last_linear_are_rotated_in_every_family(name, kind, exact):
    """LayerNorm and GELU of the library are float64; Gemma's norm is not, so its logits agree in float32."""
    assert difference(exact(name), (kind,)) < (1e-5 if name == "gemma2" else 1e-13)


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        *((name, ROTATIONS) for name in ("phi3", "smollm3", "granite")),
        *(
            (name, ("vo", "qk", "down"))
            for name in ("olmo2", "glm4", "starcoder2", "stablelm parallel", "cohere2", "gpt neox")
        ),
        ("gpt2", ("vo", "down")),
    ],
)
def test_all_that_a_family_allows_is_rotated(name, kinds, exact):
    """Fused rows, parts of heads, neighbours that rotate, layers without rotary embeddings, factors of what is added."""
    assert difference(exact(name), kinds) < 1e-13


@pytest.mark.parametrize("kinds", ["residual", "vo", "all"])
def test_matrices_that_are_not_orthogonal_fail(kinds, exact, monkeypatch):
    """Negative control of what is folded."""

    def stretched(n: int, generator: torch.Generator) -> torch.Tensor:
        return random_hadamard(n, generator) @ torch.diag(torch.linspace(0.5, 2, n, dtype=torch.float64))

    monkeypatch.setattr(rotation_module, "random_hadamard", stretched)
    assert difference(exact("llama"), SETS[kinds]) > 1e-2


def test_queries_without_their_keys_fail(exact, monkeypatch):
    """Negative control of ``qk``."""
    monkeypatch.setattr(HeadForm, "of", lambda matrix, clips: HeadForm(matrix, None, clips))
    assert difference(exact("llama"), ("qk",)) > 1e-2


def test_a_matrix_that_the_weight_does_not_take_back_fails(exact):
    """Negative control of ``down``."""
    model = exact("llama")
    turned = rotated(model, Rotation(("down",)), CPU)
    checkpoint = turned.checkpoint
    assert isinstance(checkpoint, RotatedCheckpoint)
    checkpoint._online = {k: t.flip(1) if k.endswith("left") else t for k, t in checkpoint._online.items()}
    right = logits(model)
    assert float((logits(turned) - right).norm() / right.norm()) > 1e-2


def test_every_rotated_tensor_changes_and_norms_are_ones(exact):
    model = exact("llama gqa, tied")
    turned = rotated(model, Rotation(("residual", "vo")), CPU)
    before, after = model.block_weights(1, CPU), turned.block_weights(1, CPU)
    for name, tensor in after.items():
        if "norm" in name:
            assert bool((tensor == 1).all())
        elif name.endswith("weight"):
            assert float((tensor - before[name]).norm() / before[name].norm()) > 0.1
    outside = turned.outside_weights(CPU)
    assert not torch.equal(outside["lm_head.weight"], outside["model.embed_tokens.weight"])
    assert bool((outside["model.norm.weight"] == 1).all())


def test_what_is_read_is_rounded_to_what_is_stored(model_dir, tmp_path):
    """In the dtype of the files, whatever the arithmetic's: what is saved is what was run."""
    model = load_model(str(model_dir("llama")), dtype=torch.float64, cache_dir=tmp_path)
    weights = rotated(model, Rotation(("residual",)), CPU).block_weights(0, CPU)
    assert all(torch.equal(t, t.float().double()) for t in weights.values())


def test_matrices_depend_on_the_seed_alone(exact):
    model = exact("llama")
    first, again, other = (rotated(model, Rotation(seed=seed), CPU).block_weights(0, CPU) for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["mlp.up_proj.weight"], other["mlp.up_proj.weight"])
    assert not torch.equal(first["self_attn.online_heads"], other["self_attn.online_heads"])


@pytest.mark.parametrize(
    ("name", "kinds", "says"),
    [
        ("opt", "residual", "--rotate residual: .*its norms subtract the mean.*; use --rotate vo,down$"),
        ("opt post-norm, projected", "residual", "its norms subtract the mean"),
        ("bloom", "residual", "its norms subtract the mean"),
        ("falcon 40b", "residual", "its norms subtract the mean.*; use --rotate vo,qk,down$"),
        ("gemma2", "residual", "norms with weights stand between the attention, the MLP and the stream"),
        ("olmo2", "residual", "norms with weights stand between the attention, the MLP and the stream"),
        ("cohere2", "residual", "its norms subtract the mean"),
        ("opt", "qk", "this opt model has none .*; use --rotate vo,down$"),
        ("bloom", "qk", "this bloom model has none .*ALiBi"),
        ("falcon rw", "qk", "this falcon model has none .*ALiBi"),
    ],
)
def test_what_a_family_cannot_rotate_is_refused(name, kinds, says, model_dir, tmp_path):
    model = load_model(str(model_dir(name)), dtype=torch.float32, cache_dir=tmp_path)
    with pytest.raises(InputError, match=says):
        check_rotation(model.family, model.config, Rotation((kinds,)))


def test_kinds_are_known_and_have_one_order():
    assert Rotation(("qk", "residual")) == Rotation(("residual", "qk"))
    with pytest.raises(InputError, match="--rotate all of it: use residual"):
        Rotation(("all of it",))


def test_rotated_keys_take_four_bits_better():
    """Attention logits of keys with one large channel: measured 0.55 of the error without a rotation."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 16, 32, generator=generator, dtype=torch.float64) for _ in range(3))
    k[..., 3] *= 20
    right = q @ k.mT / 32**0.5

    def error(matrix):
        seen: list[torch.Tensor] = []
        running = RunningAttention()
        running.form = HeadForm.of(matrix, None)
        with AttentionProducts(ActSpec(bits=16, kv_bits=4), seen.append, running):
            torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return float((seen[0] - right).norm())

    assert error(random_hadamard(32, seeded(0, "qk"))) < 0.7 * error(None)


def test_a_tied_head_is_read_from_the_embedding(model_dir, tmp_path):
    """Both from one tensor of the files: rows of the head are those of the embedding with the last norm in them."""
    path = Path(model_dir("llama gqa, tied"))
    assert "lm_head.weight" not in load_file(path / "model.safetensors")
    assert json.loads((path / "config.json").read_text())["tie_word_embeddings"]
    model = load_model(str(path), dtype=torch.float32, cache_dir=tmp_path)
    turned = rotated(model, Rotation(("residual",)), CPU)
    outside, plain = turned.outside_weights(CPU), model.outside_weights(CPU)
    product = outside["lm_head.weight"] @ outside["model.embed_tokens.weight"].T
    embedding = plain["model.embed_tokens.weight"]
    torch.testing.assert_close(product, (embedding * plain["model.norm.weight"]) @ embedding.T, rtol=1e-4, atol=1e-4)
    assert model.config.tie_word_embeddings and not turned.config.tie_word_embeddings
