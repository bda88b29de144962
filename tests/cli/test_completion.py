"""Completion: the script that is printed completes, in a real shell."""

import subprocess
import sys
from pathlib import Path

import pytest

from subspan.cli import main
from subspan.cli.main import COMMANDS

TRY = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}
_shtab_subspan subspan "${!#}" "${COMP_WORDS[$COMP_CWORD-1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def bash(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The script, as a file."""
    path = tmp_path_factory.mktemp("completion") / "subspan.bash"
    with path.open("w") as file, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", file)
        assert main(["--print-completion", "bash"]) == 0
    return path


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["pre"], {"pretrain"}),
        ([""], set(COMMANDS)),
        (["bench", "re"], {"refresh"}),
        (["pretrain", "--optimizer", "sara_adamw"], {"sara_adamw", "sara_adamw_8bit"}),
        (["plan", "--model", "llama-6"], {"llama-60m"}),
        (["pretrain", "--device", "c"], {"cpu", "cuda"}),
        (["pretrain", "--update_p"], {"--update_proj_gap"}),
        (["finetune", "--evaluation.p"], {"--evaluation.patience"}),
        (["finetune", "--config", "./settings"], {"./settings.yaml"}),
        (["study", "run", "settings"], {"settings.yaml"}),
        (["inspect", "run"], {"runs"}),
    ],
)
def test_bash(words: list[str], expected: set[str], bash: Path, tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").touch()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runner.txt").touch()
    command = ["bash", "-c", TRY, "bash", str(bash), "subspan", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert set(done.stdout.split()) == expected, done.stderr


def test_zsh(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--print-completion=zsh"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("#compdef subspan\n")
    assert all(f"_shtab_subspan_{name}_options" in out for name in ("pretrain", "finetune", "plan"))


@pytest.mark.parametrize(
    "arguments", [["--print-completion", "fish"], ["--print-completion"], ["--print_completion=fish"]]
)
def test_another_shell(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    assert "expected bash, zsh, tcsh" in capsys.readouterr().err


def test_without_shtab(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(SystemExit) as exit:
        main(["--print-completion", "bash"])
    assert exit.value.code == 2
    assert "pip install 'subspan[train]'" in capsys.readouterr().err
