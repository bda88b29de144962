"""What the README shows is run: its Python in order, its commands as far as their settings."""

import io
import re
import shlex
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch

from subspan.cli import main
from subspan.training.pretrain import Pretraining
from subspan.training.resolve import resolve

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = [
    shlex.split(line, comments=True)[1:]
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.startswith(("subspan pretrain --m", "subspan pretrain --c"))
]


def test_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks run one after another, as a reader would type them, and the number in the comment is AdamW's."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    printed = io.StringIO()
    with redirect_stdout(printed):
        for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
            exec(compile(block, "README.md", "exec"), names)
            names.setdefault("first_model", names["model"])
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
