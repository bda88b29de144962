"""``subspan pretrain``: a run, alone or one of the processes that torchrun has started."""

from collections.abc import Callable
from typing import Any

from subspan.cli.parsing import Namespace
from subspan.cli.running import run_parser, run_training
from subspan.training.config import PretrainConfig

_ABOUT = "Pretrain a language model."


def add_to(commands: Any, name: str) -> None:
    commands.add_subcommand(name, run_parser(PretrainConfig, _ABOUT), help="pretrain a language model")


def run(settings: Namespace) -> int:
    return run_training("pretrain", PretrainConfig, _ABOUT, settings, _load)


def _load() -> Callable[..., Any]:
    from subspan.training.pretrain import Pretraining

    return Pretraining
