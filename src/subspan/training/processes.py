"""The processes of a run: torchrun starts them, torch's DDP or ``fully_shard`` trains in them, rank 0 writes.

In one process everything here does nothing, so the loop has one path.

Every rank draws the same batch and takes its own part of it. DDP and ``fully_shard`` average gradients over the ranks.
Losses are therefore divided by the tokens of the whole batch and multiplied by the number of ranks. The result is the
gradient of the whole batch, also where padding leaves the ranks with different numbers of tokens.
"""

import contextlib
import gc
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from subspan.training.models.blocks import blocks_of
from subspan.utils.errors import InputError, first_line, unexpected

Mode = Literal["none", "ddp", "fsdp"]
# Ranks wait this long for another one to tokenise or to save. A rank that ends is noticed at once.
_PATIENCE = timedelta(hours=6)
_LOST = ("Connection closed", "Connection reset", "Connection refused", "Broken pipe", "Socket closed",
         "Timed out waiting", "timeout caused pair closure", "remote process exited")  # fmt: skip
"""What gloo and NCCL say when another process has ended, or does not answer."""


@dataclass(frozen=True)
class Processes:
    """This process among those of the run.

    What ranks tell each other (signals, losses, names) goes over a gloo group of its own, between CPUs. It waits for no
    device and never mixes with what DDP or FSDP sends at that moment.
    """

    mode: Mode = "none"
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Number of this process on its machine."""
    group: Any = None
    """Group of all ranks, over gloo; ``None`` in a single process."""
    store: Any = None
    """Store through which the ranks met; ``None`` in a single process."""

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and speaks."""
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        """Whether each rank holds a part of the model and of the optimizer's state."""
        return self.mode == "fsdp"

    # --- the model ----------------------------------------------------------------------------------------------------

    def place(self, model: nn.Module, device: str) -> nn.Module:
        """Move ``model`` to its device, and shard it under FSDP.

        FSDP moves each block as it shards it, so no device ever holds the whole model.
        """
        if not self.sharded:
            return model.to(device)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(device, (self.size,))
        for block in blocks_of(model):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model.to(device)  # the buffers, which move with no parameter

    def wrap(self, model: nn.Module) -> nn.Module:
        """The module to call in a training step. ``model`` itself stays what is saved, evaluated and clipped."""
        if self.mode != "ddp" or self.size == 1:
            return model
        from torch.nn.parallel import DistributedDataParallel

        # DDP arranges its buckets again after the first step, unless it searches for unused parameters. Sums over three
        # or more ranks would then be rounded differently in a resumed run than in an unbroken one. (DDP warns that the
        # search found none.)
        return DistributedDataParallel(model, find_unused_parameters=self.size > 2)

    def accumulating(self, wrapped: nn.Module, last: bool) -> AbstractContextManager[None]:
        """The context of a micro-batch.

        DDP sends gradients only after the ``last`` one. FSDP reduces each, so no rank ever holds a whole gradient.
        """
        no_sync = None if last else getattr(wrapped, "no_sync", None)
        return no_sync() if no_sync else contextlib.nullcontext()

    def whole_norm(self, norm: Tensor) -> Tensor:
        """The norm over all ranks, from the norm that torch gives for this rank's gradients. Collective."""
        full = getattr(norm, "full_tensor", None)
        return full() if full else norm

    # --- words between ranks, all collective --------------------------------------------------------------------------

    def sum(self, number: float) -> float:
        """The sum of all ranks' numbers; the same on every rank."""
        return self._reduce(number, torch.float64, dist.ReduceOp.SUM)

    def largest(self, number: int) -> int:
        """The largest of all ranks' numbers; the same on every rank."""
        return int(self._reduce(number, torch.int64, dist.ReduceOp.MAX))

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.largest(0)

    def _reduce(self, number: float, dtype: torch.dtype, how: Any) -> Any:
        if self.size == 1:
            return number
        value = torch.tensor(number, dtype=dtype)
        dist.all_reduce(value, how, group=self.group)
        return value.item()

    def from_first(self, make: Callable[[], Any]) -> Any:
        """What ``make`` returns on rank 0, on every rank. Only rank 0 calls it; the result must fit into JSON."""
        if self.size == 1:
            return make()
        content = json.dumps(make()).encode() if self.first else b""
        text = torch.zeros(self.largest(len(content)), dtype=torch.uint8)
        text[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else text[:0]
        dist.broadcast(text, 0, group=self.group)
        return json.loads(bytes(text.tolist()))

    def gather(self, A: Tensor) -> list[Tensor]:
        """Every rank's ``A``, by rank. ``A`` is a CPU tensor whose shape is the same on every rank."""
        if self.size == 1:
            return [A]
        gathered = [torch.empty_like(A) for _ in range(self.size)]
        dist.all_gather(gathered, A, group=self.group)
        return gathered

    @contextlib.contextmanager
    def one_first(self) -> Iterator[None]:
        """Let one rank of each machine go first; the others find what it leaves in a cache."""
        if self.local_rank:
            self.barrier()
        yield
        if not self.local_rank:
            self.barrier()

    def speaks(self) -> bool:
        """Whether this rank is the first that has something to say before it ends.

        What the other ranks meet afterwards is mostly a consequence.
        """
        if self.store is None:
            return True
        try:
            return bool(self.store.add("subspan/last words", 1) == 1)
        except RuntimeError:  # the process that held the store is gone, and the store with it
            return True


ALONE = Processes()
"""The only process of its run."""


def join(mode: Mode | None, device: str) -> Processes:
    """Join the processes that torchrun has started. Without torchrun a run has one rank, whatever the mode.

    Args:
        mode: ``PretrainConfig.parallel``.
        device: ``PretrainConfig.device``.

    Raises:
        InputError: there are several processes, and no mode says how they should work together; or there are too few
            devices.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if mode in (None, "none"):
        if size > 1:
            raise InputError(
                f"parallel={mode or 'none'!r}: torchrun has started {size} processes; say how they share the work with "
                "--parallel ddp (each holds the model) or --parallel fsdp (each holds a part of it)"
            )
        return ALONE
    launched = all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
    if not launched and mode == "ddp":
        return Processes(mode)
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    backend = "gloo"
    if device != "cpu" and torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise InputError(
                f"device={device!r}: process {local_rank} of this machine finds {torch.cuda.device_count()} CUDA "
                "devices, and each needs its own; start fewer with --nproc-per-node, or use --device cpu"
            )
        torch.cuda.set_device(local_rank)
        backend = "cpu:gloo,cuda:nccl"
    if launched:
        store, rank, size = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]  # torch lists it as public
    else:
        store, rank, size = dist.HashStore(), 0, 1  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    return Processes(mode, rank, size, local_rank, group, store)


def run_joined(processes: Processes, body: Callable[[], int]) -> int:
    """The exit status of ``body``.

    If ``body`` fails on one of several ranks, that rank ends its process at once, so that no other rank waits for it.
    """
    if processes.store is None:
        return body()
    try:
        status = body()
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException as error:
        status = 1
        if processes.speaks():
            _say_why(error, processes.rank)
    if status:
        _end(status)
    # DDP must be gone before the group is destroyed: as the group's last holder it would wait for gloo's threads and
    # hold Python's lock while it waits.
    gc.collect()
    dist.destroy_process_group()
    return 0


def _say_why(error: BaseException, rank: int) -> None:
    if isinstance(error, RuntimeError) and any(words in str(error) for words in _LOST):
        print(
            f"subspan: error: rank {rank} has lost another process ({first_line(error)}); torchrun says below which "
            "one ended; to continue, repeat the command with --resume auto",
            file=sys.stderr,
        )
    else:
        print(f"subspan: error: rank {rank} failed: {unexpected(error)}", file=sys.stderr)


def _end(status: int) -> NoReturn:
    """End the process without tearing down: destructors of the group would wait for ranks that wait for this one."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
