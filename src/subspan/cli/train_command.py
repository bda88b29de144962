"""The part that the commands that train have in common: settings, processes, and how a run ends."""

import json
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from subspan.cli.parser import Namespace, Parser, fail, say, trace
from subspan.training.config.parsing import check_given
from subspan.training.config.settings import FinetuneConfig, PretrainConfig
from subspan.training.signals import RunInterruptedError, interrupt_ends_process
from subspan.utils.errors import UserError

if TYPE_CHECKING:
    from subspan.training.loop import Training
    from subspan.training.processes import Processes

Config = type[PretrainConfig] | type[FinetuneConfig]


def run_parser(kind: Config, about: str, examples: Sequence[str] = ()) -> Parser:
    """A parser of settings of the class ``kind``."""
    parser = Parser(description=about, examples=examples, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="A YAML file of settings. Later flags override it.")
    for action in parser._actions:
        if "--print_config" in action.option_strings:  # jsonargparse has added it
            action.help = (
                "Print all settings in the form that --config reads, and exit. With =skip_default, only those "
            )
            action.help += "that differ from their defaults."
    parser.add_argument("--json", action="store_true", help="Print the result as one line of JSON.")
    parser.add_class_arguments(kind)
    return parser


def run_training(
    command: str,
    kind: Config,
    about: str,
    settings: Namespace,
    load: Callable[[], "Callable[[Any, Processes], Training[Any]]"],
) -> int:
    """Train with ``settings``; returns the exit status.

    Args:
        load: imports the class of the run. This takes seconds, so that --help and mistyped flags need not wait.
    """
    as_json = settings.pop("json")
    settings.pop("config", None)
    try:
        check_given(kind, settings.as_dict())
    except UserError as error:
        fail(f"{error}; see subspan {command} --help")
    config = kind(**vars(run_parser(kind, about).instantiate(settings)))
    logging.getLogger("subspan").setLevel(logging.WARNING)  # the run shows the table itself
    with interrupt_ends_process():
        from subspan.training import processes as parallel

        ranks = parallel.join(config.parallel, config.device)
    return parallel.run_joined(ranks, lambda: _train(config, as_json, ranks, load))


def _train(
    config: PretrainConfig | FinetuneConfig,
    as_json: bool,
    ranks: "Processes",
    load: Callable[[], "Callable[[Any, Processes], Training[Any]]"],
) -> int:
    def end(status: int, message: str) -> int:
        if ranks.speaks():
            if status in (1, 2):
                trace()
            say(message)
        return status

    with interrupt_ends_process():
        kind = load()
        from subspan.training.loop import RunDivergedError

        try:
            run = kind(config, ranks)
        except UserError as error:
            raise SystemExit(end(2, f"error: {' '.join(str(error).split())}")) from None
    try:
        summary = run.run()
    except UserError as error:  # found late: data that breaks off, a directory taken meanwhile
        raise SystemExit(end(2, f"error: {' '.join(str(error).split())}")) from None
    except KeyboardInterrupt:  # twice, or before the first step
        return end(130, "stopped at once; what was saved before stands")
    except RunInterruptedError as error:
        return end(128 + error.signum, str(error))
    except RunDivergedError as error:
        return end(1, str(error))
    if not ranks.first:
        return 0
    print(json.dumps(summary.as_json()) if as_json else summary.words())
    return 0
