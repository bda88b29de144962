"""The whole step on one matrix and bare tensors, without groups, ranks and storage. Read this first.

The tests hold the optimizer to it: ``tests/step/test_plain.py`` trains both side by side, for every part.

Shapes: weight and gradient ``W, G (m, n)``, basis ``Q (n, r)``, ``R, U, B (m, r)``. The side to compress is last. A
weight whose rows are compressed is passed as its transpose. ``state`` holds what the parts' ``init`` have allocated.
``O (n, s)`` are the directions that a residual with a sketch draws, and ``T = G O``.
Where there is a proximal term, ``B`` (``displacement``) is how far the weight has moved since its basis was chosen.
"""

import torch
from torch import Tensor

from subspan.parts import Key, Residual, Rule, Selector, Transfer
from subspan.storage.allocation import State


def plain_step(
    W: Tensor, G: Tensor, state: State, key: Key, *, due: bool, selector: Selector, rule: Rule, residual: Residual,
    transfer: Transfer, lr: float, scale: float, weight_decay: float, eta: float | None = None, coupled: bool = True,
) -> Tensor:  # fmt: skip
    """Return the weight after one step; ``state`` is changed in place.

    Args:
        due: whether a basis is to be chosen. A gradient that is zero or not finite chooses none.
        eta: strength of the proximal term; ``None`` stands for no term.
        coupled: whether the term is added to the gradient, or to the update.
    """

    def lifted(A: Tensor) -> Tensor:  # A Qᵀ (m, n)
        return selector.project_back(A, state)

    G = residual.receive(G, state)
    M = rule.first_moment(state)
    outside = lifted(M.value) if M is not None and residual.keeps_momentum else None
    change = None  # Q_oldᵀ Q_new (r, r)
    if due and bool(G.isfinite().all()) and bool(G.any()):
        change = selector.refresh_(G, state, key)
    elif not due and selector.tracks:
        change = selector.track_(G, state, M)
    if change is not None:
        if transfer != "keep":
            rule.transfer_(state, change, transfer)
        if M is not None and outside is not None:  # M.value has followed the basis
            residual.lose_(M.weight * (outside - lifted(M.value)), state)
    R = selector.project(G, state)
    B = state.get("displacement", torch.zeros_like(R))
    if change is not None:
        B.zero_()
    pull = torch.zeros_like(R) if eta is None else B / eta
    U, factor = rule.update_(R + pull if coupled else R, state)
    if not coupled:
        U = U + pull / factor
    B -= lr * scale * factor * U
    if s := residual.sketch_width(G.shape[-1], R.shape[-1]):
        O = residual.sketch(
            R.new_empty(G.shape[-1], s), R.shape[-1], lambda A: A - lifted(selector.project(A, state)), key
        )
        A, phi = residual.combine(G @ O, R, U, scale, lifted, state)
        D = lifted(A) if phi is None else lifted(A) + phi * (G @ O @ O.T)
    else:
        A, phi = residual.combine(G, R, U, scale, lifted, state)
        D = lifted(A) if phi is None else lifted(A) + phi * G
    return (1 - lr * weight_decay) * W - lr * factor * D


def plain_full_rank_step(W: Tensor, G: Tensor, state: State, *, rule: Rule, lr: float, weight_decay: float) -> Tensor:
    """Return a weight without a subspace after one step; ``state`` is changed in place."""
    D, factor = rule.update_(G, state)
    return (1 - lr * weight_decay) * W - lr * factor * D
