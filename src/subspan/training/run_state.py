"""A run as a checkpoint: everything that it needs to go on, written by its ranks and read back by them, or by
others.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from subspan.checkpoints import directory as checkpoints
from subspan.checkpoints.writer import new_checkpoint
from subspan.training.monitor.progress import say
from subspan.training.processes import Processes
from subspan.utils.errors import InputError


class Standing(NamedTuple):
    """Where a run stands."""

    step: int
    tokens: int
    seconds: float
    best: dict[str, Any] | None
    judged: int
    saved_bytes: int | None


class Snapshots:
    """Writes and reads the checkpoints of a run.

    Args:
        model: not as wrapped for its ranks.
        optimizer: its state comes back exact in every bit.
        kept: what else has a ``state_dict``, by the name of its entry: the batches, the schedule.
        tokenizer: saved beside the model, so that both load together.
        ranks: those that share the run; for all of them to call together.
        device: whose random numbers are kept, beside the host's.
        settings: the run's, for who continues it.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        kept: dict[str, Any],
        tokenizer: PreTrainedTokenizerBase,
        ranks: Processes,
        device: str,
        settings: dict[str, Any],
    ) -> None:
        self._model, self._optimizer, self._kept, self._tokenizer = model, optimizer, kept, tokenizer
        self._ranks, self._device, self._settings = ranks, device, settings

    def write(self, folder: Path, standing: Standing, keep: int) -> None:
        """Write a checkpoint into ``folder``, then drop all but the ``keep`` newest and the best.

        Raises:
            InputError: it cannot be written, for example for want of space. It is the same on every rank, and the
                checkpoints before it stand.
        """
        ranks = self._ranks
        rng = {"cpu": ranks.gather(torch.get_rng_state())}
        if self._device == "cuda":
            rng["cuda"] = ranks.gather(torch.cuda.get_rng_state())
        training = {
            **standing._asdict(),
            **{name: value.state_dict() for name, value in self._kept.items()},
            "rng": {kind: states[0] for kind, states in rng.items()},
            "rng_of_other_ranks": [
                {kind: states[rank] for kind, states in rng.items()} for rank in range(1, ranks.size)
            ],
            "settings": self._settings,
        }
        best = standing.best["step"] if standing.best else None
        own = {"optimizer": self._optimizer.state_dict(), "training": training}
        needed = checkpoints.tensor_bytes([self._model.state_dict(), own])
        with new_checkpoint(folder, step=standing.step, keep=keep, best=best, needed=needed) as place:
            if ranks.sharded:
                from subspan.checkpoints.sharded import save_sharded

                save_sharded(place, self._model, self._optimizer)
                if ranks.first:
                    checkpoints.save_config(place, self._model, self._tokenizer)
                    checkpoints.save_part(place, "training", training)
            elif ranks.first:
                checkpoints.save_model(place, self._model, self._tokenizer)
                for name, part in own.items():
                    checkpoints.save_part(place, name, part)

    def read(self, checkpoint: Path) -> Standing:
        """Make everything that of the checkpoint.

        Raises:
            InputError: a file is missing, damaged, or of another model or optimizer.
        """
        training = checkpoints.load_part(checkpoint, "training")
        if checkpoints.holds_shards(checkpoint):
            from subspan.checkpoints.sharded import load_sharded

            load_sharded(checkpoint, self._model, self._optimizer)
        elif self._ranks.sharded:
            raise InputError(
                f"parallel='fsdp': the checkpoint {checkpoint} holds the whole model in one file; continue it with "
                "--parallel "
                "ddp or in one process, or start anew with another --out"
            )
        else:
            optimizer = checkpoints.load_part(checkpoint, "optimizer")
            checkpoints.load_weights(checkpoint, self._model)
            self._optimizer.load_state_dict(optimizer)
        for name, value in self._kept.items():
            value.load_state_dict(training[name])
        states = [training["rng"], *training.get("rng_of_other_ranks", [])]
        if self._ranks.rank < len(states):  # a rank that the run did not have keeps its own
            rng = states[self._ranks.rank]
            torch.set_rng_state(rng["cpu"])
            if "cuda" in rng and self._device == "cuda":
                torch.cuda.set_rng_state(rng["cuda"])
        best = training.get("best")
        if best and not (checkpoint.parent / checkpoints.name_of(best["step"])).exists():
            say(
                f"checkpoint {checkpoint}: the best one, of step {best['step']}, is gone; the best from here on is kept"
            )
            best = None
        return Standing(
            training["step"],
            training["tokens"],
            training["seconds"],
            best,
            training.get("judged", 0),
            training.get("saved_bytes"),
        )
