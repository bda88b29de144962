"""How the command ends: its exit status, one line without a traceback, and how to continue."""

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import subspan
from subspan._interrupt import is_program
from subspan.cli import list as listing
from subspan.cli import main
from subspan.training.loop import Training
from subspan.training.signals import RunInterruptedError

SOURCE = Path(subspan.__file__).parents[1]


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUBSPAN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SUBSPAN_DEBUG", "")  # --debug sets it, and this takes it back
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))


# --- Ctrl-C -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [["-m", "subspan"], ["subspan"]], ids=["module", "script"])
def test_while_torch_is_imported(start: list[str], tmp_path: Path) -> None:
    """It ends with one line and 130. The torch of this test stands in for the person who presses the keys."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n"
    )
    (tmp_path / "subspan").write_text(
        "import sys\nfrom subspan.cli import main\nsys.exit(main())\n"
    )  # what pip installs
    done = subprocess.run(
        [sys.executable, *start, "list"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{SOURCE}"},
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "subspan: stopped before anything was done\n")


@pytest.mark.parametrize(
    ("words", "is_it"),
    [
        ("python -m subspan list", True),
        ("python -u -m subspan.cli list", True),
        ("python /usr/bin/subspan list", True),
        ("python -m pytest subspan", False),
        ("python train.py subspan", False),
        ("python -c 'import subspan'", False),
        ("python", False),
    ],
)
def test_a_program_that_uses_the_library_is_another(words: str, is_it: bool) -> None:
    assert is_program(shlex.split(words)) is is_it


def test_in_a_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(listing, "run", lambda settings: signal.raise_signal(signal.SIGINT))
    assert main(["list"]) == 130
    assert capsys.readouterr().err == "subspan: stopped\n"


def test_a_run_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is saved, and the words of its last line, given to a shell, continue it."""
    monkeypatch.chdir(tmp_path)
    Path("my text.jsonl").write_text(
        "".join(f'{{"text": "document {i}: {"the brown fox " * 9}"}}\n' for i in range(40))
    )
    step = Training._train_step

    def interrupted(self: Training[Any]) -> Any:
        if self.step == 4:
            signal.raise_signal(signal.SIGINT)
        return step(self)

    flags = (
        "--model llama-nano --data 'my text.jsonl' --steps 8 --batch_size 2 --sequence_length 16 --rank 4 --device cpu"
    )
    with monkeypatch.context() as patch:
        patch.setattr(Training, "_train_step", interrupted)
        assert main(shlex.split(f'pretrain {flags} --out "it\'s my run"')) == 130
    said = capsys.readouterr().err.splitlines()[-1]
    command = re.fullmatch(r"subspan: SIGINT: saved at step 5; to continue: subspan (pretrain .* --resume auto)", said)
    assert command, said
    assert main(shlex.split(command[1])) == 0
    assert "continues at step 5" in capsys.readouterr().err
    assert Path("it's my run/summary.json").exists()


@pytest.mark.parametrize(
    ("ranks", "here", "program"),
    [(1, None, "subspan"), (4, "4", "torchrun --nproc-per-node 4 -m subspan"), (4, "2", "torchrun ... -m subspan")],
)
def test_the_program_that_goes_on(ranks: int, here: str | None, program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if here:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
    error = RunInterruptedError(signal.SIGTERM, 7, "a b", ranks, "finetune")
    assert str(error) == (
        f"SIGTERM: saved at step 7; to continue: {program} finetune --config 'a b/config.yaml' --out 'a b' --resume "
        "auto"
    )


# --- errors -----------------------------------------------------------------------------------------------------------


def break_down(settings: object) -> int:
    raise RuntimeError("out of luck\nand out of memory")


def test_an_error_that_nobody_expected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is one line and status 1, and the traceback is kept where the line says."""
    monkeypatch.setattr(listing, "run", break_down)
    assert main(["list"]) == 1
    said = capsys.readouterr().err
    found = re.fullmatch(
        r"subspan: error: RuntimeError: out of luck; the traceback is in (.*\.txt), and --debug shows it\n", said
    )
    assert found, said
    kept = Path(found[1])
    assert kept.parent == tmp_path / "temporary"
    assert "in break_down" in kept.read_text()
    assert "and out of memory" in kept.read_text()


@pytest.mark.parametrize("how", ["flag before", "flag after", "environment"])
def test_debug(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The traceback is shown, and not kept."""
    monkeypatch.setattr(listing, "run", break_down)
    if how == "environment":
        monkeypatch.setenv("SUBSPAN_DEBUG", "1")
    assert main(["--debug"] * (how == "flag before") + ["list"] + ["--debug"] * (how == "flag after")) == 1
    said = capsys.readouterr().err
    assert said.startswith("Traceback (most recent call last):")
    assert "in break_down" in said
    assert said.endswith("subspan: error: RuntimeError: out of luck\n")
    assert not list((tmp_path / "temporary").iterdir())


@pytest.mark.parametrize("arguments", [["pretrain", "--rank=0"], ["inspect", "nowhere"], ["pretrain", "--stpes=3"]])
def test_debug_of_wrong_settings(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The status is 2 and the line is the same with --debug and without. Only --debug shows where it comes from."""
    monkeypatch.chdir(tmp_path)
    for setting in ("0", "1"):
        monkeypatch.setenv("SUBSPAN_DEBUG", setting)
        with pytest.raises(SystemExit) as exit:
            main(arguments)
        assert exit.value.code == 2
        lines = capsys.readouterr().err.splitlines()
        assert lines[-1].startswith("subspan: error: ")
        assert (len(lines) == 1) is (setting == "0")
        assert any(line.lstrip().startswith("File ") for line in lines) is (setting == "1")
