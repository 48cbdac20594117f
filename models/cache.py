"""Keys and values of a text so far, in the library's own caches."""

from __future__ import annotations

from typing import Any

from transformers import StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer


def fixed_cache(module: Any, cache: Any, length: int) -> StaticCache | None:
    """A copy of a model's cache in memory for ``length`` tokens, whose place is a tensor too; None where a layer keeps another
    kind, such as a window, and counts in Python."""
    if any(type(layer) is not DynamicLayer for layer in getattr(cache, "layers", [None])):
        return None
    fixed = StaticCache(config=module.config, max_cache_len=length)
    if any(type(layer) is not StaticLayer for layer in fixed.layers):
        return None
    for i, layer in enumerate(cache.layers):
        fixed.update(layer.keys, layer.values, i)
    return fixed
