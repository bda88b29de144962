"""A run on the CPU asks CUDA for nothing, also where there is a GPU: a context there takes memory from others."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from subspan.training.config.settings import FinetuneConfig, PretrainConfig, ProbeConfig
from subspan.training.finetuning import Finetuning
from subspan.training.pretraining import Pretraining
from subspan.training.processes import join

ASKING = ("_lazy_init", "init", "synchronize", "current_device", "set_device", "get_rng_state", "get_rng_state_all",
          "set_rng_state", "set_rng_state_all", "manual_seed", "memory_allocated", "max_memory_allocated",
          "reset_peak_memory_stats", "mem_get_info", "empty_cache", "current_stream",
          "get_device_properties")  # fmt: skip
"""Functions of ``torch.cuda`` each of which makes a context, or would fail where there is none."""


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a GPU that nobody may ask for anything."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a run on the CPU has asked for CUDA")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name in ASKING:
        monkeypatch.setattr(torch.cuda, name, refuse)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"optimizer": "galore_adamw", "probes": ProbeConfig(subspace=True, anchor=6, noise_every=5, noise_parts=2)},
        {"backward_side": True, "probes": ProbeConfig(subspace=True)},
        {"precision": "bf16-mixed", "gradient_checkpointing": True},
        {"precision": "bf16", "parallel": "ddp", "clip": None},
    ],
    ids=str,
)
def test_pretraining(settings: dict[str, object], small: Callable[..., PretrainConfig], tmp_path: Path) -> None:
    """From the first step to the last, with evaluations and checkpoints, and again from the middle."""
    Pretraining(small(**settings)).run()
    middle = str(tmp_path / "run" / "checkpoints" / "step-000008")
    Pretraining(small(**settings, resume=middle, out=str(tmp_path / "again"))).run()


def test_a_sharded_run(small: Callable[..., PretrainConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    processes = join("fsdp", "cpu")
    try:
        Pretraining(small(parallel="fsdp"), processes).run()
    finally:
        dist.destroy_process_group()


def test_fine_tuning(bert: Path, data: tuple[Path, Path], tmp_path: Path) -> None:
    config = FinetuneConfig(
        model=str(bert), task="classification", data=str(data[0]), validation_data=str(data[1]), steps=4, batch_size=8,
        max_length=24, rank=4, threads=1, device="cpu", log_every=1, out=str(tmp_path / "run"),
    )  # fmt: skip
    Finetuning(config).run()
