"""Examples that a word decides, and a tokenizer of words."""

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = ["river", "stone", "lamp", "paper", "garden", "window", "table", "cloud", "horse", "letter"]
DECIDE = {"neg": "bad", "pos": "good", "mid": "so"}


def examples(count: int, seed: int, labels: tuple[str, ...] = ("neg", "pos")) -> list[dict[str, str]]:
    """Words at random, and among them some that say the label."""
    draw = random.Random(seed)
    rows = []
    for i in range(count):
        label = labels[i % len(labels)]
        words = [draw.choice(WORDS) for _ in range(draw.randint(0, 3))] + [DECIDE[label]] * draw.randint(1, 4)
        draw.shuffle(words)
        rows.append({"text": " ".join(words), "label": label})
    return rows


def write_jsonl(path: Path, rows: Iterable[Mapping[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def words_tokenizer() -> PreTrainedTokenizerFast:
    """A token a word, wrapped as BERT wraps texts and pairs."""
    vocabulary = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *WORDS, *DECIDE.values()]
    numbers = {word: i for i, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip
