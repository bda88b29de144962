"""Stochastic rounding: right on average, only to neighbours, the same after a resume."""

import copy
import dataclasses

import pytest
import torch
from support.helpers import parameter, snapshot

from subspan import SubspaceAdamW, create
from subspan.storage.stochastic_rounding import add_rounded_


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("keep", [1.0, 0.999])
def test_unbiased(keep):
    """Over 4,000 draws the mean is keep * p + D within five standard errors, for updates far
    below the spacing of bf16.
    """
    start = torch.tensor([1.0, -1.0, 3.0, 0.01, -250.0, 1e-20, 0.0], dtype=torch.bfloat16)
    D = torch.tensor([1e-4, 2e-3, -3e-3, 1e-6, 0.1, 3e-23, 1e-9])
    exact = start.double() * keep + D.double()
    total, squares, draws = torch.zeros(7, dtype=torch.float64), torch.zeros(7, dtype=torch.float64), 4000
    for seed in range(draws):
        p = start.clone()
        add_rounded_(p, D.clone(), keep, generator(seed))
        total += p.double()
        squares += p.double().square()
    mean = total / draws
    error = ((squares / draws - mean.square()).clamp_min(0) / draws).sqrt()
    assert ((mean - exact).abs() < 5 * error + 1e-6 * exact.abs()).all()


def test_only_the_two_neighbours():
    """Each result is the bf16 number just below or just above the sum, and the sum itself where it is one."""
    numbers = torch.randn(2000, generator=generator())
    p = torch.zeros(2000, dtype=torch.bfloat16)
    add_rounded_(p, numbers.clone(), 1.0, generator(1))
    toward_zero = (numbers.view(torch.int32) & -(1 << 16)).view(torch.float32)
    away = ((numbers.view(torch.int32) & -(1 << 16)) + (1 << 16)).view(torch.float32)
    assert ((p.float() == toward_zero) | (p.float() == away)).all()
    assert (p.float() == away).any()
    assert (p.float() == toward_zero).any()
    exact = numbers.to(torch.bfloat16)
    q = torch.zeros(2000, dtype=torch.bfloat16)
    add_rounded_(q, exact.float(), 1.0, generator(2))
    assert torch.equal(q, exact)


def test_what_is_not_finite_stays_so():
    """NaNs of any payload and infinities: a carry would turn them into other numbers."""
    bits = torch.tensor([0x7FFFFFFF, 0x7FC00000, 0x7F800001, -1], dtype=torch.int32)
    D = torch.cat([bits.view(torch.float32), torch.tensor([torch.inf, -torch.inf])])
    for seed in range(20):
        p = torch.zeros(6, dtype=torch.bfloat16)
        add_rounded_(p, D.clone(), 1.0, generator(seed))
        assert p[:4].isnan().all()
        assert p[4:].tolist() == [torch.inf, -torch.inf]


@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2000, 700)], ids=str)
def test_every_shape(shape):
    """Chunks cover everything once."""
    p = torch.zeros(shape, dtype=torch.bfloat16)
    D = torch.randn(shape, generator=generator())
    add_rounded_(p, D.clone(), 1.0, generator(3))
    torch.testing.assert_close(p.float(), D, rtol=1 / 128, atol=0)


def run(stochastic, steps=300, lr=1e-4, weight_decay=0.0):
    p = torch.nn.Parameter(torch.full((64, 32), 1.0, dtype=torch.bfloat16))
    settings = {"lr": lr, "weight_decay": weight_decay, "bf16_stochastic_round": stochastic}
    optimizer = SubspaceAdamW([p], **settings)
    for _ in range(steps):
        p.grad = torch.zeros_like(p) if weight_decay else torch.ones_like(p)
        optimizer.step()
    return p.detach().float()


def test_small_steps_are_not_lost():
    """Three hundred steps of 1e-4 from 1.0 arrive at 0.97 on average; rounded to nearest they never leave."""
    assert (run(False) == 1.0).all()
    moved = run(True)
    assert abs(moved.mean().item() - 0.97) < 0.002


def test_weight_decay_is_not_lost():
    assert (run(False, lr=1e-3, weight_decay=0.1) == 1.0).all()
    assert abs(run(True, lr=1e-3, weight_decay=0.1).mean().item() - (1 - 1e-4) ** 300) < 0.002


@pytest.mark.parametrize("name", ["sara_adamw", "galore_adafactor", "fira_adamw", "adamw"])
def test_resume_is_exact(name):
    """The draw depends on seed, name and step, so a resumed run has the same bits; another seed has others."""

    def steps(optimizer, p, seeds):
        for seed in seeds:
            p.grad = torch.randn(p.shape, generator=generator(seed)).to(p.dtype)
            optimizer.step()

    def build(p, seed=0):
        model = torch.nn.ParameterDict({"w": p})
        settings = {"lr": 1e-3, "rank": 4, "update_proj_gap": 3, "targets": ["w"]} if name != "adamw" else {"lr": 1e-3}
        return create(name, model, **settings, bf16_stochastic_round=True, seed=seed)

    p = parameter((48, 20), dtype=torch.bfloat16)
    optimizer = build(p)
    steps(optimizer, p, range(5))
    q = torch.nn.Parameter(p.detach().clone())
    r = torch.nn.Parameter(p.detach().clone())
    saved = snapshot(optimizer)
    steps(optimizer, p, range(5, 10))
    for other, seed in ((q, 0), (r, 1)):
        resumed = build(other, seed)
        resumed.load_state_dict(copy.deepcopy(saved))
        assert resumed.seed == 0  # it is restored
        resumed.method = dataclasses.replace(resumed.method, seed=seed)
        steps(resumed, other, range(5, 10))
    assert torch.equal(p, q)
    assert not torch.equal(p, r)
