"""Gemma 2: LLaMA's linears between pre- and post-norms, sliding-window attention in every other block."""

from __future__ import annotations

from models.family import ModelFamily
from models.llama import groups

FAMILY = ModelFamily(model_types=("gemma2",), blocks="model.layers", groups=groups)
