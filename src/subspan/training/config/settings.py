"""The settings of a run. Each field is a YAML key and a command-line flag."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

_INCIDENTAL = {"computes": "nothing"}
"""Metadata of a setting that changes nothing that is computed, except for rounding."""
_MEASUREMENT = {"computes": "measurements"}
"""Metadata of a setting that changes what is measured of the weights and when, and not how they are trained."""


@dataclass(frozen=True)
class OptimConfig:
    """Finer settings of the optimizer."""

    betas: tuple[float, float] | None = None
    """Decay of the moments; null is the rule's own."""
    eps: float | None = None
    """Added to the root of the second moment; null is the rule's own."""
    rule: dict[str, Any] | None = None
    """Settings of the recipe's rule, such as {momentum: 0.95}."""
    proj_type: str = "std"
    """Side to compress: std (the shorter; with parallel fsdp right), reverse_std (the longer), right, left."""
    transfer: Literal["keep", "rotate", "moments", "reset"] | None = None
    """What becomes of the moments at a refresh; null is the recipe's own."""
    selector: dict[str, Any] | None = None
    """Settings of the recipe's selector, such as {power: 2.0, floor: 0.1}; or of another, {name: gaussian}."""
    residual: dict[str, Any] | None = None
    """Settings of the recipe's residual, such as {mode: official}."""
    stagger: bool | None = None
    """Spread the refreshes over the period; null: with backward_side."""
    share: Literal["auto", "none"] = "auto"
    """With backward_side: whether layers that get the same tensor share a basis and what is saved of it."""
    merge: Literal["step", "refresh"] = "step"
    """With backward_side: when the weight changes; refresh keeps the steps between in fp32, for bf16 weights."""
    select_from: Literal["mean", "owner"] = "mean"
    """With backward_side and several processes: whether a basis is chosen from the gradient of the whole batch, or from
    that of
    one process's part, which sends less and chooses otherwise than one process would."""
    eta: float | None = None
    """Strength of the proximal term ||B||² / (2 eta), B the way since the last refresh; null is none."""
    proximal: Literal["coupled", "decoupled"] = "coupled"
    """Whether the proximal term is part of the gradient, or beside the rule."""
    state_dtype: Literal["float32", "int8"] | None = None
    """int8 keeps moments in 8 bits; null is the recipe's own."""
    min_8bit_size: int = 4096
    """Entries of the smallest moment that int8 is for."""
    bf16_stochastic_round: bool = False
    """With precision bf16: round updates of the weights at random, right on average."""
    lr_full: float | None = None
    """Learning rate of what is not projected; null is that of the rest."""
    targets: str | list[str] = "all-linear"
    """Which matrices are projected: all-linear, a list of substrings, or a regular expression."""


@dataclass(frozen=True)
class ScheduleConfig:
    """Linear warmup, then a decay."""

    shape: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate goes down after warmup."""

    warmup_steps: int | None = None
    """Steps of linear warmup; null is the preset's, or a tenth of the run."""
    min_lr_ratio: float = 0.1
    """Where the decay ends, as a share of the learning rate."""


@dataclass(frozen=True)
class EvaluationConfig:
    """The validation loss: the exact mean over the tokens of a fixed set."""

    every: int | None = None
    """Steps between evaluations; null is five in a run. The last step is always evaluated."""
    tokens: int = 131_072
    """Size of the fixed set, spread evenly over the validation documents; all of them if they hold less."""


@dataclass(frozen=True)
class SelectionConfig:
    """The score of the validation examples, which chooses the checkpoint that is kept as the best."""

    every: int | None = None
    """Steps between evaluations; null is ten in a run. The last step is always evaluated."""
    patience: int | None = None
    """Evaluations in a row without a better score after which the run stops; null never stops it."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Saving."""

    every: int = 100
    """Steps between checkpoints. The last step is always saved."""
    keep: int = 2
    """How many of the newest to keep; the best is kept beside them."""


@dataclass(frozen=True)
class ProbeConfig:
    """Measurements of the subspaces while training, written to probes.jsonl; `subspan inspect` reads them."""

    subspace: bool = False
    """At each refresh: overlap with the basis before and with the anchor, principal angles, gradient captured, time."""
    anchor: int | None = None
    """The step whose bases later ones are compared with; null is none."""
    noise_every: int | None = None
    """Steps between measurements of the noise of the gradient, which cost a backward pass each; null is none."""
    noise_parts: int = 4
    """Parts of the batch whose gradients are compared for that."""


@dataclass(frozen=True)
class RunConfig:
    """What every run has."""

    optimizer: str = "sara_adamw"
    """A name from `subspan list optimizers`."""
    tokenizer: str | None = None
    """bytes, embedded (a BPE of 4,096), or a Hugging Face path or name; null is the model's."""
    backward_side: bool | None = None
    """Let the backward pass make the low-rank gradient, and save no input of a projected layer; null is the
    optimizer's own.
    """
    steps: int | None = None
    """Optimizer steps; null is the preset's in pretraining, and what the epochs come to in fine-tuning."""
    batch_size: int | None = None
    """Sequences in a step, of all processes together; null is the preset's in pretraining, 16 in fine-tuning."""
    micro_batch_size: int | None = field(default=None, metadata=_INCIDENTAL)
    """Sequences in a forward pass of a process, fewer than its part of the batch to accumulate gradients; null is
    all.
    """
    lr: float | None = None
    """Peak learning rate; null is the method's own."""
    rank: int | None = None
    """Dimension of the subspace; null is the preset's, or 4 for a model that brings its weights to fine-tuning."""
    update_proj_gap: int | None = None
    """Steps between refreshes of the subspace; null is the preset's, or likewise a tenth of the run, 500 at most."""
    scale: float | None = None
    """Factor on the step of projected matrices; null is the recipe's own, or 4 likewise."""
    weight_decay: float = 0.0
    """Decoupled weight decay; biases and norms are not decayed."""
    clip: float | None = 1.0
    """Largest norm of the whole gradient; null does not clip."""
    seed: int = 0
    """Of the weights, the order of stored data and every subspace."""
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    checkpoint: CheckpointConfig = field(default=CheckpointConfig(), metadata=_INCIDENTAL)
    probes: ProbeConfig = field(default=ProbeConfig(), metadata=_INCIDENTAL)
    out: str | None = field(default=None, metadata=_INCIDENTAL)
    """Directory of the run; null is one under runs/ named after the settings, numbered if taken."""
    resume: str | None = field(default=None, metadata=_INCIDENTAL)
    """auto continues the newest checkpoint of `out` if there is one; a path continues that checkpoint or run. Settings
    must be
    those of the run: give its config.yaml as --config."""
    device: Literal["auto", "cpu", "cuda"] = field(default="auto", metadata=_INCIDENTAL)
    """Where to train; auto is cuda if there is one."""
    parallel: Literal["none", "ddp", "fsdp"] | None = field(default=None, metadata=_INCIDENTAL)
    """Under torchrun: ddp, each process holds the model; fsdp, each holds a part of it. Both compute what one process
    computes,
    and a run may go on with another number of processes. Without torchrun there is one; null is none."""
    precision: Literal["auto", "fp32", "bf16-mixed", "bf16"] = "auto"
    """bf16-mixed computes in bf16 and keeps fp32 weights; bf16 keeps bf16 weights; auto is bf16-mixed on cuda, else
    fp32.
    """
    gradient_checkpointing: bool = field(default=False, metadata=_INCIDENTAL)
    """Recompute activations in the backward pass."""
    threads: int | None = field(default=None, metadata=_INCIDENTAL)
    """CPU threads; null is torch's choice."""
    log_every: int = field(default=10, metadata=_INCIDENTAL)
    """Steps between lines of metrics."""
    tensorboard: bool = field(default=False, metadata=_INCIDENTAL)
    """Write TensorBoard files too, beside metrics.jsonl."""


@dataclass(frozen=True)
class PretrainConfig(RunConfig):
    """Pretrain a language model."""

    model: str = "llama-nano"
    """A preset (`subspan list models`), a config.json (random weights), a model directory or OWNER/NAME on the Hugging
    Face hub
    (their weights)."""
    data: str = "embedded"
    """embedded; text files (each one document) or JSONL files (a document a line) as a file, folder or glob; c4 or
    slimpajama,
    or c4:PATH for a local copy of their files."""
    validation_data: str | None = None
    """Files of validation documents; null sets aside 5 % of the documents of `data`."""
    sequence_length: int | None = None
    """Tokens predicted in a sequence; null is the preset's."""
    packing: bool = True
    """Streamed data: join documents end to end; false is one document a sequence, cut or padded, as in GaLore's
    code.
    """
    evaluation: EvaluationConfig = field(default=EvaluationConfig(), metadata=_MEASUREMENT)

    def run_name(self) -> str:
        return f"{Path(self.model).name}-{self.optimizer}-seed{self.seed}"


@dataclass(frozen=True)
class LoraConfig:
    """LoRA adapters (the package peft) instead of the weights, for comparison."""

    rank: int | None = None
    """Of the adapters; null trains the weights."""
    alpha: float = 16.0
    """Their factor is alpha / rank."""
    dropout: float = 0.0
    """Of their inputs."""


@dataclass(frozen=True)
class FinetuneConfig(RunConfig):
    """Fine-tune a model on labelled examples, or a causal language model on prompts and answers."""

    model: str = "llama-tiny"
    """A model directory (also a checkpoint of subspan pretrain) or OWNER/NAME on the Hugging Face hub; a preset or a
    config.json for random weights."""
    task: str = "bundled"
    """bundled (which author wrote a passage of the embedded corpus); a task of GLUE (cola, sst2, mrpc, qqp, stsb, mnli,
    mnli-mm, qnli, rte, wnli); or of your own files: classification, regression, or lm (a causal model learns to write
    the
    answer)."""
    data: str | None = None
    """A file of training examples, .jsonl, .csv or .tsv (also .gz, .xz), instead of the task's own."""
    validation_data: str | None = None
    """A file of validation examples; null sets aside a tenth of `data`."""
    text_column: str | None = None
    """The column of the text (lm: the prompt); null is the task's, or text."""
    pair_column: str | None = None
    """The column of a second text, where there is one; null is the task's."""
    label_column: str | None = None
    """The column of the label (lm: the answer, and without it the text is learnt whole); null is the task's, or
    label.
    """
    max_length: int = 128
    """Tokens of an example; longer ones are cut."""
    epochs: int | None = None
    """Times that each example is seen, unless `steps` says how long the run is; null is the task's: of GLUE 30."""
    schedule: ScheduleConfig = ScheduleConfig(shape="linear", min_lr_ratio=0.0)
    evaluation: SelectionConfig = field(default=SelectionConfig(), metadata=_MEASUREMENT)
    lora: LoraConfig = LoraConfig()

    def run_name(self) -> str:
        adapted = f"-lora{self.lora.rank}" if self.lora.rank else ""
        return f"{self.task}-{Path(self.model).name}-{self.optimizer}{adapted}-seed{self.seed}"


def names_without_effect(*, with_measurements: bool = False) -> frozenset[str]:
    """Names of the settings of any run that change nothing that is computed, except for rounding.

    Args:
        with_measurements: add the settings that change only what is measured.
    """
    computes = ("nothing", "measurements") if with_measurements else ("nothing",)
    settings = (*fields(PretrainConfig), *fields(FinetuneConfig))
    return frozenset(setting.name for setting in settings if setting.metadata.get("computes") in computes)


def without_defaults(settings: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """``settings`` of a run, as a nested dict, but for those that are as they are by default.

    So those of an older version compare with today's: a setting that it did not know is as it was.
    """
    known = asdict(FinetuneConfig() if "task" in settings else PretrainConfig()) if defaults is None else defaults
    found = {}
    for key, value in settings.items():
        own = known.get(key)
        found[key] = without_defaults(value, own) if isinstance(value, dict) and isinstance(own, dict) else value
        if found[key] in (own, {}):
            del found[key]
    return found
