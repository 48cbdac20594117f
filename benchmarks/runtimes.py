"""Our files in the runtimes they are for: what llama.cpp and mlx-lm compute of them, beside what the codes say.

python -m benchmarks.runtimes --llama-cpp .venv-llama/bin/python --mlx .venv-mlx/bin/python [--out benchmarks/results/runtimes.md]

Every model is rounded to nearest in memory, written by the same code as a run's checkpoint, and loaded by llama.cpp (package
xllamacpp) or mlx-lm in an environment of its own, on one thread of a CPU. They continue texts of the demo world, always with
the most probable token; ours is the same model computed in float32 from the codes. KL: mean of the divergence of their
distribution of the next token from ours, over all positions of their own continuations; llama.cpp rounds the inputs of its
products to 8 bits, so that ours is also computed with inputs rounded like that, and the verdict is by that column. same tokens: of theirs, up to the
first of a text that is not our most probable one. Super-blocks need inputs in multiples of 256, which no demo model has, and
there is no demo model of every architecture: the rows named random are of untrained models of that width.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch.func import functional_call
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.measuring import about, report
from data.demo import text
from models.gguf_architectures import MODEL_TYPES as GGUF_MODELS
from models.gguf_writer import FILE
from models.load import LazyModel, load_model, load_tokenizer
from quant.core.grid import fit_grid
from quant.core.types import QuantizedWeight, QuantSpec
from quant.export.formats import Content
from quant.export.gguf_types import type_for
from quant.export.mlx import MODELS as MLX_MODELS
from quant.export.write import entries, form_of, layers_of, save_checkpoint
from quant.run.writing import whole_weights
from tests.helpers import DEMO

PEERS = {"gguf": Path(__file__).with_name("llama_cpp.py"), "mlx": Path(__file__).with_name("mlx_peer.py")}
PROMPTS, LENGTH, STEPS = 3, 24, 40
LOW_BITS, LOW_BOUND = 3, 1e-2  # what rounding to nearest leaves of a model at so few bits, small differences move far
BOUND = 1e-3  # of the mean divergence: of llama.cpp from ours with inputs of 8 bits; mlx computes in the file's float16
CPU = torch.device("cpu")
SIZES = {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 843, "pad_token_id": None,
         "bos_token_id": 0, "eos_token_id": 1}  # fmt: skip
LLAMA = SIZES | {"intermediate_size": 512, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 512}
PLAIN_LLAMA = {key: value for key, value in LLAMA.items() if key != "head_dim"}
ENDS = {"pad_token_id": None, "bos_token_id": 0, "eos_token_id": 1}
PARTLY = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 512}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192, "rope_theta": 500000.0}  # fmt: skip
RANDOM: dict[str, tuple[str, dict[str, Any]]] = {
    "random llama": ("llama", LLAMA),
    "random llama 3": ("llama", LLAMA | {"rope_parameters": LLAMA3, "max_position_embeddings": 131072}),
    "random qwen2": ("qwen2", LLAMA),
    "random qwen3": ("qwen3", LLAMA),
    "random gemma2": ("gemma2", LLAMA | {"query_pre_attn_scalar": 64}),
    "random gemma3": (
        "gemma3_text",
        LLAMA | {"query_pre_attn_scalar": 64, "num_hidden_layers": 6, "sliding_window": 16},
    ),
    "random phi3": ("phi3", PLAIN_LLAMA | PARTLY),
    "random gpt neox": ("gpt_neox", SIZES | {"intermediate_size": 512, "max_position_embeddings": 512} | PARTLY),
    "random gpt2": ("gpt2", {"vocab_size": 843, "n_embd": 256, "n_layer": 2, "n_head": 4, "n_positions": 512} | ENDS),
    "random starcoder2": ("starcoder2", PLAIN_LLAMA),
    "random qwen3 moe": ("qwen3_moe", LLAMA | EXPERTS | {"num_experts": 4, "norm_topk_prob": True}),
    "random qwen2 moe": ("qwen2_moe", LLAMA | EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 256}),
    "random olmoe": ("olmoe", LLAMA | EXPERTS | {"num_experts": 4}),
    "random mixtral": ("mixtral", LLAMA | EXPERTS | {"num_local_experts": 4}),
    "random falcon 40b": ("falcon", SIZES | {"num_kv_heads": 2, "new_decoder_architecture": True, "bias": False}),
}
SYMMETRIC, WIDE = QuantSpec(4, 32, True), QuantSpec(4, -1)
ALL = (SYMMETRIC, QuantSpec(4, 32), QuantSpec(4, 32, kind="real"), QuantSpec(8, 32, True))
MORE = (QuantSpec(2, 32), QuantSpec(3, -1), QuantSpec(5, 32, kind="real"), QuantSpec(6, 64, True))
SUPER = (
    QuantSpec(2, -1),
    QuantSpec(2, 256, kind="real"),
    QuantSpec(3, -1, True),
    WIDE,
    QuantSpec(4, -1, kind="real"),
    QuantSpec(5, 256),
    QuantSpec(6, -1, True),
)
MLX_MORE = tuple(QuantSpec(bits, 64, kind="real") for bits in (2, 3, 5, 6, 8))
CASES: dict[str, dict[str, tuple[QuantSpec, ...]]] = {
    "gguf": {
        "llama": ALL + MORE + (QuantSpec(4, 32, kind="iq4_nl"),),
        **dict.fromkeys(("mistral", "falcon", "bloom"), ALL),
        "random llama": SUPER,
        **{
            name: (SYMMETRIC, WIDE)
            for name, (kind, _) in RANDOM.items()
            if kind in GGUF_MODELS and name != "random llama"
        },
    },
    "mlx": {
        "llama": ALL + MLX_MORE,
        "mistral": ALL,
        **{name: (SYMMETRIC, WIDE) for name, (kind, _) in RANDOM.items() if kind in MLX_MODELS},
    },
}


@dataclass(frozen=True)
class Job:
    """A file (of MLX: a directory), and the weights that its codes stand for, by name."""

    family: str
    spec: QuantSpec
    model: LazyModel
    weights: Mapping[str, torch.Tensor]
    file: Path

    @property
    def types(self) -> str:
        """Of the blocks of its linears in GGUF."""
        found = {type_for(self.spec, n_in) for _, n_in in self.model.linear_shapes().values()}
        return ", ".join(sorted(one.type.name for one in found if one is not None))


def prepare(kind: str, family: str, spec: QuantSpec, base: Path) -> Job:
    """A model rounded to nearest, in a format."""
    model, whole, tokenizer = opened(family, base)
    weights = dict(whole)

    def replaced(index: int) -> Mapping[str, QuantizedWeight]:
        prefix = f"{model.family.blocks}.{index}."
        solved = {}
        for name in model.linear_shapes():
            original = whole[f"{prefix}{name}.weight"]
            grid = fit_grid(original, spec)
            solved[f"{name}.weight"] = QuantizedWeight(grid.quantize(original), grid, spec)
            weights[f"{prefix}{name}.weight"] = solved[f"{name}.weight"].dequantize()
        return solved

    content = Content(spec, model.linear_shapes(), model_type=model.config.model_type)
    form = form_of(
        model,
        kind,
        content,
        layers_of(model, len(model.blocks), content),
        lambda: entries(model, replaced),
        dtype_of=model.storage_of,
        layout=model.family.layout,
        side_files=lambda directory: None,
        tokenizer=tokenizer,
        results={"method": "rtn"},
    )
    target = base / f"{kind}-{family}-{spec.described()}".replace(" ", "-")
    save_checkpoint(form.tensors(), target, form.config, form.side_files, {}, False, form.writer_in)
    return Job(family, spec, model, weights, target / FILE if kind == "gguf" else target)


@lru_cache(maxsize=1)
def opened(family: str, base: Path) -> tuple[LazyModel, Mapping[str, torch.Tensor], Any]:
    """A model, all its weights in float32, and its tokenizer."""
    path = DEMO / family if family not in RANDOM else random_model(family, base)
    model = load_model(str(path), dtype=torch.float32, cache_dir=base / "cache")
    return model, whole_weights(model, CPU), load_tokenizer(DEMO / "llama")  # all demo models have the same


def random_model(family: str, base: Path) -> Path:
    """An untrained model, made once; its norms and biases are random too."""
    path, (model_type, options) = base / family.replace(" ", "-"), RANDOM[family]
    if path.exists():
        return path
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **options), dtype=torch.float32)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(parameter + torch.randn_like(parameter) * 0.03)
    made.half().save_pretrained(path)
    return path


def prompts() -> list[list[int]]:
    """Beginnings of texts, in the tokens that all demo models share."""
    ids = load_tokenizer(DEMO / "llama")(text("test", PROMPTS * 8))["input_ids"]
    return [ids[start : start + LENGTH] for start in range(0, PROMPTS * LENGTH, LENGTH)]


@torch.inference_mode()
def ours(job: Job, ids: Sequence[int], in_bytes: bool = False) -> torch.Tensor:
    """Log-probabilities float64 [tokens, vocabulary] of the token behind each. in_bytes: inputs of the quantized linears are
    rounded to 8 bits, as llama.cpp does."""
    given, module = (torch.tensor([ids]),), job.model.module
    with ExitStack() as hooks:
        for name in job.model.linear_shapes() if in_bytes else ():
            for block in job.model.blocks:
                linear = block.get_submodule(name)
                hooks.callback(linear.register_forward_pre_hook(partial(_in_bytes, job.spec)).remove)
        logits = functional_call(module, dict(job.weights), given, {"use_cache": False}).logits[0]
    return torch.log_softmax(logits.double(), -1)


def _in_bytes(spec: QuantSpec, linear: torch.nn.Module, given: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """Blocks of inputs in 8 bits with one scale each: a float16 one beside blocks of 32, float32 beside super-blocks (ggml,
    quantize_row_q8_0 and quantize_row_q8_K)."""
    (inputs,) = given
    kind = type_for(spec, inputs.shape[-1])
    assert kind is not None
    parts = inputs.unflatten(-1, (-1, kind.columns))
    scale = parts.abs().amax(-1, keepdim=True) / 127
    codes = (parts / scale.clamp(min=1e-30)).round().clamp(-127, 127)
    return ((codes * (scale.half().float() if kind.columns == 32 else scale)).flatten(-2),)


def ask(peer: str, kind: str, jobs: Sequence[Job], texts: Sequence[Sequence[int]], base: Path) -> str:
    """Have all files answered in one process; what it said last where it failed."""
    listed = base / "jobs.json"
    rows = [[str(job.file), texts, STEPS, job.model.rows, f"{job.file}.json"] for job in jobs]
    listed.write_text(json.dumps(rows))
    command = [peer, str(PEERS[kind]), str(listed)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=base, timeout=1800)
    return ([line for line in done.stderr.splitlines() if line.strip()] or ["no answer"])[-1] if done.returncode else ""


def compare(kind: str, job: Job, texts: Sequence[Sequence[int]], failure: str) -> dict[str, str]:
    """A row: divergence, tokens that are ours before the first that is not, verdict."""
    row = {
        "format": kind,
        "model": job.family,
        "grid": job.spec.described(),
        "blocks": job.types if kind == "gguf" else "-",
    }
    answer = Path(f"{job.file}.json")
    if not answer.exists():
        return row | {"KL": "-", "KL, inputs of 8 bits": "-", "same tokens": "-", "": (failure or "no answer")[:160]}
    divergences, in_bytes, same = [], [], 0
    for prompt, one in zip(texts, json.loads(answer.read_text()), strict=True):
        theirs, tokens = torch.tensor(one["logprobs"], dtype=torch.float64).log_softmax(-1), one["tokens"]
        right = ours(job, [*prompt, *tokens])[len(prompt) - 1 : -1]
        divergences += (right.exp() * (right - theirs)).sum(-1).tolist()
        if kind == "gguf":
            rounded = ours(job, [*prompt, *tokens], in_bytes=True)[len(prompt) - 1 : -1]
            in_bytes += (rounded.exp() * (rounded - theirs)).sum(-1).tolist()
        own = right.argmax(-1).tolist()
        same += next((i for i, pair in enumerate(zip(own, tokens, strict=True)) if pair[0] != pair[1]), len(tokens))
    mean = math.fsum(divergences) / len(divergences)
    bytewise = math.fsum(in_bytes) / len(in_bytes) if in_bytes else mean
    bound = BOUND if job.spec.bits > LOW_BITS else LOW_BOUND
    said = "same" if bytewise < bound else "DIFFERENT"
    figures = {"KL": f"{mean:.1e}", "KL, inputs of 8 bits": f"{bytewise:.1e}" if in_bytes else "-"}
    return row | figures | {"same tokens": f"{same} of {len(divergences)}", "": said}


def records(peers: Mapping[str, str], families: Sequence[str], base: Path, said: list[str]) -> Iterator[dict[str, str]]:
    """All rows, a model in one process of the peer."""
    texts = prompts()
    for kind, peer in peers.items():
        for family, grids in ((name, grids) for name, grids in CASES[kind].items() if name in families):
            jobs = [prepare(kind, family, spec, base) for spec in grids]
            failure = ask(peer, kind, jobs, texts, base)
            for job in jobs:
                row = compare(kind, job, texts, failure)
                said.append(row[""])
                yield row


def version_of(peer: str, package: str) -> str:
    """A package of another environment, with its version."""
    code = f"from importlib.metadata import version; print(version({package!r}))"
    done = subprocess.run([peer, "-c", code], check=True, capture_output=True, text=True)
    return f"{package} {done.stdout.strip()}"


def main() -> None:
    """One table; exit code 1 where a file does not load or means something else."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-cpp", help="Python of an environment with xllamacpp (default: no rows of GGUF)")
    parser.add_argument("--mlx", help="Python of an environment with mlx-lm (default: no rows of MLX)")
    parser.add_argument("--models", default=",".join(CASES["gguf"]), help="of the table (default: all)")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    given = {"gguf": args.llama_cpp, "mlx": args.mlx}
    peers = {kind: str(Path(peer).absolute()) for kind, peer in given.items() if peer}
    versions = [version_of(peer, {"gguf": "xllamacpp", "mlx": "mlx-lm"}[kind]) for kind, peer in peers.items()]
    tolerance = f"{BOUND:g}, of {LOW_BITS} bits and fewer {LOW_BOUND:g}"
    bounds = (
        f"{PROMPTS} texts of {LENGTH} tokens, {STEPS} tokens each; same: KL below {tolerance}. {', '.join(versions)}."
    )
    said: list[str] = []
    with tempfile.TemporaryDirectory() as directory:
        head = ["# Our files in their runtimes", "", about(__doc__), "", bounds, ""]
        report(head, records(peers, args.models.split(","), Path(directory), said), args.out)
    sys.exit(any(word != "same" for word in said))


if __name__ == "__main__":
    main()
