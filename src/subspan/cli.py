"""The command line: ``subspan pretrain``, ``bench`` and ``list``. Settings come from YAML files and flags, by jsonargparse."""

import difflib
import json
import logging
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

try:
    import jsonargparse
    from jsonargparse import ArgumentParser
except ImportError as error:  # the library was installed without the harness
    raise SystemExit(f"subspan: error: {error}; the command line comes with an extra: pip install 'subspan[train]'") from error

from subspan import __version__
from subspan.bench.setting import Setting
from subspan.memory import VARIABLES
from subspan.recipes import describe, list_optimizers
from subspan.training.config import PretrainConfig
from subspan.training.errors import InputError
from subspan.training.signals import RunInterruptedError, interrupt_ends_process

if TYPE_CHECKING:
    from subspan.training.parallel import Ranks

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)


class _Parser(ArgumentParser):
    """Says which names are near an unknown one, and exits with 2."""

    known: ClassVar[list[str]] = []

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        wrong = re.search(r'Parser key "([^"]+)":(.*?)(?:Given value|Got value): (.*)', " ".join(message.split()))
        if wrong:
            kinds = re.findall(r"<class '(\w+)'>|Literal\[(.*?)\]", wrong[2])
            allowed = dict.fromkeys("null" if kind == "NoneType" else kind or choices for kind, choices in kinds)
            _fail(f"{wrong[1]}={wrong[3]}: expected {' or '.join(allowed)}; see subspan pretrain --help")
        # The last part of a name counts too: --warmup_steps for --schedule.warmup_steps.
        known = {name: name for name in self.known} | {name.rpartition(".")[2]: name for name in self.known}
        words = re.findall(r"--([\w.-]+)", message) or re.findall(r"'([\w.-]+)'", message)
        near = {
            known[hit]
            for word in (word.replace("-", "_") for word in words)
            if word not in self.known or "unrecognized" in message
            for hit in difflib.get_close_matches(word, known, n=2, cutoff=0.75)
        }
        hint = f" (did you mean {' or '.join(sorted(near))}?)" if near else ""
        _fail(message + hint)


def _fail(message: str) -> NoReturn:
    if os.environ.get("LOCAL_RANK", "0") == "0":  # of many processes that read the same settings, one says what is wrong
        _say(f"error: {' '.join(message.split())}")
    raise SystemExit(2)


def _say(message: str) -> None:
    print(f"subspan: {message}", file=sys.stderr, flush=True)


def _parser() -> tuple[ArgumentParser, ArgumentParser]:
    pretrain = _Parser(description="Pretrain a language model.", allow_abbrev=False)
    pretrain.add_argument("--config", action="config", help="a YAML file of settings; later flags override it")
    pretrain.add_argument("--json", action="store_true", help="print one line of JSON last")
    pretrain.add_class_arguments(PretrainConfig)
    listing = _Parser(description="List what is known by name.")
    listing.add_argument("--json", action="store_true", help="print JSON: of optimizers, parts, paper and state formula")
    listing.add_argument("what", nargs="?", choices=["optimizers", "models"], default="optimizers", help="optimizers or models")
    parser = _Parser(prog="subspan", description="Train large language models inside moving subspaces.", version=__version__)
    commands = parser.add_subcommands(required=True, dest="command")
    commands.add_subcommand("pretrain", pretrain, help="pretrain a language model")
    commands.add_subcommand("list", listing, help="list optimizers or models")
    bench = _Parser(description="Measure memory and time of training steps.")
    commands.add_subcommand("bench", bench, help="measure memory and time of training steps")
    benches = bench.add_subcommands(required=True, dest="what")
    for what, about in {
        "memory": "bytes of a step, by kind, beside closed forms",
        "train": "time of a step over fused AdamW's",
    }.items():
        measured = _Parser(description=f"Measure {about}.")
        measured.add_argument("--json", action="store_true", help="print JSON")
        measured.add_class_arguments(Setting)
        if what == "train":
            measured.add_argument("--pairs", type=int, default=15, help="pairs of steps")
        benches.add_subcommand(what, measured, help=about)
    _Parser.known = [action.dest for action in pretrain._actions] + ["pretrain", "list", "optimizers", "models"]
    return parser, pretrain


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser, pretrain = _parser()
    try:
        given = parser.parse_args(_spelled(sys.argv[1:] if argv is None else argv))
        settings = given[given.command]
        if given.command == "list":
            _list(settings.what, settings.json)
            return 0
        if given.command == "bench":
            return _bench(settings.what, settings[settings.what])
        as_json = settings.pop("json")
        settings.pop("config", None)
        for section in ("optim", "schedule", "evaluation", "checkpoint"):
            if not isinstance(settings[section], jsonargparse.Namespace):
                _fail(f"{section}={settings[section]!r}: expected settings of its own; see subspan pretrain --help")
        config = PretrainConfig(**vars(pretrain.instantiate(settings)))
    except (TypeError, ValueError) as error:  # a config file that is no text
        _fail(f"the settings cannot be read: {error}")
    return _pretrain(config, as_json)


def _bench(what: str, settings: Any) -> int:
    from subspan.bench import memory, report, train

    logging.getLogger("subspan").setLevel(logging.WARNING)
    as_json, pairs = settings.pop("json"), settings.pop("pairs", 0)
    settings.pop("config", None)
    try:
        setting = Setting(**vars(settings))
        found = memory.measure(setting) if what == "memory" else train.measure(setting, pairs)
    except ValueError as error:
        _fail(str(error))
    print(json.dumps(found) if as_json else report.text(found))
    return 0


def _spelled(argv: Sequence[str]) -> list[str]:
    """Flags as jsonargparse has them: with underscores, and ``--backward_side`` without a value is true."""
    spelled = []
    for position, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if word.startswith("--"):
            word = name.replace("-", "_").replace("_", "-", 2) + equals + value
        following = argv[position + 1] if position + 1 < len(argv) else "--"
        spelled.append(f"{word}=true" if word == "--backward_side" and following.startswith("--") else word)
    return spelled


def _list(what: str, as_json: bool) -> None:
    if what == "optimizers":
        rows = list_optimizers()
        if as_json:
            print(json.dumps([describe(name) | {"variables": VARIABLES} for name in rows], indent=1))
            return
    else:
        from subspan.training.presets import PRESETS

        if as_json:
            print(json.dumps([{"name": name} | asdict(preset) for name, preset in PRESETS.items()], indent=1))
            return
        rows = {
            name: f"hidden {p.hidden}, MLP {p.mlp}, {p.layers} layers, {p.heads} heads; tokenizer {p.tokenizer}, "
            f"sequence {p.sequence_length}, batch {p.batch_size}, {p.steps:,} steps, rank {p.rank}, period {p.update_proj_gap}"
            for name, p in PRESETS.items()
        }
    for name, line in rows.items():
        print(f"{name:{max(map(len, rows))}s}  {line}")


def _pretrain(config: PretrainConfig, as_json: bool) -> int:
    logging.getLogger("subspan").setLevel(logging.WARNING)  # the run shows the table itself
    with interrupt_ends_process():
        # Here, because it takes seconds to import: --help and mistyped flags need not wait.
        from subspan.training import parallel

        try:
            ranks = parallel.join(config.parallel, config.device)
        except InputError as error:
            _fail(str(error))
    return parallel.run_joined(ranks, lambda: _train(config, as_json, ranks))


def _train(config: PretrainConfig, as_json: bool, ranks: "Ranks") -> int:
    def end(status: int, message: str) -> int:
        if ranks.speaks():
            _say(message)
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


if __name__ == "__main__":
    raise SystemExit(main())
