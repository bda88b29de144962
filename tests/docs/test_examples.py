"""The examples run as they are, with few steps: the loss falls, and the bytes they print are those of the library."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from support.processes import environment, torchrun_command

EXAMPLES = Path(__file__).parents[2] / "examples"
FILES = sorted(EXAMPLES.glob("*.py"))
ADAMW = 920_148
"""Bytes of AdamW's state for the small LLaMA of most examples: 8 for each parameter and 4 for each tensor.

It has 115,008 parameters in 21 tensors.
"""


def run(name: str, *arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What the example prints."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


def losses(printed: str) -> tuple[float, float]:
    """The losses before and after training, from the last line."""
    found = re.search(r"loss (\d\.\d+) before, (\d\.\d+) after", printed.strip().splitlines()[-1])
    assert found, printed
    return float(found[1]), float(found[2])


def state(printed: str) -> tuple[int, int]:
    """Bytes of the optimizer's state, and of AdamW's."""
    found = re.search(r"state: ([\d,]+) bytes.*AdamW would hold ([\d,]+)", printed)
    assert found, printed
    return int(found[1].replace(",", "")), int(found[2].replace(",", ""))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_form(path: Path) -> None:
    """A file has at most 60 lines, its docstring gives the command, and the list of examples names it."""
    text = path.read_text()
    assert len(text.splitlines()) <= 60
    docstring = text.split('"""')[1]
    assert re.search(rf"^    (python|torchrun .*) examples/{path.name} --steps \d+", docstring, re.MULTILINE)
    assert f"]({path.name})" in (EXAMPLES / "README.md").read_text()


def test_all_five_are_here() -> None:
    names = {"loop", "trainer", "lightning_module", "fsdp2", "backward_side"}
    assert {path.stem for path in FILES} == names


@pytest.mark.parametrize("name", ["loop.py", "trainer.py", "lightning_module.py"])
def test_the_loss_falls(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    printed = run(name, "--steps", "8", monkeypatch=monkeypatch, capsys=capsys)
    before, after = losses(printed)
    assert after < before - 0.5
    held, adamw = state(printed)
    assert adamw == ADAMW
    assert held < 0.6 * adamw


def test_the_loop_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Two calls, the second from the checkpoint of the first, end where one call does."""
    monkeypatch.chdir(tmp_path)

    def last(*arguments: str) -> str:
        return run("loop.py", *arguments, monkeypatch=monkeypatch, capsys=capsys)

    whole = last("--steps", "8", "--checkpoint", "whole.pt")
    last("--steps", "5")
    broken = last("--steps", "8")
    assert "goes on at step 5" in broken
    assert broken.splitlines()[-2:] == whole.splitlines()[-2:]


def test_backward_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It holds less of everything than AdamW; gradients and states are as large as the shapes say."""
    monkeypatch.chdir(tmp_path)
    printed = run("backward_side.py", "--steps", "6", monkeypatch=monkeypatch, capsys=capsys)
    adamw, ours = (
        [int(number.replace(",", "")) for number in re.findall(r"\d[\d,]{5,}", line)]
        for line in printed.splitlines()[1:3]
    )
    width, inner, rank, layers = 128, 384, 16, 4
    plain = 2 * 256 * width + (2 * layers + 1) * width  # embeddings, head and norms
    matrices = layers * (4 * width * width + 3 * width * inner)
    carriers = layers * (5 * width + 2 * inner) * rank  # of q, k, v, o and down; of gate and up
    assert adamw[0] == 4 * (plain + matrices)
    assert ours[0] == 4 * (plain + carriers)
    assert adamw[1] == 2 * adamw[0] + 4 * (2 + 2 * layers + 1 + 7 * layers)
    assert ours[1] < 0.25 * adamw[1]
    assert ours[2] < 0.9 * adamw[2]
    for line in printed.splitlines()[1:3]:
        before, after = losses(line)
        assert after < before - 0.3


@pytest.mark.distributed
def test_fsdp2() -> None:
    command = torchrun_command(2, str(EXAMPLES / "fsdp2.py"), "--steps", "8")
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr[-6000:]
    printed = done.stdout
    before, after = losses(printed)
    assert after < before - 0.5
    held, adamw = state(printed)
    assert adamw == ADAMW
    assert held < 0.35 * adamw
