"""Models as GGUF files: read back they have the same weights, element by element, the same configuration and tokenizer."""

import re
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from gguf import GGUFReader as PackageReader
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from models.gguf_architectures import ARCHITECTURES, MODEL_TYPES, stored_rows
from models.gguf_tokens import vocabulary
from models.gguf_writer import FILE
from models.load import load_model, load_tokenizer
from models.vocabulary import Vocabulary
from quant.core.errors import InputError
from quant.core.grid import fit_grid
from quant.core.names import SUPER_GRIDS
from quant.core.types import QuantizedWeight, QuantSpec
from quant.export import refusal
from quant.export.formats import Content
from quant.export.gguf_model import check_model
from quant.export.write import entries, form_of, layers_of, save_checkpoint
from quant.run.config import RunConfig
from quant.run.content import expected_bits, outside_matrices
from quant.run.convert import convert
from quant.tune.config import Tuning
from tests.conftest import CONFIGS, MIXTURES, build
from tests.gguf_files import AS_LLAMA_CPP, NAMES, WRITTEN, as_stored, built, logits, made, module_of
from tests.helpers import CPU, config_for, perform
from tests.helpers import replace as replace_in

SPEC = QuantSpec(4, 32, symmetric=True)
# What transformers' reader makes no right configuration of: Falcon's second kind of blocks, heads of Qwen3 that are not 128 wide
BEYOND_TRANSFORMERS = ("falcon 40b", "falcon 11b", "qwen3")


def save_tokenizer(path):
    """A token for every byte, one merge; the last ids of the vocabulary stay unused."""
    Wrapped(bytes_model(), None, pre_tokenizers.ByteLevel(add_prefix_space=False)).save_pretrained(path)


def save_model(name, path):
    """A model that llama.cpp computes as it is, with tokenizer."""
    model = built(name) if name in AS_LLAMA_CPP or name in WRITTEN else build(name)
    model.half().save_pretrained(path)
    save_tokenizer(path)
    return model


def rounded(weight, spec):
    """To the nearest codes of a grid."""
    grid = fit_grid(weight.float(), spec)
    return QuantizedWeight(grid.quantize(weight.float()), grid, spec)


def write(lazy, target, spec=SPEC, n_blocks=2, results=()):
    """A GGUF file of a model whose first blocks are rounded; what each parameter is then, by name."""
    expected = {}

    def replaced(index):
        if index >= n_blocks:
            return {}
        weights = lazy.block_weights(index, torch.device("cpu"))
        linears = lazy.linear_shapes(index)
        solved = {f"{name}.weight": rounded(weights[f"{name}.weight"], spec) for name in linears}
        prefix = f"{lazy.family.blocks}.{index}."
        expected.update({prefix + name: weight.dequantize() for name, weight in solved.items()})
        return solved

    content = Content(spec, lazy.linear_shapes(), model_type=lazy.config.model_type)
    assert refusal("gguf", content) is None
    form = form_of(lazy, "gguf", content, layers_of(lazy, n_blocks, content), lambda: entries(lazy, replaced),
                   dtype_of=lazy.storage_of, layout=lazy.family.layout, side_files=lambda directory: None,
                   tokenizer=load_tokenizer(lazy.checkpoint.path), results=dict(results))  # fmt: skip
    save_checkpoint(form.tensors(), target, form.config, form.side_files, {"format": "gguf"}, False, form.writer_in)
    return expected


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_comes_back_element_by_element(name, tmp_path):
    save_model(name, tmp_path / "model")
    lazy = load_model(str(tmp_path / "model"), dtype=None, cache_dir=tmp_path / "cache")
    expected = write(lazy, tmp_path / "out", results={"method": "rtn", "bits_per_weight": 4.5, "command": "/secret"})
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [FILE, "results.json"]
    back = load_model(str(tmp_path / "out"), dtype=torch.float32, cache_dir=tmp_path / "cache")
    state = {}
    for own, _ in lazy.module.named_parameters():
        value = expected.get(own, lazy.checkpoint.read(lazy.key(own)).float())
        read = back.checkpoint.read(back.key(own))
        assert read.dtype == (torch.float16 if own not in expected and value.dim() > 1 else torch.float32)
        tolerance = (
            2.0**-22 if name in ("gemma2", "gemma3") and own.endswith("norm.weight") else 0.0
        )  # 1 was added to it
        torch.testing.assert_close(read.float(), value, rtol=0.0, atol=tolerance)
        state[own] = value
    source = AutoModelForCausalLM.from_config(lazy.config, dtype=torch.float32).eval()
    source.load_state_dict(state, strict=False)
    window = 8 if name == "mistral" else None  # a file of the architecture llama has none
    torch.testing.assert_close(
        logits(module_of(back))[:, :window],
        logits(source)[:, :window],
        rtol=0.0,
        atol=1e-5 if name in ("gemma2", "gemma3") else 0.0,
    )
    raw = (tmp_path / "out" / FILE).read_bytes()
    assert b"/secret" not in raw and str(tmp_path).encode() not in raw


@pytest.mark.parametrize("name", [name for name in NAMES if name not in BEYOND_TRANSFORMERS])
def test_transformers_own_reader_has_the_same_weights(name, tmp_path):
    """Element by element, by its own names and rows."""
    save_model(name, tmp_path / "model")
    lazy = load_model(str(tmp_path / "model"), dtype=None, cache_dir=tmp_path / "cache")
    expected = write(lazy, tmp_path / "out", n_blocks=len(lazy.blocks))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file=FILE, dtype=torch.float32).state_dict()
    for own, _ in lazy.module.named_parameters():
        value = expected.get(own, lazy.checkpoint.read(lazy.key(own)).float())
        tolerance = 2.0**-22 if name in ("gemma2", "gemma3") and own.endswith("norm.weight") else 0.0
        torch.testing.assert_close(theirs[own], value, rtol=0.0, atol=tolerance, msg=lambda m, own=own: f"{own}: {m}")


@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_only_written_is_what_the_converter_writes(name, tmp_path):
    """Names by the package's own map, rows by the converter's steps; experts of a block are one tensor, and routers float32."""
    save_model(name, tmp_path / "model")
    lazy = load_model(str(tmp_path / "model"), dtype=torch.float32, cache_dir=tmp_path / "cache")
    own_names = {own for own, _ in lazy.module.named_parameters()}
    values = {own: tensor for own, tensor in lazy.outside_weights(CPU).items() if own in own_names}
    for index in range(len(lazy.blocks)):
        prefix = f"{lazy.family.blocks}.{index}."
        values |= {prefix + own: tensor for own, tensor in lazy.block_weights(index, CPU).items()}
    values |= write(lazy, tmp_path / "out", n_blocks=len(lazy.blocks))
    found = {one.name: one for one in PackageReader(tmp_path / "out" / FILE).tensors}
    named = "llama" if name == "mixtral" else MODEL_TYPES[lazy.config.model_type]
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == named)
    names = gguf.get_tensor_name_map(arch, lazy.config.num_hidden_layers)
    experts: dict[str, list[torch.Tensor]] = {}
    for own, value in values.items():
        base, _, kind = own.rpartition(".")
        if match := re.fullmatch(r"(.*mlp\.experts)\.\d+\.(\w+)", base):
            experts.setdefault(f"{names.get_name(f'{match[1]}.{match[2]}')}.{kind}", []).append(value)
            continue
        if own == "lm_head.weight" and lazy.config.tie_word_embeddings:
            continue
        one = found.pop(f"{names.get_name(base)}.{kind}")
        right = as_stored(own, value, lazy.config)
        assert np.array_equal(gguf.dequantize(one.data, one.tensor_type), right.numpy()), own
        if ".mlp.gate." in own or "wpe" in own:
            assert one.tensor_type.name == "F32"
    for own, parts in experts.items():
        one = found.pop(own)
        assert one.tensor_type.name == "Q4_0" and np.array_equal(
            gguf.dequantize(one.data, one.tensor_type), torch.stack(parts).numpy()
        )
    assert not found and len(experts) == (3 * len(lazy.blocks) if lazy.family.experts else 0)


def test_facts_are_those_that_the_package_reads(tmp_path):
    save_model("qwen3", tmp_path / "model")
    lazy = load_model(str(tmp_path / "model"), dtype=None, cache_dir=tmp_path / "cache")
    write(lazy, tmp_path / "out", results={"method": "quantease", "bits_per_weight": 4.5, "codes_sha256": "ab"})
    fields = {key: field.contents() for key, field in PackageReader(tmp_path / "out" / FILE).fields.items()}
    expected = {
        "general.architecture": "qwen3", "general.type": "model", "general.file_type": 2,
        "general.quantization_version": 2, "general.quantized_by": "llm-quantizer", "quantization.method": "quantease",
        "quantization.bits_per_weight": 4.5, "quantization.codes_sha256": "ab", "qwen3.context_length": 64,
        "qwen3.embedding_length": 32, "qwen3.block_count": 3, "qwen3.feed_forward_length": 64,
        "qwen3.attention.head_count": 4, "qwen3.attention.head_count_kv": 2, "qwen3.attention.key_length": 8,
        "qwen3.attention.value_length": 8, "qwen3.rope.dimension_count": 8, "qwen3.rope.freq_base": 10000.0,
        "qwen3.vocab_size": 264, "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_eos_token": False,
    }  # fmt: skip
    assert {key: fields.get(key) for key in expected} == expected
    assert fields["qwen3.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    tokens = fields["tokenizer.ggml.tokens"]
    assert len(tokens) == 264 and tokens[256:] == ["th", *(f"[PAD{n}]" for n in range(257, 264))]
    assert fields["tokenizer.ggml.token_type"] == [1] * 257 + [5] * 7


def test_frequencies_of_llama_3_are_a_tensor_of_the_file(tmp_path):
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192, "rope_theta": 500000.0}  # fmt: skip
    options = CONFIGS["llama gqa, tied"][1] | {"rope_parameters": scaling, "max_position_embeddings": 131072}
    made("llama", **options).save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    lazy = load_model(str(tmp_path / "model"), dtype=None, cache_dir=tmp_path / "cache")
    write(lazy, tmp_path / "out")
    back = load_model(str(tmp_path / "out"), dtype=None, cache_dir=tmp_path / "cache")
    assert back.config.rope_parameters == lazy.config.rope_parameters
    (factors,) = [t.data for t in PackageReader(tmp_path / "out" / FILE).tensors if t.name == "rope_freqs.weight"]
    own = lazy.module.model.rotary_emb.inv_freq
    plain = 500000.0 ** -(torch.arange(0, 8, 2) / 8)
    np.testing.assert_allclose(factors, (plain / own).numpy(), rtol=1e-6)


@pytest.mark.parametrize("named", ARCHITECTURES)
def test_rows_go_where_reading_brings_them_back_from(named):
    for module, undo in ARCHITECTURES[named].undo.items():
        rows = torch.randn(8 * (4 + 2 * 2) if module == "attn_qkv" else 8 * 4, 3)
        heads = (4, 2) if module == "attn_qkv" else (4, 4)
        assert torch.equal(undo(stored_rows(rows, undo, *heads), *heads), rows)
        assert not torch.equal(stored_rows(rows, undo, *heads), rows)


@pytest.mark.parametrize("kind", ["compressed-tensors", "bitplane"])
def test_a_run_and_its_checkpoint_become_the_same_file(kind, text, tmp_path):
    save_model("llama gqa, tied", tmp_path / "model")
    config = config_for(tmp_path / "model", text, tmp_path, solver="rtn", wbits=4, symmetric=True, group_size=32,
                        options={}, save=tmp_path / "saved", format="gguf", num_layers=2)  # fmt: skip
    results = perform(config)
    file = tmp_path / "saved" / FILE
    assert results["checkpoint_bytes"] > file.stat().st_size
    convert(tmp_path / "run", kind, tmp_path / "packed", cache_dir=tmp_path / "cache")
    convert(tmp_path / "packed", "gguf", tmp_path / "again", cache_dir=tmp_path / "cache")
    lazy, again = (load_model(str(tmp_path / d), dtype=None, cache_dir=tmp_path / "cache") for d in ("saved", "again"))
    assert sorted(lazy.checkpoint.names()) == sorted(again.checkpoint.names())
    for name in lazy.checkpoint.names():
        assert torch.equal(lazy.checkpoint.read(name), again.checkpoint.read(name))
    plain = tmp_path / "plain"
    convert(tmp_path / "run", "dequantized", plain, cache_dir=tmp_path / "cache")
    right = load_model(str(plain), dtype=None, cache_dir=tmp_path / "cache")
    for name, _ in right.module.named_parameters():
        assert torch.equal(lazy.checkpoint.read(name).half(), right.checkpoint.read(name))
    before = file.stat().st_mtime_ns
    perform(config)  # it is there, whole
    assert file.stat().st_mtime_ns == before


@pytest.mark.parametrize("kind", ["q2_k", "q3_k", "q4_k"])
def test_a_run_on_the_grid_of_super_blocks_is_its_file(kind, text, tmp_path):
    """Solved, tuned and written: what the file holds is what the run says, resumed alike, and no other format takes it."""
    own = SUPER_GRIDS[kind]
    options = CONFIGS["llama gqa, tied"][1] | {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
    made("llama", **options | {"num_hidden_layers": 1}).half().save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    tuned = {"tuning": Tuning("block", 2, rate=0.05)} if kind == "q3_k" else {}
    config = config_for(tmp_path / "model", text, tmp_path, wbits=own.bits, group_size=own.part, grid_kind=kind, range="mse",
                        options={"num_iter": 3, "search_grid": True, "refit_grid": True}, save=tmp_path / "saved",
                        format="gguf", nsamples=8, limit=4, **tuned)  # fmt: skip
    results = perform(config)
    assert results["bits_per_weight"] == own.size * 8 / 256 and results["grid_kind"] == kind
    convert(tmp_path / "run", "dequantized", tmp_path / "plain", cache_dir=tmp_path / "cache")
    lazy, right = (load_model(str(tmp_path / d), dtype=None, cache_dir=tmp_path / "cache") for d in ("saved", "plain"))
    for name, _ in right.module.named_parameters():
        assert torch.equal(lazy.checkpoint.read(name).half(), right.checkpoint.read(name))
    reader = PackageReader(tmp_path / "saved" / FILE)
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert {types[f"blk.0.{name}.weight"] for name in ("attn_q", "attn_output", "ffn_down")} == {kind.upper()}
    for other in ("bitplane", "gptq", "compressed-tensors"):
        with pytest.raises(InputError, match=f"{other} .*--grid {kind}.*: use format gguf"):
            convert(tmp_path / "run", other, tmp_path / "other", cache_dir=tmp_path / "cache")
    assert not (tmp_path / "other").exists()
    again = perform(replace_in(config, run_dir=tmp_path / "second", save=None, format=None))
    assert again["codes_sha256"] == results["codes_sha256"]


NARROW = {"q2_k": "IQ4_NL", "q3_k": "IQ4_NL", "q4_k": "Q5_0", "q5_k": "Q5_1", "q6_k": "Q8_0"}  # llama-quant.cpp


@pytest.mark.parametrize("kind", NARROW)
def test_rows_that_are_no_whole_super_blocks_have_the_blocks_that_llama_cpp_gives_them(kind, text, tmp_path, caplog):
    """Solved, tuned where its codes move, and written: each linear is of its type, and the file holds what the run says."""
    own = SUPER_GRIDS[kind]
    options = CONFIGS["llama gqa, tied"][1] | {"hidden_size": 96, "intermediate_size": 256, "head_dim": 24}
    made("llama", **options | {"num_hidden_layers": 1}).half().save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    tuned = {"tuning": Tuning("block", 2, rate=0.05)} if NARROW[kind] != "IQ4_NL" else {}
    tuned |= {"head_bits": own.bits} if kind in ("q3_k", "q5_k") else {}  # of a head that the embedding is tied to
    config = config_for(tmp_path / "model", text, tmp_path, wbits=own.bits, group_size=own.part, grid_kind=kind, range="mse",
                        options={"num_iter": 3, "search_grid": True, "refit_grid": True}, save=tmp_path / "saved",
                        format="gguf", nsamples=8, limit=4, **tuned)  # fmt: skip
    results = perform(config)
    assert "6 of 7 linears" in caplog.text
    reader = PackageReader(tmp_path / "saved" / FILE)
    linears = {t.name: t for t in reader.tensors if t.name.startswith("blk.0.") and len(t.shape) == 2}
    types = {name.split(".")[2]: tensor.tensor_type.name for name, tensor in linears.items()}
    assert types == dict.fromkeys(types, NARROW[kind]) | {"ffn_down": kind.upper()} and len(types) == 7
    embedding = next(t.tensor_type.name for t in reader.tensors if t.name == "token_embd.weight")
    assert embedding == (NARROW[kind] if "head_bits" in tuned else "F16")
    stored = sum(8 * t.data.nbytes for t in linears.values()) / sum(int(t.n_elements) for t in linears.values())
    assert results["bits_per_weight"] == pytest.approx(stored, abs=1e-12)
    assert expected_bits(config.run, {"a": (64, 96), "b": (64, 256)}) == 64 * 96 * NARROW_BITS[kind] + 64 * own.size * 8
    convert(tmp_path / "run", "dequantized", tmp_path / "plain", cache_dir=tmp_path / "cache")
    lazy, right = (load_model(str(tmp_path / d), dtype=None, cache_dir=tmp_path / "cache") for d in ("saved", "plain"))
    for name, _ in right.module.named_parameters():
        assert torch.equal(lazy.checkpoint.read(name).half(), right.checkpoint.read(name))
    assert results["entropy_bits"] == (5.0 if kind == "q5_k" else None), "of no one number of levels"
    if NARROW[kind] == "IQ4_NL":
        with pytest.raises(
            InputError, match="96 columns are no super-blocks.*--tune does not move codes of iq4_nl.*drop --tune"
        ):
            perform(replace_in(config, run_dir=tmp_path / "second", save=None, format=None, tuning=Tuning("block", 2)))


@pytest.mark.parametrize("flags", [{"head_bits": 3, "grid_kind": "q3_k"}, {"embedding_bits": 6, "grid_kind": "q6_k"}])
def test_a_head_that_no_blocks_fit_is_refused_before_work(flags):
    own = SUPER_GRIDS[flags["grid_kind"]]
    vocabulary = Vocabulary("embed", "head", (100, 48), (100, 48), tied=False)
    with pytest.raises(InputError, match="and it has 48: no type of GGUF's blocks fits"):
        outside_matrices(RunConfig(wbits=own.bits, group_size=own.part, **flags), vocabulary)


NARROW_BITS = {"q2_k": 4.5, "q3_k": 4.5, "q4_k": 5.5, "q5_k": 6.0, "q6_k": 8.5}


@pytest.mark.parametrize("tied", [False, True])
def test_iq4_nl_is_what_the_reader_of_gguf_says(tied, text, tmp_path):
    options = CONFIGS["llama gqa, tied"][1] | {"num_hidden_layers": 1, "tie_word_embeddings": tied}
    made("llama", **options).half().save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    config = config_for(tmp_path / "model", text, tmp_path, wbits=4, group_size=32, grid_kind="iq4_nl", range="mse",
                        options={"num_iter": 3, "search_grid": True, "refit_grid": True}, save=tmp_path / "saved",
                        format="gguf", nsamples=8, limit=4)  # fmt: skip
    results = perform(config)
    assert results["bits_per_weight"] == 4.5
    convert(tmp_path / "run", "dequantized", tmp_path / "plain", cache_dir=tmp_path / "cache")
    lazy, right = (load_model(str(tmp_path / d), dtype=None, cache_dir=tmp_path / "cache") for d in ("saved", "plain"))
    for name, _ in right.module.named_parameters():
        assert torch.equal(lazy.checkpoint.read(name).half(), right.checkpoint.read(name))
    types = {tensor.name: tensor.tensor_type.name for tensor in PackageReader(tmp_path / "saved" / FILE).tensors}
    assert {types[f"blk.0.{name}.weight"] for name in ("attn_q", "attn_output", "ffn_down")} == {"IQ4_NL"}


REFUSED = {
    "floats": ({"spec": QuantSpec(4, 16, kind="nvfp4")}, "cannot hold the levels of --grid nvfp4: use format compressed-tensors"),
    "super-blocks": ({"spec": QuantSpec(4, 32, kind="q4_k"), "shapes": {"a": (64, 48)}},
                     "no blocks for symmetric grids of 32 levels in groups of 32 on 48 inputs of a: use format bitplane"),
    "no architecture": ({"model_type": "opt"}, "no architecture for opt models"),
    "no blocks": ({"spec": QuantSpec(8, 32)}, "asymmetric grids of 256 levels in groups of 32 on 128 inputs of a "
                  "(the nearest that it holds: --wbits 8 --group-size 32 --sym): use format bitplane"),
    "small groups": ({"spec": QuantSpec(4, 16)}, "nearest that it holds: --wbits 4 --group-size 128)"),
    "real": ({"spec": QuantSpec(6, 32, kind="real")}, "--wbits 6 --group-size 32 --grid integer)"),
    "widths": ({"spec": QuantSpec(4, 32), "mixed": True, "widths": (3, 4, 8)}, "of 256 levels"),
    "order": ({"reordered": True}, "cannot hold groups in act-order"),
    "outliers": ({"outliers": True}, "sparse outliers"),
    "activations": ({"act": replace(Content(SPEC, {}).act, bits=8)}, "weight-only"),
    "misfit": ({"misfit": "block 0 a: too small"}, "stores scales in float16"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_file_cannot_hold_is_refused_before_work(case):
    changes, message = REFUSED[case]
    content = Content(SPEC, {"a": (64, 128)})
    assert refusal("gguf", content) is None
    against = refusal("gguf", replace(content, **changes))
    assert against is not None and message in against and "\n" not in against
    assert refusal("gguf", replace(content, spec=QuantSpec(4, 32), mixed=True, widths=(2, 3, 4, 7))) is None


OTHERWISE = {
    "alibi": ("falcon", {"alibi": True}, "ALiBi"),
    "biases": ("falcon 7b", {"bias": True}, "biases"),
    "heads": ("falcon 7b", {"multi_query": False}, "one key and value for every head"),
    "one after the other": ("falcon 7b", {"parallel_attn": False}, "parallel_attn false"),
    "residuals": ("bloom", {"apply_residual_connection_post_layernorm": True}, "residuals from behind the norms"),
    "activation": ("llama", {"hidden_act": "gelu"}, "the activation gelu"),
    "scaling": ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}, "scaled by yarn"),
    "windows": ("qwen2", {"use_sliding_window": True}, "sliding windows"),
    "bias of heads": ("qwen3", {"attention_bias": True}, "attention_bias"),
    "queries": ("gemma2", {"query_pre_attn_scalar": 16}, "query_pre_attn_scalar"),
    "local layers": ("gemma3", {"query_pre_attn_scalar": 16}, "every sixth layer"),
    "router": ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob"),
    "dense blocks": ("qwen3_moe", {"norm_topk_prob": True, "mlp_only_layers": [0]}, "blocks without experts"),
    "layers": ("gemma2", {"query_pre_attn_scalar": 8, "layer_types": ["full_attention"] * 3}, "every second"),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERWISE)
def test_what_llama_cpp_computes_otherwise_is_refused(case, tmp_path):
    name, options, message = OTHERWISE[case]
    model_type, base = (CONFIGS | MIXTURES)["falcon 7b" if name == "falcon" else name]
    made(model_type, **base | options).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    lazy = load_model(str(tmp_path), dtype=None, cache_dir=tmp_path / "cache")
    with pytest.raises(InputError, match=message) as caught:
        check_model(lazy, load_tokenizer(tmp_path))
    assert "\n" not in str(caught.value)


class Wrapped:
    """What transformers makes of a tokenizer."""

    def __new__(cls, model, normalizer=None, pre=None, decoder=None):
        tokenizer = Tokenizer(model)
        if normalizer:
            tokenizer.normalizer = normalizer
        if pre:
            tokenizer.pre_tokenizer = pre
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def bytes_model(merges=(("t", "h"),), **more):
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    return models.BPE(letters | {"th": 256}, list(merges), **more)


def test_pieces_get_scores_by_which_the_highest_is_joined_first():
    """A slow joining by scores gives what the merges give."""
    merges = [("▁", "t"), ("h", "e"), ("▁", "the"), ("▁t", "he"), ("t", "h"), ("t", "he"), ("th", "e")]
    vocabulary_ = {"<unk>": 0, "<0x0A>": 1} | {c: 2 + i for i, c in enumerate("▁thea")}
    for left, right in merges:
        vocabulary_.setdefault(left + right, len(vocabulary_))
    model = models.BPE(vocabulary_, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer = Wrapped(model, normalizer)
    facts = vocabulary(tokenizer, len(vocabulary_) + 2)
    tokens, scores = facts["tokenizer.ggml.tokens"], facts["tokenizer.ggml.scores"]
    assert facts["tokenizer.ggml.model"] == "llama" and facts["tokenizer.ggml.add_space_prefix"] is True
    assert facts["tokenizer.ggml.token_type"] == [2, 6, *[1] * (len(vocabulary_) - 2), 5, 5]
    for text in ("the", "the the", "a tea that heats", "ethe"):
        pieces = list("▁" + text.replace(" ", "▁"))
        while True:
            joined = [
                (scores[tokens.index(a + b)], -i)
                for i, (a, b) in enumerate(zip(pieces, pieces[1:], strict=False))
                if a + b in tokens
            ]
            if not joined:
                break
            place = -max(joined)[1]
            pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]
        expected = [piece for piece in pieces if piece in tokens]
        known = [t for t in tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"]) if t != "<unk>"]
        assert known == expected


def test_merges_that_scores_cannot_say_are_refused():
    vocabulary_ = {"<unk>": 0, "a": 1, "b": 2, "c": 3, "ab": 4, "bc": 5, "abc": 6}
    for merges, message in (
        ([("a", "b"), ("b", "c"), ("a", "bc")], "'ab', 'c'. are pieces of a third, but no merge"),
        ([("a", "b"), ("a", "bc"), ("b", "c"), ("ab", "c")], "its merges to 'abc' are not behind each other"),
    ):
        with pytest.raises(InputError, match=message):
            vocabulary(Wrapped(models.BPE(vocabulary_, merges, byte_fallback=True, unk_token="<unk>")), 7)


QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def cut_by(*steps):
    return pre_tokenizers.Sequence(list(steps))


def split(pattern):
    from tokenizers import Regex

    return pre_tokenizers.Split(Regex(pattern), "isolated")


RAW = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
NAMED = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": cut_by(pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "qwen2": cut_by(split(QWEN), RAW),
    "falcon": cut_by(pre_tokenizers.Punctuation("contiguous"), pre_tokenizers.ByteLevel(add_prefix_space=False),
                     pre_tokenizers.Digits(individual_digits=False), split("[0-9][0-9][0-9]")),
    None: cut_by(split(r"\s+"), RAW),
    "": pre_tokenizers.ByteLevel(add_prefix_space=True),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMED)
def test_ways_to_cut_text_are_known_by_what_they_do(name):
    tokenizer = Wrapped(bytes_model(), normalizers.NFC() if name == "qwen2" else None, NAMED[name])
    if not name:
        with pytest.raises(InputError, match="llama.cpp has no such tokenizer .it cuts text by"):
            vocabulary(tokenizer, 300)
        return
    facts = vocabulary(tokenizer, 300)
    assert facts["tokenizer.ggml.pre"] == name and facts["tokenizer.ggml.merges"] == ["t h"]


def test_tokenizers_that_llama_cpp_does_not_have():
    raw = pre_tokenizers.ByteLevel(add_prefix_space=False)
    cases = [
        (Wrapped(models.Unigram([("a", -1.0)], unk_id=0)), "its model is Unigram"),
        (Wrapped(bytes_model(), normalizers.Lowercase(), raw), "normalizes text by Lowercase"),
        (Wrapped(bytes_model(ignore_merges=True), None, raw), "ignore_merges True"),
        (
            Wrapped(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"), None, pre_tokenizers.Whitespace()),
            "cuts words by",
        ),
        (
            Wrapped(models.BPE({"a": 0, "<unk>": 1}, [], byte_fallback=True), normalizers.NFKC()),
            "its pieces stand behind",
        ),
        (Wrapped(bytes_model(merges=()), None, raw), "it has no merges"),
        (object(), "it has no tokenizer.json"),
    ]
    for tokenizer, message in cases:
        with pytest.raises(InputError, match=message):
            vocabulary(tokenizer, 300)
    with pytest.raises(InputError, match="the tokenizer has 257 tokens, but the model's embedding 256 rows"):
        vocabulary(Wrapped(bytes_model(), None, raw), 256)


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    import errno

    from models import gguf_writer

    save_model("llama", tmp_path / "model")
    lazy = load_model(str(tmp_path / "model"), dtype=None, cache_dir=tmp_path / "cache")

    def full(self, tensor):
        raise OSError("16384 requested and 0 written")

    monkeypatch.setattr(gguf_writer.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(OSError) as caught:
        write(lazy, tmp_path / "out")
    assert caught.value.errno == errno.ENOSPC and FILE in str(caught.value)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".llm-quantizer*new*"))
