"""Our dequantized checkpoints in transformers 4 (`make test-all` makes its environment; skipped where there is none).

Every model is random and made by the installed transformers 5, whose config.json transformers 4 does not understand; "older"
is the same model with a config.json as transformers 4 wrote it. It is rounded to four bits, saved dequantized, and read by
transformers 4. The models themselves, without anything of ours, show that such a reader tells the difference.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from quant.export.carried import carried_config
from quant.run.convert import convert
from quant.run.session import open_session
from tests.conftest import save_tokenizer
from tests.helpers import ROOT, demo_config, perform, reference_logits

PEER = Path(os.environ.get("OLDER_PYTHON", ROOT / ".venv-older/bin/python"))
SAME, OTHER = 1e-6, 0.1  # relative distance of the logits: measured 0, and 0.34 to 1.3 (float32 on both sides)
SIZES = {"vocab_size": 264, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 1}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
LONGROPE = {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 128,
            "short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [1.0 + 0.5 * i for i in range(8)]}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model: its type, its rotary settings in the form of transformers 4, other fields. older: whether it has such a form;
    told: whether a reader of version 4 takes the newer form for another model; quantized: whether it is rounded first."""

    model_type: str
    theta: float = 10000.0
    scaling: dict[str, Any] | None = None
    more: dict[str, Any] = field(default_factory=dict)
    older: bool = True
    told: bool = True
    quantized: bool = True


CASES = {
    "llama3": Case("llama", 5e5, LLAMA3, {"eos_token_id": [1, 5, 7]}),
    "qwen2, tied": Case("qwen2", 1e6, more={"tie_word_embeddings": True}),
    "qwen2, windows": Case("qwen2", 1e6, more={"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 2}),
    "qwen3": Case("qwen3", 1e6, more={"head_dim": 16}),
    "yarn": Case("llama", 1e6, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}),
    "longrope": Case("mistral", 1e4, LONGROPE, {"sliding_window": None}),
    # 4 takes the ratio of lengths for the factor, whatever is written
    "longrope, other factor": Case("llama", 1e4, LONGROPE | {"factor": 2.0}, older=False),
    "linear": Case("mistral", 1e4, {"rope_type": "linear", "factor": 2.0}, {"sliding_window": 16}),
    "dynamic": Case("llama", 5e5, {"rope_type": "dynamic", "factor": 2.0}),
    # read with eager attention: what 4 takes by default leaves out the soft cap (distance 5e-4)
    "gemma2, windows": Case("gemma2", 5e5, more={"sliding_window": 16, "head_dim": 16}),
    "falcon": Case("falcon", 5e5, more={"num_kv_heads": 2, "new_decoder_architecture": True, "bias": False, "alibi": False}),
    # parts of heads are rotated in families that are not quantized here: config.json alone is ours
    "stablelm, partly rotated": Case("stablelm", 5e5, more={"partial_rotary_factor": 0.25}, older=False, quantized=False),
    "phi, partly rotated": Case("phi", 1e6, more={"partial_rotary_factor": 0.5}, older=False, quantized=False),
    "opt": Case("opt", more={"ffn_dim": 128, "word_embed_proj_dim": 64}, told=False),
    "bloom": Case("bloom", told=False),
}  # fmt: skip


def make(case: Case, path: Path, older: bool) -> Path:
    """A random model of a case in a directory, with a config.json of version 5, or of 4."""
    part = {key: case.more[key] for key in ("partial_rotary_factor",) if key in case.more}
    parameters = {"rope_type": "default", **(case.scaling or {}), "rope_theta": case.theta, **part}
    rotary = {} if case.model_type in ("opt", "bloom") else {"rope_parameters": parameters}
    config = AutoConfig.for_model(case.model_type, **SIZES | case.more | rotary)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 2 / parameter.shape[1] ** 0.5)
    model.save_pretrained(path)
    save_tokenizer(path)
    if older:
        declared = json.loads((path / "config.json").read_text())
        declared["torch_dtype"] = declared.pop("dtype")
        if declared.pop("rope_parameters", None):
            declared |= {"rope_theta": case.theta, "rope_scaling": case.scaling}
            if case.scaling is LONGROPE:
                declared["original_max_position_embeddings"] = LONGROPE["original_max_position_embeddings"]
        (path / "config.json").write_text(json.dumps(declared))
    return path


@pytest.mark.parametrize("case", [case for case in CASES.values() if case.told and case.older])
def test_both_forms_of_a_model_are_one_model(case, tmp_path):
    """What is compared below: the same rotary settings in a config.json of version 4 and of 5."""
    paths = [make(case, tmp_path / form, form == "older") for form in ("newer", "older")]
    newer, older = (json.loads((path / "config.json").read_text()) for path in paths)
    assert "rope_theta" not in newer and "rope_parameters" not in older and older["rope_theta"] == case.theta
    read = [AutoConfig.from_pretrained(path).rope_parameters for path in paths]
    assert read[0] == read[1] and read[0]["rope_theta"] == case.theta


IDS = torch.randint(0, 256, (2, 256), generator=torch.Generator().manual_seed(0))


def logits_of(path: Path, base: Path, case: Case) -> torch.Tensor:
    """Our logits of IDS; of a family that is not quantized here, those of the installed library."""
    if not case.quantized:
        with torch.inference_mode():
            return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(IDS, use_cache=False).logits
    base.mkdir()
    return reference_logits(open_session(demo_config(base, path)), IDS)


def save(case: Case, model: Path, place: Path) -> Path:
    """What is written of a model: rounded to four bits and dequantized, or its config.json alone."""
    if case.quantized:
        config = demo_config(place, model)
        perform(config)
        convert(place / "run", "dequantized", place / "saved", cache_dir=place / "cache")
    else:
        shutil.copytree(model, place / "saved")
        declared = json.loads((model / "config.json").read_text())
        (place / "saved" / "config.json").write_text(json.dumps(carried_config(declared, torch.float32, {})))
    return place / "saved"


@pytest.fixture(scope="module")
def distances(tmp_path_factory):
    """Relative distance of the logits of transformers 4 from ours, of every model: by case and what was read of it."""
    base, jobs, ours = tmp_path_factory.mktemp("older"), [], {}
    for number, (name, case) in enumerate(CASES.items()):
        for form in ("newer", "older")[: 1 + case.older]:
            place = base / f"{number}-{form}"
            model = make(case, place / "model", form == "older")
            for path, what in ((save(case, model, place), form), (model, "as it is")):
                if what == form or (form == "newer" and case.told):
                    ours[name, what] = logits_of(path, place / f"of-{path.name}", case)
                    how = "eager" if case.model_type == "gemma2" else "transformers"
                    jobs.append(
                        (how, str(path), str(base / "tokens.safetensors"), str(base / f"{name}-{what}.safetensors"))
                    )
    save_file({"ids": IDS}, base / "tokens.safetensors")
    (base / "jobs.json").write_text(json.dumps(jobs))
    subprocess.run([PEER, ROOT / "benchmarks/peer.py", "load", base / "jobs.json"], check=True, cwd=base, timeout=1200)
    theirs = {key: load_file(base / f"{key[0]}-{key[1]}.safetensors")["logits"] for key in ours}
    return {key: float((theirs[key] - ours[key]).norm() / ours[key].norm()) for key in ours}


@pytest.mark.slow
@pytest.mark.skipif(not PEER.exists(), reason="needs an environment with transformers 4 (make test-all)")
@pytest.mark.parametrize("name", CASES)
def test_transformers_4_computes_what_we_compute(name, distances):
    read = {what: distance for (case, what), distance in distances.items() if case == name}
    assert read["newer"] < SAME and read.get("older", 0.0) < SAME
    assert read.get("as it is", 1.0) > OTHER, "the newer form alone is another model there"
