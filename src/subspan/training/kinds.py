"""The kinds of runs by the command that starts them: what they are set with, how blanks are filled in, what trains."""

from typing import TYPE_CHECKING, Any

from subspan.training.config import FinetuneConfig, PretrainConfig
from subspan.training.finetuning.resolve import ResolvedFinetune, resolve_finetune
from subspan.training.resolve import ResolvedConfig, resolve

if TYPE_CHECKING:
    from subspan.training.loop import Training
    from subspan.training.parallel import Ranks

CONFIGS: dict[str, type[PretrainConfig] | type[FinetuneConfig]] = {"pretrain": PretrainConfig, "finetune": FinetuneConfig}


def resolve_run(config: PretrainConfig | FinetuneConfig) -> ResolvedConfig | ResolvedFinetune:
    """``config`` with every blank filled in that needs no data to be read; raises ``ValueError`` as ``resolve`` does."""
    return resolve_finetune(config) if isinstance(config, FinetuneConfig) else resolve(config)


def prepare(config: PretrainConfig | FinetuneConfig, *ranks: "Ranks") -> "Training[Any]":
    """The run of these settings, ready to start; see ``Training``."""
    if isinstance(config, FinetuneConfig):
        from subspan.training.finetuning.run import Finetuning

        return Finetuning(config, *ranks)
    from subspan.training.pretrain import Pretraining

    return Pretraining(config, *ranks)
