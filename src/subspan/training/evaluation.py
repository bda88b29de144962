"""The losses: what is trained, and the validation loss, which is the exact mean over tokens."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from subspan.training.data.batches import IGNORED, Batch
from subspan.training.processes import ALONE, Processes


def token_losses(model: nn.Module, batch: Batch) -> Tensor:
    """The sum, in fp32, of the negative log-likelihood of every target that counts."""
    return _token_losses(_run(model, batch), batch)


def trained_losses(model: nn.Module, batch: Batch) -> Tensor:
    """The losses of ``token_losses``, and for each target the loss of the routers of a mixture of experts.

        sum over targets of -log p(target) + c * number of targets * aux

    ``aux`` is the ``aux_loss`` that models of transformers return if their config has ``output_router_logits=True``,
    and ``c`` is their coefficient of it, such as ``router_aux_loss_coef``. It is part of what is trained, and no part
    of the losses that are reported for the validation set.
    """
    output = _run(model, batch)
    losses = _token_losses(output, batch)
    aux = getattr(output, "aux_loss", None)
    if not isinstance(aux, Tensor):
        return losses
    count = (batch.targets != IGNORED).sum()  # on the device, so that nothing waits for it
    return losses + router_coefficient(model) * count * aux.float().to(losses.device)


def router_coefficient(model: nn.Module) -> float:
    """The factor with which a model of transformers adds the loss of its routers to its own loss; 0 if it has none."""
    inner = getattr(model, "module", model)  # inside DDP
    config = getattr(inner, "config", None)
    for place in (inner, config, getattr(config, "text_config", None)):
        for name in ("router_aux_loss_coef", "aux_loss_coef"):
            if isinstance(value := getattr(place, name, None), int | float):
                return float(value)
    return 0.0


def _run(model: nn.Module, batch: Batch) -> Any:
    # From positions that begin again transformers tells packed examples apart, so that none sees another.
    places = {} if batch.positions is None else {"position_ids": batch.positions}
    return model(input_ids=batch.inputs, use_cache=False, **places)


def _token_losses(output: Any, batch: Batch) -> Tensor:
    logits = output.logits
    return cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten(), ignore_index=IGNORED, reduction="sum")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Let ``model`` evaluate, and train again afterwards, whatever happens."""
    model.eval()
    try:
        yield
    finally:
        model.train()


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: Batch,
    batch_size: int,
    autocast: AbstractContextManager[object],
    processes: Processes = ALONE,
    between: Callable[[], object] = lambda: None,
) -> float:
    """Mean negative log-likelihood per token: one sum over all tokens, one division by their number.

    The ranks share the work and get the same result. Each of them calls ``between`` as often as the others, before each
    of its batches; an exception there breaks the work off.

    The mean of the batches' means would instead weigh a token by the batch that it is in. Seven codes of this field
    divide by the number of batches plus one.
    """
    device = next(model.parameters()).device
    total = torch.zeros((), dtype=torch.float64)
    with autocast, evaluating(model):
        batches = data.split(batch_size)
        for start in range(0, len(batches), processes.size):
            between()
            own = start + processes.rank
            # The last round may have too few batches. Then a rank takes part without counting, because a sharded model
            # needs all ranks in each pass.
            batch = batches[own] if own < len(batches) else batches[start].ignored()
            total += token_losses(model, batch.to(device)).double().cpu()
    return processes.sum(float(total)) / data.weight()
