"""TRL: its ``SFTTrainer`` and ``DPOTrainer`` train with the optimizers of this library, by each way that they offer."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from support.frameworks import PROJECTED, projected
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

import subspan
from subspan.integrations.transformers import Subspace, register
from subspan.training.data.tokenizer import load_tokenizer
from subspan.utils.errors import SettingError

trl = pytest.importorskip("trl")
STEPS = 8


@pytest.fixture
def tokenizer() -> Any:
    found = load_tokenizer("bytes")
    found.pad_token = found.eos_token
    return found


@pytest.fixture
def model(tokenizer: Any) -> LlamaForCausalLM:
    set_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, **sizes))


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    common = {"max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1}
    quiet = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "bf16": False, "save_steps": 4}
    return {"output_dir": str(folder), **common, **quiet, **more}


def sentences() -> Dataset:
    return Dataset.from_list([{"text": f"the quick brown fox jumps over {number} lazy dogs"} for number in range(32)])


def pairs() -> Dataset:
    return Dataset.from_list(
        [{"prompt": f"{number} dogs are", "chosen": " lazy dogs", "rejected": " quick foxes"} for number in range(32)]
    )


def losses(run: Any) -> list[float]:
    return [row["loss"] for row in run.state.log_history if "loss" in row]


def test_sft(model: LlamaForCausalLM, tokenizer: Any, tmp_path: Path) -> None:
    """As with the Trainer, steps in the backward pass included, and resumed exactly."""

    def trainer(model: LlamaForCausalLM) -> Any:
        chosen = (Subspace, {"name": "sara_adamw", "rank": 4, "update_proj_gap": 4, "step_in_backward": True})
        return trl.SFTTrainer(
            model=model,
            args=trl.SFTConfig(**settings(tmp_path)),
            train_dataset=sentences(),
            processing_class=tokenizer,
            optimizer_cls_and_kwargs=chosen,
        )

    run = trainer(model)
    run.train()
    assert losses(run)[-1] < losses(run)[0] - 1
    assert projected(run.optimizer.optimizer) == PROJECTED
    again = trainer(LlamaForCausalLM(model.config))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert again.state.global_step == STEPS
    assert all(torch.equal(p, q) for p, q in zip(run.model.parameters(), again.model.parameters(), strict=True))


def test_sft_by_name(model: LlamaForCausalLM, tokenizer: Any, tmp_path: Path) -> None:
    register()
    args = trl.SFTConfig(**settings(tmp_path, optim="sara_adamw", optim_args="rank=4,update_proj_gap=4"))
    run = trl.SFTTrainer(model=model, args=args, train_dataset=sentences(), processing_class=tokenizer)
    run.train()
    assert losses(run)[-1] < losses(run)[0] - 1
    assert projected(run.optimizer.optimizer) == PROJECTED


def test_dpo(model: LlamaForCausalLM, tokenizer: Any, tmp_path: Path) -> None:
    """``DPOTrainer`` takes an optimizer that is made already; the learning rate follows its schedule."""
    optimizer = subspan.create("sara_adamw", model, lr=1e-2, rank=4, update_proj_gap=4)
    run = trl.DPOTrainer(
        model=model,
        ref_model=copy.deepcopy(model),  # a model with a name is loaded again instead
        args=trl.DPOConfig(**settings(tmp_path, learning_rate=1e-6)),
        train_dataset=pairs(),
        processing_class=tokenizer,
        optimizers=(optimizer, None),
    )
    run.train()
    assert losses(run)[-1] < losses(run)[0]
    assert projected(run.optimizer.optimizer) == PROJECTED
    rates = [row["learning_rate"] for row in run.state.log_history if "learning_rate" in row]
    assert max(rates) == pytest.approx(1e-2)


def test_adapters_are_refused_with_the_reason(model: LlamaForCausalLM, tokenizer: Any, tmp_path: Path) -> None:
    """With ``peft_config`` only LoRA's matrices are trained, which are left out on purpose."""
    peft = pytest.importorskip("peft")
    run = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**settings(tmp_path)),
        train_dataset=sentences(),
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        optimizer_cls_and_kwargs=(Subspace, {"name": "sara_adamw", "rank": 4}),
    )
    with pytest.raises(SettingError, match=r"'lora_'\) are excluded on purpose: .*without peft_config"):
        run.create_optimizer()
