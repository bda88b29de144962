"""Lightning: ``configure_optimizers``, ``LightningCLI`` with ``class_path``, and exact resume from its checkpoint."""

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.cli import LightningCLI, OptimizerCallable
from support.frameworks import PROJECTED, Text, projected
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import subspan
from subspan.integrations.lightning import create
from subspan.utils.errors import SettingError

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Lightning(lightning.LightningModule):
    def __init__(self, optimizer: OptimizerCallable | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.llama = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=128,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
            )
        )
        self.optimizer = optimizer
        self.losses: list[float] = []

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        loss = self.llama(**batch).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        if self.optimizer is not None:
            return self.optimizer(self)
        optimizer = subspan.create("sara_adamw", self, lr=1e-2, rank=4, update_proj_gap=4)
        return [optimizer], [torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=4)]


class Data(lightning.LightningDataModule):
    def train_dataloader(self) -> Any:
        return DataLoader(Text(), batch_size=8)


def test_trains(tmp_path: Path) -> None:
    model = Lightning()
    run = lightning.Trainer(max_epochs=3, gradient_clip_val=1.0, default_root_dir=tmp_path, **QUIET)
    run.fit(model, Data())
    assert model.losses[-1] < model.losses[0] - 1
    assert {name.removeprefix("llama.") for name in projected(run.optimizers[0])} == PROJECTED


def test_resume_is_exact(tmp_path: Path) -> None:
    """Two epochs, and a third from the checkpoint, end in the bits of three."""
    whole = Lightning()
    lightning.Trainer(max_epochs=3, default_root_dir=tmp_path, enable_checkpointing=False, **QUIET).fit(whole, Data())
    first = lightning.Trainer(max_epochs=2, default_root_dir=tmp_path, **QUIET)
    first.fit(Lightning(), Data())
    first.save_checkpoint(tmp_path / "two.ckpt")
    again = Lightning()
    lightning.Trainer(max_epochs=3, default_root_dir=tmp_path, **QUIET).fit(
        again, Data(), ckpt_path=str(tmp_path / "two.ckpt"), weights_only=True
    )
    assert len(again.losses) == 8
    for p, q in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


CLASS_PATHS = {
    "sara by default": ("subspan.SubspaceAdamW", {}, "Importance"),
    "a selector by name": ("subspan.SubspaceAdamW", {"selector": "dominant"}, "Dominant"),
    "a selector with settings": (
        "subspan.SubspaceAdamW",
        {"selector": '{"class_path": "subspan.selectors.Importance", "init_args": {"floor": 0.1}}', "residual": "fira"},
        "floor=0.1",
    ),
    "all the parts": (
        "subspan.SubspaceOptimizer",
        {
            "selector": '{"class_path": "subspan.selectors.Random"}',
            "rule": '{"class_path": "subspan.rules.Adafactor", "init_args": {"beta1": 0.0}}',
            "residual": '{"class_path": "subspan.residuals.Discard"}',
        },
        "Adafactor(beta1=0.0",
    ),
}


@pytest.mark.parametrize(("class_path", "settings", "shown"), CLASS_PATHS.values(), ids=CLASS_PATHS)
def test_cli(tmp_path: Path, class_path: str, settings: dict[str, str], shown: str) -> None:
    """An optimizer named by ``class_path`` gets its settings, typed, and trains."""
    arguments = [
        "--model.optimizer",
        class_path,
        "--model.optimizer.rank",
        "4",
        "--model.optimizer.update_proj_gap",
        "4",
    ]
    for key, value in settings.items():
        arguments += [f"--model.optimizer.{key}", value]
    command = LightningCLI(
        Lightning,
        Data,
        args=["fit", *arguments],
        save_config_callback=None,
        trainer_defaults={"max_epochs": 3, "default_root_dir": str(tmp_path), **QUIET},
    )
    optimizer = command.trainer.optimizers[0]
    assert shown in optimizer.summary()
    assert {name.removeprefix("llama.") for name in projected(optimizer)} == PROJECTED
    assert command.model.losses[-1] < command.model.losses[0] - 1


def test_cli_refuses_what_is_no_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        LightningCLI(
            Lightning, Data, args=["fit", "--model.optimizer", "subspan.SubspaceAdamW", "--model.optimizer.rnk", "4"]
        )
    assert "rnk" in capsys.readouterr().err


class InBackward(Lightning):
    """Chooses its optimizer by ``create``, and keeps the norms that Lightning logs."""

    def __init__(self, name: str, **settings: Any) -> None:
        super().__init__()
        self.name, self.settings = name, settings
        self.norms: list[float] = []

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.norms.append(float(lightning.pytorch.utilities.grad_norm(self, 2)["grad_2.0_norm_total"]))

    def configure_optimizers(self) -> Any:
        optimizer = create(self.name, self, lr=1e-2, rank=4, update_proj_gap=4, **self.settings)
        return [optimizer], [torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=4)]


@pytest.mark.parametrize("name", ["sara_adamw", "fira_adamw"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_step_in_backward(tmp_path: Path, name: str, accumulate: int) -> None:
    """The weights of stepping afterwards, over epochs that end with fewer micro-batches, and the norm of gradients."""
    models = []
    for in_backward in (True, False):
        models.append(InBackward(name, step_in_backward=in_backward))
        settings = {"accumulate_grad_batches": accumulate, "enable_checkpointing": False, **QUIET}
        run = lightning.Trainer(max_epochs=2, default_root_dir=tmp_path, **settings)
        run.fit(models[-1], Data())
        assert run.global_step == len(models[-1].norms) == 2 * -(-8 // accumulate)
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert models[0].norms[0] == pytest.approx(models[1].norms[0], rel=1e-4)
    if name == "fira_adamw":  # whose residual needs the whole gradient
        assert models[0].norms == pytest.approx(models[1].norms, rel=1e-3)


def test_step_in_backward_clips_and_resumes(tmp_path: Path) -> None:
    """By the norm of the step before, to ``gradient_clip_val``; two epochs and a third from a checkpoint are three."""
    settings = {"gradient_clip_val": 0.5, "accumulate_grad_batches": 3, "default_root_dir": tmp_path, **QUIET}
    whole = InBackward("sara_adamw", step_in_backward=True)
    run = lightning.Trainer(max_epochs=3, enable_checkpointing=False, **settings)
    run.fit(whole, Data())
    group = run.optimizers[0].param_groups[0]
    assert whole.norms[-1] > 0.5
    assert group["lagged_norm"] == pytest.approx(whole.norms[-1], rel=1e-3)
    first = lightning.Trainer(max_epochs=2, **settings)
    first.fit(InBackward("sara_adamw", step_in_backward=True), Data())
    first.save_checkpoint(tmp_path / "two.ckpt")
    again = InBackward("sara_adamw", step_in_backward=True)
    lightning.Trainer(max_epochs=3, **settings).fit(
        again, Data(), ckpt_path=str(tmp_path / "two.ckpt"), weights_only=True
    )
    assert len(again.norms) == 3
    for p, q in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


def test_accumulation_by_epoch(tmp_path: Path) -> None:
    """The callback that changes the number of micro-batches is asked for the largest."""
    model = InBackward("sara_adamw", step_in_backward=True)
    schedule = lightning.pytorch.callbacks.GradientAccumulationScheduler({0: 1, 1: 4})
    run = lightning.Trainer(
        max_epochs=2, callbacks=[schedule], default_root_dir=tmp_path, enable_checkpointing=False, **QUIET
    )
    run.fit(model, Data())
    assert run.global_step == 8 + 2


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("adamw", {}, "AdamW is torch's own"),
        ("sara_adamw", {"gradient_clip_val": 0.5, "gradient_clip_algorithm": "value"}, "clip.*'value'.*use 'norm'"),
    ],
)
def test_steps_that_cannot_be_taken_in_backward(tmp_path: Path, name: str, settings: Any, words: str) -> None:
    run = lightning.Trainer(max_epochs=1, default_root_dir=tmp_path, enable_checkpointing=False, **settings, **QUIET)
    with pytest.raises(SettingError, match=words):
        run.fit(InBackward(name, step_in_backward=True), Data())
