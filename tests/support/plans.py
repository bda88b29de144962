"""A small model as a directory, and a real step of a plan."""

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

import subspan
from subspan.costs.live_bytes import LiveBytes
from subspan.costs.saved_activations import SavedBytes
from subspan.factory import residual_of
from subspan.planning.model import choose
from subspan.planning.setting import PlanSetting
from subspan.storage.allocation import state_bytes
from subspan.training.data.batches import Batch
from subspan.training.evaluation import token_losses

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "bf16-mixed": torch.float32}


def llama_directory(folder: Path, layers: int, **changes: Any) -> str:
    """A directory with a config.json alone."""
    sizes = {"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4, "vocab_size": 300}
    LlamaConfig(num_hidden_layers=layers, max_position_embeddings=64, **sizes | changes).save_pretrained(folder)
    return str(folder)


def tensors(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]


def real_step(setting: PlanSetting) -> dict[str, int]:
    """The second step of a real model of ``setting``, and so an ordinary one: bytes by kind, and the most beside what
    was there before: of its passes (``peak``; backward-side, of the worst step in which one basis is chosen), of the
    optimizer's step (``step``), and of its first, in which all bases are chosen (``first_step``).
    """
    from transformers import AutoModelForCausalLM

    chosen = choose(setting)
    model = AutoModelForCausalLM.from_config(chosen.config, dtype=torch.float32).train()
    for p in model.parameters():
        p.data = p.data.to(DTYPES[setting.dtype])
    ranks: dict[str, Any] = {"rank": chosen.rank, "rank_pattern": setting.rank_pattern}
    handle = None
    if setting.is_backward_side:
        handle = subspan.project_backward(model, share=setting.share, residual=residual_of(setting.optimizer), **ranks)
    settings = {"8bit": {"state_dtype": "int8"}}.get(setting.state or "", {})
    optimizer = subspan.create(setting.optimizer, model, update_proj_gap=1000, stagger=False, **ranks, **settings)
    if setting.checkpointing:
        model.gradient_checkpointing_enable()
    tokens = torch.randint(chosen.config.vocab_size, (setting.batch, chosen.seq))
    batch = Batch(tokens, tokens.clone())

    def passes() -> int:
        optimizer.zero_grad(set_to_none=True)
        held = [*model.parameters(), *model.buffers(), *tensors(optimizer), batch.inputs, batch.targets]
        with LiveBytes(held) as live, torch.autocast("cpu", torch.bfloat16, enabled=setting.dtype == "bf16-mixed"):
            before = live.now
            loss = token_losses(model, batch)
        with live:
            loss.backward()
        return live.peak - before

    def step() -> int:
        for group in optimizer.param_groups:
            if "foreach" in group:  # torch's AdamW, as the plan has it
                group["foreach"] = True
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        with LiveBytes([*model.parameters(), *model.buffers(), *tensors(optimizer), *grads]) as live:
            before = live.now
            optimizer.step()
        return live.peak - before

    passes()
    first_step = step()
    peak = passes()
    gradients = sum(p.grad.numel() * p.grad.element_size() for p in model.parameters() if p.grad is not None)
    steps = {"first_step": first_step, "step": step()}
    for projection in () if handle is None else handle.projections:
        projection.expect("form" if optimizer.selector.needs_gradient else "draw")
        peak = max(peak, passes())
        step()
    optimizer.zero_grad(set_to_none=True)
    mixed = torch.autocast("cpu", torch.bfloat16, enabled=setting.dtype == "bf16-mixed")
    with SavedBytes(model, [], tensors(optimizer)) as saved, mixed:
        loss = token_losses(model, batch)
    del loss
    carriers = sum(p.numel() * p.element_size() for name, p in model.named_parameters() if name.endswith(".carrier"))
    bases = sum(
        state["basis"].numel() * state["basis"].element_size() for state in optimizer.state.values() if "basis" in state
    )
    del handle
    return {
        "weights": sum(p.numel() * p.element_size() for p in model.parameters()) - carriers,
        "carriers": carriers,
        "gradients": gradients,
        "states": state_bytes(optimizer) - bases,
        "bases": bases,
        "activations": saved.total,
        "peak": peak,
        **steps,
    }
