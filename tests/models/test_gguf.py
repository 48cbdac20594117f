"""GGUF files as models: names, rows and facts mapped back, numbers of every type, and damage in them."""

import json
import struct

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from transformers import AutoModelForCausalLM, AutoTokenizer

from models.gguf_config import unpack
from models.gguf_header import read_header
from models.gguf_layout import ARCHITECTURES, llama3_factors
from models.load import load_config, load_model, load_tokenizer
from quant.cli.errors import exit_code_of
from quant.core.errors import InputError
from quant.core.files import sha256_of_file
from tests.conftest import COMMON, GQA, VOCABULARY, build
from tests.gguf_files import AS_LLAMA_CPP, NAMES, built, logits, made, module_of, write_gguf
from tests.helpers import config_for, perform

WIDE = GQA | {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_hidden_layers": 2}


def opened(file, tmp_path):
    return load_model(str(file), dtype=None, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("name", NAMES)
def test_plain_numbers_give_the_logits_of_their_source(name, tmp_path):
    """F32: every tensor bit for bit, but norms to which one was added; and the logits of the whole model."""
    offset = name in AS_LLAMA_CPP
    source = built(name) if offset else build(name)
    write_gguf(source, tmp_path / "model.gguf")
    lazy = opened(tmp_path / "model.gguf", tmp_path)
    state = source.state_dict()
    for own in lazy.checkpoint.names():
        tolerance = 2.0**-22 if offset and own.endswith("norm.weight") else 0.0
        torch.testing.assert_close(lazy.checkpoint.read(own), state[own], rtol=0.0, atol=tolerance)
    assert set(lazy.checkpoint.names()) | {"lm_head.weight"} == set(state)
    window = (
        getattr(source.config, "sliding_window", None) if lazy.config.model_type == "llama" else None
    )  # not in the file
    same, right = (logits(module)[:, :window] for module in (module_of(lazy), source))
    torch.testing.assert_close(same, right, rtol=0.0, atol=1e-5 if offset else 0.0)


@pytest.mark.parametrize(
    "type_name", ["Q4_0", "Q4_1", "Q5_0", "Q8_0", "F16", "BF16", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
)
def test_every_type_is_what_the_package_says(type_name, tmp_path):
    """Element by element those of gguf.dequantize; queries and keys after their rows have moved back."""
    kind = Type[type_name]
    source = made("llama", **WIDE)
    written = write_gguf(source, tmp_path / "model.gguf", lambda name, tensor: kind)
    reader = opened(tmp_path / "model.gguf", tmp_path).checkpoint.reader
    for name, (_, type_, data) in written.items():
        numbers = torch.from_numpy(np.array(gguf.dequantize(data, type_)))
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        if heads is not None:  # row 2 i + half of a head in the file is row half · head_dim / 2 + i
            numbers = torch.stack(
                [numbers[h * 64 + 2 * i + half] for h in range(heads) for half in (0, 1) for i in range(32)]
            )
        assert torch.equal(reader.read(name).float(), numbers), name
        plain = {Type.F16: torch.float16, Type.BF16: torch.bfloat16}.get(type_, torch.float32)
        assert reader.dtype_of(name) == reader.read(name).dtype == plain
        assert reader.shape(name) == tuple(reader.read(name).shape)


def test_names_are_those_of_the_package():
    """Each name of a block in our table is one that the gguf package gives the module it stands for."""
    for named, architecture in ARCHITECTURES.items():
        arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == named.split(",")[0])
        names = gguf.get_tensor_name_map(arch, 2)
        for own, module in architecture.inside.items():
            path = f"{architecture.blocks}.1.{module}"
            assert f"blk.1.{own}" in (names.get_name(path), names.get_name(path.removeprefix("transformer."))), path
        for own, module in architecture.outside.items():
            assert own in (names.get_name(module), names.get_name(module.removeprefix("transformer."))), module


def test_configuration_and_tokenizer(tmp_path):
    """What transformers' reader says, and what it leaves out; the hash is the file's; a second opening writes nothing."""
    source = build("qwen3")
    write_gguf(source, tmp_path / "model.gguf")
    lazy = opened(tmp_path / "model.gguf", tmp_path)
    directory = lazy.checkpoint.path
    declared = json.loads((directory / "config.json").read_text())
    assert declared["head_dim"] == 8 and declared["architectures"] == ["Qwen3ForCausalLM"]
    assert declared["dtype"] == "float32" and declared["model_type"] == "qwen3"
    tokenizer = load_tokenizer(directory)
    text = "that, there\n  über 12"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text and len(tokenizer) <= VOCABULARY
    assert tokenizer.convert_ids_to_tokens(tokenizer("that")["input_ids"])[0] == "th"
    before = {file: file.stat().st_mtime_ns for file in directory.iterdir()}
    config, same = load_config(str(tmp_path / "model.gguf"), tmp_path / "cache", with_weights=False)
    assert same == directory and before == {file: file.stat().st_mtime_ns for file in directory.iterdir()}
    assert config.hidden_size == 32
    other = tmp_path / "elsewhere"
    other.mkdir()
    (other / "copy.gguf").write_bytes((tmp_path / "model.gguf").read_bytes())
    copied = load_model(str(other), dtype=None, cache_dir=tmp_path / "cache")  # a directory that holds one
    assert copied.checkpoint.sha256() == lazy.checkpoint.sha256() and copied.checkpoint.path != directory
    assert [sha256_of_file(file) for file in copied.checkpoint.files] == [sha256_of_file(tmp_path / "model.gguf")]


def test_a_run_saves_what_transformers_loads(text, tmp_path):
    """Quantized, saved and loaded again: config.json and tokenizer are there, the head stays tied."""
    write_gguf(build("llama gqa, tied"), tmp_path / "model.gguf", lambda name, tensor: Type.Q8_0)
    options = {"solver": "rtn", "wbits": 8, "options": {}, "save": tmp_path / "saved"}
    results = perform(config_for(tmp_path / "model.gguf", text, tmp_path, **options))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert saved.config.tie_word_embeddings and saved.dtype == torch.float32
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert (
        tokenizer("that")["input_ids"]
        == load_tokenizer(unpack(tmp_path / "model.gguf", tmp_path / "cache"))("that")["input_ids"]
    )
    ours = logits(module_of(load_model(str(tmp_path / "saved"), dtype=None, cache_dir=tmp_path / "cache")))
    torch.testing.assert_close(logits(saved), ours, rtol=0.0, atol=1e-5)
    assert results["perplexity"]


def test_falcon_and_llama_say_more_than_transformers_reads(tmp_path):
    write_gguf(build("falcon 40b"), tmp_path / "model.gguf")
    config, _ = load_config(str(tmp_path / "model.gguf"), tmp_path / "cache")
    assert config.new_decoder_architecture and config.num_kv_heads == 2 and not config.multi_query
    biased = made("llama", **GQA, attention_bias=True)
    write_gguf(biased, tmp_path / "biased.gguf")
    torch.testing.assert_close(
        logits(module_of(opened(tmp_path / "biased.gguf", tmp_path))), logits(biased), rtol=0.0, atol=0.0
    )


def test_frequencies_of_llama_3(tmp_path):
    """Factors of the rotary frequencies are what transformers computes from rope_scaling; others are refused."""
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192, "rope_theta": 500000.0}  # fmt: skip
    source = made("llama", **GQA | {"head_dim": 16, "rope_parameters": scaling, "max_position_embeddings": 131072})
    plain = 1.0 / 500000.0 ** (torch.arange(0, 16, 2) / 16)
    factors = plain / source.model.rotary_emb.inv_freq
    assert len(factors.unique()) > 2
    torch.testing.assert_close(llama3_factors(500000.0, 8, 8.0), factors.double(), rtol=1e-5, atol=0.0)
    write_gguf(source, tmp_path / "model.gguf", more=lambda w: w.add_tensor("rope_freqs.weight", factors.numpy()))
    lazy = opened(tmp_path / "model.gguf", tmp_path)
    assert lazy.config.rope_parameters["factor"] == 8.0
    torch.testing.assert_close(logits(module_of(lazy)), logits(source), rtol=0.0, atol=0.0)
    wrong = (factors * torch.linspace(1, 2, 8)).numpy()
    write_gguf(source, tmp_path / "wrong.gguf", more=lambda w: w.add_tensor("rope_freqs.weight", wrong))
    with pytest.raises(InputError, match="not those of Llama 3.1"):
        opened(tmp_path / "wrong.gguf", tmp_path)


def fact(key, kind, value):
    raw = key.encode()
    return struct.pack("<Q", len(raw)) + raw + struct.pack("<I", kind) + value


def entry(name, shape, kind=0, offset=0):
    return struct.pack("<Q", len(name)) + name + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def file_of(facts=b"", n_facts=None, tensors=b"", n_tensors=None, data=b"\0" * 4096, magic=b"GGUF", version=3):
    arch = fact("general.architecture", 8, struct.pack("<Q", 5) + b"llama")
    heads = fact("llama.attention.head_count", 4, struct.pack("<I", 2))
    n_facts = 2 + bool(facts) if n_facts is None else n_facts
    n_tensors = bool(tensors) if n_tensors is None else n_tensors
    head = magic + struct.pack("<IQQ", version, n_tensors, n_facts) + arch + heads + facts + tensors
    return head + b"\0" * (-len(head) % 32) + data


Q = struct.Struct("<Q").pack
DAMAGED = {
    "empty": (b"", "is empty"),
    "short": (b"GG", "ends behind the end"),
    "magic": (file_of(magic=b"GGML"), "does not begin with GGUF"),
    "version 1": (file_of(version=1), "of version 1, where 2 and 3 are read"),
    "big-endian": (file_of(version=3 << 24), "big-endian"),
    "tensors without end": (file_of(n_tensors=1 << 60), "do not go into it"),
    "facts without end": (file_of(n_facts=1 << 63), "do not go into it"),
    "facts past the end": (file_of(n_facts=60, data=b"\xff" * 4096), "no GGUF file that can be read"),
    "a long key": (file_of(Q(1 << 62)), "ends behind the end"),
    "a long text": (file_of(fact("a", 8, Q(1 << 62))), "'a' ends behind the end"),
    "a long array": (file_of(fact("a", 9, struct.pack("<IQ", 0, 1 << 61))), "do not go into the file"),
    "long texts": (file_of(fact("a", 9, struct.pack("<IQ", 8, 1 << 61))), "do not go into the file"),
    "nested arrays": (file_of(fact("a", 9, struct.pack("<IQ", 9, 1) * 50)), "array of the unknown type 9"),
    "unknown type of a fact": (file_of(fact("a", 13, b"")), "unknown type 13"),
    "a key twice": (file_of(fact("general.architecture", 4, b"\0" * 4)), "stands there twice"),
    "no text": (file_of(fact("a", 8, Q(1) + b"\xff")), "is not UTF-8"),
    "a key of control characters": (file_of(fact("\x1b[2J", 4, b"\0" * 4)), "is no name"),
    "alignment": (file_of(fact("general.alignment", 4, struct.pack("<I", 24))), "where a power of two belongs"),
    "alignment zero": (file_of(fact("general.alignment", 4, b"\0" * 4)), "where a power of two belongs"),
    "no dimensions": (file_of(tensors=entry(b"output.weight", ())), "has 0 dimensions"),
    "many dimensions": (file_of(tensors=struct.pack("<Q", 1) + b"a" + struct.pack("<I", 1 << 31)), "dimensions, where"),
    "an empty tensor": (file_of(tensors=entry(b"output.weight", (32, 0))), "has the shape"),
    "half a block": (file_of(tensors=entry(b"output.weight", (33, 2), 2)), "of type Q4_0 has the shape"),
    "a huge tensor": (file_of(tensors=entry(b"output.weight", (1 << 62, 1 << 62))), "ends behind the end"),
    "an offset past the end": (file_of(tensors=entry(b"output.weight", (32, 2), 0, 1 << 40)), "ends behind the end"),
    "an odd offset": (file_of(tensors=entry(b"output.weight", (32, 2), 0, 3)), "no multiple of 32"),
    "unknown type of a tensor": (file_of(tensors=entry(b"output.weight", (32, 2), 200)), "type 200, which the gguf package"),
    "one upon the other": (
        file_of(tensors=entry(b"output.weight", (32, 2)) + entry(b"token_embd.weight", (32, 2)), n_tensors=2),
        "lies in the bytes of another",
    ),
    "mixture": (file_of(fact("llama.expert_count", 4, struct.pack("<I", 8))), "a mixture of 8 experts"),
    "a part": (file_of(fact("split.count", 2, struct.pack("<H", 3))), "is one of 3 parts"),
    "no vocabulary": (file_of(), "has no vocabulary"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_one_line(case, tmp_path, capsys):
    content, message = DAMAGED[case]
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        opened(tmp_path / "model.gguf", tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400 and "\x1b" not in str(caught.value)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_gguf(build("llama"), path, lambda name, tensor: Type.Q8_0)
    return path.read_bytes()


@pytest.mark.parametrize("part", [0.0005, 0.01, 0.03, 0.06, 0.2, 0.5, 0.9, 0.998])
def test_a_cut_file_is_one_line(whole, part, tmp_path):
    (tmp_path / "model.gguf").write_bytes(whole[: int(len(whole) * part)])
    with pytest.raises(InputError, match="end|go into|empty"):
        opened(tmp_path / "model.gguf", tmp_path)


def test_flipped_bytes_are_one_line_or_a_model(whole, tmp_path):
    """Whatever stands in the header, opening ends in a model or in one line."""
    (tmp_path / "whole.gguf").write_bytes(whole)
    length = read_header(tmp_path / "whole.gguf").length
    generator = np.random.default_rng(0)
    refused = 0
    for number in range(24):
        data = bytearray(whole)
        for at in generator.integers(0, length, 3):
            data[at] ^= 1 << int(generator.integers(8))
        file = tmp_path / f"{number}.gguf"
        file.write_bytes(data)
        try:
            opened(file, tmp_path)
        except InputError as error:
            refused += 1
            assert "\n" not in str(error), str(error)
    assert refused


@pytest.mark.parametrize(
    ("name", "message"),
    [("../../etc/x.weight", "is none of a llama model"), ("blk.0.ffn_gate_exps.weight", "is none of a llama model"),
     ("blk.0.attn_q.weight.scale", "is none of"), ("blk.99.attn_q.weight", "belongs to none of the 3 blocks|99|blocks")],
)  # fmt: skip
def test_strange_tensors_are_refused(name, message, tmp_path):
    write_gguf(
        build("llama"), tmp_path / "model.gguf", more=lambda w: w.add_tensor(name, np.ones((32, 32), np.float32))
    )
    with pytest.raises(InputError, match=message):
        opened(tmp_path / "model.gguf", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"model.gguf", "cache"}


def test_what_is_not_covered_is_one_line(tmp_path):
    (tmp_path / "a.gguf").write_bytes(file_of().replace(b"llama", b"mamba"))
    with pytest.raises(InputError, match="architecture 'mamba' are not read .but those of bloom, falcon, gemma2"):
        opened(tmp_path / "a.gguf", tmp_path)
    source = build("llama")
    write_gguf(source, tmp_path / "b.gguf", more=lambda w: w.add_tensor("blk.0.attn_q.bias", np.ones(32, np.int32)))
    with pytest.raises(InputError, match="is stored as I32, which the gguf package does not dequantize"):
        opened(tmp_path / "b.gguf", tmp_path)
    write_gguf(source, tmp_path / "c.gguf", more=lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN))
    with pytest.raises(InputError, match="positions scaled by 'yarn' are not read"):
        opened(tmp_path / "c.gguf", tmp_path)
    write_gguf(made("llama", **COMMON, intermediate_size=64), tmp_path / "model.gguf")
    (tmp_path / "two").mkdir()
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / "two" / name).write_bytes((tmp_path / "model.gguf").read_bytes())
    with pytest.raises(InputError, match="GGUF files .a.gguf.: give one of them"):
        opened(tmp_path / "two", tmp_path)


def test_a_damaged_file_ends_a_command_with_2(text, tmp_path, capsys):
    (tmp_path / "model.gguf").write_bytes(file_of(n_tensors=1 << 60))
    assert exit_code_of(lambda: perform(config_for(tmp_path / "model.gguf", text, tmp_path))) == 2
    said = capsys.readouterr().err.strip()
    assert said.count("\n") == 0 and "do not go into it" in said
