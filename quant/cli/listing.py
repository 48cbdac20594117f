"""What --list prints: methods with their options, learned recipes, families, formats, data sets."""

from __future__ import annotations

from rich.text import Text

from data.corpora import CALIBRATION
from models import FAMILIES
from quant.cli.console import Console
from quant.core.names import FORMATS, TUNED_METHODS
from quant.learn import recipe_entries
from quant.solvers import entries


def show_list() -> None:
    """Print all of it."""
    console = Console(soft_wrap=True)
    console.print("methods", style="bold")
    for name, entry in entries().items():
        console.print(f"  {name:15} {entry.about}")
        if options := ", ".join(f"{k}={v}" for k, v in (entry.options or {}).items()):
            console.print(f"{'':18}{options}")
    for name, start in TUNED_METHODS.items():
        console.print(
            f"  {name:15} {start}, then offsets and ranges tuned block by block (--tune-...; docs/algorithms.md)"
        )
    console.print(Text("learned recipes", style="bold"), "(main.py --method)")
    for name, entry in recipe_entries().items():
        console.print(f"  {name:15} {entry.about}")
    files = ", or a .txt, .jsonl, .json.gz or .parquet file"
    for title, names in (
        ("families", ", ".join(t for family in FAMILIES for t in family.model_types)),
        ("formats", ", ".join(FORMATS)),
        ("data sets", ", ".join(CALIBRATION) + files),
    ):
        console.print(Text(f"{title:9}", style="bold"), names)
