"""Keys and values of a text so far, in the library's own caches."""

from __future__ import annotations

from typing import Any

from transformers import StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer


def fixed_cache(module: Any, cache: Any, length: int) -> StaticCache | None:
    """A copy of a model's cache in memory for ``length`` tokens, whose place is a tensor too; None where a layer keeps another
    kind, such as a window, and counts in Python."""
    fixed = StaticCache(config=module.config, max_cache_len=length)
    plain = all(type(layer) is StaticLayer for layer in fixed.layers)
    if not plain or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return None
    for i, layer in enumerate(cache.layers):
        fixed.update(layer.keys, layer.values, i)
    return fixed
