"""Presets: names for sets of flags, decided by measurement (docs/which-method.md), so that nobody has to know the flags.

A flag that is given by itself stays as it was given. ``best`` also adds text that the model writes itself, where it fits in
memory (`quant.run.choice.with_own_text`).
"""

from __future__ import annotations

import argparse
from typing import Any

from quant.core.names import AUTO_SCOPE, LEVEL_GRIDS, SUPER_GRIDS

FAST: dict[str, Any] = {"range": "mse", "search_grid": True, "refit_grid": True}
BALANCED: dict[str, Any] = FAST | {"true_sequential": True, "target_correction": 1.0, "residual_correction": True}
BEST: dict[str, Any] = BALANCED | {"tune": AUTO_SCOPE, "tune_norms": True}
PRESETS = {"fast": FAST, "balanced": BALANCED, "best": BEST}


def own_sizes(grid: str) -> tuple[int, int] | None:
    """Bits and columns that share a scale, as a kind of grid has them; None where flags decide."""
    if kind := SUPER_GRIDS.get(grid):
        return kind.bits, kind.part
    levels = LEVEL_GRIDS.get(grid)
    return (levels.bits, levels.groups[0]) if levels else None


def apply_grid(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Set the bits and groups that a grid of its own has, where the flags have their defaults still."""
    if sizes := own_sizes(args.grid):
        for name, value in zip(("wbits", "groupsize"), sizes, strict=True):
            if getattr(args, name) == parser.get_default(name):
                setattr(args, name, value)


def apply_preset(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Set what the preset of ``args`` says, where the flag has its default still."""
    for name, value in PRESETS.get(args.preset or "", {}).items():
        if getattr(args, name) == parser.get_default(name):
            setattr(args, name, value)
