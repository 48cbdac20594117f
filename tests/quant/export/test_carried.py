"""What a checkpoint takes over: config.json as readers of transformers 4 and 5 take it, and side files byte for byte."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from quant.core.errors import InputError
from quant.export.carried import carried_config, carried_files, older_rotary_form
from quant.run.convert import convert
from tests.helpers import DEMO, config_for, demo_config, perform

LLAMA = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2,
         "intermediate_size": 64, "max_position_embeddings": 512, "vocab_size": 99}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 16.0}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
# (fields of transformers 4, fields of transformers 5) that mean the same
FORMS = {
    "theta": ({"rope_theta": 500000.0}, {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}}),
    "theta, integer": ({"rope_theta": 1000000}, {"rope_parameters": {"rope_theta": 1000000, "rope_type": "default"}}),
    "llama3": (
        {"rope_theta": 500000.0, "rope_scaling": LLAMA3},
        {"rope_parameters": LLAMA3 | {"rope_theta": 500000.0}},
    ),
    "yarn": ({"rope_theta": 1e6, "rope_scaling": YARN}, {"rope_parameters": YARN | {"rope_theta": 1e6}}),
    "linear": (
        {"rope_theta": 10000.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
    ),
    "dynamic": (
        {"rope_theta": 10000.0, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
    ),
    "longrope": (
        {"rope_theta": 10000.0, "original_max_position_embeddings": 128,
         "rope_scaling": LONG | {"factor": 4.0, "original_max_position_embeddings": 128}},
        {"rope_parameters": LONG | {"factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 10000.0}},
    ),
    "partial": (
        {"rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default", "partial_rotary_factor": 0.5}},
    ),
    "nothing": ({}, {}),
}  # fmt: skip


def version_4(declared):
    """What transformers 4.57 takes of a config.json (configuration_llama.py, modeling_rope_utils.py): rotary settings
    with all that its functions fill in, and the rest under the names that it knows."""
    scaling = dict(declared.get("rope_scaling") or {})
    kind = scaling.get("type") or scaling.get("rope_type") or "default"
    longest = declared["max_position_embeddings"]
    taken = {
        "theta": declared.get("rope_theta", 10000.0),
        "part": declared.get("partial_rotary_factor", 1.0),
        "type": kind,
        "dtype": declared.get("torch_dtype"),
        "rest": {
            key: declared.get(key) for key in ("eos_token_id", "layer_types", "sliding_window", "tie_word_embeddings")
        },
    }
    if kind == "longrope":
        original = declared.get("original_max_position_embeddings")
        factor = longest / original if original else scaling["factor"]
        original = original or longest
        own = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        given = scaling.get("attention_factor")
        taken |= {"original": original, "attention": own if given is None else given}
    elif kind in ("yarn", "llama3"):
        original = scaling["original_max_position_embeddings"] if kind == "llama3" else (
            scaling.get("original_max_position_embeddings") or longest)  # fmt: skip
        taken |= {"original": original, "factor": scaling["factor"]}
    elif kind != "default":
        taken |= {"factor": scaling["factor"]}
    named = ("beta_fast", "low_freq_factor", "high_freq_factor", "short_factor", "long_factor")
    return taken | {key: scaling[key] for key in named if key in scaling}


def version_5(declared, tmp_path):
    """The rotary settings that the installed library takes."""
    (tmp_path / "config.json").write_text(json.dumps(declared))
    parameters = dict(AutoConfig.from_pretrained(tmp_path).rope_parameters)
    parameters.pop("attention_factor", None)  # of longrope: what 5 computes anyway
    return parameters


MORE = {
    "windows": {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "several ends, tied": {"eos_token_id": [1, 5, 7], "tie_word_embeddings": True},
    "untied": {"eos_token_id": 1, "tie_word_embeddings": False},
}


@pytest.mark.parametrize("more", MORE)
@pytest.mark.parametrize("case", FORMS)
def test_either_form_is_read_by_both_versions(case, more, tmp_path):
    """From either form a reader of version 4, and one of version 5, takes the same settings."""
    older, newer = FORMS[case]
    rest = LLAMA | MORE[more]
    made = [carried_config(rest | form, torch.bfloat16, {}) for form in (older, newer)]
    expected = version_4(rest | older | {"torch_dtype": "bfloat16"})
    assert [version_4(config) for config in made] == [expected, expected]
    assert expected["theta"] == older.get("rope_theta", 10000.0) and expected["rest"]["eos_token_id"] == rest.get(
        "eos_token_id"
    )
    readings = [version_5(config, tmp_path) for config in (rest | older, rest | newer, *made)]
    assert all(reading == readings[0] for reading in readings)
    for config, form in zip(made, (older, newer), strict=True):
        assert {key: config[key] for key in (rest | form)} == rest | form, "nothing of the source's is changed"
        assert config["dtype"] == config["torch_dtype"] == "bfloat16"
        assert set(config) <= {*rest, *older, *newer, "dtype", "torch_dtype"}


def test_a_version_4_reader_takes_the_default_without_it():
    """The check above has power: the newer form alone is read as a theta of 10000 without scaling."""
    _, newer = FORMS["llama3"]
    assert version_4(LLAMA | newer)["theta"] == 10000.0 and version_4(LLAMA | newer)["type"] == "default"


FILLED = {
    "the older form": ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 1e4}, {}),
    "scaling null": (
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}, "rope_scaling": None},
        {"rope_theta": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    ),
    "yarn without factor and length": (
        {"rope_parameters": {"rope_type": "yarn", "factor": None, "rope_theta": 1e4, "original_max_position_embeddings": 128}},
        {"rope_theta": 1e4, "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}},
    ),
    "llama3 without length": (
        {"rope_parameters": {k: v for k, v in LLAMA3.items() if k[:8] != "original"} | {"rope_theta": 1e4}},
        {"rope_theta": 1e4, "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 512}},
    ),
    "longrope, a factor of its own": (
        {"rope_parameters": LONG | {"factor": 2.0, "original_max_position_embeddings": 128, "rope_theta": 1e4}},
        {"rope_theta": 1e4, "original_max_position_embeddings": 128,
         "rope_scaling": LONG | {"factor": 2.0, "original_max_position_embeddings": 128,
                                 "attention_factor": math.sqrt(1 + math.log(2) / math.log(128))}},
    ),
    "by layer type": (
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}},
        {},
    ),
    "both": ({"rope_theta": 5e5, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, {}),
    "no rotation": ({"alibi": True}, {}),
}  # fmt: skip


@pytest.mark.parametrize("case", FILLED)
def test_what_version_5_fills_in_is_written_for_4(case):
    declared, added = FILLED[case]
    assert older_rotary_form(LLAMA | declared) == added


SIDES = {
    "tokenizer.model": b"\x00 a sentencepiece model",
    "tokenizer.model.v3": b"another",
    "special_tokens_map.json": b'{"bos_token": "<s>"}',
    "added_tokens.json": b'{"<extra>":  7}\n',
    "chat_template.jinja": b"{{ messages[0].content }}",
    "additional_chat_templates/tool.jinja": b"{{ tools }}",
    "vocab.json": b"{}",
    "merges.txt": b"#version: 0.2\r\n",
    "README.md": b"---\nlicense: mit\n---\n# Model",
    "LICENSE.txt": b"as it is",
    "USE_POLICY.md": b"be good",
}
OTHER = {"training_log.json": b"{}", "model.fp16.bin": b"x", "notes.md": b"mine", "own.py": b"print(1)"}


def with_side_files(source):
    """A copy of a demo model with every kind of side file, and an unusual generation_config.json."""
    shutil.copytree(DEMO / "llama", source)
    for name, data in (SIDES | OTHER).items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(data)
    (source / "generation_config.json").write_bytes(b'{"eos_token_id": [1, 5],\n "_from_model_config": true}')
    tokenizer = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(
        json.dumps(tokenizer | {"tokenizer_class": "PreTrainedTokenizerFast"})
    )
    return source


def test_side_files_are_the_sources_byte_for_byte(tmp_path):
    """By a run, by a conversion of the run, and by one of the checkpoint."""
    source = with_side_files(tmp_path / "model")
    declared = json.loads((source / "config.json").read_text())
    declared |= {
        "rope_theta": 500000.0,
        "rope_scaling": LLAMA3,
        "eos_token_id": [1, 5],
        "torch_dtype": "float16",
        "mine": [1],
    }
    del declared["rope_parameters"], declared["dtype"]
    (source / "config.json").write_text(json.dumps(declared))
    config = demo_config(tmp_path, source, save=tmp_path / "saved", format="gptq_v2")
    perform(config)
    convert(tmp_path / "run", "dequantized", tmp_path / "plain")
    convert(tmp_path / "saved", "bitplane", tmp_path / "planes")
    carried = {*SIDES, "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    for name in ("saved", "plain", "planes"):
        place = tmp_path / name
        assert all((place / file).read_bytes() == (source / file).read_bytes() for file in carried)
        assert not [file for file in OTHER if (place / file).exists()]
        written = json.loads((place / "config.json").read_text())
        quantization = written.pop("quantization_config", {})
        assert bool(quantization) == (name != "plain")
        assert written == declared, "every reader knows the older form"


def test_a_head_of_ones_own_and_biases_are_in_the_config(model_dir, text, tmp_path):
    """What opening a model changes is written; what config.json leaves to the library's default stays unsaid."""
    config = config_for(model_dir("llama gqa, tied"), text, tmp_path, solver="rtn", options={}, save=tmp_path / "out")
    perform(config)
    source = json.loads((model_dir("llama gqa, tied") / "config.json").read_text())
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["tie_word_embeddings"] is source["tie_word_embeddings"] is True
    own = shutil.copytree(model_dir("llama gqa, tied"), tmp_path / "own")
    tensors = load_file(own / "model.safetensors")
    head = torch.randn_like(tensors["model.embed_tokens.weight"])
    save_file(tensors | {"lm_head.weight": head}, own / "model.safetensors", {"format": "pt"})
    config = config_for(own, text, tmp_path, solver="rtn", options={}, save=tmp_path / "headed", format="compressed-tensors",
                        run_dir=tmp_path / "run3")  # fmt: skip
    perform(config)
    convert(tmp_path / "headed", "bitplane", tmp_path / "headed-planes")
    for name in ("headed", "headed-planes"):
        assert json.loads((tmp_path / name / "config.json").read_text())["tie_word_embeddings"] is False
        assert torch.equal(load_file(tmp_path / name / "model.safetensors")["lm_head.weight"], head)
    plain = json.loads((model_dir("opt") / "config.json").read_text())
    assert "tie_word_embeddings" in plain
    bare = shutil.copytree(model_dir("opt"), tmp_path / "bare")
    del plain["tie_word_embeddings"]
    (bare / "config.json").write_text(json.dumps(plain))
    config = config_for(
        bare, text, tmp_path, solver="rtn", options={}, save=tmp_path / "opt", run_dir=tmp_path / "run2"
    )
    perform(config)
    assert "tie_word_embeddings" not in json.loads((tmp_path / "opt" / "config.json").read_text())


def test_a_tokenizer_without_files_of_its_own_is_written(tmp_path):
    from quant.export.carried import side_file_writer

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "out").mkdir()

    class Tokenizer:
        def save_pretrained(self, directory):
            (directory / "tokenizer.json").write_text("made")

    side_file_writer(tmp_path / "model", {}, Tokenizer())(tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "made"
    (tmp_path / "model" / "vocab.json").write_text("{}")
    (tmp_path / "other").mkdir()
    side_file_writer(tmp_path / "model", {}, Tokenizer())(tmp_path / "other")
    assert {file.name for file in (tmp_path / "other").iterdir()} == {"vocab.json"}


def test_a_readme_of_the_persons_stays(tmp_path):
    """The model's own is left out where a person has put one beside the checkpoint; a changed one of ours is refused."""
    source = with_side_files(tmp_path / "model")
    config = demo_config(tmp_path, source)
    perform(config)
    out = tmp_path / "out"
    convert(tmp_path / "run", "bitplane", out)
    (out / "README.md").write_text("mine")
    with pytest.raises(InputError, match=r"README.md was changed since it was written"):
        convert(tmp_path / "run", "gptq_v2", out, overwrite=True)
    (source / "README.md").unlink()
    shutil.rmtree(out)
    convert(tmp_path / "run", "bitplane", out)
    (out / "README.md").write_text("mine")
    (source / "README.md").write_text("the model's, made later")
    convert(tmp_path / "run", "gptq_v2", out, overwrite=True)
    assert (out / "README.md").read_text() == "mine"
    assert (out / "LICENSE.txt").read_bytes() == SIDES["LICENSE.txt"]
    assert json.loads((out / "results.json").read_text())["format"] == "gptq_v2"
    (source / "README.md").unlink()
    convert(tmp_path / "run", "bitplane", out, overwrite=True)
    assert (out / "README.md").read_text() == "mine"


def test_links_are_checked_and_classes_come_along(tmp_path):
    source = with_side_files(tmp_path / "model")
    names = {file.relative_to(source).as_posix() for file in carried_files(source, {})}
    assert names == {*SIDES, "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    tokenizer = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(
        json.dumps(tokenizer | {"auto_map": {"AutoTokenizer": ["own.T", None]}})
    )
    assert source / "own.py" in carried_files(source, {})
    (source / "LICENSES").mkdir()
    assert source / "LICENSES" not in carried_files(source, {})
    (tmp_path / "secret").write_text("secret")
    (source / "NOTICE").symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match="NOTICE is a link to"):
        carried_files(source, {})
