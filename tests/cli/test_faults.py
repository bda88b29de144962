"""Whose error it is: the user's is one line and status 2; every other one is the program's, with its traceback."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest

from subspan.cli import main
from subspan.cli.parser import Parser
from subspan.theory import EXPERIMENTS
from subspan.utils.errors import SettingError, user_error

STUDY = str(Path(__file__).parents[2] / "studies" / "length_nano.yaml")
WORK = {
    "pretrain": "subspan.training.pretraining.Pretraining.__init__",
    "finetune": "subspan.training.finetuning.Finetuning.__init__",
    "plan --model=llama-nano": "subspan.planning.plan.plan",
    "plan --model=llama-nano --compare": "subspan.planning.compare.compare",
    "bench memory": "subspan.bench.memory.measure",
    f"study table {STUDY}": "subspan.study.table.compare",
    f"study run {STUDY}": "subspan.study.runner.Runner.run",
    "report studies": "subspan.study.report.gather",
    "inspect runs": "subspan.study.inspect.inspect",
    "list": "subspan.recipes.list_optimizers",
    "theory momentum": f"{EXPERIMENTS['momentum'].__module__}.{EXPERIMENTS['momentum'].__name__}.run",
}
"""A function that each command calls, by the command."""


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SUBSPAN_DEBUG", "")
    (tmp_path / "studies").mkdir()
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))


def breaks(kind: type[Exception]) -> Any:
    """A function that does nothing but raise."""

    def raises(*args: object, **settings: object) -> NoReturn:
        if kind is ValueError:
            list(zip([1], [], strict=True))
        raise kind("it went wrong")

    return raises


@pytest.mark.parametrize("kind", [ValueError, OSError])
@pytest.mark.parametrize("command", WORK, ids=lambda command: command.replace(STUDY, "STUDY"))
def test_a_fault_of_the_program(
    command: str, kind: type[Exception], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Status 1, and one line that names the file in which the traceback is kept."""
    monkeypatch.setattr(WORK[command], breaks(kind))
    assert main(command.split()) == 1
    said = capsys.readouterr().err
    found = re.fullmatch(
        rf"subspan: error: {kind.__name__}: .*; the traceback is in (.*\.txt), and --debug shows it\n", said
    )
    assert found, said
    assert "in raises" in Path(found[1]).read_text()


INSIDE = {
    "subspan.planning.model.positions_of": "plan --model=config.json",
    "subspan.planning.passes.Passes._batch": "plan --model=llama-nano",
    "subspan.costs.live_bytes.LiveBytes._add": "plan --model=llama-nano",
    "subspan.study.study_file.resolve_run": f"study table {STUDY}",
    "subspan.study.study_file.check_given": f"study table {STUDY}",
    "subspan.training.pretraining.resolve": "pretrain --steps=1",
    "subspan.training.pretraining.build_model": "pretrain --steps=1",
    "subspan.training.data.token_cache._chunks": "pretrain --steps=1",
    "subspan.training.finetuning.load_tokenizer": "finetune --model=llama-nano --steps=1",
    "subspan.training.monitor.metrics.write_text": "pretrain --steps=1",
}
"""Functions deep inside, where errors of the user are told from others, by the command that calls them."""


@pytest.mark.parametrize("kind", [ValueError, TypeError, OSError])
@pytest.mark.parametrize(("place", "command"), INSIDE.items())
def test_a_fault_deep_inside(
    place: str,
    command: str,
    kind: type[Exception],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is neither shown as a wrong setting, nor as a disk that is full."""
    Path("config.json").write_text('{"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 64}')
    monkeypatch.setenv("SUBSPAN_CACHE", "cache")
    monkeypatch.setattr(place, breaks(kind))
    assert main(command.split()) == 1
    said = capsys.readouterr().err
    assert f"subspan: error: {kind.__name__}: " in said
    assert "make room" not in said
    assert "in raises" in next(Path("temporary").glob("subspan-error-*.txt")).read_text()


@pytest.mark.parametrize("command", WORK, ids=lambda command: command.replace(STUDY, "STUDY"))
def test_an_error_of_the_user(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(WORK[command], breaks(SettingError))
    with pytest.raises(SystemExit) as exit:
        main(command.split())
    assert exit.value.code == 2
    assert capsys.readouterr().err == "subspan: error: it went wrong\n"


@dataclass(frozen=True)
class Section:
    """Settings that are checked as they are made."""

    size: int = 1

    def __post_init__(self) -> None:
        if self.size == 0:
            list(zip([1], [], strict=True))
        if self.size < 0:
            raise SettingError(f"size={self.size}: expected a whole number >= 1")


@dataclass(frozen=True)
class Settings:
    """A section, and one that may be left out: jsonargparse wraps what the second one raises."""

    section: Section = Section()
    other: Section | None = None


@pytest.mark.parametrize("name", ["section", "other"])
def test_settings_that_check_themselves(name: str) -> None:
    parser = Parser()
    parser.add_class_arguments(Settings)
    given = parser.parse_args([f"--{name}.size=-1"])
    with pytest.raises(SettingError, match=r"\Asize=-1: expected a whole number >= 1\Z"):
        parser.instantiate(given)
    with pytest.raises(ValueError, match="zip") as fault:
        parser.instantiate(parser.parse_args([f"--{name}.size=0"]))
    assert user_error(fault.value) is None


@pytest.mark.parametrize(
    "text", ["lr: !!float x", "steps: !!int x", "lr: !!timestamp x", f"steps: {'9' * 5000}", "lr: 1: 2", "[1]"]
)
@pytest.mark.parametrize("flag", ["--config", "--optim"])
def test_a_file_of_settings_that_is_none(flag: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A failure of PyYAML is an error of the user, whatever its class."""
    Path("settings.yaml").write_text(text)
    with pytest.raises(SystemExit) as exit:
        main(["pretrain", f"{flag}=settings.yaml"])
    assert exit.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("subspan: error: ")
    assert said.count("\n") == 1


@pytest.mark.parametrize("name", ["picture.foo", "picture"])
def test_a_picture_of_no_known_format(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Refused before anything is computed."""
    with pytest.raises(SystemExit) as exit:
        main(["plan", "--model=llama-nano", "--compare", f"--out={name}"])
    assert exit.value.code == 2
    assert f"out='{name}': no picture has this ending; expected one of ." in capsys.readouterr().err
