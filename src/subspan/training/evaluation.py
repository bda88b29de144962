"""The validation loss: the exact mean over tokens."""

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from subspan.training.data.batches import IGNORED, Batch
from subspan.training.processes import ALONE, Processes


def token_losses(model: nn.Module, batch: Batch) -> Tensor:
    """The sum, in fp32, of the negative log-likelihood of every target that counts."""
    logits = model(input_ids=batch.inputs, use_cache=False).logits
    return cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten(), ignore_index=IGNORED, reduction="sum")


@torch.no_grad()
def evaluate(
    model: nn.Module, data: Batch, batch_size: int, autocast: AbstractContextManager[object], ranks: Processes = ALONE
) -> float:
    """Mean negative log-likelihood per token: one sum over all tokens, one division by their number.

    The ranks share the work and get the same result.

    Dividing by the number of batches instead weighs tokens by the batch they are in; seven codes of this field divide
    by
    the number of batches plus one.
    """
    model.eval()
    device = next(model.parameters()).device
    total = torch.zeros((), dtype=torch.float64)
    with autocast:
        pieces = data.split(batch_size)
        for start in range(0, len(pieces), ranks.size):
            mine = start + ranks.rank
            # Where the last round has too few, a rank joins in without counting: a sharded model needs all ranks in
            # each pass.
            batch = pieces[mine] if mine < len(pieces) else pieces[start].ignored()
            total += token_losses(model, batch.to(device)).double().cpu()
    model.train()
    return ranks.sum(float(total)) / data.weight()
