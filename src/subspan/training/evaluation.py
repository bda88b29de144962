"""The validation loss: the exact mean over tokens."""

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from subspan.training.data.batches import IGNORED, Batch
from subspan.training.processes import ALONE, Processes


def token_losses(model: nn.Module, batch: Batch) -> Tensor:
    """The sum, in fp32, of the negative log-likelihood of every target that counts."""
    # From positions that begin again transformers tells packed examples apart, so that none sees another.
    places = {} if batch.positions is None else {"position_ids": batch.positions}
    logits = model(input_ids=batch.inputs, use_cache=False, **places).logits
    return cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten(), ignore_index=IGNORED, reduction="sum")


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: Batch,
    batch_size: int,
    autocast: AbstractContextManager[object],
    processes: Processes = ALONE,
) -> float:
    """Mean negative log-likelihood per token: one sum over all tokens, one division by their number.

    The ranks share the work and get the same result.

    The mean of the batches' means would instead weigh a token by the batch that it is in. Seven codes of this field
    divide by the number of batches plus one.
    """
    model.eval()
    device = next(model.parameters()).device
    total = torch.zeros((), dtype=torch.float64)
    with autocast:
        batches = data.split(batch_size)
        for start in range(0, len(batches), processes.size):
            own = start + processes.rank
            # The last round may have too few batches. Then a rank takes part without counting, because a sharded model
            # needs all ranks in each pass.
            batch = batches[own] if own < len(batches) else batches[start].ignored()
            total += token_losses(model, batch.to(device)).double().cpu()
    model.train()
    return processes.sum(float(total)) / data.weight()
