"""What the command line does with the families: it plans all of them, and pretrains the decoders."""

import json

import pytest
import torch
from support.families import FAMILIES
from transformers import AutoModelForCausalLM

from subspan.cli import main
from subspan.planning.plan import plan
from subspan.planning.setting import PlanSetting
from subspan.training.data.task_specs import find_task
from subspan.training.data.tokenizer import load_tokenizer
from subspan.training.models.build import build_model
from subspan.utils.errors import InputError

pytestmark = pytest.mark.usefixtures("one_parser")
TRANSFORMERS = [name for name, family in FAMILIES.items() if family.settings]
SHOWN = ["GPT-2", "T5", "ViT", "Mixtral"]


def saved(name, path):
    config = FAMILIES[name].config()
    config.save_pretrained(path)
    return str(path / "config.json")


@pytest.mark.parametrize(
    "name", [name if name in SHOWN else pytest.param(name, marks=pytest.mark.slow) for name in TRANSFORMERS]
)
def test_plan(name, tmp_path):
    """All weights are counted; of a mixture those of the experts that a token is not sent to are not active."""
    found = plan(PlanSetting(saved(name, tmp_path), rank=8, seq=16))
    model = FAMILIES[name].build()
    total = sum(p.numel() for p in model.parameters())
    idle = sum(p.numel() * 10 // 12 for name, p in model.named_parameters() if "mlp.experts." in name)
    assert found["parameters"] == {"total": total, "active": total - idle}
    assert found["bytes"]["weights"] == 2 * total
    assert found["bytes"]["total"] > found["bytes"]["weights"]
    assert found["peaks"]["backward"] > 0


def pretrain(name, tmp_path, capsys, *more):
    (tmp_path / "texts").mkdir()
    for number in range(4):
        words = "".join(f"document {number} line {line}, the quick brown fox\n" for line in range(60))
        (tmp_path / "texts" / f"{number}.txt").write_text(words)
    main(["pretrain", "--model", saved(name, tmp_path), "--tokenizer", "bytes", "--data", f"{tmp_path}/texts/*.txt",
          "--rank", "8", "--lr", "0.01", "--steps", "3", "--batch_size", "2", "--sequence_length", "32", "--device", "cpu",
          "--out", str(tmp_path / "run"), "--json", *more])  # fmt: skip
    return json.loads(capsys.readouterr().out.splitlines()[-1])


CAUSAL = [name for name, family in FAMILIES.items() if family.is_causal]
FAST = ("GPT-2", "gpt-oss")


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in CAUSAL]
)
def test_pretrain(name, tmp_path, capsys):
    assert 0 < pretrain(name, tmp_path, capsys)["val_loss"] < 7


def test_the_loss_of_routers_is_trained(tmp_path, capsys, monkeypatch):
    """Only the coefficient differs, and so does what is learnt; the loss that is reported is that of the tokens."""
    found = []
    for coefficient in (0.0, 50.0):
        monkeypatch.setitem(FAMILIES["Mixtral"].settings, "router_aux_loss_coef", coefficient)
        (tmp_path / str(coefficient)).mkdir()
        found.append(pretrain("Mixtral", tmp_path / str(coefficient), capsys)["val_loss"])
    assert found[0] != found[1]
    assert max(found) < 10


def test_encoder_decoders_are_refused_by_name(tmp_path, capsys):
    with pytest.raises(InputError, match=r"task='seq2seq': encoder-decoders .* not fine-tuned .* Trainer"):
        find_task("seq2seq")
    with pytest.raises(SystemExit):
        pretrain("T5", tmp_path, capsys)
    assert "t5 is an encoder-decoder, and this command trains decoders" in capsys.readouterr().err
    assert torch.is_grad_enabled()


TUNED = [name for name, family in FAMILIES.items() if family.task in ("lm", "classification")]


@pytest.mark.parametrize(
    "name", [name if name in ("GPT-2", "BERT") else pytest.param(name, marks=pytest.mark.slow) for name in TUNED]
)
def test_finetune(name, tmp_path, capsys):
    """Every family that reads text learns to tell classes apart; its random head stays full rank."""
    main(["finetune", "--task", "bundled", "--model", saved(name, tmp_path), "--tokenizer", "bytes", "--rank", "8",
          "--steps", "2", "--batch_size", "4", "--max_length", "32", "--device", "cpu", "--out", str(tmp_path / "run"),
          "--json"])  # fmt: skip
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["val_loss"] > 0
    assert 0 <= found["accuracy"] <= 1


@pytest.mark.parametrize("name", ["Llama", "GPT-2"])
def test_weights_load_in_the_dtype_that_is_trained(name, tmp_path):
    """They are those that loading in fp32 and rounding gives, and buffers stay in fp32."""
    tokenizer = load_tokenizer("bytes")
    config = FAMILIES[name].config()
    config.vocab_size = len(tokenizer)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    whole, half = (
        build_model(str(tmp_path), tokenizer, 32, seed=0, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)
    )
    for (key, p), (_, q) in zip(whole.named_parameters(), half.named_parameters(), strict=True):
        assert q.dtype == torch.bfloat16, key
        assert torch.equal(p.to(torch.bfloat16), q), key
    assert all(buffer.dtype == torch.float32 for buffer in half.buffers())
