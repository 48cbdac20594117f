"""Presets: names for sets of flags, decided by measurement (docs/which-method.md), so that nobody has to know the flags.

A flag that is given by itself stays as it was given. ``best`` also adds text that the model writes itself, where it fits in
memory (`quant.run.choice.with_own_text`).
"""

from __future__ import annotations

import argparse
from typing import Any

from quant.core.names import AUTO_SCOPE, SUPER_GRIDS

FAST: dict[str, Any] = {"range": "mse", "search_grid": True, "refit_grid": True}
BALANCED: dict[str, Any] = FAST | {"true_sequential": True, "target_correction": 1.0, "residual_correction": True}
BEST: dict[str, Any] = BALANCED | {"tune": AUTO_SCOPE, "tune_norms": True}
PRESETS = {"fast": FAST, "balanced": BALANCED, "best": BEST}


def apply_grid(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Set the bits and groups that a grid of super-blocks has, where the flags have their defaults still."""
    if kind := SUPER_GRIDS.get(args.grid):
        for name, value in (("wbits", kind.bits), ("groupsize", kind.part)):
            if getattr(args, name) == parser.get_default(name):
                setattr(args, name, value)


def apply_preset(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Set what the preset of ``args`` says, where the flag has its default still."""
    for name, value in PRESETS.get(args.preset or "", {}).items():
        if getattr(args, name) == parser.get_default(name):
            setattr(args, name, value)
