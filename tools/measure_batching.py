"""Measure whether it would pay to batch layers of one shape.

    python tools/measure_batching.py

It takes two minutes on a quiet machine. For each shape of a LLaMA's linear layers it compares three ways to make the
products of an ordinary step (``G Q`` and ``W -= U Qᵀ``):

- layer by layer, as the optimizer makes them;
- batched, over stacks that exist already, which is the most that batching could give;
- with the gradients, which autograd leaves apart, gathered into a stack for the first product only.

It also compares ``eigh`` of matrices one by one and batched. It prints medians of the ratios to one by one, with 95 %
intervals.
"""

import argparse

import torch
from torch import Tensor

from subspan.bench import timing
from subspan.costs.llama import Llama
from subspan.linalg import spectral_dtype
from subspan.training.models.presets import PRESETS


def products(m: int, n: int, r: int, count: int, rounds: int) -> dict[str, dict[str, float]]:
    """Ratios for ``count`` weights ``(m, n)`` and bases ``(n, r)``."""
    weights, gradients = [torch.randn(m, n) for _ in range(count)], [torch.randn(m, n) for _ in range(count)]
    bases = [torch.linalg.qr(torch.randn(n, r))[0] for _ in range(count)]
    W, G, Q = torch.stack(weights), torch.stack(gradients), torch.stack(bases)
    R = torch.empty(count, m, r)

    def one_by_one() -> None:
        for w, g, q in zip(weights, gradients, bases, strict=True):
            w.addmm_(g @ q, q.mT, alpha=-1e-3)

    def stacked() -> None:
        W.baddbmm_(torch.bmm(G, Q, out=R), Q.mT, alpha=-1e-3)

    def gathered() -> None:  # bases are the optimizer's own, and could be kept in a stack; weights stay where they are
        torch.bmm(torch.stack(gradients, out=G), Q, out=R)
        for w, U, q in zip(weights, R, bases, strict=True):
            w.addmm_(U, q.mT, alpha=-1e-3)

    return _ratios({"one by one": one_by_one, "stacked": stacked, "gathered": gathered}, rounds)


def factorisations(n: int, count: int, rounds: int) -> dict[str, dict[str, float]]:
    """Ratios for ``eigh`` of ``count`` matrices ``(n, n)``."""
    A = torch.randn(count, 2 * n, n, dtype=spectral_dtype(torch.device("cpu"), n))
    S: Tensor = A.mT @ A

    def one_by_one() -> None:
        for matrix in S:
            torch.linalg.eigh(matrix)

    return _ratios({"one by one": one_by_one, "stacked": lambda: torch.linalg.eigh(S)}, rounds)


def _ratios(contenders: dict, rounds: int) -> dict[str, dict[str, float]]:
    seconds = timing.rounds(contenders, rounds, warm_up=2)
    base = seconds.pop("one by one")
    return {
        name: timing.interval(timing.median_ratio, zip(taken, base, strict=True)) for name, taken in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    torch.manual_seed(0)
    print(timing.machine())
    for name, rank in (("llama-nano", 16), ("llama-60m", 128)):
        model = Llama.of(PRESETS[name])
        shapes: dict[tuple[int, int], int] = {}
        for layer in model.block:
            shapes[layer.out, layer.inputs] = shapes.get((layer.out, layer.inputs), 0) + model.layers
        for (m, n), count in shapes.items():
            for way, ratio in products(m, n, rank, count, given.rounds).items():
                print(f"{name}: {count} products of ({m}, {n}), rank {rank}, {way}: {_said(ratio)}")
        for way, ratio in factorisations(model.d, 8, given.rounds).items():
            print(f"{name}: eigh of 8 ({model.d}, {model.d}), {way}: {_said(ratio)}")


def _said(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"


if __name__ == "__main__":
    main()
