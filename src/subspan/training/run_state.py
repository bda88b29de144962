"""What a run needs to go on, and its checkpoints: all ranks write and read them together."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from subspan.checkpoints import directory as checkpoints
from subspan.checkpoints.writer import new_checkpoint
from subspan.training.processes import Processes
from subspan.utils.errors import InputError
from subspan.utils.messages import say


@dataclass
class Best:
    """The best evaluation so far."""

    step: int
    measured: dict[str, float]
    waited: int = 0
    """Evaluations since then, none of which was better."""


@dataclass(frozen=True)
class TrainState:
    """How far a run has come."""

    step: int
    tokens: int
    seconds: float
    best: Best | None
    evaluated_at: int
    """The step of the last evaluation, or 0."""
    saved_bytes: int | None
    """Bytes that a forward pass saves for the backward pass, once they are counted."""

    def as_saved(self) -> dict[str, Any]:
        """The entries of ``training.pt``."""
        saved = asdict(self)
        return {"judged" if name == "evaluated_at" else name: value for name, value in saved.items()}

    @classmethod
    def from_saved(cls, saved: dict[str, Any]) -> "TrainState":
        """The state in ``training.pt``. Files of the first version lack the last three entries."""
        best = saved.get("best")
        return cls(
            step=saved["step"],
            tokens=saved["tokens"],
            seconds=saved["seconds"],
            best=Best(**best) if best else None,
            evaluated_at=saved.get("judged", 0),
            saved_bytes=saved.get("saved_bytes"),
        )


class Checkpointer:
    """Writes and reads the checkpoints of a run. All ranks call it together.

    Args:
        model: the model itself, not the module that DDP wraps around it.
        optimizer: its state comes back exact in every bit.
        stateful: whatever else has a ``state_dict``, by the name of its entry: the data, the schedule.
        tokenizer: is saved beside the model, so that both load together.
        processes: those of the run.
        device: the random numbers of this device are saved beside the host's.
        settings: the settings of the run, which its continuation must repeat.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        stateful: dict[str, Any],
        tokenizer: PreTrainedTokenizerBase,
        processes: Processes,
        device: str,
        settings: dict[str, Any],
    ) -> None:
        self._model, self._optimizer, self._stateful, self._tokenizer = model, optimizer, stateful, tokenizer
        self._processes, self._device, self._settings = processes, device, settings

    def write(self, folder: Path, state: TrainState, keep: int) -> None:
        """Write a checkpoint into ``folder``, then remove all except the ``keep`` newest and the best.

        Raises:
            InputError: it cannot be written, for example for want of space. It is the same on every rank, and the
                checkpoints before it stand.
        """
        processes = self._processes
        rng = {"cpu": processes.gather(torch.get_rng_state())}
        if self._device == "cuda":
            rng["cuda"] = processes.gather(torch.cuda.get_rng_state())
        training = {
            **state.as_saved(),
            **{name: value.state_dict() for name, value in self._stateful.items()},
            "rng": {kind: states[0] for kind, states in rng.items()},
            "rng_of_other_ranks": [
                {kind: states[rank] for kind, states in rng.items()} for rank in range(1, processes.size)
            ],
            "settings": self._settings,
        }
        best = state.best.step if state.best else None
        own = {"optimizer": self._optimizer.state_dict(), "training": training}
        needed = checkpoints.tensor_bytes([self._model.state_dict(), own])
        with new_checkpoint(folder, step=state.step, keep=keep, best=best, needed=needed) as scratch:
            if processes.sharded:
                from subspan.checkpoints.sharded import save_sharded

                save_sharded(scratch, self._model, self._optimizer)
                if processes.first:
                    checkpoints.save_config(scratch, self._model, self._tokenizer)
                    checkpoints.save_part(scratch, "training", training)
            elif processes.first:
                checkpoints.save_model(scratch, self._model, self._tokenizer)
                for name, part in own.items():
                    checkpoints.save_part(scratch, name, part)

    def read(self, checkpoint: Path) -> TrainState:
        """Load ``checkpoint`` into the model, the optimizer, the data, the schedule and the random generators.

        Raises:
            InputError: a file is missing, damaged, or of another model or optimizer.
        """
        training = checkpoints.load_part(checkpoint, "training")
        missing = [name for name in ("step", "tokens", "seconds", "rng", *self._stateful) if name not in training]
        if missing:
            raise InputError(
                f"checkpoint {checkpoint}: training.pt has no entry {missing[0]!r}; "
                "remove it, or continue an older one with --resume PATH"
            )
        if checkpoints.holds_shards(checkpoint):
            from subspan.checkpoints.sharded import load_sharded

            load_sharded(checkpoint, self._model, self._optimizer)
        elif self._processes.sharded:
            raise InputError(
                f"parallel='fsdp': the checkpoint {checkpoint} holds the whole model in one file; continue it with "
                "--parallel ddp or in one process, or start a new run with another --out"
            )
        else:
            optimizer = checkpoints.load_part(checkpoint, "optimizer")
            checkpoints.load_weights(checkpoint, self._model)
            self._optimizer.load_state_dict(optimizer)
        for name, value in self._stateful.items():
            value.load_state_dict(training[name])
        states = [training["rng"], *training.get("rng_of_other_ranks", [])]
        if self._processes.rank < len(states):  # a rank that the run did not have keeps its own
            rng = states[self._processes.rank]
            torch.set_rng_state(rng["cpu"])
            if "cuda" in rng and self._device == "cuda":
                torch.cuda.set_rng_state(rng["cuda"])
        best = training.get("best")
        if best and not (checkpoint.parent / checkpoints.name_of(best["step"])).exists():
            say(
                f"checkpoint {checkpoint}: the best one, of step {best['step']}, is gone; the best from here on is kept"
            )
            training["best"] = None
        return TrainState.from_saved(training)
