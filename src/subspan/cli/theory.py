"""``subspan theory``: claims of the papers as experiments."""

import json
import logging
from collections.abc import Mapping
from typing import Any

import torch

from subspan.cli.parser import Namespace, Parser
from subspan.theory import EXPERIMENTS
from subspan.utils.tables import aligned


def add_to(commands: Any, name: str, about: str) -> None:
    theory = Parser(
        description="Put a theoretical claim to the test.",
        examples=["subspan theory nonconvergence --n 10 --r 4 --seed 0"],
    )
    commands.add_subcommand(name, theory, help=about)
    experiments = theory.add_subcommands(required=True, dest="what", title="claims", description=None)
    for what, experiment in EXPERIMENTS.items():
        claim = " ".join((experiment.__doc__ or "").split())
        parser = Parser(description=claim, examples=[f"subspan theory {what} --json"])
        parser.add_argument("--json", action="store_true", help="Print JSON.")
        parser.add_class_arguments(experiment)
        experiments.add_subcommand(what, parser, help=claim)


def run(settings: Namespace) -> int:
    chosen = settings[settings.what]
    as_json = chosen.pop("json")
    logging.getLogger("subspan").setLevel(logging.WARNING)
    torch.set_num_threads(1)  # with matrices this small, a second thread only costs time
    found = EXPERIMENTS[settings.what](**vars(chosen)).run()
    print(json.dumps(found) if as_json else _text(found))
    return 0


def _text(found: Mapping[str, Any]) -> str:
    def cell(value: object) -> str:
        return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    rows = found["rows"]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [columns, *([cell(row.get(column)) for column in columns] for row in rows)]
    claims = [
        f"{'holds' if claim['holds'] else 'FAILS'}  {claim['claim']}: {claim['found']}" for claim in found["claims"]
    ]
    return "\n".join([found["unit"], aligned(lines, numbers=False), *claims])
