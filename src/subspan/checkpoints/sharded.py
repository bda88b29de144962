"""Sharded checkpoints: each rank writes its own shards, and any number of ranks, or one process, can go on from them.

The model's tensors have the names of its ``state_dict``. Those of the optimizer have the name of their parameter and of
the entry, such as ``model.layers.0.self_attn.q_proj.weight.exp_avg``. Neither depends on the number of ranks, on the
order of parameters, or on what wraps the model or a layer (``torch.compile``, data parallelism, activation
checkpointing). DTensors (``torch.distributed.fsdp.fully_shard``) are written by the ranks that hold them, and plain
tensors, which must be equal on all ranks, by the first rank. What is no tensor, such as learning rates, is in
``index.json``.

Every function here is for all ranks to call together, or for one process without a group.
"""

import contextlib
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import empty as empty_dtensor

from subspan.checkpoints.collective import gather, is_agreed, on_first, together, world
from subspan.checkpoints.directory import INDEX, model_tensors, tensor_bytes
from subspan.checkpoints.shard_files import (
    DamagedError,
    HostCopy,
    Piece,
    Shards,
    Table,
    Written,
    copy_to_host,
    dtype_name,
    own_files,
    piece_of,
    write_index,
    write_shards,
)
from subspan.utils.atomic_files import is_full, no_space
from subspan.utils.errors import InputError
from subspan.utils.names import canonical_names


def save_sharded(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write ``model`` and the state of ``optimizer`` into ``folder``, each rank its own shards.

    The folder holds no checkpoint until this returns. ``subspan.checkpoints.writer.new_checkpoint`` gives a folder that
    appears under its name when all is written.

    Raises:
        InputError: the folder holds a checkpoint already, or the disk does not take this one; then nothing of it is
            left. Or the optimizer holds what is neither tensor nor number. It is the same on all ranks.
    """
    save_sharded_async(folder, model, optimizer).wait()


def save_sharded_async(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> "PendingSave":
    """Copy everything to the host, and write it in the background while training goes on.

    The host holds a copy of this rank's shards until the files are written.

    Returns:
        A handle. There is no checkpoint before all ranks have called its ``wait``.

    Raises:
        InputError: see ``save_sharded``; what goes wrong in writing is raised by ``wait``.
    """

    def prepare() -> tuple[dict[str, HostCopy], Any]:
        _open(folder, model, optimizer)
        tensors = _model_tensors(model)  # before names are asked for: it lets fully_shard put its shards in place
        state, settings = _optimizer_state(model, optimizer)
        return {"model": copy_to_host(tensors), "optimizer": copy_to_host(state)}, settings

    copies, settings = together(prepare)
    paths = own_files(folder, copies)
    writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
    future = writer.submit(write_shards, paths, copies)
    writer.shutdown(wait=False)
    return PendingSave(folder, paths, {kind: copy.table for kind, copy in copies.items()}, settings, future)


def _open(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if is_full(error):
            needed = tensor_bytes([model.state_dict(), optimizer.state_dict()])
            raise no_space(f"checkpoint {folder}", folder, error, needed) from error
        raise InputError(
            f"folder={str(folder)!r}: cannot be made ({error.strerror}); give one that can be written"
        ) from error
    if (folder / INDEX).exists():
        raise InputError(f"folder={str(folder)!r}: holds a checkpoint; save into an empty folder")


@dataclass
class PendingSave:
    """A checkpoint that is being written."""

    _folder: Path
    _paths: dict[str, Path]
    _tables: dict[str, Table]
    _settings: Any
    _future: "Future[Written] | None"
    _failure: Exception | None = None

    def done(self) -> bool:
        """Whether the files of this rank are written, so that ``wait`` waits only for other ranks."""
        return self._future is None or self._future.done()

    def wait(self) -> None:
        """Return when the checkpoint is complete. For all ranks to call, at the same point of their work.

        Raises:
            InputError: the disk of a rank did not take its shards. Nothing of the checkpoint is left.
        """
        if self._failure is not None:
            raise self._failure
        if self._future is None:
            return
        try:
            written = gather(together(self._future.result))
            on_first(lambda: write_index(self._folder, self._tables, written, self._settings))
        except Exception as error:
            self._failure = error
            if is_agreed(error):  # all ranks are here, and none goes on before all have removed their files
                together(self._remove)
            else:
                self._remove()
            raise
        self._future = None

    def _remove(self) -> None:
        """Remove what this rank has written of a checkpoint that will not be complete."""
        first = [self._folder / INDEX] if world()[0] == 0 else []
        for path in (*first, *self._paths.values()):
            with contextlib.suppress(OSError):
                path.unlink()


def load_sharded(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Make ``model`` and ``optimizer`` those of the checkpoint, exact in every bit, however many ranks wrote it.

    Everything is read and checked before anything is changed. Until it is copied, what has been read takes as much
    memory again as the local shards. That is less than the gradients and activations of the training to come.

    Raises:
        InputError: a file is missing, damaged or of another checkpoint; or the model or the optimizer is another one.
        ValueError: ``optimizer.load_state_dict`` refuses the state. Nothing has been changed in either case.
    """

    def examine() -> Shards:
        shards = Shards(folder)
        _check_model(shards, _model_tensors(model))
        _check_optimizer(shards, model, optimizer)
        shards.check(*world())
        return shards

    def read() -> tuple[dict[str, Any], dict[str, Tensor]]:
        state = _read_optimizer(shards, model, optimizer)
        return state, _read_model(shards, model)

    shards = together(examine)
    state, tensors = together(read)
    together(lambda: optimizer.load_state_dict(state))
    model.load_state_dict(tensors)


def damage(folder: Path) -> str | None:
    """Return what is wrong with the files in ``folder``, or ``None`` if all are as written. For one process."""
    try:
        Shards(folder).check()
    except DamagedError as error:
        return error.reason
    return None


# --- the model --------------------------------------------------------------------------------------------------------


def _model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of the model by canonical name; tied weights by the first of their names."""
    tensors = {names[0]: tensor for tensor, names in model_tensors(model)}
    return {canonical: tensors[name] for name, canonical in canonical_names(tensors).items()}


def _check_model(shards: Shards, own: dict[str, Tensor]) -> None:
    saved = {name: shards.tables["model"][stored] for name, stored in shards.model_names.items()}
    for name in [*saved, *own]:
        if name not in own:
            raise shards.differs(f"names {name!r}, which this model does not have")
        if name not in saved:
            raise shards.differs(f"does not name {name!r}, which this model has")
        theirs, ours = saved[name], (dtype_name(own[name]), tuple(own[name].shape))
        if theirs != ours:
            raise shards.differs(f"has {name!r} as {theirs[0]} {theirs[1]}, this model as {ours[0]} {ours[1]}")


def _read_model(shards: Shards, model: nn.Module) -> dict[str, Tensor]:
    """Read what ``model.load_state_dict`` is to be given."""
    scratch, wanted = {}, {}
    tensors = model_tensors(model)
    canonical = canonical_names(names[0] for _, names in tensors)
    for tensor, names in tensors:
        empty = torch.empty_like(tensor, requires_grad=False)
        wanted[shards.model_names[canonical[names[0]]]] = piece_of(empty)
        scratch.update(dict.fromkeys(names, empty))
    shards.read("model", wanted)
    return scratch


# --- the optimizer ----------------------------------------------------------------------------------------------------


def _optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], Any]:
    """Return the tensors of the optimizer by name, and everything else of it as JSON can hold it."""
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
    """Return the canonical names of the parameters of each group."""
    names = {id(p): name for name, p in model.named_parameters()}
    for number, group in enumerate(optimizer.param_groups):
        for p in group["params"]:
            if id(p) not in names:
                raise InputError(
                    f"optimizer: parameter group {number} has a parameter of shape {tuple(p.shape)} that is not the "
                    "model's; build the optimizer from the model, after fully_shard"
                )
    groups = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    canonical = canonical_names(chain(*groups))
    return [[canonical[name] for name in group] for group in groups]


def _encode(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Return ``value`` for JSON, which gets ``{kind: ...}`` for what it has no word for.

    Tensors go to ``tensors``, under ``path``.
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
        "nothing else can be read from a file in safety"
    )


def _check_optimizer(shards: Shards, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Check what torch's ``load_state_dict`` does not: it compares neither names nor methods."""
    saved, groups = shards.settings, _names(model, optimizer)
    ours = type(optimizer).__name__
    knows = all("method" in group for group in optimizer.param_groups)  # our own optimizers say more when they refuse
    if not knows and saved["kind"] != ours:
        raise shards.differs(f"is of the optimizer {saved['kind']}, this one is {ours}")
    if [len(names) for names in groups] != [len(names) for names in saved["params"]]:
        return  # that is for load_state_dict to say
    for theirs, own in zip(_canonical(saved["params"]).values(), chain(*groups), strict=True):
        if theirs != own:
            raise shards.differs(f"has parameter {theirs!r} where this optimizer has {own!r}")


def _canonical(groups: list[list[str]]) -> dict[str, str]:
    """Return the canonical names of the parameters of an index, by the names that it has, in order."""
    return canonical_names(chain(*groups))


def _read_optimizer(shards: Shards, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Read what ``optimizer.load_state_dict`` is to be given."""
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

    canonical = _canonical(saved["params"])
    params = dict(
        zip(chain(*_names(model, optimizer)), chain(*(g["params"] for g in optimizer.param_groups)), strict=True)
    )
    state = {}
    for name, entry in saved["state"].items():
        p = params.get(canonical[name])
        state[name] = decode(entry, optimizer.state.get(p) if p is not None else None, p)
    own = optimizer.param_groups if len(optimizer.param_groups) == len(saved["param_groups"]) else []
    groups = []
    for number, (group, names) in enumerate(zip(saved["param_groups"], saved["params"], strict=True)):
        like = own[number] if own else {}
        groups.append({key: decode(value, like.get(key), None) for key, value in group.items()} | {"params": names})
        if _same_names(groups[-1], like):  # an optimizer knows its parameters by the names of its own model
            groups[-1]["param_names"] = list(like["param_names"])
    assert wanted.keys() == table.keys()
    shards.read("optimizer", wanted)
    return {"state": state, "param_groups": groups}


def _same_names(saved: Mapping[str, Any], own: Mapping[str, Any]) -> bool:
    pairs = [list(canonical_names(group.get("param_names") or ()).values()) for group in (saved, own)]
    return bool(pairs[0]) and pairs[0] == pairs[1]


def _empty(shards: Shards, name: str, like: Any, p: Tensor | None, *, fresh: bool) -> Tensor:
    """Return room for a tensor of the optimizer, sharded like the one that it has, or else like the parameter."""
    named, shape = shards.tables["optimizer"][name]
    dtype = getattr(torch, named)
    model = like if isinstance(like, Tensor) else p if p is not None and shape == p.shape else None
    if not isinstance(model, DTensor):
        if fresh and isinstance(p, DTensor) and shape and model is None:
            raise shards.differs(
                f"has {name!r} of shape {shape}, for a parameter of shape {tuple(p.shape)}, and this optimizer has "
                "no state that would tell how it is sharded: load it in one process",
            )
        return torch.empty(shape, dtype=dtype, device=like.device if isinstance(like, Tensor) else "cpu")
    if shape == model.shape:
        return torch.empty_like(model, dtype=dtype, requires_grad=False)
    # Perhaps its rank is another one: what differs is for the optimizer to tell.
    return empty_dtensor(shape, dtype=dtype, device_mesh=model.device_mesh, placements=model.placements)
