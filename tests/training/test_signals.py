"""Signals during an evaluation, which may take minutes: schedulers kill after 30 seconds."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from subspan.training import evaluation
from subspan.training.config.settings import EvaluationConfig, PretrainConfig
from subspan.training.pretraining import Pretraining
from subspan.training.signals import RunInterruptedError

Make = Callable[..., PretrainConfig]


def weights(run: Pretraining) -> list[torch.Tensor]:
    return [p.detach().clone() for p in run.model.parameters()]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(p, q) for p, q in zip(first, second, strict=True))


@pytest.mark.parametrize("when", ["periodic", "last", "test"])
def test_a_signal_during_an_evaluation(
    when: str, small: Make, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run stops after the batch that is under way, saved, and its continuation ends with the same weights."""
    settings: dict[str, Any] = {
        "optimizer": "sara_adamw",
        "evaluation": EvaluationConfig(every=6, tokens=4096),
        "micro_batch_size": 1,
    }
    held = tmp_path / "held.jsonl"
    held.write_text(corpus.read_text(encoding="utf-8").replace("fox", "cat"), encoding="utf-8")
    settings["test_data"] = str(held)
    whole = Pretraining(small(**settings, out=str(tmp_path / "whole")))
    expected = whole.run()
    asked = {"periodic": 1, "last": 2, "test": 3}[when]
    real, calls, batches = evaluation.token_losses, [], []

    def evaluate(*given: Any, **more: Any) -> float:
        calls.append(len(batches))
        return evaluation.evaluate(*given, **more)

    def losses(*given: Any) -> torch.Tensor:
        batches.append(1)
        if len(calls) == asked and len(batches) == calls[-1] + 2:  # in its second batch
            signal.raise_signal(signal.SIGTERM)
        return real(*given)

    monkeypatch.setattr("subspan.training.pretraining.evaluate", evaluate)
    monkeypatch.setattr(evaluation, "token_losses", losses)
    run = Pretraining(small(**settings))
    step = 6 if when == "periodic" else 12
    with pytest.raises(RunInterruptedError, match=rf"SIGTERM: saved at step {step}; to continue: .*--resume auto"):
        run.run()
    assert len(batches) == calls[-1] + 2
    assert run.model.training
    assert (tmp_path / "run" / "checkpoints" / f"step-{step:06}").exists()
    again = Pretraining(small(**settings, resume="auto"))
    found = again.run()
    assert same(weights(again), weights(whole))
    assert expected.test_loss is not None
    assert (found.val_loss, found.test_loss) == (expected.val_loss, expected.test_loss)
