"""The gradient of a carrier is the projected gradient, and both executions of a method are one."""

import copy
from itertools import product
from typing import Any

import pytest
import torch
from support.backward_side import RANK, backward_side, basis_of, batches, layers_of, train
from support.pairs import every_pair
from torch.utils.checkpoint import checkpoint

import subspan
from subspan.backward import project_backward

NAMES = [
    "galore_adamw", "sara_adamw", "golore_adamw", "golore_hybrid_adamw", "gosare_adamw", "gasare_sgd", "flora_adafactor",
    "galore_sgd", "sara_adam_mini", "sara_lion", "sara_adamw_8bit", "galore_lazy_adamw", "grass_adamw", "rso_sgd",
    "sara_sketch_adamw", "golore_sketch_adamw_8bit",
]  # fmt: skip
SHARES = {"auto": "auto", "none": "none", "a list": [["q_proj", "k_proj", "v_proj"]]}


def dense_gradients(model: Any, data: Any) -> dict[str, torch.Tensor]:
    """The gradient of every weight, by plain autograd, over all of ``data``."""
    for batch in data:
        model(**batch).loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


@every_pair(
    "name, share, checkpointed, accumulate",
    [*product(["golore_adamw", "sara_adamw", "gosare_adamw", "rso_adamw", "flora_sgd"], SHARES, [False, True], [1, 3])],
)
def test_carriers_get_the_projected_gradient(
    llama: Any, name: str, share: str, checkpointed: bool, accumulate: int
) -> None:
    """Every carrier gets R = G Q, at the step that chooses the basis and at one that does not. Everything else gets its
    own gradient. The comparison is with plain autograd at the same weights, in fp64.
    """
    model = llama().double()
    if checkpointed:
        model.train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    plain = copy.deepcopy(model)
    optimizer, _ = backward_side(model, name, SHARES[share], lr=0.0)
    for step in range(2):
        data = list(batches(accumulate, seed=step))
        expected = dense_gradients(plain, data)
        for batch in data:
            model(**batch).loss.backward()
        for path, layer in layers_of(model).items():
            R = expected[f"{path}.weight"] @ basis_of(layer)
            torch.testing.assert_close(layer.carrier.grad, R, rtol=0, atol=1e-12 * (1 + R.abs().max().item()))
            assert layer.weight.grad is None
        for path, p in model.named_parameters():
            if p.requires_grad and not path.endswith(".carrier"):
                torch.testing.assert_close(p.grad, expected[path], rtol=0, atol=1e-12)
        optimizer.step()
        optimizer.zero_grad()
        plain.zero_grad()


@every_pair("name, transfer, merge", [*product(NAMES, [None, "moments"], ["step", "refresh"])])
def test_both_executions_agree(llama: Any, name: str, transfer: Any, merge: str) -> None:
    """Thirty steps over six refreshes, with weight decay, have the losses of the optimizer-side method with right
    bases: keys are the same, and so are draws. Weights are in fp64, but transformers computes norms and losses in fp32.
    """
    twin, model = llama().double(), llama().double()
    settings = {
        "lr": 1e-3,
        "update_proj_gap": 5,
        "transfer": transfer,
        "weight_decay": 0.1,
        "total_steps": 30,
        "seed": 4,
    }
    optimizer = subspan.create(name, twin, rank=RANK, proj_type="right", **settings)
    other, handle = backward_side(model, name, "none", merge, **settings)
    expected, losses = train(twin, optimizer, batches(30)), train(model, other, batches(30))
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=3e-7, atol=0)
    handle.merge()
    for path, p in twin.named_parameters():
        torch.testing.assert_close(model.get_parameter(path), p, rtol=0, atol=1e-6)


def test_shared_selection_is_that_of_the_stacked_gradient(llama: Any) -> None:
    """The leading subspace of the gradients of q, k and v, on top of each other, is that of all three."""
    model = llama().double()
    plain = copy.deepcopy(model)
    optimizer, _ = backward_side(model, "galore_adamw")
    (batch,) = batches(1)
    expected = dense_gradients(plain, [batch])
    model(**batch).loss.backward()
    for index in range(2):
        path = f"model.layers.{index}.self_attn"
        stacked = torch.cat([expected[f"{path}.{head}_proj.weight"] for head in "qkv"])
        V = torch.linalg.svd(stacked)[2][:RANK].T
        bases = [basis_of(model.get_submodule(f"{path}.{head}_proj")) for head in "qkv"]
        for Q in bases:
            torch.testing.assert_close(Q @ Q.T, V @ V.T, rtol=0, atol=1e-9)
        assert torch.equal(bases[0], bases[1])
    assert sum("basis" in state for state in optimizer.state.values()) == 8  # of 14 layers


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_blocks(reentrant: bool) -> None:
    """Both kinds of torch's checkpointing, over a block whose basis is due in the backward pass."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(12, 20), torch.nn.Tanh(), torch.nn.Linear(20, 6)).double()
    plain, x = copy.deepcopy(model), torch.randn(9, 12, dtype=torch.float64, requires_grad=True)
    project_backward(model, rank=3, share="none")
    optimizer = subspan.create("sara_adamw", model, lr=0.0, stagger=False)
    for _ in range(2):
        checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
        plain(x).square().sum().backward()
        for index in (0, 2):
            torch.testing.assert_close(model[index].carrier.grad, plain[index].weight.grad @ basis_of(model[index]))
            torch.testing.assert_close(model[index].bias.grad, plain[index].bias.grad)
        optimizer.step()
        optimizer.zero_grad()
        plain.zero_grad()


def test_full_rank_sgd_is_sgd() -> None:
    """With rank = in, backward-side SGD is plain SGD, whatever the basis."""
    for name in ("golore_sgd", "galore_sgd", "gosare_sgd"):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.Tanh(), torch.nn.Linear(10, 10)).double()
        plain = copy.deepcopy(model)
        project_backward(model, rank=6, targets=["0."], share="none")
        optimizer = subspan.create(name, model, lr=0.1, scale=1.0, rank=100, transfer="rotate", update_proj_gap=3)
        sgd = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
        for step in range(10):
            x = torch.randn(7, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
            for network, stepper in ((model, optimizer), (plain, sgd)):
                stepper.zero_grad()
                network(x).square().mean().backward()
                stepper.step()
        for p, q in zip((model[0].weight, model[2].weight), (plain[0].weight, plain[2].weight), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


def test_a_layer_called_twice() -> None:
    """Whether it is called with other inputs or with the same again, both parts of the gradient arrive."""

    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = torch.nn.Linear(8, 8).double(), torch.nn.Linear(8, 8).double()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(torch.tanh(self.a(x))) + self.b(x) + self.a(x)

    model = Twice()
    plain, x = copy.deepcopy(model), torch.randn(5, 8, dtype=torch.float64)
    project_backward(model, rank=3, share=[["a", "b"]])
    optimizer = subspan.create("galore_adamw", model, lr=0.0, stagger=False)
    for _ in range(2):
        model(x).square().sum().backward()
        plain(x).square().sum().backward()
        for layer, other in ((model.a, plain.a), (model.b, plain.b)):
            torch.testing.assert_close(layer.carrier.grad, other.weight.grad @ basis_of(layer), rtol=0, atol=1e-10)
        optimizer.step()
        optimizer.zero_grad()
        plain.zero_grad()


@pytest.mark.parametrize("coupled", [True, False])
@pytest.mark.parametrize("execution", ["backward", "optimizer"])
@pytest.mark.parametrize("name", ["rso_sgd", "rso_adamw"])
def test_proximal_term(coupled: bool, execution: str, name: str) -> None:
    """The steps are those of RSO written out: min_B f(W + B Qᵀ) + ||B||² / (2 eta), with B and its moments from zero in
    each subspace.
    """
    eta, lr, W = 0.7, 0.05, torch.randn(10, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = torch.nn.Sequential(torch.nn.Linear(6, 10, bias=False)).double()
    with torch.no_grad():
        model[0].weight.copy_(W)
    if execution == "backward":
        project_backward(model, rank=3, share="none")
    settings = {
        "eta": eta,
        "proximal": "coupled" if coupled else "decoupled",
        "update_proj_gap": 4,
        "proj_type": "right",
    }
    optimizer = subspan.create(name, model, lr=lr, rank=3, **settings)
    B = M = V = Q = None
    for step in range(10):
        x = torch.randn(7, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        G = (2 * (x @ W.T) / 70).T @ x
        optimizer.step()
        if step % 4 == 0:
            state = next(s for s in optimizer.state.values() if "basis" in s)
            Q = state["basis"].double()
            torch.testing.assert_close(Q.T @ Q, 2 * torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-6)
            B, M, V = (torch.zeros(10, 3, dtype=torch.float64) for _ in range(3))
        R = G @ Q + (B / eta if coupled else 0)
        M = 0.9 * M + (R if name == "rso_sgd" else 0.1 * R)
        V, t = 0.999 * V + 0.001 * R**2, step % 4 + 1
        U = M if name == "rso_sgd" else M / (1 - 0.9**t) / ((V / (1 - 0.999**t)).sqrt() + 1e-8)
        move = lr * (U + (0 if coupled else B / eta))
        B, W = B - move, W - move @ Q.T
        torch.testing.assert_close(model[0].weight.detach(), W, rtol=0, atol=1e-10)
