"""Measurements of the subspaces while a run trains: ``probes.jsonl`` in its directory. They change nothing that is
computed.

A row of kind ``subspace`` for each subspace that the step has chosen anew:

    overlap        with the basis before (``subspaces.overlap``); angles: least, median and largest principal angle,
    degrees
    anchor         overlap with the basis that was current at the step ``probes.anchor``
    captured       share of this step's gradient that the new basis holds; ``captured_before``: that the old one held
    skipped        refreshes skipped so far
    step_seconds   time of the whole optimizer step, and ``usual_seconds``, the median of steps without a refresh so
    far; of
                   backward-side layers neither, for the backward pass chooses their bases

A row of kind ``noise`` for each projected weight every ``probes.noise_every`` steps: the batch in k parts with
gradients g_i,

    noise  = 1/(k (k - 1)) sum_i ||g_i - mean||²       unbiased for the variance of the batch's gradient
    signal = ||mean||² - noise                         unbiased for the square of its expectation

The parts have as many sequences each; with padding, in fine-tuning, not as many tokens, and then each counts alike. A
part goes
through the model at once, whatever ``micro_batch_size``, and the gradients of all parts are held together.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from subspan.inspection import angles, captured, overlap, subspaces
from subspan.optimizer import SubspaceOptimizer
from subspan.training.config.settings import ProbeConfig
from subspan.training.data.batches import Batch
from subspan.training.monitor.metrics import Metrics
from subspan.utils.errors import InputError, first_line

ANCHORS = "anchors.safetensors"


class Probes:
    """What a run measures of its subspaces.

    Args:
        config: what is asked for.
        folder: the run's directory.
        step: where the run starts.
    """

    def __init__(self, config: ProbeConfig, optimizer: SubspaceOptimizer, folder: Path, step: int) -> None:
        self.config, self.optimizer, self.folder = config, optimizer, folder
        self._file = Metrics(folder, step, tensorboard=False, name="probes.jsonl")
        self._usual: list[float] = []
        self._before = {subspace.name: (subspace.refreshed_at, subspace.basis()) for subspace in subspaces(optimizer)}
        self._anchors = self._load_anchors(step)

    def __enter__(self) -> "Probes":
        self._file.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._file.__exit__(*exception)

    def step(self, number: int, take: Callable[[], object]) -> None:
        """Take the optimizer's step ``number`` (the first is 1) and look at what it has chosen."""
        seconds = self._timed(take)
        usual = statistics.median(self._usual[-50:]) if self._usual else None
        rows = []
        for subspace in subspaces(self.optimizer):
            chosen, old = self._before[subspace.name]
            if subspace.refreshed_at == chosen:
                continue
            new, G = subspace.basis(), subspace.gradient()
            self._before[subspace.name] = (subspace.refreshed_at, new)
            row: dict[str, Any] = {
                "kind": "subspace",
                "name": subspace.name,
                "step": number,
                "skipped": subspace.skipped,
            }
            if subspace.layout is not None:  # the backward pass chooses its own, at another time
                row |= {"step_seconds": seconds, "usual_seconds": usual}
            if chosen >= 0:
                turned = angles(old, new)
                row |= {"overlap": overlap(old, new), "angles": [float(turned[i]) for i in (0, len(turned) // 2, -1)]}
            if subspace.name in self._anchors:
                row["anchor"] = overlap(self._anchors[subspace.name], new)
            if G is not None and bool((G != 0).any()):
                row["captured"] = captured(G, new)
                if chosen >= 0:
                    row["captured_before"] = captured(G, old)
            rows.append(row)
        if not rows:
            self._usual.append(seconds)
        for row in rows:
            self._file.write(row)
        if number == self.config.anchor:
            self._drop_anchor()

    def _timed(self, take: Callable[[], object]) -> float:
        """Seconds on the device: it must have done what was asked before, and then what is asked now."""
        self._wait()
        began = time.monotonic()
        take()
        self._wait()
        return time.monotonic() - began

    def _wait(self) -> None:
        if any(p.is_cuda for group in self.optimizer.param_groups for p in group["params"]):
            torch.cuda.synchronize()

    def noise(self, number: int, batch: Batch, loss_of: Callable[[Batch], Tensor], model: nn.Module) -> None:
        """Before step ``number``, if it is its turn: how noisy the gradient of ``batch`` is. It leaves generators
        alone.
        """
        every = self.config.noise_every
        if every is None or number % every:
            return
        k = min(self.config.noise_parts, len(batch.inputs))
        names = {id(p): name for name, p in model.named_parameters()}
        weights = [subspace.parameter for subspace in subspaces(self.optimizer) if subspace.layout is not None]
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            parts = [batch.part(part, k) for part in range(k)]
            gradients = [torch.autograd.grad(loss_of(part) / max(1, part.weight()), weights) for part in parts]
        for place, p in enumerate(weights):
            found = noise_and_signal([gradient[place] for gradient in gradients])
            self._file.write({"kind": "noise", "name": names[id(p)], "step": number, "parts": k, **found})

    def _drop_anchor(self) -> None:
        current = {
            subspace.name: subspace.basis() for subspace in subspaces(self.optimizer) if subspace.refreshed_at >= 0
        }
        self._anchors = current
        scratch = self.folder / f".{ANCHORS}.unfinished"
        save_file({name: Q.contiguous() for name, Q in current.items()}, scratch, {"step": str(self.config.anchor)})
        scratch.replace(self.folder / ANCHORS)

    def _load_anchors(self, step: int) -> Mapping[str, Tensor]:
        path = self.folder / ANCHORS
        if self.config.anchor is None or step < self.config.anchor or not path.exists():
            return {}
        try:
            with safe_open(path, "pt") as file:
                saved = (file.metadata() or {}).get("step")
            found: dict[str, Tensor] = load_file(path)
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{path}: cannot be read: {first_line(error)}; remove it and set --probes.anchor null"
            ) from error
        if saved != str(self.config.anchor):
            raise InputError(
                f"probes.anchor={self.config.anchor}: {path} holds the bases of step {saved}, and that step has "
                "passed; go on "
                f"with --probes.anchor {saved}, or with null"
            )
        return found


def noise_and_signal(gradients: list[Tensor]) -> dict[str, float]:
    """Of the gradients of k equal parts of a batch; see the head of this file."""
    G = torch.stack([gradient.double() for gradient in gradients])
    k, mean = len(G), G.mean(0)
    noise = float((G - mean).square().sum()) / (k * (k - 1))
    return {"noise": noise, "signal": float(mean.square().sum()) - noise}


def check_probes(
    config: ProbeConfig, optimizer: torch.optim.Optimizer, name: str, parallel: str | None, batch: int
) -> None:
    """Raise unless these can be measured in this run; names the setting."""
    if not isinstance(optimizer, SubspaceOptimizer) or next(subspaces(optimizer), None) is None:
        raise InputError(
            f"probes.subspace=True: {name} has no subspace here; use a method with one, or leave probes out"
        )
    if parallel == "fsdp":
        raise InputError(
            "probes.subspace=True: gradients are spread over ranks under parallel='fsdp'; use ddp, or no probes"
        )
    if config.noise_every is not None:
        if config.noise_every < 1:
            raise InputError(f"probes.noise_every={config.noise_every}: expected a whole number of steps >= 1, or null")
        if config.noise_parts < 2 or batch % config.noise_parts:
            raise InputError(
                f"probes.noise_parts={config.noise_parts}: expected 2 or more, and a divisor of batch_size={batch}: "
                "the parts "
                "must be equal"
            )
        if all(subspace.layout is None for subspace in subspaces(optimizer)):
            raise InputError("probes.noise_every: backward-side layers form no gradient; use --backward-side=false")
    if config.anchor is not None and config.anchor < 1:
        raise InputError(f"probes.anchor={config.anchor}: expected a step >= 1, or null")
