"""From the settings of a run to the run."""

from typing import TYPE_CHECKING, Any

from subspan.training.config.settings import FinetuneConfig, PretrainConfig

if TYPE_CHECKING:
    from subspan.training.loop import Training
    from subspan.training.processes import Processes


def prepare(config: PretrainConfig | FinetuneConfig, *processes: "Processes") -> "Training[Any]":
    """The run that ``config`` describes, ready to start; see ``Training``."""
    if isinstance(config, FinetuneConfig):
        from subspan.training.finetuning import Finetuning

        return Finetuning(config, *processes)
    from subspan.training.pretraining import Pretraining

    return Pretraining(config, *processes)
