"""The ``subspan`` command as a rank runs it, once or several times, with an accident on the way.

The first argument is the accident ("nothing", or a key of ``ACCIDENTS``), the second the step before which it happens.
Those of ``subspan`` follow; "then" separates the arguments of several runs.
"""

import dataclasses
import os
import signal
from itertools import groupby
from typing import Any

from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from subspan.cli import main as subspan_main
from subspan.training import processes as parallel
from subspan.training.pretraining import Pretraining
from subspan.utils.errors import InputError


def kill(run: Pretraining) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def terminate(run: Pretraining) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def bad_data(run: Pretraining) -> None:
    raise InputError("data 'moon': is made of cheese; expected stone")


def bug(run: Pretraining) -> None:
    raise ZeroDivisionError("a mistake of ours")


ACCIDENTS = {"kill": kill, "terminate": terminate, "bad data": bad_data, "bug": bug}


def arrange(what: str, step: int) -> None:
    """Let the accident ``what`` happen to rank 1 before ``step``."""
    train_step = Pretraining._train_step

    def wrapped(run: Pretraining) -> Any:
        if what in ACCIDENTS and run.processes.rank == 1 and run.step + 1 == step:
            ACCIDENTS[what](run)
        return train_step(run)

    Pretraining._train_step = wrapped  # type: ignore[method-assign]


def count_what_is_sent() -> None:
    """Write the number of bytes of gradients that DDP has all-reduced into the file ``sent`` of the run's directory."""
    run_all = Pretraining.run

    def wrapped(run: Pretraining) -> Any:
        sent = []

        def counting(group, bucket):  # type: ignore[no-untyped-def]  # DDP refuses annotations other than its own
            sent.append(bucket.buffer().numel() * bucket.buffer().element_size())
            return allreduce_hook(group, bucket)

        if run.wrapped is not run.model:
            run.wrapped.register_comm_hook(None, counting)  # type: ignore[operator]
        summary = run_all(run)
        if run.processes.first:
            (run.out / "sent").write_text(str(sum(sent)))
        return summary

    Pretraining.run = wrapped  # type: ignore[method-assign]


def run_one_after_the_other(commands: list[list[str]]) -> int:
    """Run all commands in one process group, because a process can join only once."""
    count_what_is_sent()
    join, run_joined = parallel.join, parallel.run_joined
    processes = join("ddp", "cpu")
    parallel.join = lambda mode, device: dataclasses.replace(processes, mode=mode)
    parallel.run_joined = lambda processes, body: body()
    return run_joined(processes, lambda: max(subspan_main(command) for command in commands))


def main(what: str, step: str, *arguments: str) -> int:
    arrange(what, int(step))
    commands = [list(words) for then, words in groupby(arguments, lambda word: word == "then") if not then]
    return subspan_main(commands[0]) if len(commands) == 1 else run_one_after_the_other(commands)
