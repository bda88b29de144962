"""What a user can mend is raised as a ``UserError``; everything else comes out as the error that it is."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM

from subspan.training.config.settings import PretrainConfig, ProbeConfig
from subspan.training.monitor import probes
from subspan.training.pretraining import Pretraining
from subspan.training.processes import Processes, run_joined
from subspan.utils.errors import InputError

Make = Callable[..., PretrainConfig]
LONG = "x" * 300


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"out": LONG}, "File name too long"),
        ({"resume": LONG}, "File name too long"),
        ({"out": "a\0b"}, "out='a\\x00b': expected a path without null characters; give another --out"),
        ({"resume": "a\0b"}, "resume='a\\x00b': expected a path without null characters; give another --resume"),
    ],
)
def test_a_path_that_cannot_be(settings: dict[str, str], words: str, small: Make) -> None:
    with pytest.raises(InputError, match=re.escape(words)):
        Pretraining(small(**settings))


def test_a_model_that_cannot_recompute(small: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "supports_gradient_checkpointing", False)
    with pytest.raises(InputError, match=r"gradient_checkpointing=True: the model 'llama-nano' \(LlamaForCausalLM\)"):
        Pretraining(small(gradient_checkpointing=True))


def test_anchors_that_cannot_be_written(small: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing unfinished stays."""

    def full(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(probes, "save_file", full)
    run = Pretraining(small(optimizer="galore_adamw", probes=ProbeConfig(subspace=True, anchor=2)))
    with pytest.raises(InputError, match=r"anchors\.safetensors cannot be written: no space is left; it needs about"):
        run.run()
    assert not list((tmp_path / "run").glob(".anchors*"))


def test_a_mistake_of_the_program_is_not_the_users(small: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever a run meets it: while it is built, in a step, while it saves."""
    for name in ("build_model", "losses", "words"):
        run_of = small(out=None)
        with monkeypatch.context() as patch:
            patch.setattr(f"subspan.training.pretraining.LanguageModelling.{name}", broken)
            with pytest.raises(ValueError, match="is shorter than") as caught:
                Pretraining(run_of).run()
            assert not isinstance(caught.value, InputError)
    run = Pretraining(small())
    run.scheduler.state_dict = broken  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="is shorter than") as caught:
        run.run()
    assert not isinstance(caught.value, InputError)


def broken(*_: object) -> Any:
    return list(zip([1, 2], [1], strict=True))


class Ended(BaseException):
    """In place of the end of the process."""


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [::1]:1"),
            "has lost another process",
        ),
        (
            RuntimeError("[gloo/transport/tcp/pair.cc:446] Read error [::1]: Connection reset by peer"),
            "has lost another",
        ),
        (RuntimeError("[gloo/.../buffer.cc:81] Timed out waiting 1800000ms for recv operation"), "has lost another"),
        (
            RuntimeError("[enforce fail at gloo/allgather.cc:26] ptrs.size() == 2"),
            "failed: RuntimeError: [enforce fail",
        ),
        (ValueError("Connection closed by hand"), "failed: ValueError: Connection closed by hand"),
    ],
)
def test_only_a_lost_process_is_called_one(
    error: Exception, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # where the traceback is kept

    def end(status: int) -> None:
        raise Ended(status)

    def body() -> int:
        raise error

    monkeypatch.setattr("subspan.training.processes._end", end)

    class Store:
        def add(self, key: str, amount: int) -> int:
            return amount

    with pytest.raises(Ended) as ended:
        run_joined(Processes("ddp", 1, 2, store=Store()), body)
    assert ended.value.args == (1,)
    assert f"subspan: error: rank 1 {words}" in capsys.readouterr().err
