"""The kinds of runs, by the command that starts them: their settings, and how blanks are filled in."""

from subspan.training.config.resolve import ResolvedConfig, resolve
from subspan.training.config.resolve_finetuning import ResolvedFinetune, resolve_finetune
from subspan.training.config.settings import FinetuneConfig, PretrainConfig

CONFIGS: dict[str, type[PretrainConfig] | type[FinetuneConfig]] = {
    "pretrain": PretrainConfig,
    "finetune": FinetuneConfig,
}


def resolve_run(config: PretrainConfig | FinetuneConfig) -> ResolvedConfig | ResolvedFinetune:
    """Fill in every blank of ``config`` for which no data need be read.

    Raises:
        UserError: a setting is wrong, as for ``resolve``.
    """
    return resolve_finetune(config) if isinstance(config, FinetuneConfig) else resolve(config)
