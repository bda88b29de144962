"""A small model whose weights are tall, wide, uneven and smaller than the world, and its batches."""

import torch
from torch import nn

STEPS, RANK = 30, 6  # every seventh step refreshes
SMALLEST = 64  # min_8bit_size: the moments are small, and are to be kept in 8 bits where that is asked


class Halves(nn.Module):
    """Scales the halves of its input: two numbers, fewer than there are ranks."""

    def __init__(self):
        super().__init__()
        self.factors = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return torch.cat([factor * half for factor, half in zip(self.factors, x.chunk(2, -1), strict=True)], -1)


def build():
    torch.manual_seed(0)
    first, second = nn.Sequential(nn.Linear(24, 40), nn.LayerNorm(40)), nn.Sequential(nn.Tanh(), nn.Linear(40, 31))
    return nn.Sequential(first, second, nn.Sequential(nn.Tanh(), nn.Linear(31, 26), Halves())).double()


def batches():
    # Rows enough for gradients of full rank: what a zero singular value belongs to is for rounding to decide.
    generator = torch.Generator().manual_seed(1)
    return [[torch.randn(48, n, generator=generator, dtype=torch.float64) for n in (24, 26)] for _ in range(STEPS)]


def loss_of(model, x, y):
    return (model(x) - y).square().mean()
