"""Train the small demo models: five families and a mixture of experts on the demo world, or the same on a text of your own.

    python -m scripts.train_demo_models --family all                       # what models/demo/ holds
    python -m scripts.train_demo_models --family llama --text wiki.txt --vocab-size 8192 --hidden 256 --out my-llama

Large language models have a few channels whose activations are far larger than the rest; small ones do not.
`plant_outliers` gives them such channels without changing the function: a norm's gain on some channels is
multiplied by k and the columns of the linears that read it are divided by k. Round-to-nearest, which gives a
column the same step as its neighbours whatever it carries, then suffers as it does at scale.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from data import demo
from models import family_of

FAMILIES = ("opt", "bloom", "falcon", "llama", "mistral")
MIXTURE, MIXTURE_TYPE = "mixture", "qwen3_moe"  # a mixture of experts: its name here, and its model type
SEQLEN, BATCH = 256, 4
LEARNING_RATE, WARMUP, WEIGHT_DECAY, INITIAL_SPREAD = 3e-3, 100, 0.02, 0.08
OUT = Path(__file__).parents[1] / "models" / "demo"


def configuration(family: str, vocabulary: int, hidden: int, layers: int) -> Any:
    """A small member of the family with the features that matter: GQA, sliding window, multi-query, ALiBi."""
    common = {"vocab_size": vocabulary, "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": 4}
    common |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "tie_word_embeddings": True}
    common |= {"init_std" if family == "opt" else "initializer_range": INITIAL_SPREAD}
    gated = common | {"intermediate_size": 3 * hidden, "max_position_embeddings": 512, "num_key_value_heads": 2}
    options = {
        "opt": common
        | {"ffn_dim": 4 * hidden, "word_embed_proj_dim": hidden, "max_position_embeddings": 512, "dropout": 0.0},
        "bloom": {k: v for k, v in common.items() if k[:3] != "num"} | {"n_layer": layers, "n_head": 4},
        "falcon": common | {"multi_query": True, "parallel_attn": True, "bias": False, "max_position_embeddings": 512},
        "llama": gated,
        "mistral": gated | {"sliding_window": 128},
        MIXTURE: gated
        | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 3 * hidden // 2, "norm_topk_prob": True,
           "head_dim": hidden // 4, "router_aux_loss_coef": 0.01},
    }  # fmt: skip
    return AutoConfig.for_model(MIXTURE_TYPE if family == MIXTURE else family, **options[family])


def train_tokenizer(texts: Iterator[str], vocabulary: int | None) -> PreTrainedTokenizerFast:
    """BPE over words that carry their leading blank; with no size given, a token for every word."""
    special = ["<s>", "</s>", "<pad>", "<unk>"]
    if vocabulary is None:
        words = sorted({word for text in texts for word in text.split()})
        ids = {token: i for i, token in enumerate([*special, "▁", "▁\n\n", *(f"▁{word}" for word in words)])}
        tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    paragraphs = pre_tokenizers.Split("\n\n", "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([paragraphs, pre_tokenizers.Metaspace(prepend_scheme="always")])
    tokenizer.decoder = decoders.Metaspace()
    if vocabulary is not None:
        tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=special))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def demo_batches(tokenizer: Any, seed: int) -> Iterator[Tensor]:
    """Endless batches [BATCH, SEQLEN + 1] of fresh stories, separated as `demo.text` separates them."""
    stream = demo.documents("train", seed)
    pending: list[int] = []
    while True:
        while len(pending) < BATCH * (SEQLEN + 1):
            texts = [next(stream) for _ in range(20)]
            pending += tokenizer("\n\n".join(texts) + "\n\n", verbose=False).input_ids
        yield torch.tensor(pending[: BATCH * (SEQLEN + 1)]).view(BATCH, -1)
        pending = pending[BATCH * (SEQLEN + 1) :]


def text_batches(ids: Tensor, seed: int) -> Iterator[Tensor]:
    """Endless batches of random windows of one text."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(ids) - SEQLEN - 1, (BATCH,), generator=generator).tolist()
        yield torch.stack([ids[s : s + SEQLEN + 1] for s in starts])


def train(model: Any, batches: Iterator[Tensor], minutes: float) -> dict[str, Any]:
    """AdamW with a cosine over the given CPU minutes. Returns the log."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98))
    is_mixture = hasattr(model.config, "router_aux_loss_coef")
    options = {"output_router_logits": True} if is_mixture else {}
    model.train()
    started, step, curve = time.process_time(), 0, []
    while (done := (time.process_time() - started) / (60 * minutes)) < 1:
        ids = next(batches)
        rate = LEARNING_RATE * min((step + 1) / WARMUP, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        answer = model(ids[:, :-1], use_cache=False, **options)
        loss = nn.functional.cross_entropy(answer.logits.flatten(0, 1), ids[:, 1:].flatten())
        if is_mixture:  # so that every expert is used
            loss = loss + model.config.router_aux_loss_coef * answer.aux_loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            curve.append([step, round(loss.item(), 4)])
            sys.stderr.write(f"step {step} loss {loss.item():.4f} done {done:.2f}\n")
        step += 1
    model.eval()
    return {
        "steps": step,
        "tokens": step * BATCH * SEQLEN,
        "cpu_minutes": round((time.process_time() - started) / 60, 2),
        "loss": curve,
    }


@torch.no_grad()
def perplexity(model: nn.Module, ids: Tensor) -> float:
    """Windows of SEQLEN tokens without overlap; mean cross entropy of each, exp of the mean."""
    windows = ids[: len(ids) // SEQLEN * SEQLEN].view(-1, SEQLEN)
    losses = []
    for part in windows.split(16):
        logits = model(part, use_cache=False).logits[:, :-1]
        loss = nn.functional.cross_entropy(logits.transpose(1, 2), part[:, 1:], reduction="none")
        losses.append(loss.mean(1))
    return float(torch.cat(losses).mean().exp())


def unigram_perplexity(train_ids: Tensor, test_ids: Tensor, vocabulary: int) -> float:
    """Perplexity of token frequencies (add-one) counted on the training text."""
    counts = torch.bincount(train_ids, minlength=vocabulary).double() + 1
    return float((-(counts / counts.sum()).log()[test_ids]).mean().exp())


@torch.no_grad()
def plant_outliers(model: Any, scale: float, channels: int, seed: int = 0) -> None:
    """Multiply `channels` random channels of every norm's output by `scale` and divide the columns of its readers.

    The function is unchanged (exactly, in any binary floating point, if scale is a power of two and nothing
    underflows).
    """
    generator, family = torch.Generator().manual_seed(seed), family_of(model.config.model_type)
    norms = [seam for seam in family.seams(model.config) if seam.kind == "norm"]
    for block in model.get_submodule(family.blocks):
        for seam in norms:
            norm = block.get_submodule(seam.producer)
            chosen = torch.randperm(norm.weight.numel(), generator=generator)[:channels]
            for parameter in norm.parameters():
                parameter[chosen] *= scale
            for name in seam.consumers:
                block.get_submodule(name).weight[:, chosen] /= scale


def make(family: str, args: argparse.Namespace) -> None:
    """Train one family and save it with tokenizer and log."""
    out = args.out / family if args.text is None else args.out
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    if args.text is None:
        texts = (next(stream) for stream in [demo.documents("train", args.seed)] for _ in range(20000))
        corpora = {split: demo.text(split) for split in ("train", "validation", "test")}
    else:
        whole = args.text.read_text(encoding="utf-8")
        cut = int(len(whole) * 0.95)
        corpora = {"train": whole[:cut], "validation": whole[cut:]}
        texts = iter(corpora["train"].splitlines())
    tokenizer = train_tokenizer(texts, args.vocab_size)
    ids = {split: torch.tensor(tokenizer(text, verbose=False).input_ids) for split, text in corpora.items()}
    model = AutoModelForCausalLM.from_config(configuration(family, len(tokenizer), args.hidden, args.layers))
    for name, parameter in model.named_parameters():
        if "embed_positions" in name:  # learned positions (OPT) start small, or they drown the words for long
            parameter.data.mul_(0.1)
    batches = demo_batches(tokenizer, args.seed) if args.text is None else text_batches(ids["train"], args.seed)
    log = {"family": family, "seed": args.seed, "threads": torch.get_num_threads()}
    log |= train(model, batches, args.minutes)
    log["perplexity before planting"] = perplexity(model, ids["validation"])
    channels = 0 if family == MIXTURE else args.outlier_channels
    if channels:
        plant_outliers(model, args.outlier_scale, channels, args.seed)
    model = model.half()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    log["parameters"] = sum(p.numel() for p in model.parameters())
    log["outliers"] = {"scale": args.outlier_scale, "channels": channels}
    for split in ("validation", "test"):
        if split in ids:
            log[f"{split} perplexity"] = perplexity(model, ids[split])
            log[f"{split} unigram perplexity"] = unigram_perplexity(ids["train"], ids[split], len(tokenizer))
    log["versions"] = {name: version(name) for name in ("torch", "transformers", "tokenizers")}
    (out / "training_log.json").write_text(json.dumps(log, indent=1) + "\n")
    sys.stderr.write(f"{out}: validation perplexity {log['validation perplexity']:.3f}\n")


def main() -> None:
    """Parse and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="all", choices=("all", *FAMILIES, MIXTURE))
    parser.add_argument("--out", type=Path, default=OUT, help="a folder for each family is made below it")
    parser.add_argument("--minutes", type=float, default=11.5, help="CPU minutes of training (process time)")
    parser.add_argument("--threads", type=int, default=1, help="CPU minutes are the sum over threads")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab-size", type=int, help="BPE tokens (default: a token for every word)")
    parser.add_argument("--text", type=Path, help="train on this text instead of the demo world; saves into --out")
    parser.add_argument("--outlier-scale", type=float, default=8.0, help="power of two; see plant_outliers")
    parser.add_argument("--outlier-channels", type=int, default=32, help="of every norm, not of a mixture's; 0: none")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for family in (*FAMILIES, MIXTURE) if args.family == "all" else (args.family,):
        make(family, args)


if __name__ == "__main__":
    main()
