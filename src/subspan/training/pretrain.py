"""The pretraining run: everything is checked and loaded first, then trained, measured and saved."""

import json
import math
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from subspan import distributed
from subspan.backward import project_backward
from subspan.factory import create
from subspan.optimizer import SubspaceOptimizer
from subspan.state import state_bytes
from subspan.training import checkpoint as checkpoints
from subspan.training.batches import DataSource
from subspan.training.config import PretrainConfig
from subspan.training.documents import find_documents
from subspan.training.errors import InputError
from subspan.training.evaluation import evaluate, token_losses
from subspan.training.files import write_text
from subspan.training.integrity import seal
from subspan.training.metrics import Meter, Metrics
from subspan.training.model import build_model
from subspan.training.parallel import ALONE, Ranks
from subspan.training.probes import Probes, check_probes
from subspan.training.progress import ProgressLine, say
from subspan.training.resolve import ResolvedConfig, resolve
from subspan.training.rundir import claim, locate
from subspan.training.schedule import lr_factor
from subspan.training.signals import RunInterruptedError, collect_signals
from subspan.training.streams import STREAMS, TokenStream
from subspan.training.tokenizer import load_tokenizer
from subspan.training.tokens import TokenWindows, tokenise


@dataclass(frozen=True)
class Summary:
    """What a finished run reports."""

    optimizer: str
    model: str
    steps: int
    tokens: int
    val_loss: float
    val_ppl: float
    state_bytes: int
    seconds: float
    out: str
    seed: int


class RunDivergedError(RuntimeError):
    """The loss, or a weight, is no longer a number."""


class Pretraining:
    """A run that is ready to start. Building it reads, checks and loads; it writes nothing but the cache of tokens.

    Args:
        config: its settings.
        ranks: the processes that share the work, each of which builds this and runs it.

    Raises:
        ValueError: a setting is wrong; the message names it.
    """

    def __init__(self, config: PretrainConfig, ranks: Ranks = ALONE) -> None:
        self.config = config = resolve(config)
        self.ranks = ranks
        self.settings = _plain(asdict(config))
        if config.batch_size % ranks.size:
            raise InputError(f"batch_size={config.batch_size}: expected a multiple of the {ranks.size} processes that share it")
        # Said by one rank: others may still be looking when it has begun to write.
        out, checkpoint = ranks.from_first(lambda: [path and str(path) for path in locate(config, self.settings)])
        self.out, resumed = Path(out), checkpoint and Path(checkpoint)
        if config.threads:
            torch.set_num_threads(config.threads)

        with ranks.one_first():
            self.tokenizer = load_tokenizer(config.tokenizer)
            self.data = _open_data(config, self.tokenizer)
        model = build_model(config.model, self.tokenizer, config.sequence_length, config.seed)
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
        self.optimizer = _build_optimizer(config, self.model)
        self.probes: Probes | None = None
        if config.probes.subspace:
            check_probes(config.probes, self.optimizer, config.optimizer, config.parallel, config.batch_size)
        self.wrapped = ranks.wrap(self.model)
        if ranks.rank:  # rank 0 draws what one process would
            torch.manual_seed((config.seed * 1_000_003 + ranks.rank) % 2**63)
        steps, warmup, floor = config.steps, config.schedule.warmup_steps, config.schedule.min_lr_ratio
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda t: lr_factor(t, steps, warmup, floor))
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        if resumed:
            self._load(resumed)

    def run(self) -> Summary:
        """Train to the last step.

        Raises:
            RunInterruptedError: SIGTERM or SIGINT came; the run is saved and can be resumed.
            RunDivergedError: the loss or a weight is not finite.
        """
        config, ranks = self.config, self.ranks
        self.out = Path(ranks.from_first(self._claim))
        self._announce()
        validation = self.data.validation()
        began = time.monotonic() - self.seconds
        with (
            ProgressLine(config.steps, self.step, shown=ranks.first) as progress,
            Metrics(self.out, self.step, config.tensorboard) if ranks.first else nullcontext() as metrics,
            self._open_probes() if ranks.first and config.probes.subspace else nullcontext() as self.probes,
            collect_signals() as received,
        ):
            meter = Meter()
            while self.step < config.steps:
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
                if self.step % config.evaluation.every == 0 and not stopping:  # who stops a run does not want to wait
                    val_loss = self._evaluate(validation, metrics)
                    progress.say(f"step {self.step}: validation loss {val_loss:.4f}, perplexity {math.exp(val_loss):.2f}")
                    signum = self._signal(received)
                    stopping = bool(signum)
                if saving or stopping:
                    self._save()
                if stopping:
                    raise RunInterruptedError(signum, self.step, str(self.out), ranks.size)
            val_loss = self._evaluate(validation, metrics)
            self.seconds = time.monotonic() - began
            self._save()
        summary = Summary(
            optimizer=config.optimizer,
            model=config.model,
            steps=self.step,
            tokens=self.tokens,
            val_loss=val_loss,
            val_ppl=math.exp(val_loss),
            state_bytes=state_bytes(self.optimizer),
            seconds=round(self.seconds, 3),
            out=str(self.out),
            seed=config.seed,
        )
        if ranks.first:
            write_text(self.out / "summary.json", json.dumps(asdict(summary)) + "\n")
        ranks.barrier()
        return summary

    def _open_probes(self) -> Probes:
        assert isinstance(self.optimizer, SubspaceOptimizer)  # check_probes has seen to that
        return Probes(self.config.probes, self.optimizer, self.out, self.step)

    def _claim(self) -> str:
        """The run's directory, made if this is not the continuation of the run there."""
        if self.config.resume and (self.out / "config.yaml").exists():
            return str(self.out)
        return str(claim(self.out, self.settings, numbered=self.config.out is None))

    def _signal(self, received: list[int]) -> int:
        """The signal that a rank has received, the same on every rank, or 0.

        Asked at every step: it is one sum of eight bytes between CPUs, and torchrun gives processes 30 seconds to save.
        """
        return self.ranks.largest(received[0] if received else 0)

    def _train_step(self) -> tuple[torch.Tensor, torch.Tensor, float, int]:
        """One optimizer step: this rank's share of the mean token loss, the norm of the gradient before clipping, the learning
        rate, the tokens of all ranks."""
        config, ranks = self.config, self.ranks
        batch = self.data.next_batch(config.batch_size)
        tokens = batch.tokens()
        total = torch.zeros((), device=config.device)
        parts = batch.part(ranks.rank, ranks.size).split(config.micro_batch_size)
        if self.probes:
            self.probes.noise(self.step + 1, batch, lambda part: token_losses(self.model, part.to(config.device)), self.model)
        for number, part in enumerate(parts, 1):
            with ranks.accumulating(self.wrapped, last=number == len(parts)):
                with self._autocast():
                    # Over the whole batch's tokens, so that accumulation changes nothing, padding or not.
                    loss = token_losses(self.wrapped, part.to(config.device)) / max(1, tokens)
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

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.config.device, torch.bfloat16, enabled=self.config.precision == "bf16-mixed")

    def _evaluate(self, validation: Any, metrics: Metrics | None) -> float:
        config = self.config
        began = time.monotonic()
        loss = evaluate(self.model, validation, config.micro_batch_size, self._autocast(), self.ranks)
        seconds = round(time.monotonic() - began, 3)
        self._check_finite(loss)
        if metrics:
            metrics.write({"step": self.step, "tokens": self.tokens, "val_loss": loss, "val_seconds": seconds})
        return loss

    def _check_finite(self, loss: float) -> None:
        if not loss < 700:  # beyond, its perplexity is no longer a number
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
        say(f"{config.optimizer}: {summary()}" if summary else f"{config.optimizer}: torch.optim.AdamW on every parameter")
        if self.step:
            say(f"continues at step {self.step}" if self.step < config.steps else f"already complete at step {self.step}")
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
        ranks = self.ranks
        rng = {"cpu": ranks.gather(torch.get_rng_state())}
        if self.config.device == "cuda":
            rng["cuda"] = ranks.gather(torch.cuda.get_rng_state())
        training = {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "data": self.data.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "rng": {kind: states[0] for kind, states in rng.items()},
            "rng_of_other_ranks": [{kind: states[rank] for kind, states in rng.items()} for rank in range(1, ranks.size)],
            "settings": self.settings,
        }
        folder, keep = self.out / "checkpoints", self.config.checkpoint.keep
        if ranks.sharded:
            self._save_shards(folder, keep, training)
        elif ranks.first:
            parts = {"optimizer": self.optimizer.state_dict(), "training": training}
            checkpoints.save(folder, self.step, keep, self.model, self.tokenizer, parts)
        ranks.barrier()

    def _save_shards(self, folder: Path, keep: int, training: dict[str, Any]) -> None:
        from subspan.training.publish import open_scratch, publish
        from subspan.training.sharded import save_sharded

        scratch = open_scratch(folder)
        save_sharded(scratch, self.model, self.optimizer)
        if self.ranks.first:
            self.model.config.save_pretrained(scratch)  # type: ignore[union-attr, operator]  # transformers' method
            self.tokenizer.save_pretrained(scratch)
            torch.save(training, scratch / "training.pt")
            seal(scratch, but="*.safetensors")
        publish(scratch, step=self.step, keep=keep)

    def _load(self, folder: Path) -> None:
        training = checkpoints.load_part(folder, "training")
        if not (folder / "optimizer.pt").exists():  # ranks have saved their parts
            from subspan.training.sharded import load_sharded

            load_sharded(folder, self.model, self.optimizer)
        elif self.ranks.sharded:
            raise InputError(
                f"parallel='fsdp': the checkpoint {folder} holds the whole model in one file; continue it with --parallel ddp "
                "or in one process, or start anew with another --out"
            )
        else:
            optimizer = checkpoints.load_part(folder, "optimizer")
            checkpoints.load_weights(folder, self.model)
            self.optimizer.load_state_dict(optimizer)
        self.scheduler.load_state_dict(training["scheduler"])
        self.data.load_state_dict(training["data"])
        states = [training["rng"], *training.get("rng_of_other_ranks", [])]
        if self.ranks.rank < len(states):  # a rank that the run did not have keeps its own
            rng = states[self.ranks.rank]
            torch.set_rng_state(rng["cpu"])
            if "cuda" in rng and self.config.device == "cuda":
                torch.cuda.set_rng_state(rng["cuda"])
        self.step, self.tokens, self.seconds = training["step"], training["tokens"], training["seconds"]


def _build_optimizer(config: ResolvedConfig, model: nn.Module) -> torch.optim.Optimizer:
    return create(
        config.optimizer,
        model,
        lr=config.lr,
        rank=config.rank,
        update_proj_gap=config.update_proj_gap,
        scale=config.scale,
        proj_type=config.optim.proj_type,
        transfer=config.optim.transfer,
        selector=config.optim.selector,
        rule=config.optim.rule,
        residual=config.optim.residual,
        betas=config.optim.betas,
        eps=config.optim.eps,
        weight_decay=config.weight_decay,
        stagger=config.optim.stagger,
        eta=config.optim.eta,
        proximal=config.optim.proximal,
        state_dtype=config.optim.state_dtype,
        min_8bit_size=config.optim.min_8bit_size,
        bf16_stochastic_round=config.optim.bf16_stochastic_round,
        lr_full=config.optim.lr_full,
        seed=config.seed,
        total_steps=config.steps,
        targets=config.optim.targets,
    )


def _open_data(config: ResolvedConfig, tokenizer: Any) -> DataSource:
    if config.data.partition(":")[0] in STREAMS:
        if config.validation_data:
            raise InputError(f"validation_data={config.validation_data!r}: {config.data} has a validation half of its own")
        return TokenStream(config.data, tokenizer, config.sequence_length, config.evaluation.tokens, config.packing)
    if not config.packing:
        raise InputError(
            f"packing=False: only streamed data ({', '.join(STREAMS)}) can be left unpacked; data is {config.data!r}"
        )
    documents = find_documents(config.data, config.validation_data)
    return TokenWindows(tokenise(documents, tokenizer), config.sequence_length, config.seed, config.evaluation.tokens)


def _plain(value: Any) -> Any:
    """Lists for tuples, so that settings equal what YAML and a checkpoint give back."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
