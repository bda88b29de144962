"""Help: it says what a command does first and shows examples last, which the command understands."""

import re
import shlex
from pathlib import Path

import pytest
from support.parsers import PARSER, PARSERS

from subspan.cli import main
from subspan.cli.main import COMMANDS

ROOT = Path(__file__).parents[2]


def help_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as exit:
        main([*arguments, "--help"])
    assert exit.value.code == 0
    return capsys.readouterr().out


def test_every_command_has_a_parser() -> None:
    assert {name for name in PARSERS if " " not in name} == set(COMMANDS)
    assert {"bench comm", "study table", "theory momentum"} <= set(PARSERS)


def test_the_list_of_commands(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """They are in groups, a line each, within 80 columns. Then follows what an exit status means."""
    monkeypatch.setenv("COLUMNS", "80")
    shown = help_of([], capsys)
    assert shown.startswith("Train large language models")
    assert "usage: subspan COMMAND" in shown
    for name, entry in COMMANDS.items():
        group = shown.partition(f"{entry.group}:\n")[2].partition("\n\n")[0]
        assert re.search(rf"^  {name} +{re.escape(entry.about)}$", group, re.MULTILINE), name
    for word in ("--debug", "--version", "--print-completion"):
        assert word in shown
    statuses = shown.partition("exit status:\n")[2].partition("\n\n")[0]
    assert [line.split("  ")[1] for line in statuses.splitlines()] == ["0", "1", "2", "130, 143", "141"]
    assert re.search(r"^  0 +done$", statuses, re.MULTILINE)
    assert max(len(line) for line in shown.partition("examples:")[0].splitlines()) <= 80


@pytest.mark.parametrize("name", PARSERS)
def test_help(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It begins with what the command does, goes on with one line on how it is called, and ends with examples."""
    monkeypatch.setenv("COLUMNS", "80")
    shown = PARSERS[name].format_help()
    about, usage, *_ = shown.split("\n\n")
    assert " ".join(about.split()) == PARSERS[name].description
    assert usage.startswith(f"usage: subspan {name} ")
    assert "\n" not in usage
    assert len(usage) <= 100
    last = shown.split("\n\n")[-1]
    assert re.match(r"examples?:\n(  subspan .*\n){1,2}\Z", last)
    assert last.startswith("examples:") == (last.count("\n") == 3)
    assert shown.count(f"{PARSERS[name].description}".rstrip(".")[:40]) <= 1 + (name in ("pretrain", "finetune"))


@pytest.mark.parametrize("name", PARSERS)
def test_examples(name: str) -> None:
    """Each of them calls this command, and is understood."""
    for example in PARSERS[name].examples:
        words = shlex.split(example)
        assert " ".join(words).startswith(f"subspan {name}")
        PARSER.parse_args(words[1:])


def test_what_must_be_given_is_in_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert "usage: subspan plan --model MODEL [options]\n" in help_of(["plan"], capsys)
    assert "usage: subspan report [options] sources [sources ...]\n" in help_of(["report"], capsys)


@pytest.mark.parametrize("name", PARSERS)
def test_types_and_defaults_are_in_plain_words(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No class of Python is shown, and booleans are spelled as in YAML."""
    monkeypatch.setenv("COLUMNS", "1000")
    shown = PARSERS[name].format_help()
    assert not re.search(r"Optional|Literal|default: (True|False)", shown)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "expected a command: plan, list, pretrain"),
        (["pretain"], "did you mean pretrain?"),
        (["bench", "refesh"], "did you mean refresh?"),
        (["pretrain", "--step", "3"], "unrecognized arguments: --step 3 (did you mean steps?)"),
        (["pretrain", "--rank=x"], "rank=x: expected int or float or null; see subspan pretrain --help"),
    ],
)
def test_mistyped(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert err.count("\n") == 1


def test_the_page_of_the_command_line() -> None:
    """It names every command and every variable that is read, and what it shows is understood."""
    page = (ROOT / "docs" / "cli.md").read_text()
    assert all(f"| `{name}` |" in page for name in COMMANDS)
    source = "".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    read = set(re.findall(r'os\.environ(?:\.get\(|\[)"(\w+)"', source))
    assert {"SUBSPAN_CACHE", "SUBSPAN_DEBUG"} <= read
    assert all(f"`{name}" in page for name in read)
    lines = [line for block in re.findall(r"```sh\n(.*?)```", page, re.DOTALL) for line in block.splitlines()]
    trained = [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("subspan pretrain")]
    assert len(trained) == 2
    for words in trained:
        PARSER.parse_args(
            [word.replace("configs", str(ROOT / "configs")) for word in words if word != "--print_config"]
        )


@pytest.mark.parametrize("name", PARSERS)
def test_what_a_setting_is(name: str) -> None:
    """Its text begins with what it is or does, and ends as a sentence does."""
    for action in PARSERS[name]._actions:
        if isinstance(action.help, str) and action.option_strings and action.dest != "help":
            assert re.match(r"(?!(Of|As|Whose|By|In|Likewise|The same)\b)[A-Z]", action.help), action.dest
            assert action.help.strip().endswith("."), action.dest
