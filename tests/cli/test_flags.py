"""Flags: every boolean setting is a switch, hyphens and underscores are the same, and values are left as they are."""

import typing
from collections.abc import Iterator
from typing import Any, Optional, get_args

import pytest
from jsonargparse import ArgumentParser
from support.parsers import PARSER, PARSERS

import subspan
from subspan.cli.main import make_parser
from subspan.cli.parser import Parser


def settings(parser: Parser) -> Iterator[Any]:
    """The actions of ``parser`` that read the value of a setting."""
    return (action for action in parser._actions if hasattr(action, "_typehint") and action.option_strings)


def parsed(command: str, *words: str) -> Any:
    """The settings of ``command`` that ``words`` give."""
    required = ["--model=llama-nano"] if command == "plan" else []
    found = PARSER.parse_args([*command.split(), *required, *words])
    for word in command.split():
        found = found[word]
    return found


SWITCHES = [
    (name, action.option_strings[0], action.dest)
    for name, parser in PARSERS.items()
    for action in settings(parser)
    if action._typehint is bool or bool in get_args(action._typehint)
]


def test_the_settings_that_are_switches() -> None:
    found = {f"{name} {flag}" for name, flag, _ in SWITCHES}
    assert {"pretrain --tensorboard", "finetune --optim.stagger", "plan --checkpointing"} <= found
    assert len(found) >= 16


@pytest.mark.parametrize(("command", "flag", "dest"), SWITCHES, ids=lambda value: value)
def test_a_switch(command: str, flag: str, dest: str) -> None:
    """It is true alone, last or before another flag, and takes a value in either form."""
    assert parsed(command, flag)[dest] is True
    assert parsed(command, flag, "--rank=8")[dest] is True
    for word, value in (("true", True), ("false", False)):
        assert parsed(command, flag, word)[dest] is value
        assert parsed(command, f"{flag}={word}")[dest] is value
        assert parsed(command, flag.replace("_", "-"), word)[dest] is value


@pytest.mark.parametrize("name", PARSERS)
def test_hyphens_and_underscores_are_the_same(name: str) -> None:
    """Every flag of every command is found in either spelling, with a value behind it and with one after ``=``."""
    parser = PARSERS[name]
    for option, action in parser._option_string_actions.items():
        if option.startswith("--"):
            for end in ("", "=a-b_c"):
                found = parser._parse_optional(f"--{option[2:].replace('_', '-')}{end}")
                found = found[0] if isinstance(found, list) else found  # from Python 3.12 on
                assert found[0] is action
                assert found[-1] in (end[1:] or None, "")


def test_values_are_left_as_they_are() -> None:
    assert parsed("pretrain", "--data=--my-file=a-b").data == "--my-file=a-b"
    assert parsed("pretrain", "--data", "my-file").data == "my-file"
    assert parsed("report", "a", "--title", "--a-page of-mine").title == "--a-page of-mine"
    assert parsed("report", "a-b", "--", "--my-run").sources == ["a-b", "--my-run"]
    assert parsed("pretrain", "--optim.targets=[q-proj, my_proj]").optim.targets == ["q-proj", "my_proj"]


@pytest.mark.parametrize("flag", ["--optim.min-8bit-size=7", "--optim.min_8bit-size=7", "--optim.min_8bit_size=7"])
def test_nested_settings(flag: str) -> None:
    assert parsed("pretrain", flag).optim.min_8bit_size == 7


def _met(*unions: Any) -> None:
    """Let Python meet unions whose first type is float. It answers equal ones in this order from then on."""
    for forget in typing._cleanups:  # type: ignore[attr-defined]  # it has met others before
        forget()
    for union in unions:
        assert Optional[union] is not None  # noqa: UP045  # typing keeps what it has met, X | None does not


@pytest.mark.parametrize("command", ["pretrain", "finetune", "plan", "bench memory", "bench comm"])
def test_a_whole_rank_stays_one(command: str) -> None:
    """Whatever order Python keeps a union of types in, 4 is no 4.0."""
    _met(float | int, float | int | None)
    found = make_parser().parse_args(
        [*command.split(), *(["--model=llama-nano"] if command == "plan" else []), "--rank=4"]
    )
    for word in command.split():
        found = found[word]
    assert type(found.rank) is int


@pytest.mark.parametrize("kind", [subspan.SubspaceAdamW, subspan.SubspaceOptimizer])
def test_a_whole_rank_stays_one_for_other_command_lines(kind: type) -> None:
    """So it does where Lightning's command line builds the optimizer."""
    _met(float | int, float | int | None)
    parser = ArgumentParser()
    parser.add_class_arguments(kind, "optimizer", skip={"params", "selector", "rule", "residual"})
    assert type(parser.parse_args(["--optimizer.rank", "4"]).optimizer.rank) is int
