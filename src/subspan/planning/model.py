"""The model and its optimizer on ``meta``, and what they hold."""

import contextlib
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from subspan.backward import Handle, project_backward
from subspan.costs.llama import VOCABULARY, Llama
from subspan.costs.state_costs import StateCosts
from subspan.factory import create, residual_of
from subspan.groups import RankPattern
from subspan.optimizer import SubspaceOptimizer
from subspan.planning.many_machines import MODELS
from subspan.planning.setting import PlanSetting
from subspan.planning.shapes import ShapesOnly
from subspan.planning.tasks import class_of, patches_of, positions_of_text
from subspan.recipes import find
from subspan.step.carriers import layer_of
from subspan.step.work import Slot, whole_layout
from subspan.training.data.tokenizer import load_tokenizer
from subspan.training.models.build import UNUSABLE, positions_of, preset_of
from subspan.training.models.presets import PRESETS, Preset, llama_of
from subspan.utils.errors import InputError, first_line, named
from subspan.utils.ranks import Rank

LARGER = {"llama-70b": MODELS["70B"]}
"""Models that are no presets of a run: their shapes, and a rank."""
_PROJECTING = logging.getLogger(project_backward.__module__)
_STEPS = 10_000  # length of the run, which a hybrid asks for; its memory does not depend on it


@dataclass(frozen=True)
class Chosen:
    """A model's config, and the values of the settings that were left to the model."""

    config: Any
    rank: Rank
    seq: int


def choose(setting: PlanSetting) -> Chosen:
    """Find the model of a setting.

    Raises:
        InputError: there is no model of this name, or it has too few positions.
    """
    if setting.model in LARGER:
        llama, rank = LARGER[setting.model]
        return Chosen(llama.config(setting.seq or 4096), setting.rank or rank, setting.seq or 4096)
    preset = preset_of(setting.model)
    if preset is not None:
        seq = setting.seq or preset.sequence_length
        return Chosen(with_vocabulary(preset).config(seq), setting.rank or preset.rank, seq)
    from transformers import AutoConfig

    path = Path(setting.model)
    try:
        config = AutoConfig.from_pretrained(path if path.exists() else setting.model)
    except UNUSABLE as error:
        raise InputError(
            f"model {setting.model!r} cannot be read: {first_line(error)}; give a config.json, a directory with one, "
            f"or one of {', '.join(PRESETS)}"
        ) from error
    if (patches := patches_of(config)) is not None:
        return Chosen(config, setting.rank or 128, patches)
    positions = positions_of(shapes_of(setting, config)) or positions_of_text(config)
    if setting.seq and positions is not None and positions < setting.seq:
        raise InputError(f"seq={setting.seq}: the model {setting.model!r} has {positions} positions; give fewer tokens")
    return Chosen(config, setting.rank or 128, setting.seq or min(1024, positions or 1024))


def with_vocabulary(preset: Preset) -> Llama:
    """The shapes of a preset, with the vocabulary of its runs.

    The tokenizer of T5 is on the hub; a preset that has it gets the vocabulary of the papers' models.
    """
    ours = preset.tokenizer in ("bytes", "embedded")
    return replace(llama_of(preset), v=len(load_tokenizer(preset.tokenizer)) if ours else VOCABULARY)


def shapes_of(setting: PlanSetting, config: Any) -> nn.Module:
    """Build the model on ``meta``, in the dtype of its weights."""
    kind = class_of(config)
    build = getattr(kind, "from_config", None) or kind._from_config  # an Auto class, or a model's own
    try:
        with torch.device("meta"):
            model: nn.Module = build(config, dtype=torch.float32)
    except UNUSABLE as error:
        raise InputError(
            f"model {setting.model!r} cannot be built: {named(error)}; give the config of a model of transformers"
        ) from error
    if setting.dtype == "bf16":
        for p in model.parameters():  # buffers stay as they are, as in a run
            p.data = p.data.to(torch.bfloat16)
    return model.train()


@contextlib.contextmanager
def _unsaid(logger: logging.Logger) -> Iterator[None]:
    """Let a logger say nothing for a moment, because a plan makes the same model several times."""
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


class Planned:
    """A model and its optimizer at one rank, or one share, on ``meta``.

    Attributes:
        held: bytes that one rank holds, by kind (``StateCosts.bytes_held``), and those of the buffers.
        step: the most bytes that a step of the optimizer on one parameter adds.
        refresh: the most bytes that it adds where a basis is chosen; 0 if none is.
        sides: for each matrix that is to be projected, the largest rank at which it still is; without the matrices that
            get their rank by name.
    """

    def __init__(self, setting: PlanSetting, config: Any, rank: Rank) -> None:
        self.setting, self.rank = setting, rank
        self.model = shapes_of(setting, config)
        self.handle: Handle | None = None
        if setting.is_backward_side:
            # Where the model asks for a value, ``ShapesOnly`` answers.
            with _unsaid(_PROJECTING), ShapesOnly([], "meta"):  # it is among the notes of the plan
                self.handle = project_backward(
                    self.model,
                    rank=rank,
                    rank_pattern=setting.rank_pattern,
                    share=setting.share,
                    residual=residual_of(setting.optimizer),
                )
        given: dict[str, Any] = {"8bit": {"state_dtype": "int8"}, "32bit": {"state_dtype": "float32"}}.get(
            setting.state or "", {}
        )
        if find(setting.optimizer).selector is not None and setting.sharded:
            given["proj_type"] = "right"
        self.optimizer = create(
            setting.optimizer,
            self.model,
            rank=rank,
            rank_pattern=setting.rank_pattern,
            total_steps=_STEPS,
            **given,
        )
        self.held = self._held()
        self.sides = self._sides()
        self.step, self.refresh = self._transients()

    # --- what stays ---------------------------------------------------------------------------------------------------

    def _held(self) -> dict[str, int]:
        optimizer, setting = self.optimizer, self.setting
        if isinstance(optimizer, SubspaceOptimizer):
            selector = None if find(setting.optimizer).selector is None else optimizer.selector
            state_dtype = optimizer.param_groups[0]["state_dtype"]
            costs = StateCosts(selector, optimizer.rule, optimizer.residual, state_dtype)
            for group in optimizer.param_groups if setting.sharded else ():
                for p in group["params"]:
                    optimizer.check_shardable(p, group)
        else:  # torch's AdamW
            recipe = find(setting.optimizer)
            width = next(self.model.parameters()).element_size()
            costs = StateCosts(None, recipe.rule, recipe.residual, width=width)
        held = costs.bytes_held(optimizer.param_groups, parallel=setting.parallel, world=setting.world)
        made = set() if self.handle is None else {id(layer._parameters["weight"]) for layer in self.handle.layers}
        frozen = [p for p in self.model.parameters() if not p.requires_grad and id(p) not in made]
        share = setting.world if setting.sharded else 1
        held["weights"] += sum(p.numel() * p.element_size() for p in frozen) // share
        return held | {"buffers": sum(b.numel() * b.element_size() for b in self.model.buffers())}

    def _sides(self) -> list[int]:
        if self.handle is not None:
            return [layer.in_features for layer in self.handle.layers if not layer.projection.by_pattern]
        pattern = RankPattern(self.setting.rank_pattern)
        return [min(slot.layout.shape[-2:]) - 1 for slot in self._projected() if pattern.finds(slot.name) is None]

    def _projected(self) -> list[Slot]:
        """The matrices that are to be projected, and are unless the rank reaches a side."""
        if not isinstance(self.optimizer, SubspaceOptimizer):
            return []
        return [slot for slot in self.optimizer.slots() if slot.group["rank"] is not None]

    def counts(self) -> dict[str, int]:
        """All counts that are linear in the number of blocks.

        The number of matrices of a rank has the rank as key. That of a rank and a sketch beside it has both, as in
        ``16 + 16``.
        """
        found = self._ranks()
        ranks = Counter(str(rank) for rank, _ in sorted(found) if rank)
        sketched = Counter(f"{rank} + {width}" for rank, width in sorted(found) if width)
        counted = {"full": sum(rank == 0 for rank, _ in found), "matrices": len(found)}
        return self.held | {"step": self.step, "refresh": self.refresh} | counted | ranks | sketched

    def _ranks(self) -> list[tuple[int, int]]:
        """The rank of each matrix that is to be projected, 0 for full rank, and the width of its sketch."""
        if self.handle is not None:
            return [(layer.projection.rank, layer.projection.sketch_width) for layer in self.handle.layers]
        residual = residual_of(self.setting.optimizer)
        layouts = [slot.layout for slot in self._projected()]
        return [
            (0, 0) if one.rank is None else (one.rank, residual.sketch_width(one.oriented[-1], one.rank))
            for one in layouts
        ]

    # --- what comes and goes ------------------------------------------------------------------------------------------

    def _transients(self) -> tuple[int, int]:
        states = [
            value for state in self.optimizer.state.values() for value in state.values() if isinstance(value, Tensor)
        ]
        self._there = [*self.model.parameters(), *self.model.buffers(), *states]
        if not isinstance(self.optimizer, SubspaceOptimizer):
            return self._step_of_torch(), 0
        step = refresh = 0
        for parameters, projected in self._representatives():
            gradients = [torch.empty_like(p) for p in parameters]
            for p, gradient in zip(parameters, gradients, strict=True):
                p.grad = gradient
            first, second = self._stepping(gradients), self._stepping(gradients)
            for p in parameters:
                p.grad = None
            # A sketch is whole on every rank, as a basis is.
            layer = layer_of(parameters[0])
            divided = not projected and (layer is None or layer.projection.sketch_width == 0)
            share = self.setting.world if self.setting.sharded and divided else 1
            step = max(step, second // share)
            if projected:
                refresh = max(refresh, first)
        if self.handle is not None:
            refresh = max(self._choosing(kind[0]) for kind in self._kinds())
        return step, refresh

    def _representatives(self) -> list[tuple[list[Tensor], bool]]:
        """One parameter of each shape in each group, and whether the optimizer projects it.

        The carriers of layers that share a basis are together, because they step with one sketch.
        """
        found: dict[Any, tuple[list[Tensor], bool]] = {}
        for kind in [] if self.handle is None else self._kinds():
            found[len(found)] = ([layer.carrier for layer in kind[0].layers], False)
        for number, group in enumerate(self.optimizer.param_groups):
            for p in group["params"]:
                if layer_of(p) is None:
                    side = whole_layout(p, group).side
                    found.setdefault((number, p.shape), ([p], side is not None and self.handle is None))
        return list(found.values())

    def _stepping(self, gradients: list[Tensor]) -> int:
        with ShapesOnly([*self._there, *gradients], "meta") as live:
            before = live.now
            self.optimizer.step()
        return live.peak - before

    def _step_of_torch(self) -> int:
        """The most bytes that a step of torch's AdamW adds, on all parameters at once as on an accelerator."""
        for group in self.optimizer.param_groups:
            group["foreach"] = True
        for p in self.model.parameters():
            p.grad = torch.empty_like(p)
        self.optimizer.step()  # the first step makes the state
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        taken = self._stepping([*(p.grad for p in self.model.parameters() if p.grad is not None), *states])
        self.optimizer.zero_grad(set_to_none=True)
        return taken // (self.setting.world if self.setting.sharded else 1)

    def _kinds(self) -> list[list[Any]]:
        """The projections, in lists of those that are alike."""
        assert self.handle is not None
        kinds: dict[Any, list[Any]] = {}
        for projection in self.handle.projections:
            shapes = tuple(layer.weight.shape for layer in projection.layers)
            kinds.setdefault((projection.rank, shapes), []).append(projection)
        return list(kinds.values())

    def costly_projections(self) -> list[Any]:
        """The projections among which is the one whose choice makes the peak of a step highest.

        They are the last and the first of each kind, because the peak lies at one of the ends of the backward pass. A
        kind is left out where another takes no less to be chosen, from an input no narrower. The input counts because
        a gradient is formed from it, so it is saved whole from the forward pass on.
        """
        assert isinstance(self.optimizer, SubspaceOptimizer)
        saves = self.optimizer.selector.needs_gradient
        kinds = self._kinds()
        sizes = [(self._choosing(kind[0]), kind[0].layers[0].in_features * saves) for kind in kinds]
        costly = [
            kind
            for kind, size in zip(kinds, sizes, strict=True)
            if not any(own != size and own[0] >= size[0] and own[1] >= size[1] for own in sizes)
        ]
        return [projection for kind in costly for projection in dict.fromkeys((kind[-1], kind[0]))]

    def _choosing(self, projection: Any) -> int:
        """Bytes that choosing its basis takes: its layers' gradients, the same stacked, and what the selector needs."""
        optimizer = self.optimizer
        assert isinstance(optimizer, SubspaceOptimizer)
        if not optimizer.selector.needs_gradient:
            return self.selecting(projection)
        return 2 * self._formed.itemsize * sum(layer.weight.numel() for layer in projection.layers) + self.selecting(
            projection
        )

    @property
    def _formed(self) -> torch.dtype:
        """The dtype of a gradient that the backward pass forms, which is that of activations."""
        return torch.float32 if self.setting.dtype == "fp32" else torch.bfloat16

    def selecting(self, projection: Any) -> int:
        """The part of these bytes that the selector takes, and the moments when they follow it."""
        optimizer, first = self.optimizer, projection.layers[0].weight
        assert isinstance(optimizer, SubspaceOptimizer)
        G = None
        if optimizer.selector.needs_gradient:
            rows = sum(layer.out_features for layer in projection.layers)
            G = torch.empty(rows, first.shape[1], dtype=self._formed, device="meta")
        with ShapesOnly([*self._there, *([] if G is None else [G])], "meta") as live:
            before = live.now
            optimizer.carriers.refresh_projection(projection, G)
        return live.peak - before
