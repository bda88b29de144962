"""The norm of the gradient, and its clipping: with ``clip`` null nothing touches a gradient."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.processes import launch
from torch import Tensor
from training import gradient_worker

from subspan.training.config.settings import FinetuneConfig, PretrainConfig
from subspan.training.finetuning import Finetuning
from subspan.training.monitor.metrics import read_metrics
from subspan.training.pretraining import Pretraining

Run = Pretraining | Finetuning


def step_of(run: Run, spoilt: bool = False) -> tuple[dict[str, Tensor], float]:
    """The gradients with which the optimizer steps, and the norm; ``spoilt``: with an infinite entry in the first."""
    first = next(run.model.parameters())
    assert first is run.model.get_input_embeddings().weight  # type: ignore[operator]  # which no method projects

    def spoil(G: Tensor) -> Tensor:
        return G.index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(math.inf))

    if spoilt:
        first.register_hook(spoil)
    found: dict[str, Tensor] = {}

    def keep(*_: object) -> None:
        found.update({name: p.grad.clone() for name, p in run.model.named_parameters() if p.grad is not None})

    run.optimizer.register_step_pre_hook(keep)
    norm = float(run._train_step()[1])
    return found, norm


def check(make: Callable[[], Run]) -> None:
    """One infinite entry changes itself only, and makes the norm infinite."""
    gradients, norm = step_of(make())
    spoilt, infinite = step_of(make(), spoilt=True)
    assert (math.isfinite(norm), infinite) == (True, math.inf)
    assert gradients.keys() == spoilt.keys()
    first, *others = gradients
    assert all(torch.equal(gradients[name], spoilt[name]) for name in others)
    changed = gradients[first] != spoilt[first]
    assert changed.nonzero().tolist() == [[0, 0]]
    assert spoilt[first][0, 0] == math.inf


@pytest.mark.parametrize("backward_side", [False, True])
@pytest.mark.parametrize("parallel", [None, "ddp"])
def test_an_infinite_entry_stays_alone(
    parallel: str | None, backward_side: bool, small: Callable[..., PretrainConfig]
) -> None:
    check(lambda: Pretraining(small(clip=None, parallel=parallel, backward_side=backward_side, out=None)))


def test_it_does_so_in_fine_tuning(bert: Path, data: tuple[Path, Path], tmp_path: Path) -> None:
    config = FinetuneConfig(
        model=str(bert), task="classification", data=str(data[0]), validation_data=str(data[1]), steps=2, batch_size=8,
        max_length=24, rank=4, threads=1, device="cpu", clip=None, out=str(tmp_path / "run"),
    )  # fmt: skip
    check(lambda: Finetuning(config))


@pytest.mark.distributed
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_it_does_so_on_two_ranks(mode: str, corpus: Path, tmp_path: Path) -> None:
    launch(gradient_worker.main, 2, mode, str(corpus), str(tmp_path / "run"))


def test_a_norm_is_logged_without_clipping(small: Callable[..., PretrainConfig], tmp_path: Path) -> None:
    """Norms and weights are the same as with a clip that is never reached."""
    weights, norms = [], []
    for name, clip in (("none", None), ("high", 1e9)):
        run = Pretraining(small(clip=clip, out=str(tmp_path / name)))
        run.run()
        weights.append([p.detach().clone() for p in run.model.parameters()])
        norms.append([row["grad_norm"] for row in read_metrics(tmp_path / name) if "grad_norm" in row])
    assert norms[0] == norms[1]
    assert len(norms[0]) == 12
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
