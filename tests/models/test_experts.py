"""The loss of routers is trained, and experts that get no token are right in every mode."""

import pytest
import torch
from support.families import FAMILIES
from torch import nn

import subspan
from subspan.training.data.batches import IGNORED, Batch
from subspan.training.evaluation import evaluate, token_losses, trained_losses

MIXTURES = [name for name, family in FAMILIES.items() if family.settings.get("output_router_logits")]


@pytest.mark.parametrize("name", MIXTURES)
def test_the_trained_loss_is_the_models_own(name):
    """With its labels the model adds the loss of its routers, times its coefficient, to the mean over the targets."""
    family = FAMILIES[name]
    model = family.build()
    model.router_aux_loss_coef = 3.0
    ids = family.batch()["input_ids"]
    targets = torch.cat([ids[:, 1:], torch.full((len(ids), 1), IGNORED)], 1)
    batch = Batch(ids, targets)
    own = model(input_ids=ids, labels=ids).loss
    ours = trained_losses(model, batch) / batch.weight()
    torch.testing.assert_close(ours, own)
    plain = token_losses(model, batch) / batch.weight()
    assert own > plain + 0.1
    with torch.no_grad():
        measured = evaluate(model, batch, 4, torch.autocast("cpu", enabled=False))
    assert measured == pytest.approx(float(plain.detach()), rel=1e-5)


class Mixture(nn.Module):
    """Experts that are chosen by the sign of inputs, so that a batch decides which of them get tokens."""

    def __init__(self, stacked):
        super().__init__()
        torch.manual_seed(2)
        weights = torch.randn(3, 10, 12, dtype=torch.float64) / 3
        self.into = nn.Linear(12, 12, dtype=torch.float64)
        self.stacked = stacked
        if stacked:
            self.experts = nn.Parameter(weights)
        else:
            self.experts = nn.ModuleList(nn.Linear(12, 10, bias=False, dtype=torch.float64) for _ in weights)
            for expert, weight in zip(self.experts, weights, strict=True):
                expert.weight = nn.Parameter(weight.clone())

    def forward(self, x, choice):
        h = torch.tanh(self.into(x))
        y = h.new_zeros(len(x), 10)
        for number, expert in enumerate(self.experts):
            if (own := choice == number).any():
                y[own] = h[own] @ expert.mT if self.stacked else expert(h[own])
        return y.square().sum()

    def weights(self):
        return list(self.experts) if self.stacked else [expert.weight for expert in self.experts]


def batches(steps):
    """Inputs and the numbers of their experts: the second gets no token in step 1, the third none at all in 0 to 2."""
    generator = torch.Generator().manual_seed(9)
    for step in range(steps):
        x = torch.randn(8, 12, dtype=torch.float64, generator=generator)
        choice = torch.tensor([0, 1, 0, 1, 0, 0, 0, 0]) if step != 1 else torch.zeros(8, dtype=torch.long)
        if step > 2:
            choice[-1] = 2
        yield x, choice


def train(stacked=False, backward_side=False, parts=1, in_backward=False, name="galore_adamw"):
    model = Mixture(stacked)
    if backward_side:
        subspan.project_backward(model, rank=4, share="none")
    optimizer = subspan.create(
        name, model, rank=4, lr=1e-2, update_proj_gap=2, proj_type="right", stagger=False, total_steps=20
    )
    if in_backward:
        optimizer.enable_step_in_backward(model, accumulate=parts)
    for x, choice in batches(6):
        for rows, chosen in zip(x.chunk(parts), choice.chunk(parts), strict=True):
            model(rows, chosen).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [weight.detach().clone() for weight in model.weights()]


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("in_backward", [False, True])
def test_an_expert_in_some_micro_batches(stacked, parts, in_backward):
    """The gradients of the parts add up to that of the whole, also where an expert is in some of the parts only.

    The bases are drawn, because a gradient of two tokens leaves most of a dominant subspace to rounding.
    """
    name = "golore_adamw"
    whole, divided = train(stacked, name=name), train(stacked, parts=parts, in_backward=in_backward, name=name)
    for expected, ours in zip(whole, divided, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("parts", [1, 4])
def test_an_expert_that_is_idle_in_a_step_stays(parts):
    """A layer of its own without a token has no gradient, so it is not moved; a later first token moves it."""
    start = Mixture(False).weights()
    for backward_side in (False, True):
        third = train(backward_side=backward_side, parts=parts, name="golore_adamw")[2]
        assert bool(torch.isfinite(third).all())
        assert not torch.equal(third, start[2])


@pytest.mark.parametrize("name", ["galore_adamw", "sara_adamw", "golore_adamw"])
def test_a_stack_with_an_idle_expert_has_no_nan(name):
    """An expert without a gradient for three steps keeps its weight exactly until it gets one."""
    model = Mixture(True)
    before = model.experts[2].detach().clone()
    optimizer = subspan.create(name, model, rank=4, lr=1e-2, update_proj_gap=2)
    for step, (x, choice) in enumerate(batches(6)):
        model(x, choice).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert bool(torch.isfinite(model.experts).all())
        assert torch.equal(model.experts[2], before) == (step < 3)
