"""What lies between two training steps: ``python tools/profile_pair.py``, three minutes on a quiet machine.

The step that ``subspan bench train`` times, LLaMA-60M with backward-side SARA, and the same with plain layers and fused AdamW,
are recorded in turns by torch.profiler. Printed is, by kind of operation, the time of each and their difference, all as shares
of the step with fused AdamW; and the share that the FLOPs of the matrix products alone would give.
"""

import argparse
import collections

import torch
from profile_pretrain import kind_of
from torch.profiler import ProfilerActivity, profile

from subspan.bench.setting import Setting, build
from subspan.bench.train import _flops, _step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llama-60m")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--threads", type=int)
    given = parser.parse_args()
    setting = Setting(model=given.model, rank=given.rank, threads=given.threads)
    if given.threads:
        torch.set_num_threads(given.threads)
    batch = setting.batch()
    both = {"backward": build(setting, "sara_adamw", backward_side=True), "adamw": build(setting, "adamw", fused=True)}
    times: dict[str, collections.Counter[str]] = {name: collections.Counter() for name in both}
    flops = {name: _flops(trained, batch) for name, trained in both.items()}  # it warms up too
    for number in range(given.steps):
        for name in list(both)[:: 1 if number % 2 else -1]:
            with profile(activities=[ProfilerActivity.CPU]) as recorder:
                _step(both[name], batch)
            for event in recorder.events() or ():
                times[name][kind_of(event)] += event.self_cpu_time_total
    whole = times["adamw"].total()
    print(f"{given.model}, rank {given.rank}, {given.steps} steps of each, {torch.get_num_threads()} threads")
    print(f"{'':28} {'AdamW':>8} {'ours':>8} {'less':>8}")
    for kind, own in times["adamw"].most_common():
        ours = times["backward"][kind]
        print(f"{kind:28} {own / whole:8.1%} {ours / whole:8.1%} {(own - ours) / whole:8.1%}")
    print(f"{'all':28} {1:8.1%} {times['backward'].total() / whole:8.1%}")
    print(f"FLOPs of the matrix products: {flops['backward'] / flops['adamw']:.3f}")


if __name__ == "__main__":
    main()
