"""The model of a step on many machines, against torch's counter of FLOPs, sums by hand, and the page."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from subspan.bench.setting import Setting, build
from subspan.cli import main
from subspan.costs.traffic import COUNTED, WAYS, Traffic, Way, amortised
from subspan.planning import many_machines as scale
from subspan.planning.many_machines import MODELS, Machines
from subspan.training.models.presets import PRESETS, llama_of

PAGE = Path(__file__).parents[2] / "docs" / "scale.md"


def addmm(_, a, b, out_shape=None, **__):
    """The FLOPs of ``addmm_``, which torch's counter does not know."""
    return 2 * a[0] * a[1] * b[1]


@pytest.mark.parametrize(("name", "backward_side"), [("adamw", False), ("sara_adamw", False), ("sara_adamw", True)])
def test_flops_are_those_that_torch_counts(name, backward_side):
    """The FLOPs of an ordinary step and of a refresh are counted ones.

    The model leaves out those of a backward-side refresh.
    """
    setting = Setting("llama-nano", tokens=256, rank=16, sequence_length=64)
    way = Way(name, backward_side=backward_side)
    traffic = Traffic(llama_of(PRESETS["llama-nano"]), 16, 1, way)
    trained, batch = build(setting, name, backward_side), setting.batch()
    trained.model.set_attn_implementation("eager")  # the counter does not know the fused attention of a CPU
    for refresh in (True, False):
        passes, step = (FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm}) for _ in range(2))
        with passes:
            trained.forward(batch).backward()
        with step:
            trained.optimizer.step()
        trained.optimizer.zero_grad()
        if not (refresh and backward_side):
            assert passes.get_total_flops() == scale.matmul_flops(traffic, setting)
            period = 1 if refresh else 10**30
            assert step.get_total_flops() == pytest.approx(scale.optimizer_flops(traffic, period), rel=1e-12)


def test_seven_billion_by_hand():
    """AdamW in fp32 holds 16 bytes for each parameter of LLaMA-2 7B, and a ring of 8 sends 2 x 7/8 x 4 bytes."""
    model, rank = MODELS["7B"]
    assert model.numel == 6_738_415_616
    assert MODELS["70B"][0].numel == 68_976_648_192
    whole = Traffic(model, rank, 8, WAYS["adamw_ddp"])
    assert scale.memory(whole)["total"] == 16 * model.numel + 4 * (32 * 9 + 3)  # and a count of steps for each tensor
    assert whole.step().wire(8) == pytest.approx(7 * model.numel, rel=1e-6)
    rows = {
        (row["name"], row["world"], row["link_gbit"]): row for row in scale.compute(Machines())["models"][0]["rows"]
    }
    row = rows["adamw_fsdp", 64, 25]
    seconds = row["seconds"]
    assert seconds["sending"] == pytest.approx(row["wire_bytes"]["mean"] / (8 * 25e9 / 8))
    assert seconds["step"] == pytest.approx(
        0.4 * seconds["compute"] + seconds["sending"]
    )  # what does not hide behind 60 %
    fast = rows["adamw_fsdp", 64, 400]["seconds"]
    assert fast["step"] == pytest.approx(fast["compute"])
    # The head and the embedding count once; linear layers thrice, two FLOPs a number and token; and attention.
    linear = 6 * 8192 * (model.numel - 32_000 * 4096)
    assert row["flops"]["compute"] == pytest.approx(linear + 32 * 12 * 8192 * 4096 * 4096, rel=1e-3)


def test_what_pays_where():
    """The figures bear out what the page says in words."""
    rows = {}
    for model in scale.compute(Machines())["models"]:
        rows |= {(model["name"], row["name"], row["world"], row["link_gbit"]): row for row in model["rows"]}

    def step(model, name, world, link=None):
        return rows[model, name, world, link]["seconds"]["step"]

    assert not rows["7B", "adamw_ddp", 8, None]["fits"]
    assert rows["7B", "sara_ddp_hook", 8, None]["fits"]
    assert not any(
        row["fits"] for (model, name, *_), row in rows.items() if model == "70B" and name.endswith(("ddp", "hook"))
    )
    assert (
        step("7B", "sara_backward_ddp", 64, 10) < step("7B", "sara_ddp_hook", 64, 10) < step("7B", "adamw_fsdp", 64, 10)
    )
    assert (
        step("7B", "adamw_fsdp", 64, 400) < step("7B", "sara_fsdp", 64, 400) < step("7B", "sara_backward_fsdp", 64, 400)
    )
    assert step("70B", "sara_backward_fsdp", 1024, 10) < step("70B", "adamw_fsdp", 1024, 10)
    held = {name: rows["70B", name, 1024, 400]["memory_bytes"]["total"] for name in WAYS}
    assert held["adamw_fsdp"] < held["sara_backward_fsdp"] < held["sara_fsdp"]


def test_a_faster_link_or_machine_is_no_slower():
    slow = Machines()
    for better in (
        replace(slow, links=(800, 50, 20)),
        replace(slow, mfu=0.5),
        replace(slow, overlap=0.9),
        replace(slow, period=400),
    ):
        for before, after in zip(scale.compute(slow)["models"], scale.compute(better)["models"], strict=True):
            pairs = list(zip(before["rows"], after["rows"], strict=True))
            assert all(b["seconds"]["step"] <= a["seconds"]["step"] + 1e-9 for a, b in pairs)
            assert any(b["seconds"]["step"] < a["seconds"]["step"] for a, b in pairs)


def test_command_and_page(capsys):
    """The tables of the page are those that the command prints."""
    assert main(["bench", "scale"]) == 0
    assert capsys.readouterr().out.strip() in PAGE.read_text()
    assert main(["bench", "scale", "--json", "--tokens", "4096", "--links", "[100]"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["assumptions"]["tokens"] == 4096
    assert {row["link_gbit"] for model in found["models"] for row in model["rows"]} == {None, 100}


def test_counted_table_of_the_page():
    """The counted figures of the page are those of the closed forms, which tests compare with counted bytes."""
    page, model = PAGE.read_text(), llama_of(PRESETS["llama-60m"])
    for name, way in COUNTED.items():
        traffic = Traffic(model, 128, 8, way)
        step, refresh = traffic.step().wire(8), traffic.refresh().wire(8)
        sizes = " | ".join(f"{size / 1e6:.1f}" for size in (step, refresh, amortised(step, refresh)))
        assert f"| `{name}` | {sizes} |" in page


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--mfu", "0"], "mfu=0.0: expected a number > 0"),
        (["--mfu", "1.5"], "mfu=1.5: expected a share from 0 to 1"),
        (["--overlap", "-1"], "overlap=-1.0: expected a share from 0 to 1"),
        (["--links", "[]"], "links=(): expected numbers > 0"),
        (["--period", "0"], "period=0: expected a number > 0"),
    ],
)
def test_refusals(words, error, capsys):
    with pytest.raises(SystemExit) as status:
        main(["bench", "scale", *words])
    assert status.value.code == 2
    assert error in capsys.readouterr().err
