"""``subspan pretrain``: a run, alone or one of the processes that torchrun has started."""

import json
import logging
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from subspan.cli.parsing import Namespace, Parser, fail, say
from subspan.training.config import PretrainConfig
from subspan.training.errors import InputError
from subspan.training.signals import RunInterruptedError, interrupt_ends_process

if TYPE_CHECKING:
    from subspan.training.parallel import Ranks


def add_to(commands: Any, name: str) -> None:
    commands.add_subcommand(name, _parser(), help="pretrain a language model")


def _parser() -> Parser:
    pretrain = Parser(description="Pretrain a language model.", allow_abbrev=False)
    pretrain.add_argument("--config", action="config", help="a YAML file of settings; later flags override it")
    pretrain.add_argument("--json", action="store_true", help="print one line of JSON last")
    pretrain.add_class_arguments(PretrainConfig)
    return pretrain


def run(settings: Namespace) -> int:
    as_json = settings.pop("json")
    settings.pop("config", None)
    for section in ("optim", "schedule", "evaluation", "checkpoint", "probes"):
        if not isinstance(settings[section], Namespace):
            fail(f"{section}={settings[section]!r}: expected settings of its own; see subspan pretrain --help")
    try:
        config = PretrainConfig(**vars(_parser().instantiate(settings)))
    except (TypeError, ValueError) as error:  # a config file that is no text
        fail(f"the settings cannot be read: {error}")
    logging.getLogger("subspan").setLevel(logging.WARNING)  # the run shows the table itself
    with interrupt_ends_process():
        # Here, because it takes seconds to import: --help and mistyped flags need not wait.
        from subspan.training import parallel

        try:
            ranks = parallel.join(config.parallel, config.device)
        except InputError as error:
            fail(str(error))
    return parallel.run_joined(ranks, lambda: _train(config, as_json, ranks))


def _train(config: PretrainConfig, as_json: bool, ranks: "Ranks") -> int:
    def end(status: int, message: str) -> int:
        if ranks.speaks():
            say(message)
        return status

    with interrupt_ends_process():
        from subspan.training.pretrain import Pretraining, RunDivergedError  # seconds to import too

        try:
            run = Pretraining(config, ranks)
        except (ValueError, OSError) as error:
            raise SystemExit(end(2, f"error: {' '.join(str(error).split())}")) from None
    try:
        summary = run.run()
    except InputError as error:  # found late: data that breaks off, a directory taken meanwhile
        raise SystemExit(end(2, f"error: {' '.join(str(error).split())}")) from None
    except KeyboardInterrupt:  # twice, or before the first step
        return end(130, "stopped at once; what was saved before stands")
    except RunInterruptedError as error:
        return end(128 + error.signum, str(error))
    except RunDivergedError as error:
        return end(1, str(error))
    if not ranks.first:
        return 0
    if as_json:
        print(json.dumps(asdict(summary)))
    else:
        print(f"validation loss {summary.val_loss:.4f}, perplexity {summary.val_ppl:.2f}; saved under {summary.out}")
    return 0
