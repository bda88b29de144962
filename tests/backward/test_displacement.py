"""``merge="refresh"``: what is kept in the carriers is lost by nothing that happens to the model or its optimizer."""

import copy
import pickle
from typing import Any

import pytest
import torch
from support.backward_side import backward_side, batches, train
from torch import Tensor, nn

import subspan


def moved(llama: Any, **settings: Any) -> tuple[Any, Any, Any]:
    """A model in fp64 whose weights have moved since the last refresh, its optimizer and its handle."""
    model = llama().double()
    optimizer, handle = backward_side(model, "sara_adamw", merge="refresh", update_proj_gap=50, **settings)
    train(model, optimizer, batches(4))
    assert all(layer.carrier.abs().max() > 0 for layer in handle.layers)
    return model, optimizer, handle


def output(model: nn.Module) -> Tensor:
    (batch,) = batches(1, seed=9)
    with torch.no_grad():
        logits: Tensor = model(**batch).logits
    return logits


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_another_optimizer(llama: Any) -> None:
    model, _, _ = moved(llama)
    before = output(model)
    subspan.create("sara_adamw", model, lr=1e-2)
    close(output(model), before)


def test_the_optimizer_loads(llama: Any) -> None:
    model, optimizer, _ = moved(llama)
    other_model = llama().double()
    other, _ = backward_side(other_model, "sara_adamw", update_proj_gap=50, seed=3)
    train(other_model, other, batches(3, seed=4))
    before = output(model)
    optimizer.load_state_dict(other.state_dict())
    close(output(model), before)


def test_some_weights_are_loaded(llama: Any) -> None:
    """A displacement goes with the weight it belongs to."""
    model, _, _ = moved(llama)
    before = output(model)
    model.load_state_dict({"model.norm.weight": model.model.norm.weight.detach().clone()}, strict=False)
    close(output(model), before)
    plain = {key: value.clone() for key, value in llama().double().state_dict().items()}
    model.load_state_dict(plain)
    fresh = llama().double()
    close(output(model), output(fresh))


def test_saving_changes_nothing(llama: Any) -> None:
    """What is saved is merged; the run goes on bit for bit as if it had not been saved."""
    model, _, handle = moved(llama)
    held = [(layer.weight.clone(), layer.carrier.clone()) for layer in handle.layers]
    saved = model.state_dict()
    for layer, (weight, carrier) in zip(handle.layers, held, strict=True):
        assert torch.equal(layer.weight, weight)
        assert torch.equal(layer.carrier, carrier)
    plain = llama().double()
    plain.load_state_dict(saved)
    close(output(plain), output(model))


def test_gradients_through_frozen_layers(llama: Any) -> None:
    """The gradient of the input, with carriers that hold a displacement and take no gradient."""
    model, _, handle = moved(llama)
    for layer in handle.layers:
        layer.carrier.requires_grad_(False)
    grads = []
    for _ in range(2):
        (batch,) = batches(1, seed=9)
        model(**batch).loss.backward()
        grads.append(model.model.embed_tokens.weight.grad.clone())
        model.zero_grad()
        handle.merge()
    close(*grads)


@pytest.mark.parametrize("what", ["steps", "decay"])
def test_stochastic_rounding(what: str) -> None:
    """In bf16, steps and decay of one part in ten thousand are right on average, rounded at the end or on the way."""
    layer = nn.Sequential(nn.Linear(64, 64, bias=False)).to(torch.bfloat16)
    with torch.no_grad():
        layer[0].weight.fill_(1.0)
    handle = subspan.project_backward(layer, rank=64, share="none", merge="refresh")
    settings = {"lr": 1e-4, "rule": {"momentum": 0.0}, "update_proj_gap": 5, "bf16_stochastic_round": True}
    settings |= {"weight_decay": 1.0, "scale": 0.0} if what == "decay" else {}
    optimizer = subspan.create("golore_sgd", layer, **settings)
    for _ in range(200):
        layer(torch.ones(1, 64, dtype=torch.bfloat16)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    handle.merge()
    assert (1 - layer[0].weight.detach().float()).mean().item() == pytest.approx(0.02, rel=0.1)


def test_half_precision_afterwards() -> None:
    """Carriers stay fp32 when the model is moved to bf16 after it was prepared."""
    layer = nn.Sequential(nn.Linear(16, 16))
    handle = subspan.project_backward(layer, rank=8, share="none", merge="refresh")
    layer.to(torch.bfloat16)
    assert {layer.carrier.dtype for layer in handle.layers} == {torch.float32}
    assert layer[0].weight.dtype == torch.bfloat16


def test_copies(llama: Any) -> None:
    """A model and its optimizer are copied together and go on alike; an optimizer alone is refused."""
    model, optimizer = moved(llama)[:2]
    with pytest.raises(ValueError, match=r"copy.deepcopy\(\(model, optimizer\)\)"):
        copy.deepcopy(optimizer)
    other, its_optimizer = copy.deepcopy((model, optimizer))
    losses = [train(*pair, batches(3, seed=5)) for pair in ((model, optimizer), (other, its_optimizer))]
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-10, atol=0)
    assert losses[0][0] != losses[0][2]


def test_a_copy_changes_nothing_and_loses_nothing() -> None:
    """An average of the weights copies the model at every step: bf16 steps that are kept must not be rounded away by
    that.
    """
    ends = []
    for copies in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 32)).to(torch.bfloat16)
        subspan.project_backward(model, rank=4, share="none", merge="refresh")
        optimizer = subspan.create("golore_adamw", model, lr=1e-4, update_proj_gap=100)
        x = torch.randn(8, 32, dtype=torch.bfloat16)
        for _ in range(30):
            y = model(x)
            if copies:
                other = copy.deepcopy(model)
                assert torch.equal(model.state_dict()["0.weight"], other.state_dict()["0.weight"])
            y.float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(model.state_dict()["0.weight"])
        with torch.no_grad():
            assert torch.equal(copy.deepcopy(model)(x), model(x))
            assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))
        assert torch.equal(copy.deepcopy(model).double().state_dict()["0.weight"].bfloat16(), ends[-1])
        assert copy.deepcopy(model).to("meta").state_dict()["0.weight"].is_meta
    assert torch.equal(*ends)


def test_an_expert_without_a_token() -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    subspan.project_backward(model, rank=4, share="none", merge="refresh")
    optimizer = subspan.create("golore_adamw", model)
    for tokens in (3, 0, 3):
        model(torch.randn(tokens, 16)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model[0].carrier.isfinite().all()


def test_weights_that_get_their_memory_later() -> None:
    """``to_empty`` leaves anything in the carriers."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(16, 16))
    subspan.project_backward(model, rank=4, share="none", merge="refresh")
    model.to_empty(device="cpu")
    with torch.no_grad():
        model[0].carrier.fill_(float("nan"))
        model[0].reset_parameters()
    optimizer = subspan.create("golore_adamw", model)
    model(torch.randn(3, 16)).sum().backward()
    optimizer.step()
    assert model.state_dict()["0.weight"].isfinite().all()


def test_the_input_may_be_named() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.a(input=x)
            return y

    model = Named()
    subspan.project_backward(model, rank=4)
    optimizer = subspan.create("golore_adamw", model)
    model(torch.randn(3, 16)).sum().backward()
    optimizer.step()
    with torch.no_grad():
        assert model(torch.randn(3, 16)).isfinite().all()
