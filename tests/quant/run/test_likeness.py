"""Models of unknown types: what they are offered as, and that a family they do not belong to is noticed."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from data.calibration import evaluation_tokens
from models import family_of, llama
from models.family import Seam
from models.load import load_config, load_model
from quant.cli.arguments import build_parser, values_of
from quant.cli.flags import CONVERT, EVALUATE, GENERATE, LEARNER, QUANTIZER, SCALES
from quant.core.errors import InputError
from quant.run import likeness
from quant.run.directory import RunDirectory
from quant.run.likeness import check_family
from quant.run.packed_model import open_quantized
from tests.conftest import GQA, IDS, save_tokenizer
from tests.helpers import SEQLEN, config_for, direct_perplexity, perform

MORE = GQA | IDS | {"num_hidden_layers": 2}


@pytest.fixture(scope="module")
def unknown(tmp_path_factory):
    """Directory of a saved random model of a type that no family names."""

    def make(model_type):
        path = tmp_path_factory.mktemp(model_type)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **MORE)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.dim() > 1 else 0.3))
        model.save_pretrained(path)
        save_tokenizer(path)
        return path

    return make


def opened(path, tmp_path, **options):
    return load_model(str(path), dtype=torch.float32, cache_dir=tmp_path, **options)


def test_an_unknown_type_is_offered_what_it_looks_like(unknown, tmp_path):
    says = "unknown model family 'seed_oss'; known: .*its blocks look like those of llama.*: --family llama takes it for one"
    for with_weights in (True, False):
        with pytest.raises(InputError, match=says) as error:
            load_config(str(unknown("seed_oss")), tmp_path, with_weights=with_weights)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="look like those of olmo2: --family olmo2"):
        opened(unknown("olmo3"), tmp_path)
    with pytest.raises(InputError) as error:  # relu squared without a gate
        opened(unknown("arcee"), tmp_path)
    assert "look like" not in str(error.value)


def test_a_model_with_pictures_has_a_language_model(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mistral3", "text_config": {"model_type": "mistral"}}')
    with pytest.raises(
        InputError, match=r"unknown model family 'mistral3'.*its language model \(mistral\) is read where"
    ):
        load_config(str(tmp_path), tmp_path, with_weights=False)


def test_a_family_that_is_given_goes_all_the_way(unknown, text, tmp_path):
    path = unknown("seed_oss")
    config = config_for(path, text, tmp_path, family="llama", save=tmp_path / "saved", nsamples=4, limit=4)
    results = perform(config)
    tokens = evaluation_tokens(str(text), AutoTokenizer.from_pretrained(path), seqlen=SEQLEN, limit=4)
    for saved, key in ((path, "fp"), (tmp_path / "saved", "quantized")):
        model = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32).eval()
        assert results["perplexity"]["words"][key] == pytest.approx(direct_perplexity(model, tokens.ids), rel=1e-5)
    manifest = RunDirectory(tmp_path / "run").read("manifest.json")
    assert manifest["request"]["family"] == "llama" and manifest["configuration"]["family"] == "llama"
    quantized = open_quantized(str(tmp_path / "run"), tmp_path / "cache")
    assert quantized.model.family is llama.FAMILY, "a run says it itself"
    assert open_quantized(str(tmp_path / "saved"), tmp_path, family="llama").model.family is llama.FAMILY
    with pytest.raises(InputError, match="unknown model family 'seed_oss'"):
        open_quantized(str(tmp_path / "saved"), tmp_path)


def test_what_is_not_given_is_in_no_configuration(model_dir, text, tmp_path):
    perform(config_for(model_dir("llama"), text, tmp_path, nsamples=2, limit=2, solver="rtn", options={}, num_layers=1))
    assert "family" not in RunDirectory(tmp_path / "run").read("manifest.json")["configuration"]


def test_neighbours_that_rotate_are_noticed(unknown, tmp_path):
    """Helium has LLaMA's linears and norms; its rotary embeddings turn other pairs of rows."""
    with pytest.raises(
        InputError, match="helium model is none of the family llama: self_attn.q_proj and self_attn.k_proj"
    ):
        check_family(opened(unknown("helium"), tmp_path, family="llama"))


@pytest.mark.parametrize(
    ("family", "model", "says"),
    [
        ("lama", "llama", "--family lama: no such family; use one of bloom"),
        ("opt", "llama", "--family opt: llama models have a family of their own; leave --family out"),
        ("gpt2", "seed_oss", "--family gpt2: its checkpoints store tensors in a way of their own"),
        ("opt", "seed_oss", "a seed_oss model has no blocks where the family opt has them"),
        ("phi3", "seed_oss", "none of the family phi3: its linears are self_attn.q_proj, .*, not self_attn.qkv_proj, "),
    ],
)
def test_families_that_cannot_be_given(family, model, says, unknown, model_dir, tmp_path):
    path = model_dir(model) if model == "llama" else unknown(model)
    with pytest.raises(InputError, match=says) as error:
        opened(path, tmp_path, family=family)
    assert "\n" not in str(error.value)


def test_the_family_of_the_type_may_be_given_too(model_dir, tmp_path):
    assert opened(model_dir("qwen2"), tmp_path, family="llama").family is llama.FAMILY


@pytest.mark.parametrize("name", ["llama gqa, tied", "qwen3", "gemma2", "phi3", "glm4", "falcon 7b", "opt", "granite"])
def test_a_model_is_of_its_own_family(name, model_dir, tmp_path):
    check_family(opened(model_dir(name), tmp_path))


SWAPPED = (("self_attn.o_proj",), llama.ATTENTION_INPUTS, llama.MLP_INPUTS, ("mlp.down_proj",))
TOGETHER = (llama.ATTENTION_INPUTS, ("self_attn.o_proj", *llama.MLP_INPUTS), ("mlp.down_proj",))
FAULTS = {
    "offset": ({"norm_offset": 1.0}, "input_layernorm and .* cannot be rescaled"),
    "order": ({"groups": lambda config: SWAPPED}, "its linears run in the order self_attn.q_proj"),
    "groups": ({"groups": lambda config: TOGETHER}, "self_attn.o_proj, .* do not read the same"),
    "seam": (
        {"seams": lambda config: (Seam("mul", ("mlp.gate_proj",), ("mlp.down_proj",)),)},
        "mlp.gate_proj and mlp.down_proj cannot be rescaled",
    ),
    "sums": (
        {"residual_at": lambda config: {"self_attn.o_proj": "input_layernorm", "mlp.down_proj": "input_layernorm"}},
        "mlp.down_proj does not add to what input_layernorm reads",
    ),
    "stream": (
        {"residual": lambda config: llama.stream_between(llama.seams(config)[:1])},
        "the stream between its blocks cannot be rotated",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_wrong_word_of_a_family_is_noticed(fault, model_dir, tmp_path):
    model, (changes, says) = opened(model_dir("llama"), tmp_path), FAULTS[fault]
    with pytest.raises(InputError, match=says):
        check_family(replace(model, family=replace(model.family, **changes)))


def test_keys_with_norms_are_noticed(model_dir, tmp_path):
    model = opened(model_dir("qwen3"), tmp_path)
    with pytest.raises(InputError, match="self_attn.q_proj and self_attn.k_proj cannot be rescaled"):
        check_family(replace(model, family=family_of("llama")))


def test_other_logits_are_noticed(model_dir, tmp_path, monkeypatch):
    run = likeness.BlockStream.run

    def halved(self, index, weights, **options):
        run(self, index, weights, **options)
        self.hidden.data.mul_(0.5)

    monkeypatch.setattr(likeness.BlockStream, "run", halved)
    with pytest.raises(InputError, match="block by block its logits are others"):
        check_family(opened(model_dir("opt post-norm, projected"), tmp_path))


@pytest.mark.parametrize("command", [QUANTIZER, LEARNER, SCALES, EVALUATE, GENERATE, CONVERT])
def test_every_command_with_a_model_has_the_flag(command):
    parser = build_parser(command, None)
    given = [
        "--family",
        "llama",
        *{EVALUATE: ["--model", "x"], GENERATE: ["--model", "x", "--prompt", "y"]}.get(command, ()),
    ]
    assert values_of(parser.parse_args(given), command)["family"] == "llama"
