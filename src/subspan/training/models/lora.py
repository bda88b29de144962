"""LoRA through ``peft``, on the layers that the subspace methods project. They are compared with it.

    y = x Wᵀ + (alpha / rank) x Aᵀ Bᵀ        W frozen, A (rank, in) and B (out, rank) trained

A head for labels is trained too.

Source: Hu et al. 2021, arXiv 2106.09685.
"""

import re
from typing import Any

from torch import nn

from subspan.groups import EXCLUDED, select_linear
from subspan.utils.errors import InputError

_HEAD = re.compile(r"(^|\.)(score|classifier|classification_head)\.")


def add_lora(model: nn.Module, rank: int, alpha: float, dropout: float) -> Any:
    """Put adapters into ``model`` in place, and freeze everything else except the head.

    Returns:
        peft's wrapper, which can merge the adapters into the weights.

    Raises:
        InputError: peft is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise InputError(
            f"lora.rank={rank}: the package peft is not installed ({error}); pip install 'subspan[finetune]'"
        ) from error

    names = list(select_linear(model, "all-linear", EXCLUDED))
    settings = peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=names, bias="none")
    wrapper = peft.tuners.lora.LoraModel(model, settings, "default")
    for name, p in model.named_parameters():
        if _HEAD.search(name):
            p.requires_grad_(True)
    return wrapper
