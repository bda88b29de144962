"""What the pages show is run: all Python, the tutorial's commands with fewer and smaller steps, and other commands as
far as their settings.
"""

import json
import socket
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support.pages import ROOT, commands, module_of, python_blocks, run
from support.parsers import PARSER

from subspan.cli import main

PAGES = {str(path.relative_to(ROOT / "docs")): path.read_text() for path in sorted((ROOT / "docs").rglob("*.md"))}
PAGES = {name: page for name, page in PAGES.items() if not name.startswith("_build")}  # `make docs` leaves copies there
RUN = [name for name, page in PAGES.items() if python_blocks(page) and name != "tutorial.md"]
SHOWN = {"README.md": (ROOT / "README.md").read_text(), **PAGES}
SHOWN = {name: page for name, page in SHOWN.items() if commands(page)}
SMALL = [
    *("--steps", "4", "--checkpoint.every", "2", "--batch_size", "2"),
    *("--sequence_length", "16", "--evaluation.tokens", "64", "--update_proj_gap", "2"),
]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """The globals of a page. They are a module's, so that its classes can be pickled, in a directory of its own."""
    module = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    return vars(module)


@pytest.fixture
def _ranks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What torchrun tells the only process of a group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("page", [name for name in RUN if "fsdp2" not in name])
def test_python(page: str, names: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """The blocks of a page run one after another, and a hybrid that is shown does switch."""
    assert len(list(run(python_blocks(PAGES[page]), names, page))) == PAGES[page].count("```python")
    assert "never switches" not in caplog.text


@pytest.mark.usefixtures("_ranks")
def test_fsdp2(names: dict[str, Any]) -> None:
    page = PAGES["howto/fsdp2.md"]
    assert len(list(run(python_blocks(page), names, "howto/fsdp2.md"))) == page.count("```python") == 2
    optimizer = names["optimizer"]
    assert any(type(value).__name__ == "DTensor" for state in optimizer.state.values() for value in state.values())


def test_tutorial(names: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """Each command runs, and each block finds what they left."""
    page = PAGES["tutorial.md"]
    for words in commands(page):
        assert main(words + SMALL * (words[0] == "pretrain")) == 0, words
    assert Path("report.html").stat().st_size > 10_000
    capsys.readouterr()
    list(run(python_blocks(page), names, "tutorial.md"))
    told = capsys.readouterr().out
    losses = {run: json.loads(Path("runs", run, "summary.json").read_text())["val_loss"] for run in ("adamw", "sara")}
    assert all(f"{name:6} validation loss {loss:.3f}, optimizer state" in told for name, loss in losses.items())
    assert len(commands(page)) == 4
    assert names["newest"].name == "step-000004"


@pytest.mark.parametrize("page", SHOWN)
def test_commands_are_understood(page: str) -> None:
    """Each flag is known, and each value is of its kind. Some commands only show something and end."""
    for words in commands(SHOWN[page]):
        if {"--help", "--version", "--print_config", "--print-completion"} & set(words):
            with pytest.raises(SystemExit) as ended:
                raise SystemExit(main(words))
            assert ended.value.code == 0, words
        else:
            assert PARSER.parse_args(words).command == words[0]


def test_a_how_tos_selector_keeps_the_laws(names: dict[str, Any]) -> None:
    """The selector of the page passes the tests that the table of selectors is put to."""
    contract, laws = module_of("step/test_conformance.py"), module_of("selectors/test_selectors.py")
    from support.helpers import SHAPES

    from subspan.residuals import Discard, Fira
    from subspan.rules import AdamW

    list(run(python_blocks(PAGES["howto/selector.md"])[:1], names, "selector.md"))
    for selector in (names["Explore"](), names["Explore"](0.0), names["Explore"](1.0)):
        for shape in SHAPES.values():
            laws.test_protocol(shape, selector)
        laws.test_the_result_depends_on_gradient_state_and_key_alone(selector)
        for residual in (Discard(), Fira()):
            contract.test_contract((selector, AdamW(), residual, "rotate", "float32"))
        contract.test_no_wait_and_no_trace_of_zeros((selector, AdamW(), Discard(), "rotate", "float32"))
    with pytest.raises(ValueError, match="share=2: expected a share"):
        names["Explore"](2)


def test_a_how_tos_rule_keeps_the_contract(names: dict[str, Any]) -> None:
    """The rule of the page keeps the contract with several residuals, transfers and ways of storage."""
    contract = module_of("step/test_conformance.py")

    from subspan.residuals import Discard, Fira
    from subspan.selectors import Importance

    list(run(python_blocks(PAGES["howto/rule.md"])[:1], names, "rule.md"))
    rule = names["RMSprop"]()
    for residual, transfer, storage in (
        (Discard(), "moments", "float32"),
        (Fira(), "reset", "int8"),
        (Discard(), "rotate", "int8"),
    ):
        contract.test_contract((Importance(), rule, residual, transfer, storage))
    state = rule.init(torch.zeros(6, 5), (6, 4), row_dim=-2)
    assert {name: value.nbytes for name, value in state.items()} == {"square_avg": 4 * 6 * 4}


def test_a_how_tos_residual_keeps_the_contract(names: dict[str, Any]) -> None:
    """The residual of the page keeps the contract, and a basis that is not orthonormal is refused."""
    contract = module_of("step/test_conformance.py")

    from subspan import SubspaceAdamW
    from subspan.rules import AdamW, Lion
    from subspan.selectors import Gaussian, Importance, OnlinePCA

    list(run(python_blocks(PAGES["howto/residual.md"])[:1], names, "residual.md"))
    residual = names["Descent"]()
    for selector, rule, transfer, storage in (
        (Importance(), AdamW(), "rotate", "float32"),
        (OnlinePCA(), Lion(), "keep", "float32"),
        (Importance(), AdamW(), "reset", "int8"),
    ):
        contract.test_contract((selector, rule, residual, transfer, storage))
    contract.test_no_wait_and_no_trace_of_zeros((Importance(), AdamW(), residual, "rotate", "float32"))
    with pytest.raises(ValueError, match="rate=-1: expected a number >= 0"):
        names["Descent"](-1)
    with pytest.raises(ValueError, match="needs an orthonormal basis"):
        SubspaceAdamW(torch.nn.Linear(8, 8), rank=2, selector=Gaussian(), residual=residual)
