"""``--precision fp16``: autocast and a scaled loss."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from subspan.checkpoints import directory as checkpoints
from subspan.training.config.settings import PretrainConfig
from subspan.training.precision import Precision
from subspan.training.pretraining import Pretraining
from subspan.utils.errors import InputError

Make = Callable[..., PretrainConfig]


def weights(run: Pretraining) -> list[torch.Tensor]:
    return [p.detach().clone() for p in run.model.parameters()]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(p, q) for p, q in zip(first, second, strict=True))


@pytest.mark.parametrize("backward_side", [False, True])
def test_fp16_trains_and_resumes(backward_side: bool, small: Make, tmp_path: Path) -> None:
    """Autocast and a scaled loss, with weights in fp32: nearly the losses of fp32, and an exact continuation."""
    given = {"optimizer": "sara_adamw", "backward_side": backward_side, "rank": 8}
    exact = Pretraining(small(**given, out=str(tmp_path / "fp32"))).run()
    run = Pretraining(small(**given, precision="fp16", out=str(tmp_path / "a")))
    assert run.run().val_loss == pytest.approx(exact.val_loss, rel=5e-3)
    whole = weights(run)
    assert all(p.dtype == torch.float32 for p in whole)
    step = tmp_path / "a" / "checkpoints" / "step-000008"
    assert checkpoints.load_part(step, "training")["scaler"]["scale"] == 65536.0
    again = Pretraining(small(**given, precision="fp16", out=str(tmp_path / "b"), resume=str(step)))
    again.run()
    assert same(whole, weights(again))


def test_fp16_leaves_out_a_step_with_an_infinite_gradient() -> None:
    """The weights stay, and the loss is scaled by half as much."""
    precision, model = Precision("fp16", "cpu"), torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model.weight.detach().clone()
    for largest in (None, 1.0):
        scale = precision.scaler.get_scale()
        precision.backward(model(torch.full((1, 4), 1e35)).sum())
        precision.clip_(optimizer, list(model.parameters()), largest)
        precision.stepping(optimizer)()
        optimizer.zero_grad()
        assert precision.scaler.get_scale() == scale / 2
        assert torch.equal(model.weight, before)
    precision.backward(model(torch.ones(1, 4)).sum())
    assert float(precision.clip_(optimizer, list(model.parameters()), None)) == pytest.approx(20**0.5)
    precision.stepping(optimizer)()
    assert torch.allclose(model.weight, before - 0.1)


def test_fp16_is_refused_on_shards(small: Make) -> None:
    with pytest.raises(InputError, match=r"precision='fp16': the scaler .* use --precision bf16-mixed or fp32"):
        Pretraining(small(precision="fp16", parallel="fsdp"))
