"""One basis, and the layers that share it because they have the same input.

If the residual has a sketch, it stands beside the basis: ``O (in, s)`` of each step is drawn where it is used, in the
passes and in the step. It is the same each time, because it depends only on the basis and on a key of the step.
"""

import weakref
from typing import Any

import torch
from torch import Tensor

from subspan.backward.autograd import Box, LayerPass, gather
from subspan.backward.inputs import Inputs
from subspan.distributed import averages, is_sharded, local, running_wrapper
from subspan.parts import Key, Residual, Selector
from subspan.step.carriers import CarriedLayer, Driver, Plan
from subspan.step.frame import Frame, draw_frame
from subspan.storage.allocation import State
from subspan.storage.stochastic_rounding import add_rounded_
from subspan.utils.compiler import untraced
from subspan.utils.ranks import Rank


class Projection:
    """The basis ``Q (in, r)`` of the layers with one input ``x``, and ``h = x [Q O]``, which they share.

    An optimizer that is built for the carriers binds the projection to itself. Before that there is no basis, and so no
    gradient.

    Attributes:
        inputs, place: the inputs of the model's bases, and the number of this one among them.
        layers: the layers that share the basis, in the order of the model.
        rank, sketch_width: number of columns of ``Q`` and of ``O``.
        asked: what the rank was made of: itself, or a share of the inputs.
        by_pattern: whether a pattern of names has set it, and not the rank of all layers.
        plan: what the next pass does with the basis. The optimizer sets it after each of its steps.
        formed: whether a gradient has chosen the basis since the last step. Until the next step every pass then saves
            ``x``, as that one did. So a forward pass that is repeated for its activations (checkpointing) saves the
            same tensors again.
        displaced: whether carriers may hold a displacement that the weights lack.
        selector, residual, state: those of the optimizer, which keeps the state together with the state of the first
            carrier.
        key: what the sketch of the coming step is drawn from.
        process_group: the data-parallel ranks that share the basis. If none are given, they are those of the
            DistributedDataParallel whose forward pass reaches the layers.
    """

    def __init__(
        self,
        rank: int,
        merge: str,
        select_from: str,
        process_group: Any = None,
        *,
        inputs: Inputs,
        in_features: int,
        sketch_width: int = 0,
        asked: Rank | None = None,
        by_pattern: bool = False,
    ) -> None:
        self.rank, self.merge, self.select_from = rank, merge, select_from
        self.sketch_width = sketch_width
        self.inputs, self.place = inputs, inputs.enlist(self.columns, in_features)
        self.asked: Rank = rank if asked is None else asked
        self.by_pattern = by_pattern
        self.process_group, self._given = process_group, process_group is not None
        self._wrapper: weakref.ref[Any] | None = None
        self.layers: list[Any] = []  # each a CarriedLayer
        self.plan: Plan = "keep"
        self.formed = self.displaced = False
        self.selector: Selector | None = None
        self.residual: Residual | None = None
        self.key: Key | None = None
        self.state: State = {}
        self._driver: weakref.ref[Any] | None = None
        self._pass: _Pass | None = None
        self._stepping: Frame | None = None
        self._rounding: dict[int, torch.Generator] = {}

    @property
    def columns(self) -> int:
        """Number of columns of ``[Q O]``, and so of a carrier and its gradient."""
        return self.rank + self.sketch_width

    def bind(self, selector: Selector, residual: Residual | None, state: State, driver: Driver) -> None:
        """Make ``driver`` the optimizer that this basis belongs to."""
        self.fold()  # a displacement is one in the old basis
        for layer in self.layers:  # after ``to_empty`` a carrier may hold anything
            layer.carrier.detach().zero_()
        self.selector, self.residual, self.state, self._driver = selector, residual, state, weakref.ref(driver)

    def follow(self, state: State, driver: Driver) -> None:
        """Take the basis in ``state``, to which it has been moved, if ``driver`` is the one that chooses it."""
        if self._driver is not None and self._driver() is driver:
            self.state = state

    def expect(self, plan: Plan, key: Key | None = None) -> None:
        """Note that a step is over, what the next pass does, and what the next sketch is drawn from."""
        self.plan, self.key, self.formed = plan, key or self.key, False
        self.inputs.expect(self.place, plan == "form")
        self._pass = self._stepping = None  # layers that have not run must not keep the input alive

    @untraced  # it asks Python, not tensors
    def note_wrapper(self) -> None:
        """Take the process group of the wrapper whose forward pass is running, unless one has been given.

        A forward pass that is repeated in the backward pass (activation checkpointing) runs outside of the wrapper, so
        what was noted stays.
        """
        wrapper = None if self._given else running_wrapper()
        if wrapper is None or (self._wrapper is not None and self._wrapper() is wrapper):
            return
        self._wrapper = weakref.ref(wrapper)
        if averages(wrapper, (layer.carrier for layer in self.layers)):
            self.process_group = wrapper.process_group

    @property
    def driver(self) -> Driver:
        """The optimizer that this basis belongs to, or rather its ``Carriers``."""
        driver = None if self._driver is None else self._driver()
        if driver is None:
            names = ", ".join(layer.weight_name for layer in self.layers)
            raise RuntimeError(
                f"{names}: no optimizer is bound to these backward-side layers, so they have no basis for a gradient; "
                "build one with subspan.create(name, model) and keep it alive, or run the model under torch.no_grad()"
            )
        return driver

    def __getstate__(self) -> dict[str, Any]:
        # A copy belongs to no optimizer, so it has nothing of the optimizer's except the basis of a displacement.
        selector, state = None, {}
        if self.displaced and self.selector is not None:
            selector, weight = self.selector, self.layers[0].weight
            state = {key: self.state[key] for key in selector.init(weight, self.rank)}
        none = dict.fromkeys(("_driver", "_pass", "_stepping", "_wrapper", "process_group", "residual", "key"))
        return self.__dict__ | none | {"selector": selector, "state": state, "_rounding": {}, "_given": False}

    # --- the forward pass ---------------------------------------------------------------------------------------------

    def join_pass(self, number: int, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, LayerPass]:
        """Let layer ``number`` join the forward pass of ``x``; return its input, in ``dtype``, and what it needs."""
        if self._pass is None or not self._pass.serves(number, x, dtype):
            self._pass = self._begin(x, dtype)
        layer_pass, entered = self._pass.join(number), self._pass.entered
        if not self._pass.waiting:
            self._pass = None  # h must not live longer than what is saved for the backward pass
        return entered, layer_pass

    def _begin(self, x: Tensor, dtype: torch.dtype) -> "_Pass":
        driver, weight = self.driver, self.layers[0].weight
        driver.look(weight.device, self.state)
        if any(is_sharded(layer.carrier) for layer in self.layers):
            raise RuntimeError(
                f"{self.layers[0].weight_name}: shares a basis with layers that fully_shard has put into other "
                "groups; shard the module that holds them all, or call project_backward with share='none'"
            )
        if self.plan != "keep":
            self.fold()
        if self.plan == "draw":
            driver.refresh_projection(self, None)
        entered = x.to(dtype)
        box: Box | None = {} if self.plan == "form" or self.formed else None
        whole = box is not None or self.inputs.keeps(self.place)
        kept = self.inputs.meet(self.place, x, entered)
        if not whole:
            kept = self.down(kept)
        trained = [layer for layer in self.layers if layer.carrier.requires_grad]
        numbers = [layer.number for layer in trained]
        tickets = gather([layer.carrier for layer in trained], numbers, box, self._choose)
        return _Pass(x, entered, kept, whole, box, dict(zip(numbers, tickets, strict=True)))

    def _choose(self, box: Box) -> dict[int, Tensor]:
        """Turn each layer's gradient into its ``R``; the basis is chosen first if that has not been done."""
        numbers = sorted(box)
        if self.plan == "form":
            self.driver.refresh_projection(self, torch.cat([box[number] for number in numbers]))
            self.formed = self.plan != "form"
        frame = self.frame()
        return {number: _down(box.pop(number), frame).to(self.layers[number].carrier.dtype) for number in numbers}

    # --- the basis ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def frame(self) -> Frame:
        """Return ``[Q O]`` of the coming step, for which the sketch is drawn."""
        assert self.selector is not None
        if self.residual is None or self.sketch_width == 0:
            return Frame(self.selector, self.state, self.rank, None)
        assert self.key is not None
        weight = self.layers[0].weight
        return draw_frame(self.selector, self.residual, self.state, weight.shape, self.rank, self.key, weight)

    def down(self, A: Tensor) -> Tensor:
        """Return ``A [Q O] (..., r + s)`` in the dtype of ``A``, outside of any graph."""
        with torch.no_grad():
            return _down(A.detach(), self.frame())

    def inside(self, A: Tensor) -> Tensor:
        """Return ``A Q (..., r)`` in the dtype of ``A``."""
        assert self.selector is not None
        return _down(A, Frame(self.selector, self.state, self.rank, None))

    def moved(self, x: Tensor, layer: CarriedLayer) -> Tensor:
        """Return ``(x Q) Bᵀ``, which the displacement of a layer adds to its output."""
        return torch.nn.functional.linear(self.inside(x), self.displaced_by(layer).to(x.dtype))

    def displaced_by(self, layer: CarriedLayer) -> Tensor:
        """Return the displacement ``B (out, r)`` of a layer, in the memory of its carrier and outside of any graph."""
        return layer.carrier.detach()[:, : self.rank]

    def back(self, A: Tensor) -> Tensor:
        """Return ``A Qᵀ (..., in)``, in fp32 at least."""
        assert self.selector is not None
        rows = A.reshape(-1, A.shape[-1]).to(torch.promote_types(A.dtype, torch.float32))
        return self.selector.project_back(rows, self.state).reshape(*A.shape[:-1], self.layers[0].in_features)

    def apply_(
        self,
        layer: CarriedLayer,
        step: Tensor,
        sketched: Tensor | None,
        keep: float | Tensor,
        generator: torch.Generator | None,
    ) -> None:
        """Compute ``W <- keep * W - step Qᵀ - sketched Oᵀ``.

        With ``merge="refresh"`` the step inside the subspace stays in the carrier for now. What is outside cannot: it
        is in other directions at every step.
        """
        assert self.selector is not None
        if is_sharded(layer.carrier) != is_sharded(layer.weight):
            raise RuntimeError(
                f"{layer.weight_name}: this rank has the whole weight, but a step for a shard of it; let fully_shard "
                "reshard after the backward pass, which is its default"
            )
        weight, carrier = local(layer.weight), local(layer.carrier)
        decays = not isinstance(keep, float) or keep != 1
        if self.merge == "refresh":
            if generator is not None:
                self._rounding[layer.number] = generator
            if decays:
                carrier.mul_(keep)
            carrier[:, : self.rank].sub_(step)
            self.displaced = True
        if generator is not None:
            if self.merge == "step" or decays or sketched is not None:
                add_rounded_(weight, self._update(layer, weight, step, sketched), keep, generator)
            return
        if decays:
            weight.mul_(keep)
        if self.merge == "step":
            self.selector.subtract_(weight, step, self.state)
        if sketched is not None:
            self._frame_of_step(layer).subtract_sketch_(weight, sketched)

    def _update(self, layer: CarriedLayer, weight: Tensor, step: Tensor, sketched: Tensor | None) -> Tensor:
        """Return what a step adds to the weight, in fp32: ``-step Qᵀ``, unless it stays in the carrier, and ``-sketched
        Oᵀ``.
        """
        D = self.back(-step) if self.merge == "step" else torch.zeros_like(weight, dtype=torch.float32)
        if sketched is not None:
            self._frame_of_step(layer).subtract_sketch_(D, sketched)
        return D

    def _frame_of_step(self, layer: CarriedLayer) -> Frame:
        """Return ``[Q O]`` of this step, which is drawn once for layers that step one after another."""
        frame = self.frame() if self._stepping is None else self._stepping
        last = max(other.number for other in self.layers if other.carrier.requires_grad)
        self._stepping = None if layer.number == last else frame
        return frame

    @torch.no_grad()
    def fold(self) -> None:
        """Add the displacement of the carriers to the weights."""
        if not self.displaced:
            return
        for layer in self.layers:
            if (generator := self._rounding.get(layer.number)) is not None:
                add_rounded_(layer.weight, self.displacement(layer), 1.0, generator)
            else:
                layer.weight.add_(self.displacement(layer))
            layer.carrier.zero_()
        self.displaced = False

    def fold_copy(self) -> None:
        """Fold if this is a copy, to which no optimizer is bound."""
        if self._driver is None:
            self.fold()

    @torch.no_grad()
    def displacement(self, layer: CarriedLayer) -> Tensor:
        """Return ``B Qᵀ (out, in)``."""
        with torch.autocast(layer.carrier.device.type, enabled=False):
            return self.back(self.displaced_by(layer))


def _down(A: Tensor, frame: Frame) -> Tensor:
    """Return ``A [Q O]`` in the dtype of ``A``."""
    rows = A.reshape(-1, A.shape[-1])  # with more dimensions it would be a stack of matrices
    h = frame.project(rows).to(A.dtype)
    return h.reshape(*A.shape[:-1], h.shape[-1])


class _Pass:
    """One forward pass: an input, and the layers that have not run on it yet."""

    def __init__(
        self, x: Tensor, entered: Tensor, kept: Tensor, whole: bool, box: Box | None, tickets: dict[int, Tensor]
    ) -> None:
        self._x, self._version = weakref.ref(x), x._version
        self.entered, self._kept, self._whole, self._box = entered, kept, whole, box
        self.waiting = tickets

    def serves(self, number: int, x: Tensor, dtype: torch.dtype) -> bool:
        """Tell whether ``x`` is the input of this pass, unchanged, and layer ``number`` has not run on it."""
        same = self._x() is x and self._version == x._version and self.entered.dtype == dtype
        return same and number in self.waiting

    def join(self, number: int) -> LayerPass:
        return LayerPass(number, self._kept, self._whole, self.waiting.pop(number), self._box)
