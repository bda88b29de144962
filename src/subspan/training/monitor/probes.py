"""Measurements of the subspaces while a run trains, in ``probes.jsonl`` of its directory. They change no result.

Each subspace whose basis is new in a step gives a row of kind ``subspace``:

    overlap          overlap with the basis before (``subspan.inspection.overlap``)
    angles           smallest, median and largest principal angle to the basis before, in degrees
    anchor           overlap with the basis that was current at the step ``probes.anchor``
    captured         share of this step's gradient that the new basis holds
    captured_before  share of this step's gradient that the old basis held
    skipped          refreshes skipped so far
    step_seconds     time of the whole optimizer step
    usual_seconds    median time of the steps without a refresh so far

Backward-side layers have no times, because the backward pass chooses their bases.

Each projected weight gives a row of kind ``noise`` every ``probes.noise_every`` steps. The batch is cut into k parts
with gradients g_i:

    noise  = 1/(k (k - 1)) sum_i ||g_i - mean||²       unbiased for the variance of the batch's gradient
    signal = ||mean||² - noise                         unbiased for the square of its expectation

All parts have the same number of sequences. In fine-tuning, padding leaves them with different numbers of tokens; each
part then still counts alike. A part goes through the model at once, whatever ``micro_batch_size`` says, and the
gradients of all parts are held together.
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
from subspan.utils.atomic_files import disk_errors_explained
from subspan.utils.errors import InputError, first_line

ANCHORS = "anchors.safetensors"


class Probes:
    """The measurements of a run's subspaces, as a context manager.

    Args:
        config: which measurements are asked for.
        optimizer: the optimizer of the run.
        folder: the directory of the run.
        step: the step at which the run starts.

    Raises:
        InputError: a file of earlier measurements cannot be used, or one cannot be written.
    """

    def __init__(self, config: ProbeConfig, optimizer: SubspaceOptimizer, folder: Path, step: int) -> None:
        self.config, self.optimizer, self.folder = config, optimizer, folder
        self._file = Metrics(folder, step, tensorboard=False, name="probes.jsonl")
        self._usual: list[float] = []
        self._before = {subspace.name: (subspace.refreshed_at, subspace.basis()) for subspace in subspaces(optimizer)}
        self._anchors = self._load_anchors(step)
        self._on_cuda = any(p.is_cuda for group in optimizer.param_groups for p in group["params"])

    def __enter__(self) -> "Probes":
        self._file.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._file.__exit__(*exception)

    def step(self, number: int, optimizer_step: Callable[[], object]) -> None:
        """Call ``optimizer_step``, the run's step ``number`` (the first is 1), and measure the bases it has chosen."""
        seconds = self._timed(optimizer_step)
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
            if subspace.layout is not None:  # a backward-side layer's basis is chosen in the backward pass
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
            self._save_anchors()

    def _timed(self, optimizer_step: Callable[[], object]) -> float:
        """Seconds of the step, from when the device has done its earlier work to when it has done the step."""
        self._wait()
        began = time.monotonic()
        optimizer_step()
        self._wait()
        return time.monotonic() - began

    def _wait(self) -> None:
        if self._on_cuda:
            torch.cuda.synchronize()

    def noise(self, number: int, batch: Batch, loss_of: Callable[[Batch], Tensor], model: nn.Module) -> None:
        """Measure how noisy the gradient of ``batch`` is, if it is the turn of step ``number``, which comes next.

        The random generators are left as they were.
        """
        every = self.config.noise_every
        if every is None or number % every:
            return
        k = min(self.config.noise_parts, len(batch.inputs))
        names = {id(p): name for name, p in model.named_parameters()}
        weights = [subspace.parameter for subspace in subspaces(self.optimizer) if subspace.layout is not None]
        # In a run on the CPU, asking for CUDA's generators would make a context on the GPU.
        with torch.random.fork_rng(devices=[torch.cuda.current_device()] if self._on_cuda else []):
            parts = [batch.part(part, k) for part in range(k)]
            gradients = [torch.autograd.grad(loss_of(part) / max(1, part.weight()), weights) for part in parts]
        for index, p in enumerate(weights):
            found = noise_and_signal([gradient[index] for gradient in gradients])
            self._file.write({"kind": "noise", "name": names[id(p)], "step": number, "parts": k, **found})

    def _save_anchors(self) -> None:
        self._anchors = {
            subspace.name: subspace.basis() for subspace in subspaces(self.optimizer) if subspace.refreshed_at >= 0
        }
        anchors = {name: Q.contiguous() for name, Q in self._anchors.items()}
        path, scratch = self.folder / ANCHORS, self.folder / f".{ANCHORS}.unfinished"
        needed = sum(Q.numel() * Q.element_size() for Q in anchors.values())
        with disk_errors_explained(str(path), self.folder, needed):
            try:
                save_file(anchors, scratch, {"step": str(self.config.anchor)})
                scratch.replace(path)
            except BaseException:
                scratch.unlink(missing_ok=True)
                raise

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
                f"passed; go on with --probes.anchor {saved}, or with null"
            )
        return found


def noise_and_signal(gradients: list[Tensor]) -> dict[str, float]:
    """Noise and signal, from the gradients of k equal parts of a batch; the head of this file has the equations."""
    G = torch.stack([gradient.double() for gradient in gradients])
    k, mean = len(G), G.mean(0)
    noise = float((G - mean).square().sum()) / (k * (k - 1))
    return {"noise": noise, "signal": float(mean.square().sum()) - noise}


def check_probes(
    config: ProbeConfig, optimizer: torch.optim.Optimizer, name: str, parallel: str | None, batch: int
) -> None:
    """Raise ``InputError`` unless the run can be measured as ``config`` asks.

    Args:
        name: the name of the optimizer.
        parallel: the setting ``parallel`` of the run.
        batch: sequences in a batch.
    """
    if not isinstance(optimizer, SubspaceOptimizer) or next(subspaces(optimizer), None) is None:
        raise InputError(
            f"probes.subspace=True: {name} has no subspace here; use a method with one, or leave probes out"
        )
    if parallel == "fsdp":
        raise InputError(
            "probes.subspace=True: gradients are sharded over the ranks under parallel='fsdp'; use ddp, or no probes"
        )
    if config.noise_every is not None:
        if config.noise_every < 1:
            raise InputError(f"probes.noise_every={config.noise_every}: expected a whole number of steps >= 1, or null")
        if config.noise_parts < 2 or batch % config.noise_parts:
            raise InputError(
                f"probes.noise_parts={config.noise_parts}: expected 2 or more, and a divisor of batch_size={batch}: "
                "the parts must be equal"
            )
        if all(subspace.layout is None for subspace in subspaces(optimizer)):
            raise InputError("probes.noise_every: backward-side layers form no gradient; use --backward-side=false")
    if config.anchor is not None and config.anchor < 1:
        raise InputError(f"probes.anchor={config.anchor}: expected a step >= 1, or null")
