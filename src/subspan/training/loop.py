"""A run: everything is checked and loaded first, then trained, measured and saved. What is trained is a ``Task``."""

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import nn

from subspan import distributed
from subspan.backward import project_backward
from subspan.checkpoints import directory as checkpoints
from subspan.checkpoints.unshard import plain_model
from subspan.costs.saved_activations import SavedBytes
from subspan.factory import residual_of
from subspan.optimizer import SubspaceOptimizer
from subspan.training.config.resolve import ResolvedConfig, plain
from subspan.training.config.resolve_finetuning import ResolvedFinetune
from subspan.training.data.batches import Batch
from subspan.training.lr_schedule import lr_factor
from subspan.training.models.build import checkpoint_activations
from subspan.training.monitor.metrics import Meter, Metrics
from subspan.training.monitor.probes import Probes, check_probes
from subspan.training.monitor.progress import ProgressLine
from subspan.training.monitor.provenance import stamp
from subspan.training.optimizer import build_optimizer, uncompressed
from subspan.training.precision import Precision
from subspan.training.processes import Processes
from subspan.training.run_directory import claim, hold, locate
from subspan.training.run_state import Best, Checkpointer, TrainState
from subspan.training.signals import RunInterruptedError, StopAskedError, collect_signals
from subspan.training.task import Task
from subspan.utils.atomic_files import write_text
from subspan.utils.errors import InputError
from subspan.utils.messages import say


class Reported(Protocol):
    """The report of a finished run."""

    def as_json(self) -> dict[str, Any]: ...


R = TypeVar("R", bound=Reported)


class RunDivergedError(RuntimeError):
    """The loss, or a weight, is no longer a number."""


class Training(ABC, Generic[R]):
    """A run that is ready to start. Building it reads, checks and loads; it writes nothing except caches.

    Args:
        config: the settings of the run.
        open_task: reads what is trained. One rank of each machine calls it first.
        processes: the processes that share the work. Each of them builds this object and runs it.

    Raises:
        UserError: a setting is wrong, or a file cannot be used. The message says which, and what to do.
    """

    command: str
    """The command of ``subspan`` that continues the run."""

    def __init__(
        self, config: ResolvedConfig | ResolvedFinetune, open_task: Callable[[], Task], processes: Processes
    ) -> None:
        self.config, self.processes = config, processes
        self.settings = plain(asdict(config))
        self._made_by = stamp() if processes.first else {}  # now, because the code may be changed while this runs
        if config.batch_size % processes.size:
            raise InputError(
                f"batch_size={config.batch_size}: expected a multiple of the {processes.size} processes that share it"
            )
        # Rank 0 decides, because it may have begun to write while other ranks still look.
        out, checkpoint = processes.from_first(lambda: [path and str(path) for path in locate(config, self.settings)])
        self.out, self._resumed = Path(out), checkpoint and Path(checkpoint)
        self._found = checkpoints.list_checkpoints(self.out / "checkpoints")
        if config.threads:
            torch.set_num_threads(config.threads)

        with processes.one_first():
            self.task = open_task()
        self.tokenizer, self.data = self.task.tokenizer, self.task.data
        model = self.task.build_model()
        if config.gradient_checkpointing:
            checkpoint_activations(model, config.model)
        self.precision = Precision(config.precision, config.device)
        self.precision.cast_(model)
        if config.backward_side:
            project_backward(
                model,
                rank=config.rank,
                rank_pattern=config.rank_pattern,
                targets=config.optim.targets,
                share=config.optim.share,
                merge=config.optim.merge,
                select_from=config.optim.select_from,
                residual=residual_of(config.optimizer, config.optim.residual),
            )
        self.model: nn.Module = processes.place(model, config.device).train()
        self.optimizer = build_optimizer(config, self.model)
        self.probes: Probes | None = None
        if config.probes.subspace:
            check_probes(config.probes, self.optimizer, config.optimizer, config.parallel, config.batch_size)
        self.wrapped = processes.wrap(self.model)
        if processes.rank:  # rank 0 draws what a single process would draw
            torch.manual_seed((config.seed * 1_000_003 + processes.rank) % 2**63)
        steps, plan = config.steps, config.schedule
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda t: lr_factor(t, steps, plan.warmup_steps, plan.min_lr_ratio, plan.shape)
        )
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.best: Best | None = None
        self.evaluated_at = 0
        """The step of the last evaluation."""
        self._received: list[int] = []
        self.saved_bytes: int | None = None
        """Bytes that a forward pass saves for the backward pass.

        They are those of the first part of the second batch, when no basis is new.
        """
        stateful = {"data": self.data, "scheduler": self.scheduler, **self.precision.stateful()}
        self._checkpointer = Checkpointer(
            self.model, self.optimizer, stateful, self.tokenizer, processes, config.device, self.settings
        )
        if self._resumed:
            state = self._checkpointer.read(self._resumed)
            self.step, self.tokens, self.seconds = state.step, state.tokens, state.seconds
            self.best, self.evaluated_at, self.saved_bytes = state.best, state.evaluated_at, state.saved_bytes

    @abstractmethod
    def summarise(self, measured: dict[str, float], checkpoint: Path) -> R:
        """The report of the finished run.

        Args:
            measured: the last evaluation.
            checkpoint: the directory of the model that the run ends with, which is the best or the last.
        """

    def run(self) -> R:
        """Train to the last step, or until nothing has become better for long enough.

        Raises:
            RunInterruptedError: SIGTERM or SIGINT came; the run is saved and can be resumed.
            RunDivergedError: the loss or a weight is not finite.
            InputError: a file cannot be read or written.
        """
        processes = self.processes
        with ExitStack() as stack:
            self.out = Path(processes.from_first(lambda: self._claim(stack)))
            self._announce()
            measured = self._train()
            final = self.best.step if self.best else self.step
            folder = processes.from_first(lambda: str(plain_model(self.out, final, self.model, self.tokenizer)))
            summary = self.summarise(measured, Path(folder))
            if processes.first:
                write_text(self.out / "summary.json", json.dumps(summary.as_json() | {"made_by": self._made_by}) + "\n")
            processes.barrier()
        return summary

    def _train(self) -> dict[str, float]:
        """Train to the last step, and save it. Returns the last evaluation, and what the test text gives."""
        config, processes = self.config, self.processes
        began = time.monotonic() - self.seconds
        with (
            ProgressLine(config.steps, self.step, shown=processes.first) as progress,
            Metrics(self.out, self.step, config.tensorboard) if processes.first else nullcontext() as metrics,
            self._open_probes() if processes.first and config.probes.subspace else nullcontext() as self.probes,
            collect_signals() as self._received,
            self._stopped_in_evaluations(),
        ):
            meter = Meter(config.device)
            measured: dict[str, float] = {}
            if self.task.keeps_best and self._evaluation_due() and self.evaluated_at != self.step:
                self._evaluate(metrics)  # a signal had prevented it
            while not self._finished():
                meter.start()
                loss, norm, lr, tokens = self._train_step()
                meter.stop(loss, tokens)
                self.seconds = time.monotonic() - began
                last = self.step == config.steps
                signum = self._signal()
                stopping = bool(signum) and not last
                saving = stopping or last or self.step % config.checkpoint.every == 0
                if saving or self.step % config.log_every == 0:  # what is saved must be known to have a finite loss
                    row = {"step": self.step, "tokens": self.tokens, **meter.read(), "grad_norm": float(norm), "lr": lr}
                    row["loss"] = processes.sum(row["loss"])
                    self._check_finite(row["loss"])
                    if metrics:
                        metrics.write(row | {"seconds": round(self.seconds, 3)})
                    progress.note(row["loss"], row["tokens_per_second"])
                progress.update(self.step)
                if last:
                    break
                if self._evaluation_due() and not stopping:  # a person who stops a run does not want to wait
                    measured = self._evaluate(metrics)
                    progress.say(f"step {self.step}: {self.task.words(measured)}")
                    if self._finished():
                        break
                    signum = self._signal()
                    stopping = bool(signum)
                if saving or stopping or self._is_best():
                    self._save()
                if stopping:
                    raise self._interrupted(signum)
            if not measured or self.evaluated_at != self.step:
                measured = self._evaluate(metrics)
            tested = self.task.test(
                self.model, config.micro_batch_size, self.precision.autocast(), processes, self._stop_if_asked
            )
            if metrics and tested:
                metrics.write({"step": self.step, "tokens": self.tokens, **tested})
            self.seconds = time.monotonic() - began
            self._save()
        return measured | tested

    def _evaluation_due(self) -> bool:
        """Whether this step, which is neither the first nor the last, ends in an evaluation."""
        return 0 < self.step < self.config.steps and self.step % self.config.evaluation.every == 0

    def _finished(self) -> bool:
        """Whether the run is at its last step, or has waited long enough for a better evaluation."""
        patience = getattr(self.config.evaluation, "patience", None)
        return self.step >= self.config.steps or bool(patience and self.best and self.best.waited >= patience)

    def _is_best(self) -> bool:
        return self.best is not None and self.best.step == self.step

    def _open_probes(self) -> Probes:
        assert isinstance(self.optimizer, SubspaceOptimizer)  # check_probes has made sure of it
        return Probes(self.config.probes, self.optimizer, self.out, self.step)

    def _claim(self, stack: ExitStack) -> str:
        """Lock the directory of the run for as long as ``stack`` is open, and return it.

        A new run makes the directory. One that continues another run in a directory of its own takes the best
        checkpoint along.
        """
        out = self.out
        if not (self.config.resume and (out / "config.yaml").exists()):
            out = claim(out, self.settings, numbered=self.config.out is None)
        stack.enter_context(hold(out))
        if self._resumed and checkpoints.list_checkpoints(out / "checkpoints") != self._found:
            raise InputError(f"out={str(out)!r}: another process has trained there meanwhile; give the command again")
        if self.best and self._resumed:
            checkpoints.adopt(self._resumed.parent / checkpoints.name_of(self.best.step), out / "checkpoints")
        return str(out)

    def _signal(self) -> int:
        """The signal that some rank has received, the same on every rank, or 0.

        It is asked for at every step and every batch of an evaluation. It costs one sum of eight bytes between CPUs,
        and torchrun gives processes only 30 seconds to save.
        """
        return self.processes.largest(self._received[0] if self._received else 0)

    def _stop_if_asked(self) -> None:
        if signum := self._signal():
            raise StopAskedError(signum)

    @contextmanager
    def _stopped_in_evaluations(self) -> Iterator[None]:
        """Save where a signal has broken off an evaluation. The continued run makes up for it, if it needs it."""
        try:
            yield
        except StopAskedError as stop:
            self._save()
            raise self._interrupted(stop.signum) from None

    def _interrupted(self, signum: int) -> RunInterruptedError:
        return RunInterruptedError(signum, self.step, str(self.out), self.processes.size, self.command)

    def _train_step(self) -> tuple[torch.Tensor, torch.Tensor, float, int]:
        """Take one optimizer step.

        Returns:
            This rank's share of the mean token loss, the norm of the gradient before clipping, the learning rate, and
            the number of tokens of all ranks.
        """
        config, processes = self.config, self.processes
        batch = self.data.next_batch(config.batch_size)
        weight, tokens = batch.weight(), batch.tokens()
        total = torch.zeros((), device=config.device)
        parts = batch.part(processes.rank, processes.size).split(config.micro_batch_size)
        if self.probes:
            self.probes.noise(self.step + 1, batch, self._loss_of, self.model)
        for number, part in enumerate(parts, 1):
            with processes.accumulating(self.wrapped, last=number == len(parts)):
                with self.precision.autocast(), self._counting(number) as saved:
                    # Divided by the targets of the whole batch, so that accumulation changes nothing, padding or not.
                    loss = self.task.losses(self.wrapped, part.to(config.device)) / max(1, weight)
                if saved:
                    self.saved_bytes = saved.total
                self.precision.backward(loss * processes.size)  # gradients are averaged over the ranks
            total += loss.detach()
        parameters = list(self.model.parameters())
        norm = processes.whole_norm(self.precision.clip_(self.optimizer, parameters, config.clip))
        lr = float(self.optimizer.param_groups[0]["lr"])
        step = self.precision.stepping(self.optimizer)
        if self.probes:
            self.probes.step(self.step + 1, step)
        else:
            step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens += tokens
        return total, norm, lr, tokens

    def _loss_of(self, batch: Batch) -> torch.Tensor:
        with self.precision.autocast():
            return self.task.losses(self.model, batch.to(self.config.device))

    def _counting(self, part: int) -> AbstractContextManager[SavedBytes | None]:
        if not self.task.keeps_best or self.processes.size > 1 or (self.step, part) != (1, 1):
            return nullcontext()
        state = [
            value
            for entries in self.optimizer.state.values()
            for value in entries.values()
            if isinstance(value, torch.Tensor)
        ]
        return SavedBytes(self.model, [], state)

    def _evaluate(self, metrics: Metrics | None) -> dict[str, float]:
        began = time.monotonic()
        config, autocast = self.config, self.precision.autocast()
        measured = self.task.evaluate(
            self.model, config.micro_batch_size, autocast, self.processes, self._stop_if_asked
        )
        seconds = round(time.monotonic() - began, 3)
        self._check_finite(measured["val_loss"])
        if metrics:
            metrics.write({"step": self.step, "tokens": self.tokens, **measured, "val_seconds": seconds})
        if self.task.keeps_best and self.evaluated_at != self.step:
            if self.best is None or self.task.score(measured) > self.task.score(self.best.measured):
                self.best = Best(self.step, measured)
            else:
                self.best.waited += 1
        self.evaluated_at = self.step
        return measured

    def _check_finite(self, loss: float) -> None:
        if not loss < self.task.largest_loss:
            raise self._diverged(f"loss {loss}")

    def _check_weights(self) -> None:
        """Raise unless all weights are finite: the loss of a step says nothing of the weights after it."""
        finite = torch.stack([distributed.local(p.detach()).isfinite().all() for p in self.model.parameters()]).all()
        if self.processes.largest(not finite):
            raise self._diverged("weights that are not finite")

    def _diverged(self, what: str) -> RunDivergedError:
        return RunDivergedError(
            f"{what} at step {self.step}: the run diverged; try a lower --lr (now {self.config.lr}) "
            f"or a longer --schedule.warmup_steps (now {self.config.schedule.warmup_steps})"
        )

    def _announce(self) -> None:
        config, processes = self.config, self.processes
        if not processes.first:
            return
        number = sum(p.numel() for p in self.model.parameters())
        say(f"{config.model}: {number:,} parameters in {config.precision} on {config.device}; {self.data.describe()}")
        for note in self.data.notes():
            say(note)
        summary = getattr(self.optimizer, "summary", None)
        say(f"{config.optimizer}: " + (summary() if summary else "torch.optim.AdamW on every parameter"))
        if full := uncompressed(self.optimizer):
            asked = f"rank={config.rank}" + (f", rank_pattern={config.rank_pattern}" if config.rank_pattern else "")
            say(f"{asked}: reaches the shorter side of {full} matrices, which are trained at full rank")
        if self.step:
            say(f"{'continues' if self.step < config.steps else 'already complete'} at step {self.step}")
        if processes.size > 1:
            share = config.batch_size // processes.size
            say(f"{processes.size} processes, {processes.mode}: each takes {share} of {config.batch_size} sequences")
        say(f"writes to {self.out}")

    def _save(self) -> None:
        """Write a checkpoint.

        Raises:
            RunDivergedError: a weight is not finite; nothing is written.
            InputError: the checkpoint cannot be written. Those before it stand.
        """
        self._check_weights()
        state = TrainState(self.step, self.tokens, self.seconds, self.best, self.evaluated_at, self.saved_bytes)
        self._checkpointer.write(self.out / "checkpoints", state, self.config.checkpoint.keep)
