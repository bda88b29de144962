"""The validation loss is the exact mean over tokens."""

import contextlib
import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from subspan.training.data.batches import IGNORED, Batch
from subspan.training.data.tokenizer import load_tokenizer
from subspan.training.evaluation import evaluate
from subspan.training.models.build import build_model


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return build_model("llama-nano", load_tokenizer("bytes"), 16, seed=0)


def ragged(rows: int = 7, length: int = 16) -> Batch:
    """Random tokens. Row i ignores its last i targets, so batches hold different numbers of tokens."""
    generator = torch.Generator().manual_seed(0)
    window = torch.randint(0, 257, (rows, length + 1), generator=generator)
    targets = window[:, 1:].clone()
    for i in range(rows):
        targets[i, length - i :] = IGNORED
    return Batch(window[:, :-1], targets)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 50])
def test_mean_over_tokens_whatever_the_batches(model: torch.nn.Module, batch_size: int) -> None:
    data = ragged()
    with torch.no_grad():
        logits = model(input_ids=data.inputs).logits.double()
    every = cross_entropy(logits.flatten(0, 1), data.targets.flatten(), ignore_index=IGNORED, reduction="none")
    exact = every.sum() / (data.targets != IGNORED).sum()
    assert evaluate(model, data, batch_size, contextlib.nullcontext()) == pytest.approx(exact.item(), rel=1e-6)
    # The mean of the batches' means is another number here.
    means = [cross_entropy(logits[i], data.targets[i], ignore_index=IGNORED) for i in range(len(logits))]
    assert abs(float(torch.stack(means).mean() - exact)) > 1e-4


def test_a_model_that_knows_nothing(model: torch.nn.Module) -> None:
    """Fresh weights predict nearly evenly: the loss is near ln(257)."""
    assert evaluate(model, ragged(), 4, contextlib.nullcontext()) == pytest.approx(math.log(257), abs=0.1)


def test_it_leaves_the_model_in_training(model: torch.nn.Module) -> None:
    evaluate(model, ragged(), 4, contextlib.nullcontext())
    assert model.training
    assert all(p.grad is None for p in model.parameters())
