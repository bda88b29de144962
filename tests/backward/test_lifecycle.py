"""Conversion and its refusals, saving, resuming, copies, precision, compilation."""

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from support.backward_side import RANK, backward_side, basis_of, batches, layers_of, train
from torch import nn
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM, RobertaConfig, RobertaForMaskedLM

import subspan
from subspan.backward import project_backward
from subspan.residuals import ErrorFeedback
from subspan.selectors import OnlinePCA
from subspan.utils.errors import SettingError


def test_what_becomes_a_backward_side_layer(llama: Any) -> None:
    """Linear layers of the blocks; weights keep their names and take no gradient; everything else is as it was."""
    model = llama()
    before = dict(model.named_parameters())
    handle = project_backward(model, rank=RANK)
    assert len(layers_of(model)) == len(list(handle.layers)) == 14
    groups = [sorted(layer.weight_name.split(".")[-2] for layer in p.layers) for p in handle.projections]
    assert groups == 2 * [["k_proj", "q_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    for name, p in before.items():
        assert model.get_parameter(name) is p
        assert p.requires_grad == (name.rpartition(".")[0] not in layers_of(model))
    assert set(model.state_dict()) == set(before)
    assert all(not layer.carrier.any() for layer in handle.layers)


@pytest.mark.parametrize("family", ["opt", "roberta"])
def test_other_families(family: str) -> None:
    """OPT and RoBERTa: biases are trained, layers that share an input are found, the loss falls."""
    torch.manual_seed(0)
    if family == "opt":
        shape = {
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "word_embed_proj_dim": 32,
        }
        model = OPTForCausalLM(OPTConfig(vocab_size=64, max_position_embeddings=64, dropout=0.0, **shape))
        shared = 3
    else:
        shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = RobertaForMaskedLM(
            RobertaConfig(vocab_size=64, max_position_embeddings=64, hidden_dropout_prob=0.0, **shape)
        )
        shared = 3
    optimizer, handle = backward_side(model, "sara_adamw")
    assert max(len(p.layers) for p in handle.projections) == shared
    losses = train(model, optimizer, list(batches(1)) * 15)
    assert losses[-1] < losses[0] - 0.5
    bias = next(layer.bias for layer in handle.layers if layer.bias is not None)
    assert bias.requires_grad
    assert bias in optimizer.state


def test_saved_models_are_plain(llama: Any, tmp_path: Path) -> None:
    """What ``save_pretrained`` writes, mid-period and with a displacement in the carriers, loads in stock transformers
    with the same logits. Merge and remove give the plain model back.
    """
    (batch,) = batches(1, seed=9)
    for merge in ("step", "refresh"):
        model = llama()
        optimizer, handle = backward_side(model, "sara_adamw", merge=merge)
        train(model, optimizer, batches(7))
        model.eval()
        with torch.no_grad():
            expected = model(**batch).logits
        if merge == "refresh":
            assert any(layer.carrier.any() for layer in handle.layers)
        model.save_pretrained(tmp_path / merge)
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / merge).eval()
        with torch.no_grad():
            torch.testing.assert_close(stock(**batch).logits, expected, rtol=0, atol=1e-5)
        assert {name for name, _ in stock.named_parameters()} == set(llama().state_dict())
        handle.merge()
        handle.remove()
        assert not layers_of(model)
        assert all(type(m) is not nn.Linear or m.weight.requires_grad for m in model.modules())
        with torch.no_grad():
            torch.testing.assert_close(model(**batch).logits, expected, rtol=0, atol=1e-5)
        model.load_state_dict(llama().state_dict())


@pytest.mark.parametrize(
    "name", ["sara_adamw", "golore_hybrid_adamw", "rso_adamw", "flora_adamw", "sara_adamw_8bit", "gosare_sgd"]
)
@pytest.mark.parametrize("merge", ["step", "refresh"])
@pytest.mark.parametrize("saved_at", [4, 7])
def test_resume_is_exact(llama: Any, name: str, merge: str, saved_at: int) -> None:
    """From state dicts through files, with weights_only, a run has the bits of the one that went on after saving.

    What is saved is merged, so with ``merge="refresh"`` the resumed run adds up its steps in another order.
    """
    settings = {"name": name, "merge": merge, "eta": 10.0, "stagger": None}
    model = llama().double()
    optimizer, _ = backward_side(model, **settings)
    data = list(batches(12))
    train(model, optimizer, data[:saved_at])
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "model": model.state_dict()}, file)
    train(model, optimizer, data[saved_at:])
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = llama().double()
    resumed, _ = backward_side(again, **settings)
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    train(again, resumed, data[saved_at:])
    for path, p in model.state_dict().items():
        ours = again.state_dict()[path]
        if merge == "step":
            assert torch.equal(ours, p), path
        else:  # transformers computes norms and losses in fp32
            torch.testing.assert_close(ours, p, rtol=1e-4, atol=1e-5, msg=lambda text, path=path: f"{path}: {text}")


@pytest.mark.parametrize("merge", ["step", "refresh"])
def test_a_copy_needs_an_optimizer_of_its_own(llama: Any, merge: str) -> None:
    """A deep copy of the model is the same model, and shares nothing with the original and its optimizer."""
    model = llama()
    optimizer, _ = backward_side(model, merge=merge)
    train(model, optimizer, batches(3))
    twin = copy.deepcopy(model)
    (batch,) = batches(1)
    with pytest.raises(RuntimeError, match=r"q_proj.weight.*no optimizer is bound.*subspan.create"):
        twin(**batch)
    with torch.no_grad():
        torch.testing.assert_close(twin(**batch).logits, model(**batch).logits)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(twin, subspan.create("golore_adamw", twin, lr=1e-2), batches(2))
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])


def test_without_an_optimizer_there_is_no_gradient(llama: Any) -> None:
    model = llama()
    project_backward(model, rank=RANK)
    (batch,) = batches(1)
    with torch.no_grad():
        model(**batch)
    with pytest.raises(RuntimeError, match="no optimizer is bound"):
        model(**batch)


@pytest.mark.parametrize("where", ["autocast", "bf16", "bf16 refresh"])
def test_half_precision(llama: Any, where: str) -> None:
    """Under autocast and with bf16 weights the loss falls; carriers stay fp32, what is saved is bf16."""
    model = llama()
    if where != "autocast":
        model = model.to(torch.bfloat16)
    optimizer, _ = backward_side(model, "sara_adamw", merge="refresh" if "refresh" in where else "step")
    losses = []
    for batch in list(batches(1)) * 25:
        with torch.autocast("cpu", torch.bfloat16, enabled=where == "autocast"):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        for layer in layers_of(model).values():
            assert layer.carrier.grad.dtype == layer.carrier.dtype == torch.float32
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1


def test_autocast_gradient(llama: Any) -> None:
    """Under autocast the carrier's gradient is the projected bf16 gradient, to bf16's precision."""
    model = llama()
    plain = copy.deepcopy(model)
    optimizer, _ = backward_side(model, "golore_adamw", lr=0.0)
    (batch,) = batches(1)
    for network in (model, plain):
        with torch.autocast("cpu", torch.bfloat16):
            loss = network(**batch).loss
        loss.backward()
    assert optimizer.selector is not None
    for path, layer in layers_of(model).items():
        expected = plain.get_parameter(f"{path}.weight").grad @ basis_of(layer)
        assert (layer.carrier.grad - expected).norm() < 0.03 * expected.norm()


def test_small_bf16_steps_are_kept_by_merge_refresh() -> None:
    """Steps of 1e-4 on weights near one are lost to rounding one by one, and not when they add up in the carrier."""
    moved = {}
    for merge in ("step", "refresh"):
        layer = nn.Sequential(nn.Linear(16, 16, bias=False)).to(torch.bfloat16)
        with torch.no_grad():
            layer[0].weight.fill_(1.0)
        handle = project_backward(layer, rank=16, share="none", merge=merge)
        optimizer = subspan.create("golore_sgd", layer, lr=1e-4, rule={"momentum": 0.0}, update_proj_gap=1000)
        for _ in range(100):
            layer(torch.ones(1, 16, dtype=torch.bfloat16)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        handle.merge()
        moved[merge] = (1 - layer[0].weight.detach().float()).mean().item()
    assert moved["step"] == 0.0
    assert moved["refresh"] == pytest.approx(0.01, rel=0.2)


def test_compiled(llama: Any) -> None:
    """``torch.compile`` runs the layers as they are, between compiled parts, and losses are the same."""
    eager, compiled = llama(), llama()
    first, _ = backward_side(eager, "sara_adamw")
    second, _ = backward_side(compiled, "sara_adamw")
    network = torch.compile(compiled, backend="aot_eager")
    expected, losses = train(eager, first, batches(7)), train(network, second, batches(7))
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-5, atol=0)


def test_clipping_sees_the_carriers(llama: Any) -> None:
    """``clip_grad_norm_`` over the model's parameters scales what the optimizer steps on."""
    model = llama()
    optimizer, _ = backward_side(model, "golore_sgd", rule={"momentum": 0.0}, lr=1.0)
    (batch,) = batches(1)
    model(**batch).loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    assert norm > 1e-3
    total = sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None).sqrt()
    assert total.item() == pytest.approx(1e-3, rel=1e-3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    moved = sum((p.detach() - before[name]).square().sum() for name, p in model.named_parameters()).sqrt()
    assert moved.item() == pytest.approx(1e-3, rel=1e-2)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight


class Wrapped(nn.Module):
    """Stands for torch's wrapper, which needs a process group."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


DistributedDataParallel = type("DistributedDataParallel", (Wrapped,), {})

REFUSALS = {
    "no such target": (lambda m: project_backward(m, rank=4, targets=["no_such"]), "targets: 'no_such' matches no matrix"),
    "not linear": (lambda m: project_backward(m, rank=4, targets=["embed_tokens"]), "belongs to a Embedding; only"),
    "rank above in": (lambda m: project_backward(m, rank=40), "rank=40: above the 32 input features of 'model.layers.0"),
    "rank zero": (lambda m: project_backward(m, rank=0), "rank=0: expected a whole number >= 1"),
    "tied": (lambda m: project_backward(Tied(), rank=4), "is tied (first.weight, second.weight)"),
    "frozen": (lambda m: project_backward(m.requires_grad_(False), rank=4), "no matrix"),
    "wrapped": (lambda m: project_backward(DistributedDataParallel(m), rank=4), "has wrapped it already; call"),
    "merge": (lambda m: project_backward(m, rank=4, merge="never"), "merge='never': expected 'step' or 'refresh'"),
    "share": (lambda m: project_backward(m, rank=4, share="all"), "share='all': expected 'auto', 'none', inputs"),
    "share names": (lambda m: project_backward(m, rank=4, share=[["query"]]), "share: 'query' is no backward-side layer"),
    "share sizes": (
        lambda m: project_backward(m, rank=4, share=[["q_proj", "k_proj"], ["up_proj", "down_proj"]]),
        "have inputs of [32, 48] features",
    ),
    "share inputs": (lambda m: project_backward(m, rank=4, share={"tokens": 1}), "share: the model does not run on the inputs"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "words"), REFUSALS.values(), ids=REFUSALS)
def test_refusals(llama: Any, call: Any, words: str) -> None:
    """Each is a ValueError that names the argument, and nothing is half-converted."""
    model = llama()
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ValueError) as raised:  # noqa: PT011  # the words are compared below, as they stand
        call(model)
    assert words in str(raised.value)
    assert [type(module) for module in model.modules()] == kinds


def test_a_model_that_fails_on_the_inputs_keeps_its_error(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, bug = llama(), KeyError("layer")

    def forward(**_: object) -> None:
        raise bug

    monkeypatch.setattr(model, "forward", forward)
    with pytest.raises(
        SettingError, match=r"does not run on the inputs .*: KeyError: 'layer'; mend the model"
    ) as raised:
        project_backward(model, rank=4, share={"input_ids": torch.ones(1, 2, dtype=torch.long)})
    assert raised.value.__cause__ is bug


def test_twice_is_refused(llama: Any) -> None:
    model = llama()
    project_backward(model, rank=4)
    with pytest.raises(ValueError, match="has backward-side layers already"):
        project_backward(model, rank=4)


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("fira_adamw", {}, "residual=Fira.*needs every gradient.*residuals.Discard"),
        ("sara_adamw", {"residual": ErrorFeedback()}, "residual=ErrorFeedback.*needs every gradient"),
        ("ldadam_adamw", {}, "needs every gradient"),
        ("online_pca_adamw", {}, "selector=OnlinePCA.*follows every gradient"),
        ("sara_adamw", {"selector": OnlinePCA()}, "follows every gradient"),
        ("adamw", {}, "'adamw' is full rank, and this model's backward-side layers make no full gradient"),
        ("rso_adamw", {"eta": -1.0}, "eta=-1.0: expected a number > 0"),
        ("rso_adamw", {"proximal": "both"}, "proximal='both'"),
        (
            "sara_adamw",
            {"rank": RANK + 1},
            rf"rank={RANK + 1}: the backward-side layer of .*_proj.weight was made with rank={RANK};",
        ),
        (
            "sara_adamw",
            {"proj_type": "left"},
            r"proj_type='left': would compress the rows of .*_proj.weight \(\d+, \d+\).*columns",
        ),
        ("sara_adamw", {"proj_type": "reverse_std"}, r"proj_type='reverse_std': would compress the rows of"),
    ],
)
def test_methods_that_need_every_gradient_are_refused(llama: Any, name: str, settings: Any, words: str) -> None:
    model = llama()
    project_backward(model, rank=RANK)
    with pytest.raises(ValueError, match=words):
        subspan.create(name, model, **settings)


def test_a_rank_for_other_weights_is_no_contradiction(llama: Any) -> None:
    """Where the optimizer projects weights of its own, rank and side are for those."""
    model = llama()
    project_backward(model, rank=RANK, targets=["q_proj"])
    optimizer = subspan.create("sara_adamw", model, rank=RANK + 1, proj_type="left")
    assert {group["rank"] for group in optimizer.param_groups} == {RANK, RANK + 1, None}


def test_a_bad_gradient_chooses_no_basis(llama: Any) -> None:
    """Zero and non-finite gradients leave the basis, count as skipped, and the next good one chooses (contract R4)."""
    model = llama()
    optimizer, handle = backward_side(model, "sara_adamw", update_proj_gap=2)
    train(model, optimizer, batches(2))
    held = [projection.state["basis"].clone() for projection in handle.projections]
    (batch,) = batches(1, seed=5)
    for factor, skipped in ((0.0, 1), (float("nan"), 2)):
        (model(**batch).loss * factor).backward()
        optimizer.zero_grad()
        for projection, basis in zip(handle.projections, held, strict=True):
            assert torch.equal(projection.state["basis"], basis)
            assert projection.state["skipped_refreshes"] == skipped
    model(**batch).loss.backward()
    for projection, basis in zip(handle.projections, held, strict=True):
        assert not torch.equal(projection.state["basis"], basis)
        assert projection.plan == "keep"


def test_inputs_that_need_no_gradient() -> None:
    """The first layer of a model gets data."""
    layer = nn.Sequential(nn.Linear(8, 6)).double()
    plain, x = copy.deepcopy(layer), torch.randn(5, 8, dtype=torch.float64)
    project_backward(layer, rank=3, share="none")
    optimizer = subspan.create("golore_adamw", layer)
    layer(x).sum().backward()
    plain(x).sum().backward()
    assert optimizer.state
    torch.testing.assert_close(layer[0].carrier.grad, plain[0].weight.grad @ basis_of(layer[0]))
    layer(torch.randn(8, dtype=torch.float64)).sum().backward()  # one row, without a batch


def test_sharing_from_inputs_of_the_model() -> None:
    """A model of one's own is watched on given inputs."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(self.a(x) + self.b(x))

    handle = project_backward(Block(), rank=2, share={"x": torch.zeros(1, 8)})
    assert [[layer.weight_name for layer in p.layers] for p in handle.projections] == [
        ["a.weight", "b.weight"],
        ["c.weight"],
    ]
