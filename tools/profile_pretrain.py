"""Profile a pretraining step: where its time goes.

    python tools/profile_pretrain.py --model llama-nano --steps 20

After some steps to warm up, torch.profiler records the harness's own training step, with its data, clipping and
schedule. The CPU time that each operation spends itself is added up by kind. Everything called in the optimizer's step
counts as the optimizer's, whatever the operation. Nothing is saved or evaluated.
"""

import argparse
import collections
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from subspan.training.config.settings import PretrainConfig
from subspan.training.pretraining import Pretraining

WARM_UP = 5
KINDS = {
    "matrix products": ("aten::mm", "aten::bmm", "aten::addmm"),
    "attention": ("aten::_scaled_dot_product",),
    "softmax and loss": ("aten::_log_softmax", "aten::nll_loss"),
}


def kind_of(event: Any) -> str:
    """The kind of an operation: the optimizer's if its step calls it, else by name. What is not torch's is Python's."""
    above = event
    while above is not None:
        if above.name.startswith("Optimizer.step"):
            return "optimizer"
        above = above.cpu_parent
    if not event.name.startswith("aten::"):
        return "autograd and the profiler"
    return next((kind for kind, names in KINDS.items() if event.name.startswith(names)), "elementwise and copies")


def shares(recorder: profile) -> dict[str, float]:
    """Shares of the CPU time, largest first."""
    times: collections.Counter[str] = collections.Counter()
    for event in recorder.events() or ():
        times[kind_of(event)] += event.self_cpu_time_total
    total = sum(times.values())
    return {kind: time / total for kind, time in times.most_common()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llama-nano")
    parser.add_argument("--optimizer", default="sara_adamw")
    parser.add_argument("--backward_side", action="store_true")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--sequence_length", type=int, default=128)
    parser.add_argument("--tokenizer", help="the preset's by default")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    given = vars(parser.parse_args())
    steps = given.pop("steps")
    run = Pretraining(PretrainConfig(steps=WARM_UP + steps, out="unused", **given))
    for _ in range(WARM_UP):
        run._train_step()
    with profile(activities=[ProfilerActivity.CPU]) as recorder:
        for _ in range(steps):
            run._train_step()
    print(f"{given['model']}, {given['optimizer']}: {steps} steps, {torch.get_num_threads()} threads")
    for kind, share in shares(recorder).items():
        print(f"{kind:28} {share:6.1%}")


if __name__ == "__main__":
    main()
