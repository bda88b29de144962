"""Verdicts, limits, refusals, and what the command prints."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.plans import llama_directory
from transformers import RobertaConfig, RobertaForMaskedLM

from subspan.cli import main
from subspan.planning.compare import METHODS, compare, papers_way
from subspan.planning.model import choose
from subspan.planning.plan import Planner, largest, plan
from subspan.planning.report import comparison, parts_of, text
from subspan.planning.setting import PlanSetting, bytes_of
from subspan.training.data.tokenizer import load_tokenizer
from subspan.training.models.build import build_model
from subspan.training.models.presets import PRESETS

pytestmark = pytest.mark.usefixtures("one_parser")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return llama_directory(tmp_path_factory.mktemp("model"), 3)


def test_bytes_by_hand(model: str) -> None:
    """The bytes of a backward-side model in bf16 at rank 8, as sums over its shapes: a carrier is out x 8."""
    found = plan(PlanSetting(model, rank=8, seq=16, backward_side=True))["bytes"]
    d, f, v, blocks, r = 64, 176, 300, 3, 8
    others = 2 * v * d + d + blocks * 2 * d
    outputs = 5 * d + 2 * f
    assert found["weights"] == 2 * (others + blocks * (4 * d * d + 3 * d * f))
    assert found["carriers"] == 4 * blocks * r * outputs
    assert found["gradients"] == 2 * others + found["carriers"]
    matrices, vectors = blocks * 7 + 2, blocks * 2 + 1
    assert found["states"] == 8 * others + 2 * found["carriers"] + 4 * (matrices + vectors)
    assert found["bases"] == 4 * blocks * r * (3 * d + f)


@pytest.mark.parametrize("backward_side", [False, True])
def test_limits_are_the_largest_that_fit(model: str, backward_side: bool) -> None:
    """With one more sequence, or one more dimension, the peak is beyond the memory."""
    setting = PlanSetting(model, rank=8, batch=2, seq=32, backward_side=backward_side, gpu="3MB")
    planner = Planner(setting)
    found, budget = planner.report(), 3_000_000
    assert found["fits"] is (planner.costs(8, 2).total <= budget)
    batch, rank = found["largest_batch"], found["largest_rank"]
    assert planner.costs(8, batch).total <= budget < planner.costs(8, batch + 1).total
    assert planner.costs(rank, 2).total <= budget
    top = 64 if backward_side else 63
    assert rank == top or budget < planner.costs(rank + 1, 2).total


@pytest.mark.parametrize("limit", [0, 3, 10, 49, 50, 51, 777, 1000, 5000])
@pytest.mark.parametrize("start", [1, 50, 1000])
def test_search(limit: int, start: int) -> None:
    """The search finds what trying every number finds, for a total with a bend."""

    def total(x: int) -> int:
        return max(3 * x, 7 * x - 200)

    found = largest(total, limit, start, 1000)
    assert found == max((x for x in range(1, 1001) if total(x) <= limit), default=0)


def test_nothing_fits(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Where nothing fits the plan says so, and it is no error."""
    assert main(["plan", "--model", model, "--rank", "8", "--gpu", "0.1MB", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["fits"], found["largest_batch"], found["largest_rank"]) == (False, 0, 0)
    assert found["gpu_bytes"] == 100_000
    kinds = {
        "weights",
        "carriers",
        "gradients",
        "states",
        "bases",
        "activations",
        "refresh_peak",
        "communication",
        "total",
    }
    assert kinds <= found["bytes"].keys()
    assert main(["plan", "--model", model, "--rank", "8", "--gpu", "0.1MB"]) == 0
    assert "It does not fit" in capsys.readouterr().out


def test_a_rank_above_a_side_is_full_rank(model: str) -> None:
    found = plan(PlanSetting(model, rank=64, seq=16))
    assert "rank 64 is no smaller than a side of 21 of 21 matrices" in found["notes"][0]
    assert "full-rank training" in found["notes"][0]
    assert found["bytes"]["bases"] == 0


def test_ranks_by_share_and_by_pattern(model: str) -> None:
    """The plan says which ranks they are, what they make apart, and which common rank would fit beside the pattern."""
    setting = PlanSetting(
        model, rank=0.25, rank_pattern={"q_proj": 32}, seq=16, dtype="fp32", backward_side=True, gpu="2MB"
    )
    planner = Planner(setting)
    found, d, f = planner.report(), 64, 176
    assert (found["rank"], found["rank_pattern"], found["ranks"]) == (
        0.25,
        {"q_proj": 32},
        {"16": 15, "32": 3, "44": 3},
    )
    assert "rank 0.25, rank_pattern {'q_proj': 32} (16 for 15 matrices, 32 for 3 matrices, 44 for 3 matrices)" in text(
        found
    )
    assert found["bytes"]["carriers"] == 4 * 3 * (32 * d + 16 * (3 * d + 2 * f) + 44 * d)
    assert found["bytes"]["bases"] == 4 * 3 * (32 * d + 16 * 3 * d + 44 * f)
    assert found["notes"][0].startswith("rank_pattern: layers with the same input share a basis and one x Q only where")
    rank = found["largest_rank"]
    assert planner.costs(rank, 1).total <= 2_000_000 < planner.costs(rank + 1, 1).total
    every = plan(replace(setting, rank_pattern={".": 0.5}))
    assert (every["largest_rank"], every["notes"]) == (None, [])


def test_a_sketch_beside_the_ranks(model: str) -> None:
    """The plan says how wide h is and that T is no state; the figures say the same of carriers, states and h."""
    setting = PlanSetting(model, "sara_sketch_adamw", rank=40, seq=16, dtype="fp32", backward_side=True)
    found, without = plan(setting), plan(replace(setting, optimizer="sara_adamw"))
    # No more than 24 of 64 inputs are outside; the last matrix of an MLP has 176.
    assert found["sketches"] == {"40 + 24": 18, "40 + 40": 3}
    assert found["ranks"] == without["ranks"] == {"40": 21}
    assert "r + s = 40 + 24 for 18 matrices, 40 + 40 for 3 matrices: a sketch" in found["notes"][0]
    assert "keeps h = x [Q O], which is r + s wide. R and T come and go" in text(found)
    d, f, blocks = 64, 176, 3
    more = 4 * blocks * (24 * (4 * d + 2 * f) + 40 * d)
    assert found["bytes"]["carriers"] - without["bytes"]["carriers"] == more
    assert found["bytes"]["gradients"] - without["bytes"]["gradients"] == more
    assert found["bytes"]["states"] - without["bytes"]["states"] == 4 * 7 * blocks  # what the limiter keeps
    assert found["bytes"]["bases"] == without["bytes"]["bases"]
    # Two inputs of a block and that of its last matrix are seen in more columns. With r + s = d the input of o_proj is
    # kept itself, and attention keeps it anyway, so that its 40 columns without a sketch are saved.
    assert found["bytes"]["activations"] - without["bytes"]["activations"] == 4 * 16 * blocks * (2 * 24 + 40 - 40)
    ordinary = plan(replace(setting, backward_side=False))
    assert ordinary["sketches"] == {"40 + 24": 21}  # the shorter side is compressed
    assert "h = x" not in text(ordinary)
    assert (without["sketches"], without["notes"]) == ({}, [])


def test_a_share_of_a_longer_side_may_be_full_rank(model: str) -> None:
    """Under fsdp the columns are compressed: half of 176 is more than 64 rows."""
    found = plan(PlanSetting(model, rank=0.5, seq=16, world=2, parallel="fsdp"))
    assert "rank 0.5 is no smaller than a side of 3 of 21 matrices" in found["notes"][0]
    assert found["ranks"] == {"32": 18}
    everywhere = plan(PlanSetting(model, rank=8, rank_pattern={"up": 64}, seq=16))["notes"]
    assert "rank 8, or one of rank_pattern, is no smaller than a side of 3 of 21 matrices" in everywhere[0]


def test_a_comparison_of_shares(model: str) -> None:
    """Its rows have the bytes of their plans. Papers report nothing for shares or patterns."""
    found = compare(PlanSetting("llama-60m", rank=0.25, rank_pattern={"q_proj": 32}, seq=16))
    assert "rank 0.25, rank_pattern {'q_proj': 32}" in comparison(found).splitlines()[0]
    assert {row["papers_way_bytes"] for row in found["rows"]} == {None}
    assert papers_way("llama-60m", "sara_adamw", 0.25) == papers_way("llama-60m", "sara_adamw", 128)


def test_ranks(model: str) -> None:
    """Each of two fsdp ranks holds half of the weights; ddp has a copy of the gradients to send."""
    alone, ddp, fsdp = (
        Planner(PlanSetting(model, rank=8, seq=16, world=world, parallel=parallel)).costs(8, 1).bytes
        for world, parallel in ((1, "ddp"), (2, "ddp"), (2, "fsdp"))
    )
    assert alone["communication"] == 0
    assert ddp["communication"] == ddp["gradients"] == alone["gradients"]
    assert 2 * fsdp["weights"] == alone["weights"]
    assert fsdp["bases"] == 4 * 3 * 8 * (6 * 64 + 176)  # columns are compressed, and each matrix has its own


def test_accumulation_and_steps_in_the_backward_pass(model: str) -> None:
    """Gradients that stay are there in the second forward pass. Gradients that are stepped on at once are not."""
    setting = PlanSetting(model, rank=8, seq=32)
    once, twice, at_once = (
        Planner(replace(setting, **change)).costs(8, 8)
        for change in ({}, {"accumulate": 2}, {"step_in_backward": True})
    )
    assert once.backward < twice.backward
    assert at_once.bytes["gradients"] == 0
    assert at_once.step < once.step == twice.step


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model": "llama-6b"}, "model 'llama-6b' is unknown; did you mean llama-7b"),
        ({"gpu": "24 potatoes"}, "gpu='24 potatoes': expected a size above zero"),
        ({"gpu": "0GiB"}, "gpu='0GiB': expected a size above zero"),
        ({"gpu": "-3GiB"}, "gpu='-3GiB': expected a size above zero"),
        ({"optimizer": "sara_adam"}, "optimizer 'sara_adam' is unknown; did you mean"),
        ({"batch": 0}, "batch=0: expected a whole number >= 1"),
        ({"seq": 100}, "seq=100: the model .* has 64 positions; give fewer tokens"),
        ({"rank": 65, "backward_side": True}, "rank=65: above the 64 input features"),
        ({"rank": 0}, "rank=0: expected a whole number >= 1, or a share"),
        ({"rank": 1.5}, "rank=1.5: expected a whole number >= 1, or a share"),
        ({"rank_pattern": {"up": 0.0}}, r"rank_pattern\['up'\]=0.0: expected a whole number >= 1, or a share"),
        ({"rank_pattern": {"upp": 4}}, "rank_pattern: 'upp' matches no projected matrix; the names look like"),
        ({"optimizer": "adamw", "backward_side": True}, "backward_side=True: adamw is full rank"),
        ({"optimizer": "fira_adamw", "backward_side": True}, "needs every gradient"),
        ({"optimizer": "adamw", "step_in_backward": True}, "step_in_backward=True: adamw is torch's own"),
        (
            {"optimizer": "ldadam_adamw", "world": 2, "parallel": "fsdp"},
            "does not work where the rows of a weight are sharded",
        ),
    ],
)
def test_refusals(model: str, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        plan(PlanSetting(**{"model": model, "rank": 8} | settings))


def test_8_bits_are_refused_without_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    from subspan import recipes
    from subspan.rules import Adafactor

    bare = recipes.RECIPES["galore_adafactor"]._replace(rule=Adafactor(beta1=0.0))
    monkeypatch.setitem(recipes.RECIPES, "galore_adafactor", bare)
    with pytest.raises(ValueError, match="state='8bit': galore_adafactor keeps no moments"):
        PlanSetting("llama-nano", "galore_adafactor", state="8bit")


def test_sizes() -> None:
    assert bytes_of("24GiB") == 24 * 2**30
    assert bytes_of("80 gb") == 80 * 10**9
    assert bytes_of("1.5MiB") == 3 * 2**19


def test_a_damaged_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model"}')
    with pytest.raises(ValueError, match=r"cannot be read: .*give a config\.json"):
        plan(PlanSetting(str(tmp_path)))


def test_comparison(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bars are as long as the peaks, and the picture names every method."""
    found = compare(PlanSetting(model, rank=8, seq=16, gpu="1MB"))
    assert [(row["name"], row["backward_side"]) for row in found["rows"]] == list(METHODS)
    for row in found["rows"]:
        assert sum(parts_of(row).values()) == row["bytes"]["total"]
        assert min(parts_of(row).values()) >= 0
        assert row["fits"] is (row["bytes"]["total"] <= 1_000_000)
        assert row["reported_bytes"] is None  # papers report nothing of this model
    from subspan.planning.figure import draw

    draw(found, tmp_path / "memory.svg")
    assert "</svg>" in (tmp_path / "memory.svg").read_text()
    assert "sara_adamw backward-side" in comparison(found)
    with pytest.raises(SystemExit):
        main(["plan", "--model", model, "--out", str(tmp_path / "no.svg")])
    assert "add --compare" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--optimizer=fira_adamw", "--state=8bit", "--backward-side=true"])
def test_a_comparison_does_not_pass_over_what_was_asked(
    flag: str, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["plan", "--model", model, "--compare", flag])
    assert caught.value.code == 2
    assert "a row for each method; leave it out, or leave out --compare" in capsys.readouterr().err


def test_the_head_says_what_was_set(model: str) -> None:
    """A plan and a comparison begin with everything that was set, also as JSON."""
    setting = PlanSetting(
        model, rank=8, seq=16, accumulate=2, checkpointing=True, world=2, parallel="fsdp", step_in_backward=True
    )
    one, all_of = plan(setting), compare(setting)
    said = "bf16, 1 x 16 tokens, 2 passes a step, checkpointing, steps in the backward pass; each of 2 ranks, fsdp (*computed*)"
    assert said in text(one).splitlines()[0]
    assert said in comparison(all_of).splitlines()[0]
    keys = ("accumulate", "checkpointing", "step_in_backward", "per_rank", "batch", "seq", "dtype")
    assert {key: one[key] for key in keys} == {key: all_of[key] for key in keys}
    assert "torch's AdamW takes no steps in the backward pass" in all_of["assumptions"]


@pytest.mark.parametrize(("name", "tokens"), [("llama-nano", 257), ("llama-tiny", 4096)])
def test_a_preset_has_the_vocabulary_of_its_runs(name: str, tokens: int) -> None:
    tokenizer = load_tokenizer(PRESETS[name].tokenizer)
    real = build_model(name, tokenizer, PRESETS[name].sequence_length, seed=0)
    found = plan(PlanSetting(name, "adamw", dtype="fp32", seq=16))
    assert found["bytes"]["weights"] == 4 * sum(p.numel() for p in real.parameters())
    assert f"a vocabulary of {tokens:,} tokens" in found["assumptions"]


def test_positions_begin_behind_that_of_padding(tmp_path: Path) -> None:
    """A RoBERTa with 40 positions has room for 38 tokens."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 60,
    }
    RobertaConfig(max_position_embeddings=40, pad_token_id=1, is_decoder=True, **sizes).save_pretrained(tmp_path)
    assert choose(PlanSetting(str(tmp_path))).seq == 38
    with pytest.raises(ValueError, match=r"seq=39: the model .* has 38 positions"):
        choose(PlanSetting(str(tmp_path), seq=39))


def test_an_encoder_is_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model that reads both ways is planned as one that predicts masked words, and its weights are all counted."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 60,
    }
    config = RobertaConfig(**sizes)
    config.save_pretrained(tmp_path)
    main(["plan", "--model", str(tmp_path), "--optimizer", "sara_adamw", "--rank", "8", "--seq", "16", "--json"])
    found = json.loads(capsys.readouterr().out)
    number = sum(p.numel() for p in RobertaForMaskedLM(config).parameters())
    assert found["parameters"] == {"total": number, "active": number}
    assert found["bytes"]["weights"] == 2 * number


def test_papers_way_of_counting() -> None:
    """Where nothing is projected (3 x 2 bytes a weight) GaLore's table 2 is met to its last digit or two."""
    assert papers_way("llama-60m", "adamw", 128) == pytest.approx(0.36e9, rel=0.04)
    assert papers_way("llama-1b", "adamw", 512) == pytest.approx(7.80e9, rel=0.04)
    assert papers_way("llama-60m", "adamw_8bit", 128) is None
