"""Checkpoints that each rank writes a part of, and that any number of ranks, or one plain process, can go on from.

The model's tensors have the names of its ``state_dict``. The optimizer's have the name of their parameter and of the
entry,
such as ``model.layers.0.self_attn.q_proj.weight.exp_avg``, so that neither the number of ranks nor that of a parameter
in
some list means anything. DTensors (``torch.distributed.fsdp.fully_shard``) are written by the ranks that hold them;
plain
tensors, which must be the same on all ranks, by the first. What is no tensor, such as learning rates, is in
``index.json``.

Every function here is for all ranks to call together, or for one process without a group.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import empty as empty_dtensor

from subspan.checkpoints.collective import first_alone, gather, together, world
from subspan.checkpoints.shard_files import (
    INDEX,
    DamagedError,
    Part,
    Piece,
    Shards,
    Table,
    Written,
    copy_part,
    dtype_name,
    piece_of,
    write_index,
    write_parts,
)
from subspan.utils.errors import InputError

_WRAPPERS = {"DistributedDataParallel": "module", "OptimizedModule": "_orig_mod"}


def save_sharded(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write ``model`` and the state of ``optimizer`` into ``folder``, each rank its own part.

    The folder is not complete until this returns: write into a scratch folder, then rename it (``publish``).

    Raises:
        InputError: it holds a checkpoint, or cannot be written; or the optimizer holds what is neither tensor nor
            number.
    """
    save_sharded_async(folder, model, optimizer).wait()


def save_sharded_async(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> "PendingSave":
    """Copy everything to the host, and write it in the background; training may go on.

    The host holds a copy of this rank's part until the files are written.

    Returns:
        A handle. Without its ``wait``, which all ranks must call, there is no checkpoint.

    Raises:
        InputError: as ``save_sharded``; what goes wrong in writing is raised by ``wait``.
    """
    plain = _unwrapped(model)

    def prepare() -> tuple[dict[str, Part], Any]:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"folder={str(folder)!r}: cannot be made ({error.strerror}); give one that can be written"
            ) from error
        if (folder / INDEX).exists():
            raise InputError(f"folder={str(folder)!r}: holds a checkpoint; save into an empty folder")
        tensors = _model_tensors(plain)  # before names are asked for: it lets fully_shard put its shards in place
        state, settings = _optimizer_state(plain, optimizer)
        return {"model": copy_part(tensors), "optimizer": copy_part(state)}, settings

    parts, settings = together(prepare)
    rank, count = world()
    writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
    future = writer.submit(write_parts, folder, parts, rank, count)
    writer.shutdown(wait=False)
    return PendingSave(folder, {kind: part.table for kind, part in parts.items()}, settings, future)


@dataclass
class PendingSave:
    """A checkpoint that is being written."""

    _folder: Path
    _tables: dict[str, Table]
    _settings: Any
    _future: "Future[Written] | None"

    def done(self) -> bool:
        """Whether the files of this rank are written, so that ``wait`` waits for other ranks at most."""
        return self._future is None or self._future.done()

    def wait(self) -> None:
        """Return when the checkpoint is complete. For all ranks to call, at the same point of their work.

        Raises:
            InputError: a rank could not write its part. The folder is no checkpoint then.
        """
        if self._future is None:
            return
        written = gather(together(self._future.result))
        first_alone(lambda: write_index(self._folder, self._tables, written, self._settings))
        self._future = None


def load_sharded(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Make ``model`` and ``optimizer`` those of the checkpoint, exact in every bit, however many ranks wrote it.

    Everything is read and checked before anything is changed. Until it is copied, what has been read takes as much
    memory
    again, beside each tensor: less than the gradients and activations of the training to come.

    Raises:
        InputError: a file is missing, damaged or of another checkpoint; or the model or the optimizer is another one.
        ValueError: ``optimizer.load_state_dict`` refuses the state. Nothing has been changed in either case.
    """
    plain = _unwrapped(model)

    def examine() -> Shards:
        shards = Shards(folder)
        _check_model(shards, _model_tensors(plain))
        _check_optimizer(shards, plain, optimizer)
        shards.check(*world())
        return shards

    def read() -> tuple[dict[str, Any], dict[str, Tensor]]:
        state = _read_optimizer(shards, plain, optimizer)
        return state, _read_model(shards, plain)

    shards = together(examine)
    state, tensors = together(read)
    together(lambda: optimizer.load_state_dict(state))
    plain.load_state_dict(tensors)


def damage(folder: Path) -> str | None:
    """What is wrong with the files in ``folder``; ``None`` if all are as they were written. For one process."""
    try:
        Shards(folder).check()
    except DamagedError as error:
        return error.reason
    return None


# --- the model --------------------------------------------------------------------------------------------------------


def _unwrapped(model: nn.Module) -> nn.Module:
    while (inner := _WRAPPERS.get(type(model).__name__)) is not None:
        model = getattr(model, inner)
    return model


def _model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the model, one that has several names (tied weights) by the first of them."""
    return {names[0]: tensor for tensor, names in _tied(model)}


def _tied(model: nn.Module) -> list[tuple[Tensor, list[str]]]:
    names: dict[int, tuple[Tensor, list[str]]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():  # the variables themselves, so that ties show
        if not isinstance(tensor, Tensor):
            raise InputError(f"model: {name!r} in its state_dict is a {type(tensor).__name__}; expected tensors only")
        names.setdefault(id(tensor), (tensor, []))[1].append(name)
    return list(names.values())


def _check_model(shards: Shards, own: dict[str, Tensor]) -> None:
    saved = shards.tables["model"]
    for name in [*saved, *own]:
        if name not in own:
            raise shards.differs(f"names {name!r}, which this model does not have")
        if name not in saved:
            raise shards.differs(f"does not name {name!r}, which this model has")
        theirs, ours = saved[name], (dtype_name(own[name]), tuple(own[name].shape))
        if theirs != ours:
            raise shards.differs(f"has {name!r} as {theirs[0]} {theirs[1]}, this model as {ours[0]} {ours[1]}")


def _read_model(shards: Shards, model: nn.Module) -> dict[str, Tensor]:
    """What ``model.load_state_dict`` is to be given."""
    scratch, wanted = {}, {}
    for tensor, names in _tied(model):
        empty = torch.empty_like(tensor, requires_grad=False)
        wanted[names[0]] = piece_of(empty)
        scratch.update(dict.fromkeys(names, empty))
    shards.read("model", wanted)
    return scratch


# --- the optimizer ----------------------------------------------------------------------------------------------------


def _optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], Any]:
    """The tensors of the optimizer by name, and everything else of it as JSON can hold it."""
    tensors: dict[str, Tensor] = {}
    given, groups = optimizer.state_dict(), _names(model, optimizer)
    name_of = {
        number: name
        for group, names in zip(given["param_groups"], groups, strict=True)
        for number, name in zip(group["params"], names, strict=True)
    }
    state = {name_of[number]: _encode(own, name_of[number], tensors) for number, own in given["state"].items()}
    settings = [
        {
            key: _encode(value, f"param_groups.{number}.{key}", tensors)
            for key, value in group.items()
            if key != "params"
        }
        for number, group in enumerate(given["param_groups"])
    ]
    return tensors, {"kind": type(optimizer).__name__, "state": state, "param_groups": settings, "params": groups}


def _names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """The names of the parameters of each group."""
    names = {id(p): name for name, p in model.named_parameters()}
    for number, group in enumerate(optimizer.param_groups):
        for p in group["params"]:
            if id(p) not in names:
                raise InputError(
                    f"optimizer: parameter group {number} has a parameter of shape {tuple(p.shape)} that is not the "
                    "model's; "
                    "build the optimizer from the model, after fully_shard"
                )
    return [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]


def _encode(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """``value`` for JSON; what JSON has no word for becomes ``{its kind: ...}``. Tensors go to ``tensors``, under
    ``path``.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        assert path not in tensors, f"two tensors of the optimizer are called {path}"
        tensors[path] = value
        return {"tensor": path}
    if isinstance(value, (list, tuple)):
        items = [_encode(item, f"{path}.{index}", tensors) for index, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {key: _encode(item, f"{path}.{key}", tensors) for key, item in value.items()}}
    raise InputError(
        f"optimizer: {path} is a {type(value).__name__}; expected tensors, numbers, text, lists and dicts, since "
        "nothing else "
        "can be read from a file in safety"
    )


def _check_optimizer(shards: Shards, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """What ``load_state_dict`` does not see: that of torch knows numbers, not names, and no methods."""
    saved, groups = shards.settings, _names(model, optimizer)
    ours = type(optimizer).__name__
    knows = all("method" in group for group in optimizer.param_groups)  # our own optimizers say more when they refuse
    if not knows and saved["kind"] != ours:
        raise shards.differs(f"is of the optimizer {saved['kind']}, this one is {ours}")
    if [len(names) for names in groups] != [len(names) for names in saved["params"]]:
        return  # that it does see
    for theirs, own in zip(chain(*saved["params"]), chain(*groups), strict=True):
        if theirs != own:
            raise shards.differs(f"has parameter {theirs!r} where this optimizer has {own!r}")


def _read_optimizer(shards: Shards, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What ``optimizer.load_state_dict`` is to be given."""
    wanted: dict[str, Piece] = {}
    saved, table = shards.settings, shards.tables["optimizer"]

    def decode(value: Any, like: Any, p: Tensor | None) -> Any:
        if isinstance(value, list):
            return [decode(item, None, p) for item in value]
        if not isinstance(value, dict):
            return value
        ((kind, content),) = value.items()
        if kind == "tuple":
            return tuple(decode(item, None, p) for item in content)
        if kind == "dict":
            own = like if isinstance(like, dict) else {}
            return {key: decode(item, own.get(key), p) for key, item in content.items()}
        tensor = _empty(shards, content, like, p, fresh=p is not None and not optimizer.state.get(p))
        wanted[content] = piece_of(tensor)
        return tensor

    params = dict(model.named_parameters())
    state = {}
    for name, entry in saved["state"].items():
        p = params.get(name)
        state[name] = decode(entry, optimizer.state.get(p) if p is not None else None, p)
    own = optimizer.param_groups if len(optimizer.param_groups) == len(saved["param_groups"]) else []
    groups = []
    for number, (group, names) in enumerate(zip(saved["param_groups"], saved["params"], strict=True)):
        like = own[number] if own else {}
        groups.append({key: decode(value, like.get(key), None) for key, value in group.items()} | {"params": names})
    assert wanted.keys() == table.keys()
    shards.read("optimizer", wanted)
    return {"state": state, "param_groups": groups}


def _empty(shards: Shards, name: str, like: Any, p: Tensor | None, *, fresh: bool) -> Tensor:
    """Room for a tensor of the optimizer, placed over the ranks like the one it has, or else like the parameter."""
    named, shape = shards.tables["optimizer"][name]
    dtype = getattr(torch, named)
    model = like if isinstance(like, Tensor) else p if p is not None and shape == p.shape else None
    if not isinstance(model, DTensor):
        if fresh and isinstance(p, DTensor) and shape and model is None:
            raise shards.differs(
                f"has {name!r} of shape {shape}, for a parameter of shape {tuple(p.shape)}, and this optimizer has "
                "no state "
                "that would tell how it is spread over the ranks: load it on one process",
            )
        return torch.empty(shape, dtype=dtype, device=like.device if isinstance(like, Tensor) else "cpu")
    if shape == model.shape:
        return torch.empty_like(model, dtype=dtype, requires_grad=False)
    # Of another rank, say: what differs is for the optimizer to tell.
    return empty_dtensor(shape, dtype=dtype, device_mesh=model.device_mesh, placements=model.placements)
