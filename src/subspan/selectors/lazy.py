"""A selector whose period grows while its subspace stands still.

Each refresh measures the overlap of the old and the new subspace:

    overlap = ||Q_oldᵀ Q_new||² / r        1 for the same subspace, r/n on average for a random one

Where the overlap reaches ``threshold``, the period doubles, up to ``longest`` times ``update_proj_gap``. Otherwise it
is ``update_proj_gap`` again. Each parameter has a period of its own. The next refresh falls on the next multiple of the
new period.

Source: the idea is that of Q-GaLore (Zhang et al. 2024, arXiv 2407.08296).

Deviations from the paper:

- Q-GaLore measures the cosine of only the first singular vector, averaged over five refreshes. A flip of that vector's
  sign defeats the measure.
- Its period never shrinks.
"""

from dataclasses import dataclass

from torch import Tensor

from subspan.linalg import Gram
from subspan.parts import Key, Momentum, Selector, check_selector
from subspan.selectors.base import with_entry
from subspan.storage.allocation import State
from subspan.utils.checks import is_number
from subspan.utils.errors import SettingError


@dataclass(frozen=True)
class Lazy(Selector):
    """Another selector, refreshed less often where its subspace stands still.

    Args:
        selector: chooses the subspace.
        threshold: least overlap at which the subspace counts as standing still, in [0, 1].
        longest: largest period, as a multiple of ``update_proj_gap``, >= 1.
    """

    selector: Selector
    threshold: float = 0.5
    longest: int = 8

    def __post_init__(self) -> None:
        check_selector(self.selector, "selector")
        if self.selector.tracks:
            raise SettingError(
                f"selector={self.selector!r}: moves at every step, so there is no period to lengthen; use it without Lazy"
            )
        if not self.selector.orthonormal:
            raise SettingError(
                f"selector={self.selector!r}: overlap is measured between orthonormal bases, and this one has none; give "
                "another, such as selectors.Dominant()"
            )
        if not is_number(self.threshold) or not 0 <= self.threshold <= 1:
            raise SettingError(f"threshold={self.threshold!r}: expected an overlap between 0 and 1")
        if not isinstance(self.longest, int) or isinstance(self.longest, bool) or self.longest < 1:
            raise SettingError(f"longest={self.longest!r}: expected a whole number of periods >= 1")

    @property
    def needs_gradient(self) -> bool:
        return self.selector.needs_gradient

    @property
    def takes_gram(self) -> bool:
        return self.selector.takes_gram

    @property
    def orthonormal(self) -> bool:
        return True

    @property
    def tracks(self) -> bool:
        return self.selector.tracks

    def init(self, G: Tensor, rank: int) -> State:
        return with_entry(self.selector.init(G, rank), "stretch", 1)

    def period(self, gap: int, state: State) -> int | None:
        inner = self.selector.period(gap, state)
        return None if inner is None else inner * state["stretch"]

    def refresh_(self, G: Tensor | Gram, state: State, key: Key) -> Tensor:
        change = self.selector.refresh_(G, state, key)
        overlap = float(change.square().sum((-2, -1)).mean()) / change.shape[-1]
        state["stretch"] = min(2 * state["stretch"], self.longest) if overlap >= self.threshold else 1
        return change

    def track_(self, G: Tensor, state: State, momentum: Momentum | None) -> Tensor | None:
        return self.selector.track_(G, state, momentum)

    def project(self, G: Tensor, state: State) -> Tensor:
        return self.selector.project(G, state)

    def project_back(self, R: Tensor, state: State) -> Tensor:
        return self.selector.project_back(R, state)

    def subtract_(self, W: Tensor, R: Tensor, state: State) -> None:
        self.selector.subtract_(W, R, state)
