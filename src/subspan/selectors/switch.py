"""One selector up to some step of the run, and another from then on.

Source: GoLore (He et al. 2024, arXiv 2410.11289): "GoLore@x%" is ``Switch(Dominant(), Random(), at=1 - x / 100)``.

Deviations from the paper: none. In its SGD code the momentum stays as it is at the switch. Here the switch is a refresh
like any other, and the transfer applies.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from subspan.linalg import Gram
from subspan.parts import Key, Momentum, Selector, check_selector, holds
from subspan.selectors.base import with_entry
from subspan.storage.allocation import State
from subspan.utils.checks import is_number
from subspan.utils.errors import SettingError


@dataclass(frozen=True)
class Switch(Selector):
    """``first``, then ``second`` from the first refresh at or after the switch.

    Selectors that keep their basis under the same name share its memory.

    Args:
        first: selector at the start.
        second: selector after the switch.
        at: time of the switch, as a step (an integer >= 0) or as a share of ``total_steps`` (a float in [0, 1]).
        total_steps: length of the run, in steps. It is needed only if ``at`` is a share; ``create`` fills it in from
            its own argument.
    """

    first: Selector
    second: Selector
    at: int | float = 0.8
    total_steps: int | None = None

    def __post_init__(self) -> None:
        for name in ("first", "second"):
            check_selector(getattr(self, name), name)
        if holds(self.first, Switch) or holds(self.second, Switch):
            raise SettingError(
                f"first={self.first!r}, second={self.second!r}: a switch cannot hold another; switch only once"
            )
        if self.total_steps is not None and (not isinstance(self.total_steps, int) or self.total_steps < 1):
            raise SettingError(f"total_steps={self.total_steps!r}: expected the length of the run, a whole number >= 1")
        if not is_number(self.at) or not 0 <= self.at < math.inf or (isinstance(self.at, float) and self.at > 1):
            raise SettingError(
                f"at={self.at!r}: expected a step (an integer >= 0) or a share of the run (a float in [0, 1])"
            )

    @property
    def needs_gradient(self) -> bool:
        return self.first.needs_gradient or self.second.needs_gradient

    @property
    def takes_gram(self) -> bool:
        return all(not part.needs_gradient or part.takes_gram for part in (self.first, self.second))

    @property
    def orthonormal(self) -> bool:
        return self.first.orthonormal and self.second.orthonormal

    @property
    def tracks(self) -> bool:
        return self.first.tracks or self.second.tracks

    def init(self, G: Tensor, rank: int) -> State:
        self._step()
        return with_entry({**self.first.init(G, rank), **self.second.init(G, rank)}, "switched", 0)

    def period(self, gap: int, state: State) -> int | None:
        if state["switched"]:
            return self.second.period(gap, state)
        # A first selector that has no refreshes of its own gets one at the switch.
        return self.first.period(gap, state) or max(1, self._step())

    def track_(self, G: Tensor, state: State, momentum: Momentum | None) -> Tensor | None:
        return self._active(state).track_(G, state, momentum)

    def refresh_(self, G: Tensor | Gram, state: State, key: Key) -> Tensor:
        if state["switched"] or key.step < self._step():
            return self._active(state).refresh_(G, state, key)
        # The change at the switch: the rows of the old basis, Q_oldᵀ (r, n), projected by the new one.
        row = G.row if isinstance(G, Gram) else G[..., :1, :]
        rank = self.first.project(row, state).shape[-1]
        identity = torch.eye(rank, device=G.device, dtype=torch.promote_types(G.dtype, torch.float32))
        rows = self.first.project_back(identity.expand(*G.shape[:-2], rank, rank), state)
        self.second.refresh_(G, state, key)
        state["switched"] = 1
        return self.second.project(rows, state)

    def project(self, G: Tensor, state: State) -> Tensor:
        return self._active(state).project(G, state)

    def project_back(self, R: Tensor, state: State) -> Tensor:
        return self._active(state).project_back(R, state)

    def subtract_(self, W: Tensor, R: Tensor, state: State) -> None:
        self._active(state).subtract_(W, R, state)

    def switches_within(self, period: int) -> bool:
        """Tell whether a refresh every ``period`` steps falls between the switch and the end of the run."""
        return self.total_steps is None or math.ceil(self._step() / period) * period < self.total_steps

    def _active(self, state: State) -> Selector:
        return self.second if state["switched"] else self.first

    def _step(self) -> int:
        if isinstance(self.at, int):
            return self.at
        if self.total_steps is None:
            raise SettingError(
                f"total_steps=None: at={self.at} is a share of the run, so its length is needed; pass total_steps"
            )
        return math.ceil(round(self.at * self.total_steps, 6))  # 0.55 of 100 is 55.00000000000001
