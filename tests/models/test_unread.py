"""Every tensor of a checkpoint is read, carried over or named; what is said of tensors comes from the tensors."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from models.load import LazyModel, load_model
from quant.blocks.stream import BlockStream
from quant.blocks.weights import BlockWeights
from quant.core.errors import InputError
from tests.conftest import build
from tests.helpers import CPU, config_for, perform

IDS = torch.arange(2 * 12).view(2, 12) * 7 % 250
Tensors = dict[str, torch.Tensor]


def edited(source: Path, target: Path, change: Callable[[Tensors], object], **config) -> Path:
    """A copy of a model whose tensors, and entries of config.json, are changed."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target / "model.safetensors")
    declared = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(declared | config))
    return target


def opened(path: Path, dtype: torch.dtype | None = torch.float32) -> LazyModel:
    return load_model(str(path), dtype=dtype, cache_dir=path.parent / "cache")


def logits(model: LazyModel) -> torch.Tensor:
    outside = model.outside_weights(CPU)
    stream = BlockStream(model, IDS, device=CPU, batch=2).capture(outside)
    for index in range(len(model.blocks)):
        stream.run(index, BlockWeights.read(model, index, CPU), advance=True)
    return stream.logits(slice(0, 2), outside)


def other_logits(path: Path) -> torch.Tensor:
    """Of transformers itself."""
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()(IDS).logits


TIED = "llama gqa, tied"


def test_a_head_of_its_own_is_not_tied(model_dir, tmp_path, text, caplog):
    """config.json says that the head is tied; the file holds another one (as after full fine-tuning). The saved
    checkpoint computes with it too."""
    head = torch.randn(264, 32, generator=torch.Generator().manual_seed(0))
    path = edited(model_dir(TIED), tmp_path / "own", lambda t: t.update({"lm_head.weight": head}))
    model = opened(path)
    assert torch.equal(model.outside_weights(CPU)["lm_head.weight"], head)
    assert [r.message for r in caplog.records] == [
        f"{path}: config.json ties lm_head.weight, which has values of its own: it is not tied here"
    ]
    torch.testing.assert_close(logits(model), other_logits(path))
    assert (logits(model) - logits(opened(model_dir(TIED)))).abs().max() > 1
    config = config_for(path, text, tmp_path, save=tmp_path / "saved", solver="rtn", options={}, wbits=8)
    perform(config)
    assert json.loads((tmp_path / "saved/config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(load_file(tmp_path / "saved/model.safetensors")["lm_head.weight"], head)


@pytest.mark.parametrize("form", ["equal", "equal, wider", "head alone"])
def test_a_head_that_is_the_embedding_stays_tied(form, model_dir, tmp_path, caplog):
    def change(tensors: Tensors) -> None:
        name = "model.embed_tokens.weight"
        tensors[name] = tensors[name].bfloat16()
        tensors["lm_head.weight"] = tensors[name].float() if form == "equal, wider" else tensors[name].clone()
        if form == "head alone":
            del tensors[name]

    model = opened(edited(model_dir(TIED), tmp_path / "tied", change))
    outside = model.outside_weights(CPU)
    assert not caplog.records and "lm_head.weight" not in outside
    assert torch.equal(outside["model.embed_tokens.weight"], outside["model.embed_tokens.weight"].bfloat16().float())
    torch.testing.assert_close(logits(model), other_logits(tmp_path / "tied"))


def new(name: str, *shape: int) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: torch.ones(shape)})


REFUSED = {
    "bias of the head": (new("lm_head.bias", 264), "lm_head.bias has no place in the model"),
    "bias of the norm": (new("model.norm.bias", 32), "model.norm.bias has no place in the model"),
    "bias in a block": (new("model.layers.1.self_attn.q_proj.bias", 32), r"q_proj.bias has no place in the model"),
    "scale in a block": (new("layers.1.mlp.up_proj.input_scale", 1), r"layers.1.*input_scale has no place in the model"),
    "block too many": (new("model.layers.3.mlp.up_proj.weight", 64, 32), "layers.3.* belongs to none of the 3 blocks"),
    "adapter": (new("model.layers.0.mlp.up_proj.lora_A.weight", 4, 32), "belongs to an adapter: merge it"),
    "adapter outside": (new("base_model.model.lm_head.lora_B.default.weight", 264, 4), "belongs to an adapter: merge it"),
    "second spelling": (new("norm.weight", 32), "model.norm.weight and norm.weight are one tensor with different values"),
    "integers": (lambda t: t.update({k: t[k].to(torch.int8) for k in t if "1.mlp.up" in k}), "up_proj.weight holds int8"),
    "float8": (lambda t: t.update({k: t[k].to(torch.float8_e4m3fn) for k in t if "k_proj" in k}), "holds float8_e4m3fn"),
    "complex": (lambda t: t.update({k: t[k].to(torch.complex64) for k in t if "norm" in k}), "holds complex64"),
    "bool": (lambda t: t.update({k: t[k] > 0 for k in t if "embed" in k}), "embed_tokens.weight holds bool"),
    "all integers": (lambda t: t.update({k: t[k].to(torch.int32) for k in t}), "no weights of blocks in floating-point"),
    "another model": (lambda t: (t.clear(), t.update(a=torch.ones(2))), "no weights of blocks in floating-point"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_change_the_numbers_is_refused(case, model_dir, tmp_path):
    change, message = REFUSED[case]
    with pytest.raises(InputError, match=message) as error:
        opened(edited(model_dir("llama"), tmp_path / "model", change))
    assert "\n" not in str(error.value)


def test_an_adapter_beside_the_model_is_refused(model_dir, tmp_path):
    path = edited(model_dir("llama"), tmp_path / "model", lambda tensors: None)
    (path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="holds an adapter"):
        opened(path)


FREQUENCIES, HEAD = "model.layers.0.self_attn.rotary_emb.inv_freq", 8
HARMLESS = {
    "bias of zeros": lambda t: t.update({"lm_head.bias": torch.zeros(264), "model.layers.0.mlp.up_proj.bias": torch.zeros(64)}),
    "rotary frequencies": lambda t: t.update({FREQUENCIES: (10000.0 ** -(torch.arange(0, HEAD, 2) / HEAD)).half()}),
    "masked bias": new("model.layers.0.self_attn.masked_bias", 1),
    "second spelling": lambda t: t.update({"norm.weight": t["model.norm.weight"].clone()}),
}  # fmt: skip


@pytest.mark.parametrize("case", HARMLESS)
def test_leftovers_that_mean_nothing_are_passed_over(case, model_dir, tmp_path, caplog):
    model = opened(edited(model_dir("llama"), tmp_path / "model", HARMLESS[case]))
    assert torch.equal(logits(model), logits(opened(model_dir("llama")))) and not caplog.records and not model.carried


@pytest.mark.parametrize("theta", [20000.0, 1e6])
def test_other_rotary_frequencies_than_those_of_the_config_are_named(theta, model_dir, tmp_path, caplog):
    own = theta ** -(torch.arange(0, HEAD, 2) / HEAD)
    model = opened(edited(model_dir("llama"), tmp_path / "model", lambda tensors: tensors.update({FREQUENCIES: own})))
    (said,) = [record.getMessage() for record in caplog.records]
    assert f"{FREQUENCIES} is not what config.json gives" in said
    assert torch.equal(logits(model), logits(opened(model_dir("llama")))), "as transformers itself does"


def test_tensors_of_other_tasks_are_named_and_carried_over(model_dir, tmp_path, text, caplog):
    more = {
        name: torch.randn(3, 5) for name in ("score.weight", "v_head.bias", "vision.layers.0.weight", "x.layers.9.w")
    }
    path = edited(model_dir("llama"), tmp_path / "model", lambda t: t.update(more))
    config = config_for(path, text, tmp_path, save=tmp_path / "saved", solver="rtn", options={})
    perform(config)
    (said,) = [r.getMessage() for r in caplog.records if "no parameter" in r.getMessage()]
    assert said.endswith(
        "reads score.weight, v_head.bias, vision.layers.0.weight and 1 more; saved checkpoints keep them"
    )
    saved = load_file(tmp_path / "saved/model.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in more.items())


def test_every_weight_is_saved_in_its_own_dtype(model_dir, tmp_path, text):
    """What most weights have is no fact about one: each is rounded to, and saved in, the dtype that it came in."""
    wide = {"model.layers.1.mlp.up_proj.weight": torch.float32, "model.layers.0.self_attn.q_proj.weight": torch.float16,
            "model.norm.weight": torch.float32, "lm_head.weight": torch.float32}  # fmt: skip

    def change(tensors: Tensors) -> None:
        for name in tensors:
            tensors[name] = tensors[name].to(wide.get(name, torch.bfloat16))

    path = edited(model_dir("llama"), tmp_path / "model", change)
    model = opened(path, None)
    assert model.dtype == model.storage_dtype == torch.bfloat16
    assert model.storage_of("mlp.up_proj.weight", 1) == torch.float32
    assert model.storage_of("mlp.up_proj.bias", 1) == torch.float32, "a bias that is added has its weight's"
    config = config_for(path, text, tmp_path, save=tmp_path / "saved", solver="rtn", options={}, dtype="float32")
    results = perform(config)
    saved, source = load_file(tmp_path / "saved/model.safetensors"), load_file(path / "model.safetensors")
    assert {k: t.dtype for k, t in saved.items()} == {k: t.dtype for k, t in source.items()}
    up = saved["model.layers.1.mlp.up_proj.weight"]
    assert not torch.equal(up, up.bfloat16().float()), "nothing was rounded to what the others have"
    again = config_for(tmp_path / "saved", text, tmp_path, run_dir=tmp_path / "again", wbits=16, dtype="float32")
    perplexity = perform(again)["perplexity"]["words"]["fp"]
    assert perplexity == results["perplexity"]["words"]["quantized"], "what was measured is what was saved"


def sharded(source: Path, target: Path, change: Callable[[Tensors, Tensors], object]) -> Path:
    """A copy of a model in two shards, both changed; the index says what it said before."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    (target / "model.safetensors").unlink()
    names = sorted(tensors)
    halves = [{n: tensors[n] for n in part} for part in (names[::2], names[1::2])]
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = {name: file for file, half in zip(files, halves, strict=True) for name in half}
    (target / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    change(*halves)
    for file, half in zip(files, halves, strict=True):
        save_file(half, target / file)
    return target


def test_one_tensor_in_two_shards(model_dir, tmp_path):
    """The same values do no harm, wherever the index says that they are; with others there is no right one."""

    def twice(factor: float) -> Callable[[Tensors, Tensors], None]:
        def change(first: Tensors, second: Tensors) -> None:
            name = next(iter(first))
            second[name] = first[name] * factor

        return change

    def moved(first: Tensors, second: Tensors) -> None:
        second.update({name: first.pop(name) for name in list(first)[:3]})

    right = logits(opened(model_dir("llama")))
    for number, change in enumerate((twice(1), moved)):
        assert torch.equal(logits(opened(sharded(model_dir("llama"), tmp_path / str(number), change))), right)
    with pytest.raises(InputError, match="two shards hold lm_head.weight with different values"):
        opened(sharded(model_dir("llama"), tmp_path / "other", twice(2)))


def test_weight_files_that_no_index_names_are_said(model_dir, tmp_path, caplog):
    path = edited(model_dir("llama"), tmp_path / "model", lambda tensors: None)
    for name in ("model-00002-of-00003.safetensors", "consolidated.safetensors"):
        shutil.copy(path / "model.safetensors", path / name)
    assert torch.equal(logits(opened(path)), logits(opened(model_dir("llama"))))
    (said,) = [record.getMessage() for record in caplog.records]
    assert said == f"{path}: these files belong to no shard that is read: model-00002-of-00003.safetensors"


def test_a_buffer_of_the_checkpoint_is_read(model_dir, tmp_path, monkeypatch):
    """A buffer that belongs into checkpoints is the file's, not what the library starts with."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    start = LlamaRMSNorm.__init__

    def with_buffer(self, *args, **options) -> None:
        start(self, *args, **options)
        self.register_buffer("offset", torch.zeros(1))

    path = edited(
        model_dir("llama"), tmp_path / "model", lambda t: t.update({"model.norm.offset": torch.full((1,), 3.0)})
    )
    with pytest.raises(InputError, match="model.norm.offset has no place in the model"):
        opened(path)
    monkeypatch.setattr(LlamaRMSNorm, "__init__", with_buffer)
    model = opened(path)
    assert model.outside_weights(CPU)["model.norm.offset"] == 3 and model.carried == ("model.norm.offset",)
    assert model.block_weights(0, CPU)["input_layernorm.offset"] == 0, "not in the file: as the library starts it"
    assert build("llama").model.norm.offset == 0
