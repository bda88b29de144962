"""The bytes that a method holds, counted from shapes.

The parts say themselves what they hold: their ``init`` allocates the state on ``meta``, where tensors have no memory.
So a part that a user wrote is counted like any other.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from subspan.costs.state_formulas import Stored, expression
from subspan.parts import Residual, Rule, Selector
from subspan.recipes import find
from subspan.selectors import Switch
from subspan.step.carriers import layer_of
from subspan.step.layout import PROJ_TYPES, Layout, Side, layout_of
from subspan.step.parameter_state import Parts, states_of_carrier, states_of_parts
from subspan.step.proximal import Proximal
from subspan.storage import eight_bit
from subspan.storage.allocation import State, StateDtype
from subspan.utils.errors import SettingError

Parallel = Literal["ddp", "fsdp"]
"""Whether each rank holds everything, or ``fully_shard`` has divided the rows of every parameter among the ranks."""


@dataclass(frozen=True)
class ParameterShape:
    """A parameter, as far as its bytes depend on it."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    weight: "ParameterShape | None" = None
    """The weight that a carrier stands for; ``None`` for an ordinary parameter."""
    keeps_basis: bool = False
    """Whether a carrier is the one that keeps the basis, which several layers may share."""
    rank: int = 0
    """The rank of a carrier, which is wider if there is a sketch."""

    @classmethod
    def of(cls, p: "Tensor | ParameterShape") -> "ParameterShape":
        """The shape of ``p``: the whole one if ``p`` is sharded, and that of a vector if ``p`` is a scalar."""
        if isinstance(p, ParameterShape):
            return p
        shape, layer = tuple(p.shape) or (1,), layer_of(p)
        if layer is None:
            return cls(shape, p.dtype)
        weight = cls(tuple(layer.weight.shape), layer.weight.dtype)
        return cls(shape, p.dtype, weight, layer.number == 0, layer.projection.rank)

    def local(self, rows: int) -> Tensor:
        """A tensor without memory for ``rows`` of the rows."""
        return torch.empty(rows, *self.shape[1:], dtype=self.dtype, device="meta")


@dataclass(frozen=True)
class StateCosts:
    """What a method holds: as formulas, and in bytes for given parameters."""

    selector: Selector | None
    """``None`` for a full-rank method."""
    rule: Rule
    residual: Residual
    state_dtype: StateDtype = "float32"
    width: int | None = None
    """Bytes of an entry of a moment that is not in 8 bits; ``None`` if the rule's ``init`` decides. Torch's own AdamW
    keeps its moments in the precision of the weights."""

    @classmethod
    def of_recipe(cls, name: str) -> "StateCosts":
        """The costs of an optimizer that ``create`` knows by this name, with its paper's settings."""
        recipe = find(name)
        selector = recipe.selector
        if isinstance(selector, Switch):  # allocates nothing before it knows the length of the run, whatever that is
            selector = replace(selector, total_steps=selector.total_steps or 1)
        return cls(selector, recipe.rule, recipe.residual, recipe.state_dtype)

    def formulas(self) -> dict[str, str]:
        """Bytes of the state of one fp32 parameter, in the names of ``state_formulas.VARIABLES``.

        Returns:
            ``matrix`` and ``vector``: parameters that are not projected. A method with a subspace has two more entries:
            ``projected``, a projected matrix, and ``basis``, what ``projected`` holds for its basis, and what
            backward-side layers hold for each basis that they share. Where the backward pass can make the low-rank
            gradient there is ``carrier`` too, for a weight of ``rows x columns``.
        """
        found = {"matrix": expression(("a", "b"), self._matrix), "vector": expression(("k",), self._vector)}
        if self.selector is None:
            return found
        tall, wide = (expression(("m", "n", "r"), allocate) for allocate in (self._tall, self._wide))
        projected = {"projected": tall if tall == wide else f"{tall} if rows >= columns else {wide}"}
        basis = {"basis": expression(("rows", "columns", "r"), self._basis)}
        if self.selector.tracks or self.residual.needs_gradient:
            return projected | found | basis
        return projected | found | {"carrier": expression(("rows", "r"), self._carrier)} | basis

    def bytes_held(
        self,
        groups: Iterable[Mapping[str, Any]],
        *,
        parallel: Parallel = "ddp",
        world: int = 1,
        index: int = 0,
    ) -> dict[str, int]:
        """Count the bytes that one rank holds for the parameters in these groups.

        Under ``fsdp`` the rank has the part of the rows that ``torch.chunk`` gives it, ``ceil(rows / world)`` of them,
        of each parameter, gradient and moment; the last ranks have fewer or none. The bases are whole on every rank.

        Args:
            groups: those of an optimizer, or mappings with ``params``, ``rank`` and ``proj_type``. The parameters may
                be on ``meta``, sharded already, or given as ``ParameterShape``.
            parallel, world: how many ranks there are, and what each of them holds.
            index: number of the rank.

        Returns:
            ``weights`` (with those of backward-side layers), ``carriers``, ``gradients``, ``states`` and ``bases``. The
            rows with which ``fully_shard`` fills up its last shards are not counted, nor the blocks that it gathers for
            a moment.

        Raises:
            SettingError: ``parallel``, ``world`` or ``index`` is out of range, or a group compresses the rows, which no
                rank has whole.
        """
        if parallel not in ("ddp", "fsdp"):
            raise SettingError(f"parallel={parallel!r}: expected 'ddp' or 'fsdp'")
        if world < 1:
            raise SettingError(f"world={world}: expected a number of ranks >= 1")
        if not 0 <= index < world:
            raise SettingError(f"index={index}: expected a rank from 0 to {world - 1}, below world={world}")
        sharded = parallel == "fsdp"
        held = Counter(weights=0, carriers=0, gradients=0, states=0, bases=0)
        for group in groups:
            if sharded and PROJ_TYPES[group.get("proj_type", "std")] == "left":
                raise SettingError(
                    f"proj_type={group['proj_type']!r}: compresses the rows, which fsdp shards over ranks; use 'std' "
                    "or 'right'"
                )
            for p, number in Counter(map(ParameterShape.of, group["params"])).items():
                rows = _chunk(p.shape[0], world, index) if sharded else p.shape[0]
                for kind, size in self._held(p, rows, sharded, group).items():
                    held[kind] += number * size
        return dict(held)

    # --- bytes of one parameter ---------------------------------------------------------------------------------------

    def _held(self, p: ParameterShape, rows: int, sharded: bool, group: Mapping[str, Any]) -> dict[str, int]:
        """Bytes that a rank with ``rows`` of the rows holds for a parameter, by kind."""
        local = p.local(rows)
        size = local.numel() * local.element_size()
        if p.weight is None:
            weights, carriers = size, 0
            rank = None if self.selector is None else group.get("rank")
            flatten, transposed = group.get("flatten", False), group.get("transposed", False)
            layout = layout_of(p.shape, rank, group.get("proj_type", "std"), flatten, sharded, transposed)
            layout = layout.of_rows(rows) if sharded else layout
            stored = self._stored(states_of_parts(self._parts(group), local, layout))
        else:
            frozen = p.weight.local(rows)
            weights, carriers = frozen.numel() * frozen.element_size(), size
            if p.keeps_basis and self.selector is None:
                raise SettingError(
                    "selector=None: a full-rank method has no basis, and these parameters are those of backward-side "
                    "layers, which have one; count them with the costs of the method that trains them"
                )
            whole = p.weight.local(p.weight.shape[0]) if p.keeps_basis else None
            stored = self._stored(states_of_carrier(self._parts(group), local, p.rank, whole))
        smallest, length = group.get("min_8bit_size", eight_bit.SMALLEST), p.shape[0] if sharded else None
        counted = {part: sum(tensor.bytes(smallest, length) for tensor in own) for part, own in stored.items()}
        bases = counted.pop("selector", 0)
        states = sum(counted.values())
        return {"weights": weights, "carriers": carriers, "gradients": size, "states": states, "bases": bases}

    def _parts(self, group: Mapping[str, Any]) -> Parts:
        return Parts(self.rule, self.selector, self.residual, Proximal(group.get("eta"), coupled=True))

    def _stored(self, states: Mapping[str, State]) -> dict[str, list[Stored]]:
        """The tensors that each part holds, without the integers of the host."""
        return {
            part: [self._as_stored(name, tensor, part) for name, tensor in state.items() if isinstance(tensor, Tensor)]
            for part, state in states.items()
        }

    def _as_stored(self, name: str, tensor: Tensor, part: str) -> Stored:
        is_moment = part == "rule" and name in self.rule.moments
        width = self.width if self.width is not None and is_moment else tensor.element_size()
        is_packed = self.state_dtype == "int8" and is_moment and eight_bit.is_packed(tensor.shape, smallest=0)
        return Stored(tuple(tensor.shape), width, is_packed)

    # --- parameters whose sizes stand for symbols ---------------------------------------------------------------------

    def _projected(self, local: Tensor, side: Side | None, rank: int | None) -> dict[str, list[Stored]]:
        return self._stored(states_of_parts(self._parts({}), local, Layout(tuple(local.shape), side, rank)))

    def _vector(self, k: int) -> list[Stored]:
        return _all(self._projected(_empty(k), None, None))

    def _matrix(self, a: int, b: int) -> list[Stored]:
        return _all(self._projected(_empty(a, b), None, None))

    def _tall(self, m: int, n: int, r: int) -> list[Stored]:
        return _all(self._projected(_empty(m, n), "right", r))

    def _wide(self, m: int, n: int, r: int) -> list[Stored]:
        return _all(self._projected(_empty(n, m), "left", r))

    def _carrier(self, rows: int, r: int) -> list[Stored]:
        return _all(self._stored(states_of_carrier(self._parts({}), _empty(rows, r), r, None)))

    def _basis(self, rows: int, columns: int, r: int) -> list[Stored]:
        return self._projected(_empty(rows, columns), "right", r)["selector"]


def _all(stored: Mapping[str, list[Stored]]) -> list[Stored]:
    return [tensor for own in stored.values() for tensor in own]


def _chunk(rows: int, world: int, index: int) -> int:
    """How many of the rows are in the part of ``torch.chunk`` with this index."""
    chunk = -(-rows // world)
    return min(max(rows - index * chunk, 0), chunk)


def _empty(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")
