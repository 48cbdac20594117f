"""Tiny models of every family, a tiny tokenizer, and no network."""

from __future__ import annotations

import json
import os
import random
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ["LLM_QUANTIZER_MEASURE"] = "0"  # products by constants, and nothing is written to the cache of whoever tests
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined

VOCABULARY = 264
COMMON = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
LLAMA = COMMON | {"intermediate_size": 64, "max_position_embeddings": 64}
GQA = LLAMA | {"num_key_value_heads": 2, "head_dim": 8}
IDS = {"pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}  # the library's own are outside of this vocabulary
NO_PADDING = GQA | IDS
NEOX = LLAMA | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}}
HALF = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}
STABLE = LLAMA | {"num_key_value_heads": 2} | HALF
OPT = COMMON | {"ffn_dim": 64, "max_position_embeddings": 64}
CONFIGS: dict[str, tuple[str, dict]] = {
    "opt": ("opt", OPT | {"word_embed_proj_dim": 32}),
    "opt post-norm, projected": ("opt", OPT | {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "bloom": ("bloom", {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 3, "n_head": 4}),
    "falcon 7b": ("falcon", COMMON | {"multi_query": True, "parallel_attn": True, "bias": False}),
    "falcon 40b": ("falcon", COMMON | {"num_kv_heads": 2, "new_decoder_architecture": True, "bias": False}),
    "falcon 11b": (
        "falcon",
        COMMON | {"num_kv_heads": 2, "new_decoder_architecture": True, "bias": False, "num_ln_in_parallel_attn": 1},
    ),
    "falcon rw": ("falcon", COMMON | {"multi_query": False, "parallel_attn": False, "alibi": True, "bias": True}),
    "llama": ("llama", LLAMA),
    "llama gqa, tied": ("llama", GQA | {"tie_word_embeddings": True}),
    "mistral": ("mistral", GQA | {"sliding_window": 8}),
    "qwen2": ("qwen2", GQA),
    "qwen3": ("qwen3", GQA),
    "gemma2": ("gemma2", GQA | {"sliding_window": 8}),
    "gemma3": (
        "gemma3_text",
        GQA | {"head_dim": 16, "sliding_window": 8, "sliding_window_pattern": 2, "query_pre_attn_scalar": 8},
    ),
    "olmo2": ("olmo2", NO_PADDING),
    "glm4": ("glm4", NO_PADDING | HALF),
    "phi3": ("phi3", LLAMA | {"num_key_value_heads": 2, "sliding_window": 8} | IDS | HALF),
    "smollm3": ("smollm3", NO_PADDING | {"no_rope_layers": [0, 1, 0], "attention_bias": True, "mlp_bias": True}),
    "granite": (
        "granite",
        GQA
        | {"embedding_multiplier": 3.0, "residual_multiplier": 0.6, "attention_multiplier": 0.3, "logits_scaling": 0.5},
    ),
    "ministral": (
        "ministral",
        GQA | {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "ministral3": ("ministral3", NO_PADDING),
    "gpt neox": ("gpt_neox", NEOX),
    "gpt neox sequential": ("gpt_neox", NEOX | {"use_parallel_residual": False, "attention_bias": False}),
    "gpt2": ("gpt2", {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64} | IDS),
    "starcoder2": ("starcoder2", LLAMA | {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "stablelm": ("stablelm", STABLE | {"use_qkv_bias": True}),
    "stablelm parallel": ("stablelm", STABLE | {"use_parallel_residual": True, "qk_layernorm": True}),
    "cohere2": (
        "cohere2",
        NO_PADDING
        | {
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "sliding_window": 8,
            "logit_scale": 1.0,
        },
    ),
}
# transformers computes BLOOM's softmax, the norms of Gemma and Cohere, and Cohere's rotary embeddings in float32: what is
# left of an equivalence in float64
IN_FLOAT32 = {"bloom": 1e-7, "gemma2": 1e-6, "gemma3": 1e-6, "cohere2": 1e-6}
# For tests that take long: without those whose blocks compute what another's do, but for what the other tests cover
DISTINCT = [
    name
    for name in CONFIGS
    if name not in ("ministral", "ministral3", "smollm3", "granite", "starcoder2", "stablelm", "gpt neox sequential")
]
EXPERTS = LLAMA | {
    "num_key_value_heads": 4,
    "head_dim": 8,
    "num_hidden_layers": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
MIXTURES: dict[str, tuple[str, dict]] = {  # some with blocks that differ
    "mixtral": ("mixtral", EXPERTS | LOCAL | {"intermediate_size": 32}),
    "qwen2_moe": ("qwen2_moe", EXPERTS | {"shared_expert_intermediate_size": 64, "decoder_sparse_step": 2}),
    "qwen3_moe": ("qwen3_moe", EXPERTS),
    "qwen3_moe, first dense": ("qwen3_moe", EXPERTS | {"mlp_only_layers": [0], "norm_topk_prob": True}),
    "olmoe": ("olmoe", EXPERTS | {"intermediate_size": 32, "norm_topk_prob": True}),
    "deepseek_v3": (
        "deepseek_v3",
        LLAMA
        | {"num_hidden_layers": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 2,
           "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 32,
           "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4},
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that reaches for the network, or asks for the address of another machine, fails at once."""

    def check(host: object) -> None:
        if host and str(host) not in ("127.0.0.1", "::1", "localhost", "0.0.0.0", socket.gethostname()):
            raise OSError(f"tests do not use the network ({host})")

    def local_only(name: str) -> Callable:
        real = getattr(socket.socket, name)

        def call(self: socket.socket, *given: Any) -> Any:
            if self.family != socket.AF_UNIX:
                check(given[-1][0])  # the address comes last
            return real(self, *given)

        return call

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, local_only(name))
    look_up = socket.getaddrinfo

    def local_addresses(host: Any, *given: Any, **options: Any) -> Any:
        check(host)
        return look_up(host, *given, **options)

    monkeypatch.setattr(socket, "getaddrinfo", local_addresses)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def build(name: str, dtype: torch.dtype = torch.float32):
    """A random model of one of CONFIGS or MIXTURES; norms and biases are random too, so that none can be forgotten."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, options = (CONFIGS | MIXTURES)[name]
    torch.manual_seed(len(name))
    config = AutoConfig.for_model(model_type, **options)
    if name in MIXTURES:
        config._experts_implementation = "eager"  # in any dtype
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.dim() > 1 else 0.3))
    return model.to(dtype)


def save_tokenizer(path: Path) -> None:
    """A token for every byte; the last ids of the vocabulary stay unused."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)


def write_text(path: Path, words: int = 3000, seed: int = 0) -> Path:
    """Zipf-like random words."""
    rng = random.Random(seed)
    path.write_text(" ".join(f"{min(999, int(1 + rng.paretovariate(0.7))):x}" for _ in range(words)))
    return path


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory):
    """Directory of a saved tiny model with tokenizer, by name of CONFIGS or MIXTURES; built once a session."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("model") / name.replace(" ", "-").replace(",", "")
            build(name).save_pretrained(made[name])
            save_tokenizer(made[name])
        return made[name]

    return make


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file for calibration and evaluation with the tiny tokenizer."""
    return write_text(tmp_path_factory.mktemp("text") / "words.txt")


@pytest.fixture
def small(model_dir, text, tmp_path) -> list[object]:
    """Flags of a small run, as both command lines have them: each has its own for the calibration text."""
    return ["--model", model_dir("llama"), "--eval-datasets", text, "--seqlen", 32, "--nsamples", 4, "--limit", 4,
            "--run-dir", tmp_path / "run"]  # fmt: skip


LOCAL_TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}, {{metric: acc_norm, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
"""


@pytest.fixture
def local_task(tmp_path) -> Path:
    """A directory with one task over a local file."""
    generator = np.random.default_rng(0)
    words = ["Ada", "Anna", "Boris", "Ida", "Leo", "Max"]  # the demo's tokenizer tells them apart
    rows = [
        {
            "question": " ".join(generator.choice(words, 4)),
            "choices": [f" {w}" for w in generator.choice(words, 3, replace=False)],
            "label": int(generator.integers(3)),
        }
        for _ in range(20)
    ]
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "mine.yaml").write_text(LOCAL_TASK.format(name="mine", file=folder / "rows.jsonl"))
    return folder
