"""The tasks for fine-tuning: GLUE's nine, scored as GLUE does, the bundled one, and those for a user's own files.

Source: Wang et al. 2019, arXiv 1804.07461, table 1, and the columns of the data set ``nyu-mll/glue``.

Deviations: scores are those of the validation half, since the labels of the test half are not public. MNLI's two
validation halves are two tasks, ``mnli`` (matched) and ``mnli-mm``.
"""

from dataclasses import dataclass
from typing import Literal

from subspan.utils.errors import InputError
from subspan.utils.suggestions import near_names

Kind = Literal["classification", "regression", "lm"]


@dataclass(frozen=True)
class TaskSpec:
    """What a task predicts, from which columns, and how it is scored."""

    kind: Kind
    text: str = "text"
    pair: str | None = None
    label: str = "label"
    scores: tuple[str, ...] = ("accuracy",)
    """Names in ``SCORES``. The first chooses the best checkpoint: the highest, or for ``lm`` the lowest perplexity."""
    labels: tuple[str, ...] = ()
    """Labels in the order of the data set, where F1 needs to know which is the second."""
    epochs: int = 3
    """Length of the run, unless the user gives one."""
    glue: str | None = None
    """Name of the configuration of ``nyu-mll/glue``."""
    validation: str = "validation"
    """Name of the half of the data set to validate on."""


TASKS: dict[str, TaskSpec] = {
    "bundled": TaskSpec("classification", epochs=1),
    "cola": TaskSpec("classification", "sentence", scores=("matthews", "accuracy"), epochs=30, glue="cola"),
    "sst2": TaskSpec("classification", "sentence", epochs=30, glue="sst2"),
    "mrpc": TaskSpec(
        "classification", "sentence1", "sentence2", scores=("accuracy", "f1"), labels=("not_equivalent", "equivalent"),
        epochs=30, glue="mrpc",
    ),
    "qqp": TaskSpec(
        "classification", "question1", "question2", scores=("accuracy", "f1"), labels=("not_duplicate", "duplicate"),
        epochs=30, glue="qqp",
    ),
    "stsb": TaskSpec("regression", "sentence1", "sentence2", scores=("pearson", "spearman"), epochs=30, glue="stsb"),
    "mnli": TaskSpec("classification", "premise", "hypothesis", epochs=30, glue="mnli", validation="validation_matched"),
    "mnli-mm": TaskSpec("classification", "premise", "hypothesis", epochs=30, glue="mnli", validation="validation_mismatched"),
    "qnli": TaskSpec("classification", "question", "sentence", epochs=30, glue="qnli"),
    "rte": TaskSpec("classification", "sentence1", "sentence2", epochs=30, glue="rte"),
    "wnli": TaskSpec("classification", "sentence1", "sentence2", epochs=30, glue="wnli"),
    "classification": TaskSpec("classification"),
    "regression": TaskSpec("regression", scores=("pearson", "spearman")),
    "lm": TaskSpec("lm", scores=("val_ppl",)),
}  # fmt: skip


def find_task(name: str) -> TaskSpec:
    """Return the task of this name.

    Raises:
        InputError: there is none.
    """
    if name in ("seq2seq", "translation", "summarization"):
        raise InputError(
            f"task={name!r}: encoder-decoders (T5, BART) are not fine-tuned by this command; train one with the Trainer of "
            "transformers and optimizer_cls_and_kwargs=(subspan.integrations.transformers.Subspace, dict(name='sara_adamw', "
            "rank=128)), or give a decoder and task lm"
        )
    if name not in TASKS:
        raise InputError(
            f"task={name!r}: is unknown; {near_names(name, TASKS)}; for files of your own: classification, regression, lm"
        )
    return TASKS[name]
