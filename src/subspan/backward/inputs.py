"""Which bases meet one input, and where the input itself is kept for all of them.

A basis needs ``h = x [Q O]`` in the backward pass, which is ``r + s`` numbers for each token. Ordinary training keeps
``x``, which is ``n`` numbers, once for all layers that it feeds. So where bases of their own meet one input, and their
``h`` together are as wide as ``x`` or wider, their layers keep ``x`` instead. They make ``h`` in the backward pass,
from the same numbers, so nothing changes except the memory.
"""

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor


class Inputs:
    """The inputs of all bases of a model, as the forward passes have shown them.

    A model need not say which of its layers get one tensor. What the passes of a step show counts from the next step
    on. It never counts within a step, because a pass that is repeated for its activations (checkpointing) must keep
    what the first one kept. A basis that has not been seen yet keeps ``x``, as ordinary training does.

    Bases have numbers here, so a copy of a part of the model does not copy the rest of it.
    """

    def __init__(self) -> None:
        self._sizes: list[tuple[int, int]] = []  # by number: columns of [Q O], and its rows
        self._met: dict[int, frozenset[int]] = {}  # with which others an input has been met, directly or through others
        self._whole: set[int] = set()  # those that keep x, because their h are too wide together
        self._forming: set[int] = set()  # those that form a gradient in this step, and keep x for it
        self._seen: set[tuple[int, ...]] = set()
        self._passes: dict[int, int] = {}  # how many passes meet an input whose first pass is of this basis
        self._meetings: dict[int, _Meeting] = {}  # of this step, by the identity of x
        self._last: dict[int, _Meeting] = {}  # by the basis whose pass came first

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_meetings": {}, "_last": {}}

    def enlist(self, columns: int, features: int) -> int:
        """Return the number of another basis, with ``columns`` columns of ``[Q O]`` for ``features`` inputs."""
        self._sizes.append((columns, features))
        return len(self._sizes) - 1

    def expect(self, number: int, forms: bool) -> None:
        """Note that a step is over, and whether the basis forms a gradient in the next one."""
        for meeting in self._meetings.values():
            self.note(meeting.passes)
        self._meetings.clear()
        self._last.clear()
        (self._forming.add if forms else self._forming.discard)(number)

    def note(self, passes: Iterable[int]) -> None:
        """Note which passes meet one input, each by the number of its basis, in their order."""
        came = tuple(passes)
        if came in self._seen:
            return
        self._seen.add(came)
        group = frozenset(came).union(*(self._met[number] for number in came if number in self._met))
        self._met |= dict.fromkeys(group, group)
        if sum(self._sizes[number][0] for number in came) >= self._sizes[came[0]][1] or not self._whole.isdisjoint(
            group
        ):
            self._whole |= group
        self._passes[came[0]] = max(len(came), self._passes.get(came[0], 0))

    def keeps(self, number: int) -> bool:
        """Tell whether the layers of a basis keep ``x`` in this step, and not ``h``.

        If one of those that meet an input keeps it, all do.
        """
        group = self._met.get(number)
        return group is None or number in self._whole or not self._forming.isdisjoint(group)

    def meet(self, number: int, x: Tensor, entered: Tensor) -> Tensor:
        """Note that a pass of a basis begins on ``x``, which is ``entered`` in the dtype of the pass.

        Returns:
            The ``entered`` to keep, outside of any graph: one tensor for all that meet ``x``, of whom each has made its
            own.
        """
        meeting = self._meetings.get(id(x))
        if meeting is None or not meeting.is_of(x):
            if meeting is not None:
                self.note(meeting.passes)
            meeting = self._meetings[id(x)] = _Meeting(x)
            if number in self._last:  # those that have not run must not keep the tensor alive
                self._last[number].cast = None
            self._last[number] = meeting
        meeting.passes.append(number)
        if entered.dtype == x.dtype:
            return entered.detach()
        cast = meeting.cast
        if cast is None or cast.dtype != entered.dtype:
            cast = entered.detach()
        comes = len(meeting.passes) < self._passes.get(meeting.passes[0], 0)
        meeting.cast = cast if comes and self.keeps(number) else None
        return cast


class _Meeting:
    """An input, and the passes that have begun on it."""

    def __init__(self, x: Tensor) -> None:
        self._x, self._version = weakref.ref(x), x._version
        self.passes: list[int] = []
        self.cast: Tensor | None = None

    def is_of(self, x: Tensor) -> bool:
        return self._x() is x and self._version == x._version
