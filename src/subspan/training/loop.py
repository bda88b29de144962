"""A run: everything is checked and loaded first, then trained, measured and saved. What is trained is a ``Task``."""

import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import nn

from subspan import distributed
from subspan.backward import project_backward
from subspan.checkpoints import directory as checkpoints
from subspan.costs.saved_activations import SavedBytes
from subspan.optimizer import SubspaceOptimizer
from subspan.training.config.resolve import ResolvedConfig
from subspan.training.config.resolve_finetuning import ResolvedFinetune
from subspan.training.data.batches import Batch
from subspan.training.lr_schedule import lr_factor
from subspan.training.monitor.metrics import Meter, Metrics
from subspan.training.monitor.probes import Probes, check_probes
from subspan.training.monitor.progress import ProgressLine, say
from subspan.training.monitor.provenance import stamp
from subspan.training.optimizer import build_optimizer, uncompressed
from subspan.training.processes import Processes
from subspan.training.run_directory import claim, hold, locate
from subspan.training.run_state import Snapshots, Standing
from subspan.training.signals import RunInterruptedError, collect_signals
from subspan.training.task import Task
from subspan.utils.atomic_files import write_text
from subspan.utils.errors import InputError


class Reported(Protocol):
    """What a finished run reports."""

    def as_json(self) -> dict[str, Any]: ...


R = TypeVar("R", bound=Reported)


class RunDivergedError(RuntimeError):
    """The loss, or a weight, is no longer a number."""


class Training(ABC, Generic[R]):
    """A run that is ready to start. Building it reads, checks and loads; it writes nothing but caches.

    Args:
        config: its settings.
        open_task: reads what is trained. One rank of each machine calls it first.
        ranks: the processes that share the work, each of which builds this and runs it.

    Raises:
        ValueError: a setting is wrong; the message names it.
    """

    command: str
    """Of ``subspan``, which continues the run."""

    def __init__(
        self, config: ResolvedConfig | ResolvedFinetune, open_task: Callable[[], Task], ranks: Processes
    ) -> None:
        self.config, self.ranks = config, ranks
        self.settings = _plain(asdict(config))
        self._made_by = stamp() if ranks.first else {}  # now: the code may be changed while this runs
        if config.batch_size % ranks.size:
            raise InputError(
                f"batch_size={config.batch_size}: expected a multiple of the {ranks.size} processes that share it"
            )
        # Said by one rank: others may still be looking when it has begun to write.
        out, checkpoint = ranks.from_first(lambda: [path and str(path) for path in locate(config, self.settings)])
        self.out, self._resumed = Path(out), checkpoint and Path(checkpoint)
        self._found = checkpoints.list_checkpoints(self.out / "checkpoints")
        if config.threads:
            torch.set_num_threads(config.threads)

        with ranks.one_first():
            self.task = open_task()
        self.tokenizer, self.data = self.task.tokenizer, self.task.data
        model = self.task.build_model()
        if config.gradient_checkpointing:
            # The second name is that of transformers before 5.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable()  # type: ignore[operator]  # transformers' method
        if config.precision == "bf16":
            for p in model.parameters():  # not the buffers: rotary frequencies in bf16 would be another model
                p.data = p.data.to(torch.bfloat16)
        if config.backward_side:
            project_backward(
                model,
                rank=config.rank,
                targets=config.optim.targets,
                share=config.optim.share,
                merge=config.optim.merge,
                select_from=config.optim.select_from,
            )
        self.model: nn.Module = ranks.place(model, config.device).train()
        self.optimizer = build_optimizer(config, self.model)
        self.probes: Probes | None = None
        if config.probes.subspace:
            check_probes(config.probes, self.optimizer, config.optimizer, config.parallel, config.batch_size)
        self.wrapped = ranks.wrap(self.model)
        if ranks.rank:  # rank 0 draws what one process would
            torch.manual_seed((config.seed * 1_000_003 + ranks.rank) % 2**63)
        steps, plan = config.steps, config.schedule
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda t: lr_factor(t, steps, plan.warmup_steps, plan.min_lr_ratio, plan.shape)
        )
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.best: dict[str, Any] | None = None
        """The best evaluation so far: its ``step``, what it ``measured``, and how many since were not better
        (``waited``).
        """
        self.judged = 0
        """The step of the last evaluation."""
        self.saved_bytes: int | None = None
        """What a forward pass keeps for the backward pass: of the first part of the second batch, when no basis is
        new.
        """
        kept = {"data": self.data, "scheduler": self.scheduler}
        self._snapshots = Snapshots(
            self.model, self.optimizer, kept, self.tokenizer, ranks, config.device, self.settings
        )
        if self._resumed:
            standing = self._snapshots.read(self._resumed)
            self.step, self.tokens, self.seconds, self.best, self.judged, self.saved_bytes = standing

    @abstractmethod
    def summarise(self, measured: dict[str, float], place: Path) -> R:
        """What the finished run reports; ``measured`` is the last evaluation, in ``place`` is its model."""

    def run(self) -> R:
        """Train to the last step, or to where nothing gets better.

        Raises:
            RunInterruptedError: SIGTERM or SIGINT came; the run is saved and can be resumed.
            RunDivergedError: the loss or a weight is not finite.
        """
        ranks = self.ranks
        with ExitStack() as held:
            self.out = Path(ranks.from_first(lambda: self._claim(held)))
            self._announce()
            measured = self._train()
            kept = self.best["step"] if self.best else self.step
            place = ranks.from_first(lambda: str(checkpoints.plain_model(self.out, kept, self.model, self.tokenizer)))
            summary = self.summarise(measured, Path(place))
            if ranks.first:
                write_text(self.out / "summary.json", json.dumps(summary.as_json() | {"made_by": self._made_by}) + "\n")
            ranks.barrier()
        return summary

    def _train(self) -> dict[str, float]:
        """To the last step, which is saved; returns the last evaluation."""
        config, ranks = self.config, self.ranks
        began = time.monotonic() - self.seconds
        with (
            ProgressLine(config.steps, self.step, shown=ranks.first) as progress,
            Metrics(self.out, self.step, config.tensorboard) if ranks.first else nullcontext() as metrics,
            self._open_probes() if ranks.first and config.probes.subspace else nullcontext() as self.probes,
            collect_signals() as received,
        ):
            meter = Meter()
            measured: dict[str, float] = {}
            if self.task.selects and self._due() and self.judged != self.step:  # a signal came in between
                self._evaluate(metrics)
            while not self._over():
                meter.start()
                loss, norm, lr, tokens = self._train_step()
                meter.stop(loss, tokens)
                self.seconds = time.monotonic() - began
                last = self.step == config.steps
                signum = self._signal(received)
                stopping = bool(signum) and not last
                saving = stopping or last or self.step % config.checkpoint.every == 0
                if saving or self.step % config.log_every == 0:  # nothing is saved whose loss is not known to be finite
                    row = {"step": self.step, "tokens": self.tokens, **meter.read(), "grad_norm": float(norm), "lr": lr}
                    row["loss"] = ranks.sum(row["loss"])
                    self._check_finite(row["loss"])
                    if metrics:
                        metrics.write(row | {"seconds": round(self.seconds, 3)})
                    progress.note(row["loss"], row["tokens_per_second"])
                progress.update(self.step)
                if last:
                    break
                if self._due() and not stopping:  # who stops a run does not want to wait
                    measured = self._evaluate(metrics)
                    progress.say(f"step {self.step}: {self.task.words(measured)}")
                    if self._over():
                        break
                    signum = self._signal(received)
                    stopping = bool(signum)
                if saving or stopping or self._is_best():
                    self._save()
                if stopping:
                    raise RunInterruptedError(signum, self.step, str(self.out), ranks.size, self.command)
            if not measured or self.judged != self.step:
                measured = self._evaluate(metrics)
            self.seconds = time.monotonic() - began
            self._save()
        return measured

    def _due(self) -> bool:
        """Whether this step, which is neither the first nor the last, ends in an evaluation."""
        return 0 < self.step < self.config.steps and self.step % self.config.evaluation.every == 0

    def _over(self) -> bool:
        """Whether the run is at its last step, or has waited long enough for a better evaluation."""
        patience = getattr(self.config.evaluation, "patience", None)
        return self.step >= self.config.steps or bool(patience and self.best and self.best["waited"] >= patience)

    def _is_best(self) -> bool:
        return self.best is not None and self.best["step"] == self.step

    def _open_probes(self) -> Probes:
        assert isinstance(self.optimizer, SubspaceOptimizer)  # check_probes has seen to that
        return Probes(self.config.probes, self.optimizer, self.out, self.step)

    def _claim(self, held: ExitStack) -> str:
        """The run's directory, made if this is not the continuation of the run there; with its best checkpoint.

        No other process trains there as long as ``held`` is open.
        """
        out = self.out
        if not (self.config.resume and (out / "config.yaml").exists()):
            out = claim(out, self.settings, numbered=self.config.out is None)
        held.enter_context(hold(out))
        if self._resumed and checkpoints.list_checkpoints(out / "checkpoints") != self._found:
            raise InputError(f"out={str(out)!r}: another process has trained there meanwhile; give the command again")
        if self.best and self._resumed:
            checkpoints.adopt(self._resumed.parent / checkpoints.name_of(self.best["step"]), out / "checkpoints")
        return str(out)

    def _signal(self, received: list[int]) -> int:
        """The signal that a rank has received, the same on every rank, or 0.

        Asked at every step: it is one sum of eight bytes between CPUs, and torchrun gives processes 30 seconds to save.
        """
        return self.ranks.largest(received[0] if received else 0)

    def _train_step(self) -> tuple[torch.Tensor, torch.Tensor, float, int]:
        """One optimizer step: this rank's share of the mean token loss, the norm of the gradient before clipping, the
        learning
        rate, the tokens of all ranks."""
        config, ranks = self.config, self.ranks
        batch = self.data.next_batch(config.batch_size)
        weight, tokens = batch.weight(), batch.tokens()
        total = torch.zeros((), device=config.device)
        parts = batch.part(ranks.rank, ranks.size).split(config.micro_batch_size)
        if self.probes:
            self.probes.noise(self.step + 1, batch, self._loss_of, self.model)
        for number, part in enumerate(parts, 1):
            with ranks.accumulating(self.wrapped, last=number == len(parts)):
                with self._autocast(), self._counting(number) as saved:
                    # Over the whole batch's targets, so that accumulation changes nothing, padding or not.
                    loss = self.task.losses(self.wrapped, part.to(config.device)) / max(1, weight)
                if saved:
                    self.saved_bytes = saved.total
                (loss * ranks.size).backward()  # gradients are averaged over the ranks
            total += loss.detach()
        norm = ranks.whole_norm(nn.utils.clip_grad_norm_(self.model.parameters(), config.clip or math.inf))
        lr = float(self.optimizer.param_groups[0]["lr"])
        if self.probes:
            self.probes.step(self.step + 1, self.optimizer.step)
        else:
            self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens += tokens
        return total, norm, lr, tokens

    def _loss_of(self, batch: Batch) -> torch.Tensor:
        with self._autocast():
            return self.task.losses(self.model, batch.to(self.config.device))

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.config.device, torch.bfloat16, enabled=self.config.precision == "bf16-mixed")

    def _counting(self, part: int) -> AbstractContextManager[SavedBytes | None]:
        if not self.task.selects or self.ranks.size > 1 or (self.step, part) != (1, 1):
            return nullcontext()
        state = [
            value
            for held in self.optimizer.state.values()
            for value in held.values()
            if isinstance(value, torch.Tensor)
        ]
        return SavedBytes(self.model, [], state)

    def _evaluate(self, metrics: Metrics | None) -> dict[str, float]:
        began = time.monotonic()
        measured = self.task.evaluate(self.model, self.config.micro_batch_size, self._autocast(), self.ranks)
        seconds = round(time.monotonic() - began, 3)
        self._check_finite(measured["val_loss"])
        if metrics:
            metrics.write({"step": self.step, "tokens": self.tokens, **measured, "val_seconds": seconds})
        if self.task.selects and self.judged != self.step:
            if self.best is None or self.task.worth(measured) > self.task.worth(self.best["measured"]):
                self.best = {"step": self.step, "measured": measured, "waited": 0}
            else:
                self.best["waited"] += 1
        self.judged = self.step
        return measured

    def _check_finite(self, loss: float) -> None:
        if not loss < self.task.largest_loss:
            raise self._diverged(f"loss {loss}")

    def _check_weights(self) -> None:
        """Nothing is saved of weights that are no numbers: the loss of a step is that of the weights before it."""
        finite = torch.stack([distributed.local(p.detach()).isfinite().all() for p in self.model.parameters()]).all()
        if self.ranks.largest(not finite):
            raise self._diverged("weights that are not finite")

    def _diverged(self, what: str) -> RunDivergedError:
        return RunDivergedError(
            f"{what} at step {self.step}: the run diverged; try a lower --lr (now {self.config.lr}) "
            f"or a longer --schedule.warmup_steps (now {self.config.schedule.warmup_steps})"
        )

    def _announce(self) -> None:
        config, ranks = self.config, self.ranks
        if not ranks.first:
            return
        number = sum(p.numel() for p in self.model.parameters())
        say(f"{config.model}: {number:,} parameters in {config.precision} on {config.device}; {self.data.describe()}")
        summary = getattr(self.optimizer, "summary", None)
        say(
            f"{config.optimizer}: {summary()}"
            if summary
            else f"{config.optimizer}: torch.optim.AdamW on every parameter"
        )
        if full := uncompressed(self.optimizer):
            say(f"rank={config.rank}: reaches the shorter side of {full} matrices, which are trained at full rank")
        if self.step:
            say(
                f"continues at step {self.step}"
                if self.step < config.steps
                else f"already complete at step {self.step}"
            )
        if ranks.size > 1:
            share = config.batch_size // ranks.size
            say(f"{ranks.size} processes, {ranks.mode}: each takes {share} of {config.batch_size} sequences")
        say(f"writes to {self.out}")

    def _save(self) -> None:
        """Write a checkpoint.

        Raises:
            RunDivergedError: a weight is not finite; nothing is written.
        """
        self._check_weights()
        standing = Standing(self.step, self.tokens, self.seconds, self.best, self.judged, self.saved_bytes)
        self._snapshots.write(self.out / "checkpoints", standing, self.config.checkpoint.keep)


def _plain(value: Any) -> Any:
    """Lists for tuples, so that settings equal what YAML and a checkpoint give back."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
