"""``subspan list``: the optimizers and the models that are known by name."""

import json
from dataclasses import asdict
from typing import Any

from subspan.cli.parser import Namespace, Parser


def add_to(commands: Any, name: str, about: str) -> None:
    listing = Parser(
        description="List the optimizers or the models that are known by name.",
        examples=["subspan list", "subspan list models --json"],
    )
    listing.add_argument(
        "--json",
        action="store_true",
        help="Print JSON, which says more: the parts, the paper and the size of the state of each optimizer.",
    )
    listing.add_argument(
        "what", nargs="?", choices=["optimizers", "models"], default="optimizers", help="What to list."
    )
    commands.add_subcommand(name, listing, help=about)


def run(settings: Namespace) -> int:
    if settings.what == "optimizers":
        from subspan.recipes import list_optimizers

        rows = list_optimizers()
        if settings.json:
            from subspan.costs.describe import describe
            from subspan.costs.state_formulas import VARIABLES

            print(json.dumps([describe(name) | {"variables": VARIABLES} for name in rows], indent=1))
            return 0
    else:
        from subspan.training.models.presets import PRESETS

        if settings.json:
            print(json.dumps([{"name": name} | asdict(preset) for name, preset in PRESETS.items()], indent=1))
            return 0
        rows = {
            name: f"hidden {p.hidden}, MLP {p.mlp}, {p.layers} layers, {p.heads} heads; tokenizer {p.tokenizer}, "
            f"sequence {p.sequence_length}, batch {p.batch_size}, {p.steps:,} steps, rank {p.rank}, period "
            f"{p.update_proj_gap}"
            for name, p in PRESETS.items()
        }
    for name, line in rows.items():
        print(f"{name:{max(map(len, rows))}s}  {line}")
    return 0
