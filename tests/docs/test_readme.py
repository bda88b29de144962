"""What the README shows is run: its Python in order, and its commands as far as their settings."""

import io
import json
import re
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from support.pages import ROOT, commands, python_blocks, run

from subspan.cli import main
from subspan.planning.compare import METHODS
from subspan.training.config.resolve import resolve
from subspan.training.config.resolve_finetuning import resolve_finetune
from subspan.training.finetuning import Finetuning
from subspan.training.pretraining import Pretraining

pytestmark = pytest.mark.usefixtures("one_parser")

README = (ROOT / "README.md").read_text()
COMMANDS = [words for words in commands(README) if words[0] == "pretrain" and words[1].startswith(("--m", "--c"))]
TUNING = [words for words in commands(README) if words[0] == "finetune"]
PLANS = [words for words in commands(README) if words[0] == "plan"]


def test_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The blocks run one after another, as a reader would type them. Each has something to project.

    The table below the first block is what that block prints, and the bytes of AdamW in it are those of torch's AdamW.
    """
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    printed = io.StringIO()
    with redirect_stdout(printed):
        for _ in run(python_blocks(README), names, "README.md"):
            names.setdefault("first_model", names["model"])
    assert "no matrix is projected" not in caplog.text
    shown = re.search(r"```\n(Importance.*?)```", README, re.DOTALL)
    assert shown
    assert [line.split() for line in shown[1].splitlines()] == [
        line.split() for line in printed.getvalue().splitlines()[:5]
    ]
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


@pytest.mark.parametrize("arguments", TUNING, ids=lambda arguments: " ".join(arguments[:3]))
def test_finetuning_commands(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """They run as far as their settings. A name on the hub is taken for a model with weights, and nothing is read."""
    seen = []
    monkeypatch.setattr(Finetuning, "__init__", lambda self, config, ranks: seen.append(resolve_finetune(config)))
    monkeypatch.setattr(Finetuning, "run", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(arguments) == 130
    assert seen


@pytest.mark.slow
def test_plans(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The table of the section shows what its first command says, as it stands and with the flags that a row adds."""

    def gib(size: int) -> str:
        return f"{size / 2**30:.1f}"

    one, all_of = PLANS
    monkeypatch.chdir(tmp_path)
    assert main(one) == 0
    found = json.loads(capsys.readouterr().out)
    said = re.search(r"([\d.]+) GiB \| no; the largest rank that fits is (\d+) \|", README)
    assert said
    assert (gib(found["bytes"]["total"]), str(found["largest_rank"])) == said.groups()
    assert found["fits"] is False
    changed = re.search(r"`([^`]*)` \| ([\d.]+) GiB \| yes \|", README)
    assert changed
    assert main([*one, *changed[1].split()]) == 0  # a later flag wins
    found = json.loads(capsys.readouterr().out)
    assert (found["fits"], gib(found["bytes"]["total"])) == (True, changed[2])
    assert main([*all_of, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["rows"]) == len(METHODS)


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 3
    assert len(TUNING) >= 2
    assert len(PLANS) == 2


def tree(page: str) -> list[str]:
    """Paths that the tree of folders names: two spaces more are one folder down."""
    block = page.partition("## Where things are")[2].partition("```text\n")[2].partition("```")[0]
    above: list[str] = []
    paths = []
    for line in block.splitlines():
        found = re.fullmatch(r"( *)(\S+) {2,}\S.*|( *)(\S+/)", line)
        assert found, f"{line!r}: expected a path and, after two spaces or more, what it holds"
        indent, name = (found[1], found[2]) if found[2] else (found[3], found[4])
        above[len(indent) // 2 :] = [name]
        paths.append("".join(above))
    return paths


def test_the_tree_is_that_of_the_disk() -> None:
    """Every path is there, and no folder or root file of the library is left out, nor a folder of the repository."""
    named = tree(README)
    assert not [path for path in named if not (ROOT / path).exists()]
    assert all((ROOT / path).is_dir() == path.endswith("/") for path in named)
    library = ROOT / "src" / "subspan"
    held = [f"{path.parent.relative_to(ROOT)}/" for path in library.rglob("__init__.py")]
    held += [str(path.relative_to(ROOT)) for path in library.glob("*.py")]
    held += ["docs/", "studies/", "results/", "configs/", "examples/", "tests/"]
    assert not set(held) - set(named)
