"""The settings of a run. Each field is a YAML key and a command-line flag."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from subspan.utils.ranks import Rank

_INCIDENTAL = {"computes": "nothing"}
"""Metadata of a setting that changes nothing that is computed, except for rounding."""
_MEASUREMENT = {"computes": "measurements"}
"""Metadata of a setting that changes what is measured of the weights and when, and not how they are trained."""


@dataclass(frozen=True)
class OptimConfig:
    """Finer settings of the optimizer."""

    betas: tuple[float, float] | None = None
    """Decay rates of the two moments. The default is those of the optimizer's rule."""
    eps: float | None = None
    """Number added to the root of the second moment, so that nothing is divided by zero. The default is that of the
    rule."""
    rule: dict[str, Any] | None = None
    """Settings of the optimizer's rule, such as {momentum: 0.95}."""
    proj_type: str = "std"
    """Side of a matrix that is compressed: std (the shorter side; with parallel fsdp the right side), reverse_std (the
    longer side), left, or right."""
    transfer: Literal["keep", "rotate", "moments", "reset"] | None = None
    """What happens to the moments when the subspace changes. keep leaves them as they are, rotate moves the first one
    into the new subspace, moments moves both, and reset sets them to zero. The optimizer defines the default."""
    selector: dict[str, Any] | None = None
    """Settings of the optimizer's selector, which chooses the subspaces, such as {power: 2.0, floor: 0.1}. With a name,
    such as {name: gaussian}, another selector."""
    residual: dict[str, Any] | None = None
    """Settings of the optimizer's residual, which is what it does with the gradient outside the subspace, such as
    {mode: official}."""
    stagger: bool | None = None
    """Spread the refreshes of the matrices over the period, instead of refreshing all at one step. The default is to do
    so only with backward_side."""
    share: Literal["auto", "none"] = "auto"
    """With backward_side: whether layers with the same input share a basis and what is saved for the backward pass
    (auto), or not (none)."""
    merge: Literal["step", "refresh"] = "step"
    """With backward_side: when a weight changes. step changes it at every step; refresh collects the steps in fp32
    until the next refresh, which helps bf16 weights."""
    select_from: Literal["mean", "owner"] = "mean"
    """With backward_side and several processes: the gradient that a basis is chosen from. mean is that of the whole
    batch. owner is that of the part of one process, which sends less, but chooses other bases than a single process
    would."""
    eta: float | None = None
    """Strength of a proximal term ||B||² / (2 eta), where B is the way since the last refresh. By default there is
    none."""
    proximal: Literal["coupled", "decoupled"] = "coupled"
    """Whether the proximal term is added to the gradient (coupled), or to the update, as decoupled weight decay is
    (decoupled)."""
    state_dtype: Literal["float32", "int8"] | None = None
    """Precision of the moments: int8 keeps the moments in 8 bits, float32 in fp32. The optimizer defines the default.
    """
    min_8bit_size: int = 4096
    """Smallest moment, in entries, that int8 applies to. Smaller moments stay in fp32."""
    bf16_stochastic_round: bool = False
    """With precision bf16: round the updates of the weights at random, so that they are right on average."""
    lr_full: float | None = None
    """Learning rate of the parameters that are not projected: embeddings, heads, norms and biases. At full rank it is
    that of the same parameters. The default is that of the others."""
    targets: str | list[str] = "all-linear"
    """Matrices that are projected: all-linear, a list of parts of their names, or a regular expression."""


@dataclass(frozen=True)
class ScheduleConfig:
    """Schedule of the learning rate: linear warmup, then a decay."""

    shape: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warmup."""

    warmup_steps: int | None = None
    """Steps of linear warmup. The default is that of the preset, or a tenth of the run."""
    min_lr_ratio: float = 0.1
    """Learning rate at the end of the decay, as a share of the peak."""


@dataclass(frozen=True)
class EvaluationConfig:
    """Validation loss: the exact mean over the tokens of a fixed set."""

    every: int | None = None
    """Steps between evaluations. By default there are five in a run. The last step is always evaluated."""
    tokens: int = 131_072
    """Size of the fixed set in tokens, spread evenly over the validation documents. If they hold fewer, all are used.
    """


@dataclass(frozen=True)
class SelectionConfig:
    """Score of the validation examples, which decides which checkpoint is kept as the best."""

    every: int | None = None
    """Steps between evaluations. By default there are ten in a run. The last step is always evaluated."""
    patience: int | None = None
    """Number of evaluations in a row without a better score after which the run stops. By default it never stops early.
    """


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints."""

    every: int = 100
    """Steps between checkpoints. The last step is always saved."""
    keep: int = 2
    """Number of the newest checkpoints to keep. In fine-tuning, the best one is kept in addition."""


@dataclass(frozen=True)
class ProbeConfig:
    """Measurements of the subspaces during training, for `subspan inspect`."""

    subspace: bool = False
    """At each refresh, write to probes.jsonl the overlap with the previous basis and with the anchor, the principal
    angles, the share of the gradient that is captured, and the time."""
    anchor: int | None = None
    """Step whose bases all later ones are compared with. By default there is none."""
    noise_every: int | None = None
    """Steps between measurements of the noise of the gradient, each of which costs a backward pass. By default there
    are none."""
    noise_parts: int = 4
    """Number of parts of the batch whose gradients are compared to measure the noise."""


@dataclass(frozen=True)
class RunConfig:
    """Settings that every run has."""

    optimizer: str = "sara_adamw"
    """Optimizer: a name from `subspan list`."""
    tokenizer: str | None = None
    """Tokenizer: bytes, embedded (a BPE vocabulary of 4,096), a path, or a name on the Hugging Face hub. The default is
    that of the model."""
    backward_side: bool | None = None
    """Let the backward pass compute the low-rank gradient directly, so that no projected layer saves its input. The
    optimizer defines the default."""
    steps: int | None = None
    """Number of optimizer steps. The default is that of the preset in pretraining; in fine-tuning it follows from the
    epochs."""
    batch_size: int | None = None
    """Sequences in a step, over all processes together. The default is that of the preset in pretraining, and 16 in
    fine-tuning."""
    micro_batch_size: int | None = field(default=None, metadata=_INCIDENTAL)
    """Sequences in one forward pass of a process. If fewer than its part of the batch, gradients are accumulated. The
    default is the whole part."""
    lr: float | None = None
    """Peak learning rate. The optimizer defines the default; when a pretrained model is fine-tuned, it is in most cases
    3e-5."""
    rank: Rank | None = None
    """Dimension of the subspaces: a whole number, or a share of the compressed side of each matrix, such as 0.25. The
    default is that of the preset, or 4 when a pretrained model is fine-tuned."""
    rank_pattern: dict[str, Rank] | None = None
    """Other ranks by name, such as {q_proj: 32, mlp: 0.5}, whole numbers or shares. The first regular expression that
    is found in the name of a projected matrix gives its rank. By default all have `rank`."""
    update_proj_gap: int | None = None
    """Steps between refreshes of the subspaces. The default is that of the preset; when a pretrained model is
    fine-tuned, it is a tenth of the run, but at most 500."""
    scale: float | None = None
    """Factor on the updates of projected matrices. The optimizer defines the default; when a pretrained model is
    fine-tuned, it is in most cases 4."""
    weight_decay: float = 0.0
    """Decoupled weight decay. It does not apply to biases and norms."""
    clip: float | None = 1.0
    """Largest norm of the whole gradient, to which a longer one is scaled down. null does not clip."""
    seed: int = 0
    """Random seed for the initial weights, the order of the training data, and the choice of subspaces."""
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    checkpoint: CheckpointConfig = field(default=CheckpointConfig(), metadata=_INCIDENTAL)
    probes: ProbeConfig = field(default=ProbeConfig(), metadata=_INCIDENTAL)
    out: str | None = field(default=None, metadata=_INCIDENTAL)
    """Directory of the run. The default is one in runs/, named after the settings, with a number if the name is taken.
    """
    resume: str | None = field(default=None, metadata=_INCIDENTAL)
    """Where to continue from: auto continues from the newest checkpoint in `out`, if there is one. A path continues
    from that checkpoint or run. The settings must be those of the run: give its config.yaml as --config."""
    device: Literal["auto", "cpu", "cuda"] = field(default="auto", metadata=_INCIDENTAL)
    """Device to train on. auto is cuda if there is a GPU."""
    parallel: Literal["none", "ddp", "fsdp"] | None = field(default=None, metadata=_INCIDENTAL)
    """How the processes of torchrun share the work: with ddp each holds the whole model, with fsdp each holds a part of
    it. Both compute what one process computes, and a run may continue on another number of processes. Without torchrun
    there is one process."""
    precision: Literal["auto", "fp32", "bf16-mixed", "bf16"] = "auto"
    """Precision of the training: bf16-mixed computes in bf16 and keeps the weights in fp32. bf16 keeps the weights in
    bf16 too. auto is bf16-mixed on a GPU, and fp32 on a CPU."""
    gradient_checkpointing: bool = field(default=False, metadata=_INCIDENTAL)
    """Save memory by computing activations again in the backward pass."""
    threads: int | None = field(default=None, metadata=_INCIDENTAL)
    """Number of CPU threads. By default torch decides."""
    log_every: int = field(default=10, metadata=_INCIDENTAL)
    """Steps between lines of metrics."""
    tensorboard: bool = field(default=False, metadata=_INCIDENTAL)
    """Write files for TensorBoard, in addition to metrics.jsonl."""


@dataclass(frozen=True)
class PretrainConfig(RunConfig):
    """Pretrain a language model."""

    model: str = "llama-nano"
    """Model: a preset from `subspan list models` or a config.json, both with random weights; or a model directory or
    OWNER/NAME on the Hugging Face hub, with their weights."""
    data: str = "embedded"
    """Training data: embedded (a small corpus that comes with the package); a file, folder or glob of text files (one
    document each), or of JSON, CSV, TSV, parquet or Arrow files (one document a record), also compressed; a folder that
    datasets has saved; OWNER/NAME on the hub; c4 or slimpajama, streamed from the hub; or c4:PATH for a local copy of
    their files."""
    validation_data: str | None = None
    """Files of validation documents. By default 5 % of the documents of `data` are set aside, or the last 5 % of a
    single text."""
    test_data: str | None = None
    """Files of test documents, which are measured once, at the end, so that nothing is chosen by them. By default they
    are the documents that name their `split` as test; the embedded corpus has 16."""
    text_column: str | None = None
    """Column of the text in files that have columns. By default it is text, or one found by its usual names."""
    encoding: str | None = None
    """Encoding of the files, such as latin-1. The default is UTF-8."""
    sequence_length: int | None = None
    """Number of tokens predicted in a sequence. The default is that of the preset."""
    packing: bool = True
    """For streamed data: join documents end to end. If false, each document is a sequence of its own, cut or padded, as
    in GaLore's code."""
    evaluation: EvaluationConfig = field(default=EvaluationConfig(), metadata=_MEASUREMENT)

    def run_name(self) -> str:
        """The name of a run's directory, if none is given."""
        return f"{Path(self.model).name}-{self.optimizer}-seed{self.seed}"


@dataclass(frozen=True)
class LoraConfig:
    """LoRA adapters, which the package peft trains instead of the weights, for comparison."""

    rank: int | None = None
    """Rank of the adapters. By default there are none, and the weights are trained."""
    alpha: float = 16.0
    """Scale of the adapters, which are multiplied by alpha / rank."""
    dropout: float = 0.0
    """Dropout of the inputs of the adapters."""


@dataclass(frozen=True)
class FinetuneConfig(RunConfig):
    """Fine-tune a model on labelled examples, or a causal language model on prompts and answers."""

    model: str = "llama-tiny"
    """Model: a directory (also a checkpoint of `subspan pretrain`) or OWNER/NAME on the Hugging Face hub, with their
    weights; or a preset or a config.json, with random weights."""
    task: str = "bundled"
    """Task: bundled (which author wrote a passage of the embedded corpus); one of GLUE (cola, sst2, mrpc, qqp, stsb,
    mnli, mnli-mm, qnli, rte, wnli); or classification, regression, or lm (a causal model learns to write the answer) on
    files of your own."""
    data: str | None = None
    """Training examples, for the tasks on files of your own: a file (JSON lines or an array, CSV, TSV, parquet, Arrow;
    also compressed), a folder, a glob, a folder that datasets has saved, or OWNER/NAME on the hub; for one of GLUE, in
    place of its own data."""
    validation_data: str | None = None
    """File of validation examples. By default a tenth of `data` is set aside."""
    text_column: str | None = None
    """Column of the text; for lm that of the prompt, of the instruction, or of the turns of a chat. The default is that
    of the task, or text, or one found by its usual names."""
    pair_column: str | None = None
    """Column of a second text, if there is one; for lm that of what an instruction is about. The default is that of the
    task."""
    label_column: str | None = None
    """Column of the label, or of the answer for lm; without an answer, lm learns the whole text. The default is that of
    the task, or label, or one found by its usual names."""
    encoding: str | None = None
    """Encoding of the files, such as latin-1. The default is UTF-8."""
    chat_template: str | None = None
    """For lm: template of chats, plain or a file of Jinja. The default is the tokenizer's; where it has none, plain."""
    learn_prompts: bool = False
    """For lm: learn prompts too. By default only the answers count in the loss; of a chat, the assistant's turns."""
    packing: bool = False
    """For lm: join short training examples into sequences of `max_length` tokens, in which none sees another."""
    max_length: int = 128
    """Largest number of tokens in an example. Longer examples are cut."""
    epochs: int | None = None
    """Number of times that each example is seen, unless `steps` says how long the run is. The default is that of the
    task, which is 30 for GLUE."""
    schedule: ScheduleConfig = ScheduleConfig(shape="linear", min_lr_ratio=0.0)
    evaluation: SelectionConfig = field(default=SelectionConfig(), metadata=_MEASUREMENT)
    lora: LoraConfig = LoraConfig()

    def run_name(self) -> str:
        """The name of a run's directory, if none is given."""
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
    """The ``settings`` of a run, as a nested dict, without those that have their default value.

    Settings of an older version compare with those of today: one that it did not know counts as the default.
    """
    known = asdict(FinetuneConfig() if "task" in settings else PretrainConfig()) if defaults is None else defaults
    found = {}
    for key, value in settings.items():
        own = known.get(key)
        found[key] = without_defaults(value, own) if isinstance(value, dict) and isinstance(own, dict) else value
        if found[key] in (own, {}):
            del found[key]
    return found
