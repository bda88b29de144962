"""Trains small models for eight steps with every listed optimizer, and hashes what came of it.

`python tests/unchanged/cases.py --write` makes `digests.json`, `weights.pt` and `checkpoints.pt` again. They are to be
written
by the code *before* a change that promises to change no number; the test compares the code after it with them.

Kernels round differently on different processors. So the environment asks for the plainest kernels that each processor
has
(`ENVIRONMENT`). Weights in fp64 stand beside the digests in fp32 and bf16: they can be compared with a tolerance.
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import subspan
from subspan.recipes import RECIPES

ENVIRONMENT = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}
HERE = Path(__file__).parent
DIGESTS, WEIGHTS, CHECKPOINTS = HERE / "digests.json", HERE / "weights.pt", HERE / "checkpoints.pt"
STEPS, MORE = 8, 4

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
COMMON: dict[str, Any] = {
    "lr": 1e-2,
    "rank": 4,
    "update_proj_gap": 3,
    "weight_decay": 0.1,
    "total_steps": 10,
    "min_8bit_size": 64,
}


class Small(nn.Module):
    """Layers that are wide, tall and square, one that three share the input of, a norm, and biases."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.norm = nn.Linear(12, 20), nn.Linear(12, 20, bias=False), nn.LayerNorm(20)
        self.mix, self.down, self.head = nn.Linear(20, 20), nn.Linear(20, 12), nn.Linear(12, 7, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.up(x) * torch.sigmoid(self.gate(x)))
        return self.head(torch.relu(self.down(torch.relu(self.mix(hidden)))))


def model_of(dtype: torch.dtype) -> Small:
    torch.manual_seed(7)
    return Small().to(dtype)


def batch(step: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(500 + step)
    return tuple(torch.randn(9, width, generator=generator).to(dtype) for width in (12, 7))  # type: ignore[return-value]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, dtype: torch.dtype) -> None:
    for step in steps:
        x, y = batch(step, dtype)
        (model(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def settings_of(name: str, dtype: torch.dtype) -> dict[str, Any]:
    """What a name is trained with; stochastic rounding where the moments are in 8 bits and the weights in bf16."""
    rounded = name.endswith("_8bit") and dtype == torch.bfloat16
    return {**COMMON, **({"bf16_stochastic_round": True} if rounded else {})}


def build(name: str, dtype: torch.dtype, **extra: Any) -> tuple[Small, torch.optim.Optimizer]:
    model = model_of(dtype)
    return model, subspan.create(name, model, **{**settings_of(name, dtype), **extra})


def listed(name: str) -> Callable[[torch.dtype], tuple[nn.Module, torch.optim.Optimizer]]:
    return lambda dtype: build(name, dtype)


def with_settings(name: str, **extra: Any) -> Callable[[torch.dtype], tuple[nn.Module, torch.optim.Optimizer]]:
    return lambda dtype: build(name, dtype, **extra)


def in_backward(name: str, **extra: Any) -> Callable[[torch.dtype], tuple[nn.Module, torch.optim.Optimizer]]:
    def make(dtype: torch.dtype) -> tuple[nn.Module, torch.optim.Optimizer]:
        model, optimizer = build(name, dtype)
        optimizer.enable_step_in_backward(model, **extra)  # type: ignore[attr-defined]
        return model, optimizer

    return make


def backward_side(
    name: str, merge: str = "step", **extra: Any
) -> Callable[[torch.dtype], tuple[nn.Module, torch.optim.Optimizer]]:
    def make(dtype: torch.dtype) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = model_of(dtype)
        subspan.project_backward(model, rank=4, share=[["up", "gate"]], merge=merge)  # type: ignore[arg-type]
        return model, subspan.create(name, model, **{**settings_of(name, dtype), **extra})

    return make


def cases() -> dict[str, Callable[[torch.dtype], tuple[nn.Module, torch.optim.Optimizer]]]:
    """Every listed name as it is; and the executions and settings that a name does not reach."""
    found = {name: listed(name) for name in RECIPES}
    found |= {
        "sara_adamw, coupled": with_settings("sara_adamw", eta=2.0),
        "rso_adamw, decoupled": with_settings("rso_adamw", eta=2.0, proximal="decoupled"),
        "galore_adamw, staggered": with_settings("galore_adamw", stagger=True),
        "galore_adamw, left": with_settings("galore_adamw", proj_type="left"),
        "sara_adafactor, moments": with_settings("sara_adafactor", transfer="moments"),
        "sara_adamw, stepped in backward": in_backward("sara_adamw"),
        "fira_sara_adamw, stepped in backward, clipped": in_backward("fira_sara_adamw", clip="per_param", max_norm=0.5),
        "golore_sgd, stepped in backward, lagged": in_backward("golore_sgd", clip="lagged_global", max_norm=0.5),
        "sara_adamw, backward side": backward_side("sara_adamw"),
        "sara_adamw, backward side, merged at a refresh": backward_side("sara_adamw", "refresh", transfer="rotate"),
        "rso_adamw, backward side, coupled": backward_side("rso_adamw", eta=2.0),
        "golore_adamw_8bit, backward side": backward_side("golore_adamw_8bit"),
        "galore_adafactor, backward side": backward_side("galore_adafactor"),
    }
    return found


def digest(tensors: dict[str, Tensor]) -> str:
    """One hash of names, dtypes, shapes and bits."""
    seen = hashlib.blake2b(digest_size=12)
    for name, value in tensors.items():
        seen.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        seen.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return seen.hexdigest()


def kernels() -> str:
    """How torch's bare kernels round here: of other processors the digests say nothing."""
    generator = torch.Generator().manual_seed(3)
    A = torch.randn(20, 12, generator=generator)
    found = {"product": A.mT @ A, "tall": A @ A[:4].mT, "half": (A.bfloat16() @ A.bfloat16().mT)}
    found["values"], found["vectors"] = torch.linalg.eigh(A.double().mT @ A.double())
    found["Q"], found["R"] = torch.linalg.qr(A)
    found["pointwise"] = torch.sigmoid(A).square().log().exp().rsqrt()
    return digest(found)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """As they are saved: of backward-side layers with their displacement, and without carriers."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def results() -> Iterator[tuple[str, str, dict[str, Tensor]]]:
    """Case, dtype, and the weights after ``STEPS`` steps."""
    for name, make in cases().items():
        for kind, dtype in {**DTYPES, "float64": torch.float64}.items():
            model, optimizer = make(dtype)
            train(model, optimizer, range(STEPS), dtype)
            yield name, kind, weights_of(model)


def resumed(name: str, saved: dict[str, Any]) -> dict[str, Tensor]:
    """The weights after ``MORE`` steps of a run that goes on from a checkpoint."""
    model, optimizer = cases()[name](torch.float32)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    train(model, optimizer, range(STEPS, STEPS + MORE), torch.float32)
    return weights_of(model)


def report() -> dict[str, Any]:
    """What the code as it is computes: digests, the largest difference in fp64, and digests of continued runs."""
    torch.set_num_threads(1)
    expected = torch.load(WEIGHTS, weights_only=True)
    checkpoints = torch.load(CHECKPOINTS, weights_only=True)
    found: dict[str, Any] = {"kernels": kernels(), "digests": {}, "differences": {}, "resumed": {}}
    for name, kind, weights in results():
        if kind == "float64":
            apart = [(weights[key] - expected[name][key]).abs().max() for key in expected[name]]
            found["differences"][name] = float(max(apart))
        else:
            found["digests"][f"{name} {kind}"] = digest(weights)
    for name, saved in checkpoints.items():
        found["resumed"][name] = digest(resumed(name, saved))
    return found


def write() -> None:
    torch.set_num_threads(1)
    record: dict[str, Any] = {"kernels": kernels(), "digests": {}, "resumed": {}}
    doubles, checkpoints = {}, {}
    for name, kind, weights in results():
        if kind == "float64":
            doubles[name] = weights
        else:
            record["digests"][f"{name} {kind}"] = digest(weights)
    for name, make in cases().items():
        model, optimizer = make(torch.float32)
        train(model, optimizer, range(STEPS), torch.float32)
        # Through a copy: of views torch would save the whole storage.
        saved = {"model": weights_of(model), "optimizer": optimizer.state_dict()}
        checkpoints[name] = saved
    torch.save(doubles, WEIGHTS)
    torch.save(checkpoints, CHECKPOINTS)
    for name, saved in torch.load(CHECKPOINTS, weights_only=True).items():
        record["resumed"][name] = digest(resumed(name, saved))
    DIGESTS.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    if any(os.environ.get(key) != value for key, value in ENVIRONMENT.items()):  # torch reads them when it is imported
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | ENVIRONMENT)
    if "--write" in sys.argv:
        write()
    else:
        print(json.dumps(report()))
