"""Data parallel training that sends ``R`` and not ``G``: a communication hook for DistributedDataParallel.

Between refreshes a method that drops its residual uses ``R = G Q`` alone, and ``Q`` is the same on every rank, so

    send   mean over ranks of R (m, r), in place of that of G (m, n)
    hand   G <- R Qᵀ to the optimizer, whose projection gives R again, since QᵀQ = I

At a refresh, and of parameters that are not projected, the whole gradient is sent. There is no error to feed back:
nothing is
lost that the step would have used. The basis and the schedule are the optimizer's, and saved with it; the hook has no
state.

Source: PowerSGD (Vogels et al. 2019, arXiv 1905.13727) sends products with a small factor too; here the factor is the
optimizer's own. Deviations: none to name. Norms of gradients, as for clipping, are those of the projected gradients.
"""

from typing import Any

import torch
from torch import Tensor

from subspan import distributed
from subspan.optimizer import SubspaceOptimizer
from subspan.step.in_backward import Place
from subspan.utils.errors import SettingError


class LowRankAllReduce:
    """What the hook knows, and what it has sent.

    Args:
        group: the ranks that the model averages over; ``None`` is all.

    Attributes:
        bytes: sent by this rank since ``reset``, those of gradients before any algorithm of the all-reduce.
        dense_bytes: what the gradients would have been.
    """

    def __init__(self, optimizer: SubspaceOptimizer, group: Any = None) -> None:
        self.optimizer, self.group = optimizer, group
        self.reset()

    def reset(self) -> None:
        """Count from zero."""
        self.bytes = self.dense_bytes = 0

    def places(self) -> dict[Tensor, Place]:
        """The parameters whose ``R`` is all that the coming step needs."""
        optimizer = self.optimizer
        return {
            place.p: place
            for place in optimizer._places()
            if optimizer._low_rank_suffices(place.p, place.layout, place.group, place.order)
        }


def register(model: Any, optimizer: SubspaceOptimizer) -> LowRankAllReduce:
    """Let ``model``, a DistributedDataParallel, send the low-rank gradients of ``optimizer``. Call it once, before
    training.

    Raises:
        ValueError: the model is no DistributedDataParallel, or the method needs more of the gradient than ``R``.
    """
    if not hasattr(model, "register_comm_hook"):
        raise SettingError(
            f"model: a {type(model).__name__} has no register_comm_hook; wrap it in DistributedDataParallel first"
        )
    if not isinstance(optimizer, SubspaceOptimizer):
        raise SettingError(f"optimizer: a {type(optimizer).__name__} has no subspace; build one with subspan.create")
    if optimizer.residual.needs_gradient:
        raise SettingError(
            f"residual={optimizer.residual!r}: needs every gradient whole; use residuals.Discard(), or no hook"
        )
    if optimizer.selector.tracks:
        raise SettingError(
            f"selector={optimizer.selector!r}: follows every gradient; use one that is refreshed, or no hook"
        )
    if not optimizer.selector.orthonormal:
        raise SettingError(
            f"selector={optimizer.selector!r}: its columns are not orthonormal, so R cannot be had from R Qᵀ; use "
            "selectors.Random() or another that is, or no hook"
        )
    state = LowRankAllReduce(optimizer, getattr(model, "process_group", None))
    model.register_comm_hook(state, lambda state, bucket: hook(state, bucket))  # whose annotations torch would check
    return state


def hook(state: LowRankAllReduce, bucket: Any) -> Any:
    """The hook, as ``register_comm_hook`` takes it."""
    places, optimizer = state.places(), state.optimizer
    parts = []
    for p, grad in zip(bucket.parameters(), bucket.gradients(), strict=True):
        place = places.get(p)
        R = grad if place is None else optimizer.selector.project(place.layout.enter(grad), optimizer.state[p])
        parts.append((grad, place, R))
    whole: Tensor = bucket.buffer()
    dense = all(place is None for _, place, _ in parts)
    sent = whole if dense else torch.cat([R.reshape(-1).to(whole.dtype) for _, _, R in parts])
    state.bytes += sent.numel() * sent.element_size()
    state.dense_bytes += whole.numel() * whole.element_size()

    def lift(mean: Tensor) -> Tensor:
        if dense:
            return mean
        for (grad, place, R), piece in zip(parts, mean.split([R.numel() for _, _, R in parts]), strict=True):
            if place is None:
                grad.copy_(piece.view_as(grad))
            else:
                G = optimizer.selector.project_back(piece.view_as(R).to(R.dtype), optimizer.state[place.p])
                grad.copy_(place.layout.leave(G, grad.shape))
        return whole

    return distributed.mean_later(sent, state.group, lift)
