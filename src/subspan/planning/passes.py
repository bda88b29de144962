"""Forward and backward passes on tensors without memory: what autograd saves, and what is alive at the peak."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from subspan.costs.saved_activations import SavedBytes
from subspan.optimizer import SubspaceOptimizer
from subspan.planning.model import Planned
from subspan.planning.shapes import ShapesOnly
from subspan.planning.tasks import inputs_of, loss_of, predicts_next
from subspan.step.carriers import Plan
from subspan.storage.allocation import State
from subspan.training.data.batches import Batch
from subspan.training.evaluation import token_losses
from subspan.training.models.blocks import blocks_of
from subspan.utils.errors import InputError, named


class Passes:
    """The passes of a planned model. The model is of no use for anything else afterwards."""

    def __init__(self, planned: Planned, seq: int) -> None:
        self.planned, self.setting, self.seq = planned, planned.setting, seq
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._chooser: _Chooser | None = None
        if planned.handle is not None:
            self._chooser = _Chooser(planned)
        self.blocks = blocks_of(planned.model)
        self._checkpointing = False
        with self._fake:
            planned.model.to_empty(device="cpu")
            if (tie := getattr(planned.model, "tie_weights", None)) is not None:
                tie()
        if not self.setting.keeps_gradients:
            for p in planned.model.parameters():
                if p.requires_grad:
                    p.register_post_accumulate_grad_hook(_forget)
        with self._fake:
            self._bases = [] if self._chooser is None else self._chooser.bind()

    def saved(self, batch: int) -> int:
        """Bytes that autograd keeps for the backward pass of an ordinary step, without those of parameters.

        With checkpointing it keeps the inputs of the blocks, and everything of the one block that is run again.
        """
        with self._fake, _taken_for_real():
            self._checkpoint(False)
            if self._chooser is not None:
                self._chooser.keep()
            saved, within = self._forward(batch)
            if not self.setting.checkpointing:
                return saved
            self._checkpoint(True)
            return self._forward(batch)[0] + within

    def peaks(self, batch: int) -> list[list[int]]:
        """The most bytes that the passes add to what was there before the forward pass.

        Returns:
            For each step a list: the peak until the gradients of the last block are there, then until those of the
            block before are there, and so on. Backward-side there are several steps, each of which chooses one basis;
            the highest peak is that of one of them.
        """
        with self._fake, _taken_for_real():
            self._checkpoint(self.setting.checkpointing)
            if self._chooser is None:
                return [self._segments(batch)]
            found = []
            for projection in self._chooser.costly:
                self._chooser.choose(projection)
                found.append(self._segments(batch))
        return found

    def _segments(self, batch: int) -> list[int]:
        model, given = self.planned.model, self._batch(batch)
        inputs = [given.inputs, given.targets] if isinstance(given, Batch) else list(given.values())
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        with ShapesOnly([*model.parameters(), *model.buffers(), *self._bases, *tensors]) as live:
            before, segments = live.now, []

            def passed() -> None:
                segments.append(live.peak - before)
                live.peak = live.now

            hooks = [hook for block in self.blocks[1:] for hook in _when_done(block, passed)]
            loss = self._loss(given)
            loss.backward()
            del loss
            segments.append(live.peak - before)
        for hook in hooks:
            hook.remove()
        model.zero_grad(set_to_none=True)
        return segments

    def of_a_block(self) -> int:
        """Bytes of the gradients of a block that stay after the block has been gone through."""
        trained = [p.numel() * p.element_size() for p in self.blocks[0].parameters() if p.requires_grad]
        return sum(trained) if self.setting.keeps_gradients else 0

    def gathered(self) -> int:
        """The most bytes that ``fully_shard`` has of other ranks' parts.

        They are the weights of two blocks and of what is outside of blocks, the whole gradients of one block and of
        what is outside, and a copy of the block's gradients to send.
        """
        inside = [sum(p.numel() * p.element_size() for p in block.parameters()) for block in self.blocks]
        trained = [
            sum(p.numel() * p.element_size() for p in block.parameters() if p.requires_grad) for block in self.blocks
        ]
        outside = sum(p.numel() * p.element_size() for p in self.planned.model.parameters()) - sum(inside)
        return 2 * max(inside, default=0) + 2 * outside + 2 * max(trained, default=0)

    def _forward(self, batch: int) -> tuple[int, int]:
        """Saved bytes of the whole model, and those of the first block without its input."""
        model, entered, block = self.planned.model, [0], self.blocks[:1]
        given = self._batch(batch)

        def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
            tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
            hidden = kwargs.get("hidden_states", tensors[0] if tensors else torch.empty(0))
            entered[0] = hidden.numel() * hidden.element_size()

        hooks = [part.register_forward_pre_hook(enter, with_kwargs=True) for part in block]
        # This mode answers where code asks for a value.
        with ShapesOnly([]), SavedBytes(model, block, self._bases) as saved:
            self._loss(given)
        for hook in hooks:
            hook.remove()
        return saved.total, saved.by_layers - entered[0]

    def _batch(self, batch: int) -> Batch | dict[str, Any]:
        if not predicts_next(self.planned.model):
            return inputs_of(self.planned.model, batch, self.seq)
        ids = torch.zeros(batch, self.seq, dtype=torch.long)
        return Batch(ids, ids.clone())

    def _checkpoint(self, wanted: bool) -> None:
        if wanted == self._checkpointing:
            return
        model: Any = self.planned.model
        how = "enable" if wanted else "disable"
        # The second name is the one that transformers had before version 5.
        change = getattr(model, f"activation_checkpointing_{how}", None) or getattr(
            model, f"gradient_checkpointing_{how}", None
        )
        if change is None:
            raise InputError(f"checkpointing=True: {type(model).__name__} has no checkpointing; leave it out")
        change()
        self._checkpointing = wanted

    def _loss(self, batch: Batch | dict[str, Any]) -> Tensor:
        """Run the model forward.

        Raises:
            InputError: the model asks for a value that a tensor without memory does not have, or its sizes contradict
                each other.
        """
        with torch.autocast("cpu", torch.bfloat16, enabled=self.setting.dtype == "bf16-mixed"):
            try:
                if isinstance(batch, Batch):
                    return token_losses(self.planned.model, batch)
                return loss_of(self.planned.model, batch)
            except RuntimeError as error:  # torch's errors of fake tensors are among them
                raise InputError(
                    f"model {self.setting.model!r} cannot run on tensors without memory: {named(error)}; measure a "
                    "step of it instead"
                ) from error


class _Chooser:
    """Stands in for the optimizer where a backward-side layer needs a basis.

    It takes the memory that choosing a basis takes, and chooses none.
    """

    def __init__(self, planned: Planned) -> None:
        assert planned.handle is not None
        assert isinstance(planned.optimizer, SubspaceOptimizer)
        self._projections, self._method = planned.handle.projections, planned.optimizer.method
        self.costly = planned.costly_projections()
        self._takes = {projection: planned.selecting(projection) for projection in self.costly}

    def bind(self) -> list[Tensor]:
        """Give every projection a basis."""
        bases = []
        for projection in self._projections:
            state = self._method.selector.init(projection.layers[0].weight, projection.rank)
            projection.bind(self._method.selector, self._method.residual, state, self)
            bases += [value for value in state.values() if isinstance(value, Tensor)]
        return bases

    def keep(self) -> None:
        """Let the next pass keep all bases."""
        for projection in self._projections:
            self._expect(projection, "keep")

    def choose(self, projection: Any) -> None:
        """Let the next pass choose this basis, and no other."""
        self.keep()
        self._expect(projection, "form" if self._method.selector.needs_gradient else "draw")

    def _expect(self, projection: Any, plan: Plan) -> None:
        projection.expect(plan, self._method.key(projection.layers[0].weight_name, 0))

    def look(self, device: torch.device, state: State) -> None:
        """Do nothing: a plan moves no model."""

    def refresh_projection(self, projection: Any, G: Tensor | None) -> None:
        """Take the memory, and leave the basis as it is."""
        torch.empty(self._takes[projection], dtype=torch.uint8)
        projection.plan = "keep"


@contextlib.contextmanager
def _taken_for_real() -> Iterator[None]:
    """Let transformers take fake tensors for real ones.

    It takes them for tensors that are traced, and would make attention masks that a real step does without.
    """
    from transformers.utils import import_utils

    own = getattr(import_utils, "is_fake_tensor", None)
    if own is None:  # a transformers that does not look
        yield
        return
    import_utils.is_fake_tensor = lambda _: False
    try:
        yield
    finally:
        import_utils.is_fake_tensor = own


def _forget(p: Tensor) -> None:
    p.grad = None


def _when_done(block: nn.Module, then: Callable[[], None]) -> list[Any]:
    """Add hooks that call ``then`` once all gradients of ``block`` are there."""
    waiting = {id(p) for p in block.parameters() if p.requires_grad}

    def receive(p: Tensor) -> None:
        waiting.discard(id(p))
        if not waiting:
            then()

    return [p.register_post_accumulate_grad_hook(receive) for p in block.parameters() if p.requires_grad]
