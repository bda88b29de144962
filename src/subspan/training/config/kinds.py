"""The kinds of runs by the command that starts them: what they are set with, and how blanks are filled in."""

from subspan.training.config.resolve import ResolvedConfig, resolve
from subspan.training.config.resolve_finetuning import ResolvedFinetune, resolve_finetune
from subspan.training.config.settings import FinetuneConfig, PretrainConfig

CONFIGS: dict[str, type[PretrainConfig] | type[FinetuneConfig]] = {
    "pretrain": PretrainConfig,
    "finetune": FinetuneConfig,
}


def resolve_run(config: PretrainConfig | FinetuneConfig) -> ResolvedConfig | ResolvedFinetune:
    """``config`` with every blank filled in that needs no data to be read; raises ``ValueError`` as ``resolve``
    does.
    """
    return resolve_finetune(config) if isinstance(config, FinetuneConfig) else resolve(config)
