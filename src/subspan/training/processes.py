"""The processes of a run: torchrun starts them, torch's DDP or ``fully_shard`` trains in them, rank 0 writes.

In one process everything here does nothing, so that the loop has one path.

Every rank draws the same batch and takes its own part of it. Losses are divided by the tokens of the whole batch and
multiplied
by the number of ranks, since DDP and ``fully_shard`` average gradients over ranks: the result is the gradient of the
whole batch, also where padding leaves the ranks with different numbers of tokens.
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
_PATIENCE = timedelta(hours=6)  # of ranks that wait for another to tokenise or to save; a lost rank is noticed at once


@dataclass(frozen=True)
class Processes:
    """This process among those of the run.

    What ranks say to each other (signals, losses, names) goes over a gloo group of its own, between CPUs: it waits for
    no
    device and crosses nothing that DDP or FSDP has under way.
    """

    mode: Mode = "none"
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    group: Any = None
    store: Any = None

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
        """``model`` on its device; under FSDP each block goes there as it is sharded, so that no device ever holds it
        whole.
        """
        if not self.sharded:
            return model.to(device)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(device, (self.size,))
        for block in blocks_of(model):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model.to(device)  # what no parameter brought along

    def wrap(self, model: nn.Module) -> nn.Module:
        """What to call in a training step. The model itself stays what is saved, evaluated and clipped."""
        if self.mode != "ddp" or self.size == 1:
            return model
        from torch.nn.parallel import DistributedDataParallel

        # DDP lays its buckets out anew after the first step, unless it searches for unused parameters; sums of three
        # and more
        # ranks would then round otherwise in a resumed run than in an unbroken one. (It warns that the search found
        # none.)
        return DistributedDataParallel(model, find_unused_parameters=self.size > 2)

    def accumulating(self, wrapped: nn.Module, last: bool) -> AbstractContextManager[None]:
        """Around a micro-batch: DDP sends gradients at the ``last`` alone. FSDP reduces each, so that none is held
        whole.
        """
        no_sync = None if last else getattr(wrapped, "no_sync", None)
        return no_sync() if no_sync else contextlib.nullcontext()

    def whole_norm(self, norm: Tensor) -> Tensor:
        """The norm that ``clip_grad_norm_`` returned, over all ranks. Collective."""
        full = getattr(norm, "full_tensor", None)
        return full() if full else norm

    # --- words between ranks, all collective
    # ----------------------------------------------------------------------------

    def sum(self, number: float) -> float:
        """Of all ranks' numbers; the same on every rank."""
        return self._reduce(number, torch.float64, dist.ReduceOp.SUM)

    def largest(self, number: int) -> int:
        """Of all ranks' numbers."""
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
        """What ``make`` returns on rank 0, which alone runs it: anything that JSON can hold."""
        if self.size == 1:
            return make()
        content = json.dumps(make()).encode() if self.first else b""
        text = torch.zeros(self.largest(len(content)), dtype=torch.uint8)
        text[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else text[:0]
        dist.broadcast(text, 0, group=self.group)
        return json.loads(bytes(text.tolist()))

    def gather(self, A: Tensor) -> list[Tensor]:
        """Every rank's ``A``, a CPU tensor of one shape, by rank."""
        if self.size == 1:
            return [A]
        gathered = [torch.empty_like(A) for _ in range(self.size)]
        dist.all_gather(gathered, A, group=self.group)
        return gathered

    @contextlib.contextmanager
    def one_first(self) -> Iterator[None]:
        """One rank of each machine goes first; what it leaves in a cache the others find."""
        if self.local_rank:
            self.barrier()
        yield
        if not self.local_rank:
            self.barrier()

    def speaks(self) -> bool:
        """Whether this rank is the first with something to say before it ends. What others meet is mostly a
        consequence.
        """
        if self.store is None:
            return True
        try:
            return bool(self.store.add("subspan/last words", 1) == 1)
        except RuntimeError:  # the store has gone with the process that held it
            return True


ALONE = Processes()
"""A run of one process."""


def join(mode: Mode | None, device: str) -> Processes:
    """Join the processes that torchrun has started; with no torchrun a run has one rank, whatever the mode.

    Args:
        mode: ``PretrainConfig.parallel``.
        device: ``PretrainConfig.device``.

    Raises:
        InputError: there are several processes, and no mode says how they should work together; or too few devices.
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
                "devices, and "
                "each needs its own; start fewer with --nproc-per-node, or use --device cpu"
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


def run_joined(ranks: Processes, body: Callable[[], int]) -> int:
    """The exit status of ``body``. Among several ranks, one that fails ends its process at once: none must wait for
    it.
    """
    if ranks.store is None:
        return body()
    try:
        status = body()
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException as error:
        status = 1
        if ranks.speaks():
            _say_why(error, ranks.rank)
    if status:
        _end(status)
    # DDP must be gone before the group is: as its last holder it would wait for gloo's threads with the interpreter
    # locked.
    gc.collect()
    dist.destroy_process_group()
    return 0


def _say_why(error: BaseException, rank: int) -> None:
    if isinstance(error, RuntimeError) and any(
        word in str(error) for word in ("Connection closed", "Connection reset", "gloo")
    ):
        print(
            f"subspan: error: rank {rank} has lost another process ({first_line(error)}); torchrun says below which "
            "one ended; "
            "to continue, repeat the command with --resume auto",
            file=sys.stderr,
        )
    else:
        print(f"subspan: error: rank {rank} failed: {unexpected(error)}", file=sys.stderr)


def _end(status: int) -> NoReturn:
    """End without tearing down: destructors of the process group would wait for ranks that wait for this one."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
