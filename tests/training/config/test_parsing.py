"""A setting of the wrong type is refused in one line, which names it and says what is allowed."""

from pathlib import Path

import pytest

from subspan.cli import main

COMMAND_LINE = {
    "--optim.betas=[1]": "optim.betas=[1]: expected [float, float] or null",
    "--optim.betas=[a, b]": "optim.betas=['a', 'b']: expected [float, float] or null",
    "--optim.selector=[1]": "optim.selector=[1]: expected a mapping such as {name: value} or null",
    "--optim.transfer=x": "optim.transfer=x: expected 'keep', 'rotate', 'moments', 'reset' or null",
    "--optim=5": "optim=5: expected a mapping of settings, or a YAML file of one",
    "--optim=null": "optim=null: expected a mapping of settings, or a YAML file of one",
    "--optim={a: &x [*x]}": "optim={a: &x [*x]}: expected a mapping of settings, or a YAML file of one",
    "--seed=null": "seed=null: expected int",
    "--rank=half": "rank=half: expected int or float or null",
    "--rank=[8]": "rank=[8]: expected int or float or null",
    "--rank_pattern=8": "rank_pattern=8: expected a mapping such as {name: value} or null",
    "--rank_pattern={q: half}": "rank_pattern={'q': 'half'}: expected a mapping such as {name: value} or null",
    "--weight_decay=null": "weight_decay=null: expected float",
    "--packing=null": "packing=null: expected true or false",
}
FILES = {
    "seed: null": "seed=null: expected int; leave it out for the default",
    "schedule: {min_lr_ratio: null}": "schedule.min_lr_ratio=null: expected float; leave it out for the default",
    "checkpoint: null": "checkpoint=null: expected a mapping of settings",
    "checkpoint: [1]": "checkpoint=[1]: expected a mapping of settings",
    "optim: &x {selector: *x}": "settings hold themselves, by an alias (*) within its own anchor (&)",
    "&x [*x]": "settings hold themselves, by an alias (*) within its own anchor (&)",
}


def refused(flag: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["pretrain", flag])
    assert exit.value.code == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.startswith("subspan: error: ")
    assert said.count("\n") == 1


@pytest.mark.parametrize(("flag", "words"), COMMAND_LINE.items())
def test_a_flag(flag: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    refused(flag, f"error: {words}; see subspan pretrain --help\n", capsys)


@pytest.mark.parametrize(("text", "words"), FILES.items())
def test_a_file(text: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    refused(f"--config={path}", words, capsys)


@pytest.mark.parametrize("text", ["&x [*x]", "&x {selector: *x}", "betas: &x [*x, 1]"])
def test_a_file_of_a_group_that_holds_itself(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    refused(f"--optim={path}", f"optim={path}: expected a mapping of settings, or a YAML file of one", capsys)


@pytest.mark.parametrize("name", ["rank", "lr", "steps", "optim.betas", "clip"])
def test_a_null_that_has_a_meaning(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["pretrain", f"--{name}=null", "--print_config"])
    assert exit.value.code == 0
