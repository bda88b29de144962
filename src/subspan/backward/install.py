"""Turning the linear layers of a model into backward-side layers (``project_backward``), and back (``Handle``)."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from subspan.backward.conv1d import convert
from subspan.backward.inputs import Inputs
from subspan.backward.layer import BackwardLinear
from subspan.backward.projection import Projection
from subspan.backward.sharing import Share, groups_of, met_by, of_one_rank, passes_on
from subspan.distributed import is_sharded, several_processes
from subspan.groups import EXCLUDED, RankPattern, check_rank, select_linear
from subspan.parts import Key, Residual, Selector, check_part
from subspan.roles import inputs_of
from subspan.storage.allocation import State, is_plain
from subspan.utils.compiler import untraced
from subspan.utils.errors import SettingError
from subspan.utils.ranks import Rank, rank_of_side

logger = logging.getLogger(__name__)
_WRAPPERS = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule", "DeepSpeedEngine")


class Noting:
    """What a model with backward-side layers does before a pass: they learn which wrapper averages their gradients.

    A layer learns it in its own pass too, but on this rank none of them may run.
    """

    def __init__(self, projections: list[Projection]) -> None:
        self.projections = projections

    @untraced  # it asks Python, not tensors
    def __call__(self, model: nn.Module, inputs: Any) -> None:
        if several_processes():
            self.projections[0].note_wrapper()


class Handle:
    """The backward-side layers of a model.

    Args:
        projections: the bases, each with the layers that share it.
        divided: a sentence on layers that have one input and different ranks, and so share no basis, if there are any.
    """

    def __init__(self, projections: list[Projection], divided: str | None = None) -> None:
        self.projections, self.divided = projections, divided
        self.noting: Any = None

    @property
    def layers(self) -> Iterator[BackwardLinear]:
        """Every layer, projection by projection."""
        return (layer for projection in self.projections for layer in projection.layers)

    @torch.no_grad()
    def enter(self, selector: Selector, *, seed: int = 0, step: int = 0) -> list[nn.Parameter]:
        """Draw new random subspaces, to train in with any optimizer of torch: randomized subspace optimization by hand.

        The displacement in the old subspaces is merged, new bases are drawn, and the carriers are set to zero. From
        then on the layers compute ``x Wᵀ + (x Q) Bᵀ``. The carriers ``B`` are ordinary parameters, for example of
        ``torch.optim.LBFGS``::

            for outer in range(100):
                inner = torch.optim.LBFGS(handle.enter(selectors.Random(scaled=True), step=outer))
                inner.step(closure)

        Args:
            selector: draws the bases. It must need no gradient, such as ``selectors.Random(scaled=True)``.
            seed, step: what the draw depends on, together with the names of the layers.

        Returns:
            The carriers.

        Raises:
            SettingError: the selector needs a gradient, or the layers have a sketch.
        """
        if selector.needs_gradient:
            raise SettingError(
                f"selector={selector!r}: chooses from a gradient; give one that draws, such as selectors.Random()"
            )
        if any(projection.sketch_width for projection in self.projections):
            raise SettingError(
                "enter(): these layers were made with a residual that has a sketch, which only an optimizer of subspan "
                "draws; leave residual out of project_backward"
            )
        self._check_whole("enter")
        for projection in self.projections:
            projection.fold()
            first = projection.layers[0]
            state = selector.init(first.weight, projection.rank)
            like = first.weight.new_ones(1, first.in_features)
            selector.refresh_(like, state, Key(seed, first.weight_name, step))
            projection.bind(selector, None, state, self)
            projection.expect("keep")
            projection.displaced = True
        return [layer.carrier for layer in self.layers]

    def look(self, device: torch.device, state: State) -> None:
        """Do nothing: a basis that ``enter`` draws stays where it was drawn."""

    def refresh_projection(self, projection: Projection, G: Tensor | None) -> None:
        """Raise, because bases that ``enter`` draws change only when it is called again."""
        raise AssertionError("subspaces entered by hand are not refreshed")

    def _check_whole(self, what: str) -> None:
        if any(is_sharded(layer.carrier) for layer in self.layers):
            raise SettingError(
                f"{what}(): fully_shard has sharded these layers' weights; save the model's state_dict, which is that of "
                "the plain model, and load it into a plain model"
            )

    def merge(self) -> None:
        """Add displacements to the weights, which are then those of the plain model. The layers stay backward-side."""
        for projection in self.projections:
            projection.fold()

    def remove(self) -> None:
        """Merge, and make every layer what it was again, with a weight that gets gradients.

        The optimizer that was built for the carriers cannot be used any more.
        """
        self._check_whole("remove")
        self.merge()
        for layer in list(self.layers):
            layer.leave()
        if self.noting is not None:
            self.noting.remove()
        self.projections = []


def project_backward(
    model: nn.Module,
    *,
    rank: Rank,
    rank_pattern: Mapping[str, Rank] | None = None,
    targets: str | Sequence[str] = "all-linear",
    exclude: Sequence[str] = EXCLUDED,
    share: Share = "auto",
    merge: Literal["step", "refresh"] = "step",
    select_from: Literal["owner", "mean"] = "owner",
    process_group: Any = None,
    residual: Residual | None = None,
) -> Handle:
    """Let the backward pass make the low-rank gradient of linear layers, ``R = dyᵀ (x Q)``, and nothing larger.

    Call it before the optimizer is built, and before DistributedDataParallel wraps the model. The layers are changed in
    place. Each keeps its weight, which gets no gradient any more. It also gets a ``carrier (out, r)``, an ordinary
    parameter whose gradient is ``R``. The bases belong to the optimizer.

    Args:
        model: the model with the layers.
        rank: dimension of the subspaces of the inputs, from 1 to the number of input features, or its share of them,
            such as 0.25.
        rank_pattern: other ranks by regular expression, such as ``{r"q_proj": 32, r"mlp": 0.5}``, whole numbers or
            shares. The first one that is found in the canonical name of a layer's weight gives its rank. Layers of
            different rank share no basis, also where they have the same input; a warning says so.
        targets, exclude: which layers to change, of class ``nn.Linear`` or transformers' ``Conv1D``; see
            ``subspan.param_groups``. Stacks of experts are left out; the optimizer projects them.
        share: which layers have one basis and save one ``x Q``. ``"auto"`` runs the model once on its ``dummy_inputs``,
            which models of transformers have, or on an image or a spectrogram of the size in its config; layers that
            get the same tensor share. If the model does not run, no layers share, and a warning says so. A dict is
            inputs of the model to run it on instead. Lists of names, such as ``[["q_proj", "k_proj", "v_proj"],
            ["gate_proj", "up_proj"]]``, say which layers share. With ``"none"`` no layers share. Whatever it is, bases
            that get the same tensor save no more of it than the tensor: where their ``x Q`` are together as wide, ``x``
            is saved once and ``x Q`` is made in the backward pass, with the same bits. Which bases these are is seen in
            the passes, and before the first one if the model runs on inputs of its own.
        merge: when steps go into the weight. With ``"step"`` each step changes the weight. With ``"refresh"`` steps add
            up in the carrier, in fp32, and the weight changes when the basis does; this is for weights in bf16, which
            lose small steps. Saving merges a copy. Code that reads ``layer.weight`` itself, such as an average of the
            model, sees these steps only after ``Handle.merge``.
        select_from: whose gradient chooses a basis where there are several data-parallel ranks. ``"owner"`` takes that
            of one rank, on its own part of the batch; each basis has another rank. ``"mean"`` takes the mean over the
            ranks. In both cases one rank chooses and sends the basis to the others. Random bases need neither.
        process_group: the data-parallel ranks of this model, for a program that averages gradients without
            DistributedDataParallel. With ``None`` they are those of the DistributedDataParallel that wraps the model
            when it runs. Without a wrapper the model is on this process only, whatever other processes there are.
        residual: that of the optimizer, if it has a sketch, such as ``subspan.residuals.Sketch()``. Then ``x [Q O]`` is
            saved in place of ``x Q``, a carrier is ``(out, r + s)``, and its gradient is ``[R T]``, whose squared norm,
            with the unbiased weight, is on average that of the whole gradient.

    Returns:
        A handle, to merge the displacement or to undo everything.

    Raises:
        SettingError: a target or a rank pattern matches nothing, a target is no ``nn.Linear``, a weight is tied, a rank
            is out of range, ``share`` lists layers whose ranks differ, or the model is wrapped. The model is not
            changed then.
    """
    for module in model.modules():
        if any(kind.__name__ in _WRAPPERS for kind in type(module).__mro__):
            raise SettingError(
                f"model: {type(module).__name__} has wrapped it already; call project_backward first, so that the "
                "carriers are among the parameters that the wrapper sees"
            )
        if isinstance(module, BackwardLinear):
            raise SettingError("model: has backward-side layers already; call remove() on their handle first")
    if merge not in ("step", "refresh"):
        raise SettingError(f"merge={merge!r}: expected 'step' or 'refresh'")
    if select_from not in ("owner", "mean"):
        raise SettingError(f"select_from={select_from!r}: expected 'owner' or 'mean'")
    if residual is not None:
        check_part(residual, Residual, "residual", "residuals.Sketch()")
        if residual.needs_gradient:
            raise SettingError(
                f"residual={residual!r}: needs every gradient, and backward-side layers form none; give one with a "
                "sketch, such as residuals.Sketch(), or none"
            )
    check_rank(rank)
    pattern = RankPattern(rank_pattern)
    layers = select_linear(model, targets, exclude)
    pattern.check_used([f"{name}.weight" for name in layers])
    asked = {name: pattern.of(f"{name}.weight", rank) for name in layers}
    ranks = {name: rank_of_side(asked[name], inputs_of(layer)) for name, layer in layers.items()}
    owners: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(p), []).append(name)
    for name, layer in layers.items():
        if ranks[name] > inputs_of(layer):
            found = pattern.finds(f"{name}.weight")
            raise SettingError(
                f"{'rank' if found is None else f'rank_pattern[{found!r}]'}={ranks[name]}: above the {inputs_of(layer)} "
                f"input features of {name!r}; lower it, or exclude the layer"
            )
        if len(tied := owners[id(layer.weight)]) > 1:
            raise SettingError(
                f"targets: the weight of {name!r} is tied ({', '.join(tied)}), so its gradient does not come from this "
                "layer only; exclude it"
            )
        if not is_plain(layer.weight):
            raise SettingError(
                f"targets: the weight of {name!r} is a {type(layer.weight).__name__}, which a backward-side layer cannot "
                "multiply by; exclude it, and the optimizer projects it"
            )
        if not layer.weight.requires_grad:
            raise SettingError(f"targets: the weight of {name!r} is frozen; exclude it")
    met = met_by(model, layers, share)
    groups, divided = of_one_rank(groups_of(model, layers, share, met), ranks, share)
    if divided is not None:
        logger.warning("%s", divided)
    projections, inputs = [], Inputs()
    for names in groups:
        patterned = [pattern.finds(f"{name}.weight") is not None for name in names]
        first = names[patterned.index(False)] if not all(patterned) else names[0]
        r = ranks[first]
        s = 0 if residual is None else residual.sketch_width(inputs_of(layers[first]), r)
        projection = Projection(
            r,
            merge,
            select_from,
            process_group,
            inputs=inputs,
            in_features=inputs_of(layers[first]),
            sketch_width=s,
            asked=asked[first],
            by_pattern=all(patterned),
        )
        for name in names:
            convert(layers[name]).join(projection, f"{name}.weight")
        projections.append(projection)
    number_of = {name: number for number, names in enumerate(groups) for name in names}
    for names in met or ():
        inputs.note(passes_on(names, number_of, groups))
    logger.info("backward-side: %d linear layers at rank %s share %d bases", len(layers), rank, len(projections))
    for projection in projections:
        projection.peers = projections
    handle = Handle(projections, divided)
    handle.noting = model.register_forward_pre_hook(Noting(projections))
    return handle
