"""What the README shows is run: its Python in order, its commands as far as their settings."""

import io
import re
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from pages import ROOT, commands, python_blocks, run

from subspan.cli import main
from subspan.training.pretrain import Pretraining
from subspan.training.resolve import resolve

README = (ROOT / "README.md").read_text()
COMMANDS = [words for words in commands(README) if words[0] == "pretrain" and words[1].startswith(("--m", "--c"))]


def test_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The blocks run one after another, as a reader would type them, each with something to project; and the number in the
    comment is AdamW's."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    printed = io.StringIO()
    with redirect_stdout(printed):
        for _ in run(python_blocks(README), names, "README.md"):
            names.setdefault("first_model", names["model"])
    assert "no matrix is projected" not in caplog.text
    shown = re.search(r"```\n(Importance.*?)```", README, re.DOTALL)
    assert shown
    assert [line.split() for line in shown[1].splitlines()] == [line.split() for line in printed.getvalue().splitlines()[:5]]
    import subspan

    model: torch.nn.Module = names["first_model"]  # type: ignore[assignment]
    adamw = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    adamw.step()
    assert f"{subspan.state_bytes(adamw):,}" in README


@pytest.mark.parametrize("arguments", COMMANDS, ids=lambda arguments: " ".join(arguments[:3]))
def test_commands(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    seen = []
    monkeypatch.setattr(Pretraining, "__init__", lambda self, config, ranks: seen.append(resolve(config)))
    monkeypatch.setattr(Pretraining, "run", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(arguments) == 130
    assert seen


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 3
