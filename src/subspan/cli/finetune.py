"""``subspan finetune``: fine-tune a model, in one process or as one of those that torchrun has started."""

from collections.abc import Callable
from typing import Any

from subspan.cli.parser import Namespace
from subspan.cli.train_command import run_parser, run_training
from subspan.training.config.settings import FinetuneConfig

_ABOUT = "Fine-tune a model on labelled examples, or a causal language model on prompts and answers."
_EXAMPLES = (
    "subspan finetune --optimizer sara_adamw --task bundled --steps 50",
    "subspan finetune --model MODEL --task classification --data train.jsonl --validation_data val.jsonl",
)


def add_to(commands: Any, name: str, about: str) -> None:
    commands.add_subcommand(name, run_parser(FinetuneConfig, _ABOUT, _EXAMPLES), help=about)


def run(settings: Namespace) -> int:
    return run_training("finetune", FinetuneConfig, _ABOUT, settings, _load)


def _load() -> Callable[..., Any]:
    from subspan.training.finetuning import Finetuning

    return Finetuning
