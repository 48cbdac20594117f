"""Our dequantized checkpoints in transformers 4: random models whose rotary settings, windows and heads are no defaults.

python -m benchmarks.older --peer .venv-older/bin/python [--out benchmarks/results/older.md]

Every model is made by the installed transformers 5, whose config.json transformers 4 does not understand; "older" is the
same model with a config.json as transformers 4 wrote it. It is rounded to four bits, saved dequantized and read by
transformers 4 in an environment of its own. The last rows show that a reader of 4 tells the difference: they are the
models themselves, without anything of ours, and have to come out DIFFERENT. Gemma 2 is read with eager attention: what 4 takes by default leaves out the soft cap.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from benchmarks.loaders import SEQLEN, ask, compare, ours, outcome
from benchmarks.measuring import about, report
from quant.run.convert import convert
from quant.run.request import Request
from quant.run.session import open_session

BOUND = 1e-5  # of the logits' relative distance: both sides compute in float32
SIZES = {"vocab_size": 843, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 1}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
LONGROPE = {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 128,
            "short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [1.0 + 0.5 * i for i in range(8)]}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model: its type, its rotary settings in the form of transformers 4, other fields. control: whether a reader of
    version 4 must take the newer form for another model. how: reads it (see benchmarks/peer.py)."""

    name: str
    model_type: str
    theta: float = 10000.0
    scaling: dict[str, Any] | None = None
    more: dict[str, Any] = field(default_factory=dict)
    control: bool = False
    how: str = "transformers"


CASES = (
    Case("llama3 scaling, theta 500000", "llama", 5e5, LLAMA3, {"eos_token_id": [1, 5, 7]}, control=True),
    Case("theta 1000000, tied", "qwen2", 1e6, more={"tie_word_embeddings": True}, control=True),
    Case("theta 1000000, untied", "qwen3", 1e6, more={"head_dim": 16}, control=True),
    Case("window in half of the layers", "qwen2", 1e6, more={"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 2}),
    Case("yarn", "llama", 1e6, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, control=True),
    Case("longrope, a factor of its own", "llama", 1e4, LONGROPE | {"factor": 2.0}, control=True),
    Case("longrope", "mistral", 1e4, LONGROPE, {"sliding_window": None}, control=True),
    Case("linear", "mistral", 1e4, {"rope_type": "linear", "factor": 2.0}, {"sliding_window": 16}, control=True),
    Case("dynamic", "llama", 5e5, {"rope_type": "dynamic", "factor": 2.0}, control=True),
    Case("windows in every other layer", "gemma2", 5e5, more={"sliding_window": 16, "head_dim": 16}, control=True, how="eager"),
    Case("rotary", "falcon", 5e5, more={"num_kv_heads": 2, "new_decoder_architecture": True, "bias": False, "alibi": False}, control=True),
    Case("no rotation", "opt", more={"ffn_dim": 128, "word_embed_proj_dim": 64}),
    Case("no rotation", "bloom"),
)  # fmt: skip


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """A token for every byte, which every model type's tokenizer class takes."""
    alphabet = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def make(case: Case, path: Path, older: bool) -> Path:
    """A random model of a case in a directory, with a config.json of version 5, or of 4."""
    rotary = case.model_type not in ("opt", "bloom")
    parameters = {"rope_type": "default", **(case.scaling or {}), "rope_theta": case.theta}
    config = AutoConfig.for_model(
        case.model_type, **SIZES | case.more | ({"rope_parameters": parameters} if rotary else {})
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 2 / parameter.shape[1] ** 0.5)
    model.save_pretrained(path)
    bytes_tokenizer().save_pretrained(path)
    if older:
        declared = json.loads((path / "config.json").read_text())
        declared["torch_dtype"] = declared.pop("dtype")
        if declared.pop("rope_parameters", None):
            declared |= {"rope_theta": case.theta, "rope_scaling": case.scaling}
            if (case.scaling or {}).get("rope_type") == "longrope":
                declared |= {"original_max_position_embeddings": LONGROPE["original_max_position_embeddings"]}
        (path / "config.json").write_text(json.dumps(declared))
    return path


def saved(model: Path, base: Path) -> Path:
    """The model rounded to four bits, dequantized."""
    run, out = base / f"{model.name}-run", base / f"{model.name}-saved"
    asked = Request.of(model=str(model), dataset="demo", nsamples=4, seqlen=SEQLEN, solver="rtn", wbits=4, group_size=32,
                       eval_datasets=(), run_dir=run)  # fmt: skip
    open_session(asked).run(asked.run, asked.output)
    convert(run, "dequantized", out)
    return out


def rows(peer: str, base: Path) -> list[tuple[dict[str, str], bool]]:
    """The records of the table, and whether each is as it should be."""
    asked: list[tuple[tuple[str, str, str], Path, bool]] = []
    hows: dict[Path, str] = {}
    for number, case in enumerate(CASES):
        for form in ("newer", "older"):
            model = make(case, base / f"{number}-{form}", form == "older")
            # 4 takes the ratio of lengths for longrope's factor, so that an older config.json with another one is no model of both
            if form == "newer" or not (
                case.model_type == "llama" and (case.scaling or {}).get("rope_type") == "longrope"
            ):
                asked.append(((case.model_type, case.name, form), saved(model, base), True))
            if form == "newer" and case.control:
                asked.append(((case.model_type, case.name, "newer, as it is"), model, False))
            hows |= {path: case.how for _, path, _ in asked if path not in hows}
    answers = {path: ours(path, base) for _, path, _ in asked}
    outs = {path: base / f"{path.name}.safetensors" for _, path, _ in asked}
    failure = ask(peer, [(hows[path], path, outs[path]) for _, path, _ in asked], answers[asked[0][1]][2], base)
    done = []
    for words, path, same in sorted(asked, key=lambda row: not row[2]):
        row = compare(outs[path], *answers[path][:2], BOUND, failure)
        record = dict(zip(("family", "what", "config.json of the source"), words, strict=True)) | outcome(row)
        done.append((record, row["said"] == ("same" if same else "DIFFERENT")))
    return done


def main() -> None:
    """All cases, one table; exit code 1 if a row is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", default=".venv-older/bin/python", help="Python of an environment with transformers 4")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    peer = str(Path(args.peer).absolute())
    code = "import torch, transformers; print(f'transformers {transformers.__version__}, torch {torch.__version__}')"
    versions = subprocess.run([peer, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    head = ["# Our checkpoints in transformers 4", "", f"Read by {versions}, on a CPU. {about(__doc__)}",
            f"same: logits within {BOUND:g} of ours, relative.", ""]  # fmt: skip
    with tempfile.TemporaryDirectory() as directory:
        table = rows(peer, Path(directory))
    report(head, (record for record, _ in table), args.out)
    sys.exit(0 if all(right for _, right in table) else 1)


if __name__ == "__main__":
    main()
