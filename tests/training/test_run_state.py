"""How far a run has come, as its checkpoints keep it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from subspan.checkpoints.checksums import RECORD
from subspan.training.config.settings import PretrainConfig
from subspan.training.pretraining import Pretraining
from subspan.training.run_state import Best, TrainState
from subspan.utils.errors import InputError

SAVED = {
    "step": 7,
    "tokens": 448,
    "seconds": 1.5,
    "best": {"step": 5, "measured": {"val_loss": 2.0, "accuracy": 0.75}, "waited": 1},
    "judged": 6,
    "saved_bytes": 1000,
}
STATE = TrainState(7, 448, 1.5, Best(5, {"val_loss": 2.0, "accuracy": 0.75}, 1), 6, 1000)


def test_the_saved_form() -> None:
    """It is that of runs which are under way: names and order of the entries stay."""
    assert list(STATE.as_saved().items()) == list(SAVED.items())
    assert TrainState.from_saved(SAVED) == STATE


def test_a_run_without_evaluations() -> None:
    state = TrainState(7, 448, 1.5, None, 0, None)
    assert TrainState.from_saved(state.as_saved()) == state
    assert TrainState.from_saved({"step": 7, "tokens": 448, "seconds": 1.5}) == state, "as the first version saved it"


@pytest.mark.parametrize("entry", ["step", "rng", "scheduler"])
def test_a_checkpoint_that_lacks_an_entry(entry: str, small: Callable[..., PretrainConfig], tmp_path: Path) -> None:
    """Without checksums nothing has noticed it before."""
    Pretraining(small(steps=4)).run()
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    (checkpoint / RECORD).unlink()
    training = torch.load(checkpoint / "training.pt", weights_only=True)
    del training[entry]
    torch.save(training, checkpoint / "training.pt")
    with pytest.raises(InputError, match=rf"{checkpoint.name}: training.pt has no entry '{entry}'; .*--resume PATH"):
        Pretraining(small(steps=4, resume="auto"))
