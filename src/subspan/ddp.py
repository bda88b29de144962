"""Data-parallel training that sends ``R`` and not ``G``: a communication hook for DistributedDataParallel.

Between refreshes a method without a residual uses only ``R = G Q``, and ``Q`` is the same on every rank. So the hook

    sends      the mean over ranks of R (m, r), in place of that of G (m, n)
    hands on   G <- R Qᵀ to the optimizer, whose projection gives R again, since QᵀQ = I

With ``residuals.Sketch`` it sends ``[R T] = G [Q O]``, and hands on the smallest ``G`` that has this ``[R T]``.

At a refresh, and for parameters that are not projected, the whole gradient is sent. There is no error to feed back,
because nothing is lost that the step would have used. The basis and the schedule belong to the optimizer, and are saved
with it. The hook has no state.

Norms of gradients, which clipping uses, are those of the projected gradients.

Source: PowerSGD (Vogels et al. 2019, arXiv 1905.13727) sends products with a small factor too. Here the factor is the
optimizer's own basis. Deviations: none.
"""

from typing import Any

import torch
from torch import Tensor

from subspan import distributed
from subspan.optimizer import SubspaceOptimizer
from subspan.step.frame import frame_of
from subspan.step.refresh import low_rank_suffices
from subspan.step.work import Slot
from subspan.utils.errors import SettingError


class LowRankAllReduce:
    """What the hook knows, and how much it has sent.

    Args:
        optimizer: the optimizer whose low-rank gradients are sent.
        group: the ranks that the model averages over; ``None`` means all.

    Attributes:
        bytes: size of the gradients that this rank has sent since ``reset``, whatever the all-reduce makes of them.
        dense_bytes: size that whole gradients would have had.
    """

    def __init__(self, optimizer: SubspaceOptimizer, group: Any = None) -> None:
        self.optimizer, self.group = optimizer, group
        self._low_rank: dict[Tensor, Slot] | None = None
        self.reset()

    def reset(self) -> None:
        """Set both counts to zero."""
        self.bytes = self.dense_bytes = 0

    def low_rank(self, bucket: Any) -> dict[Tensor, Slot]:
        """Return the parameters whose ``R`` is all that the coming step needs.

        They are found once for all buckets of a backward pass.
        """
        if self._low_rank is None or bucket.index() == 0:
            method, states = self.optimizer.method, self.optimizer.state
            self._low_rank = {
                slot.p: slot for slot in self.optimizer.slots() if low_rank_suffices(method, slot, states)
            }
        found = self._low_rank
        if bucket.is_last():
            self._low_rank = None
        return found


def register(model: Any, optimizer: SubspaceOptimizer) -> LowRankAllReduce:
    """Let ``model``, a DistributedDataParallel, send the low-rank gradients of ``optimizer``.

    Call it once, before training.

    Returns:
        The state of the hook, which counts bytes.

    Raises:
        SettingError: the model is no DistributedDataParallel, or the method needs more of the gradient than ``R``.
    """
    if not hasattr(model, "register_comm_hook"):
        raise SettingError(
            f"model: a {type(model).__name__} has no register_comm_hook; wrap it in DistributedDataParallel first"
        )
    if not isinstance(optimizer, SubspaceOptimizer):
        raise SettingError(f"optimizer: a {type(optimizer).__name__} has no subspace; build one with subspan.create")
    if optimizer.residual.needs_gradient:
        raise SettingError(
            f"residual={optimizer.residual!r}: needs every gradient in full; use residuals.Discard(), or no hook"
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
    model.register_comm_hook(
        state, lambda state, bucket: hook(state, bucket)
    )  # torch would check the annotations of ``hook``
    return state


def hook(state: LowRankAllReduce, bucket: Any) -> Any:
    """Send one bucket of gradients. This is the hook that ``register_comm_hook`` is given."""
    low_rank, method, states = state.low_rank(bucket), state.optimizer.method, state.optimizer.state
    parts = []
    for p, grad in zip(bucket.parameters(), bucket.gradients(), strict=True):
        slot = low_rank.get(p)
        frame = None if slot is None else frame_of(method, slot, states[p])
        R = grad if slot is None or frame is None else frame.project(slot.layout.enter(grad))
        parts.append((grad, slot, frame, R))
    whole: Tensor = bucket.buffer()
    dense = all(slot is None for _, slot, _, _ in parts)
    sent = whole if dense else torch.cat([R.reshape(-1).to(whole.dtype) for *_, R in parts])
    state.bytes += sent.numel() * sent.element_size()
    state.dense_bytes += whole.numel() * whole.element_size()

    def lift(mean: Tensor) -> Tensor:
        if dense:
            return mean
        for (grad, slot, frame, R), piece in zip(parts, mean.split([R.numel() for *_, R in parts]), strict=True):
            if slot is None or frame is None:
                grad.copy_(piece.view_as(grad))
            else:
                G = frame.project_back(piece.view_as(R).to(R.dtype))
                grad.copy_(slot.layout.leave(G, grad.shape))
        return whole

    return distributed.mean_later(sent, state.group, lift)
