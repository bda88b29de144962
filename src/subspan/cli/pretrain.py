"""``subspan pretrain``: pretrain a model, in one process or as one of those that torchrun has started."""

from collections.abc import Callable
from typing import Any

from subspan.cli.parser import Namespace
from subspan.cli.train_command import run_parser, run_training
from subspan.training.config.settings import PretrainConfig

_ABOUT = "Pretrain a language model."
_EXAMPLES = (
    "subspan pretrain --model llama-nano --optimizer sara_adamw --steps 300 --out runs/first",
    "subspan pretrain --model llama-nano --optimizer sara_adamw --steps 300 --out runs/first --resume auto",
)


def add_to(commands: Any, name: str, about: str) -> None:
    commands.add_subcommand(name, run_parser(PretrainConfig, _ABOUT, _EXAMPLES), help=about)


def run(settings: Namespace) -> int:
    return run_training("pretrain", PretrainConfig, _ABOUT, settings, _load)


def _load() -> Callable[..., Any]:
    from subspan.training.pretraining import Pretraining

    return Pretraining
