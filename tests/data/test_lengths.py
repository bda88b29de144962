"""Length: what is cut is counted, and examples that are packed learn what they learn alone."""

import json
import random
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from support.labelled import words_tokenizer
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.models.mamba import MambaConfig

from subspan.training.data.batches import IGNORED
from subspan.training.data.labelled_batches import Encoded, Examples, packed
from subspan.training.data.labelled_files import Row
from subspan.training.data.task_specs import TASKS
from subspan.training.data.tokenizer import load_tokenizer
from subspan.training.evaluation import token_losses
from subspan.training.models.build import check_packs
from subspan.utils.errors import InputError

BYTES = load_tokenizer("bytes")
USER = {"role": "user", "content": "hi there, what is it?"}


def examples(rows: list[Row], task: str, length: int, **settings: bool) -> Examples:
    labels = ("a", "b") if task in ("classification", "rte") else ()
    tokenizer = load_tokenizer("bytes")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    return Examples(rows, rows[:1], TASKS[task], labels, tokenizer, length, 0, **settings)


@pytest.mark.parametrize(
    ("rows", "task", "words"),
    [
        ([Row("x" * n, None, "a", "") for n in (5, 10, 30)], "classification",
         "1 of 4 examples are longer and are cut, by 20 of 50"),
        ([Row("x" * 9, "y" * n, "a", "") for n in (0, 10)], "rte", "1 of 3 examples are longer and are cut, by 10 of 40"),
        ([Row("x" * n, None, "yy", "") for n in (5, 30)], "lm", "1 of 3 examples are longer and are cut, by 23 of 49"),
        ([Row("x" * n, None, None, "") for n in (5, 30)], "lm", "1 of 3 examples are longer and are cut, by 21 of 43"),
    ],
)  # fmt: skip
def test_what_is_cut_is_said_once(rows: list[Row], task: str, words: str) -> None:
    """The first row is the validation part too. Tokens are those of the texts, and the ends of text."""
    assert examples(rows, task, 10).notes() == [
        f"max_length=10: {words} tokens in all; a larger --max_length keeps them"
    ]
    assert examples(rows, task, 100).notes() == []


def test_what_is_cut_of_wrapped_texts() -> None:
    """The tokens that wrap a text are kept, and those that are lost are counted exactly."""
    rows = [Row("river " * n, None, "a", "") for n in (3, 20)]
    data = Examples(rows, rows[:1], TASKS["classification"], ("a",), words_tokenizer(), 10, 0)
    assert data.notes() == [
        "max_length=10: 1 of 3 examples are longer and are cut, by 12 of 32 tokens in all; a larger --max_length keeps them"
    ]


@pytest.mark.parametrize("length", [8, 30, 61, 62, 400])
def test_a_chat_that_is_cut_still_has_something_to_learn(length: int) -> None:
    talk = ({"role": "user", "content": "x" * 50}, {"role": "assistant", "content": "yes"}, USER)
    data = examples([Row("", None, None, "", talk)], "lm", length)
    example = data.train[0]
    assert isinstance(example.target, list)
    assert len(example.ids) <= length
    learnt = bytes(t for t in example.target if t not in (IGNORED, 256)).decode()
    assert learnt
    assert "yes".startswith(learnt) or learnt.endswith("yes")
    assert bool(data.notes()) == (length < 100)


# --- packing ----------------------------------------------------------------------------------------------------------


def rows_of(count: int) -> list[Row]:
    draw = random.Random(0)
    return [
        Row("p" * draw.randint(1, 30), None, "".join(draw.choices("abc", k=draw.randint(1, 20))), "")
        for _ in range(count)
    ]


def test_packing_keeps_every_example_and_fills_sequences() -> None:
    alone = examples(rows_of(200), "lm", 64).train
    together = packed(alone, 64)
    assert max(len(own.ids) for own in together) <= 64
    assert sum(len(own.ids) for own in together) == sum(len(own.ids) for own in alone)
    found: list[Encoded] = []
    for own in together:
        starts = [i for i, place in enumerate(own.positions or []) if place == 0] + [len(own.ids)]
        targets = own.target
        assert isinstance(targets, list)
        found += [Encoded(own.ids[a:b], targets[a:b]) for a, b in pairwise(starts)]
        assert [p for a, b in pairwise(starts) for p in range(b - a)] == own.positions
    assert sorted(map(str, found)) == sorted(map(str, alone))
    fill = sum(len(own.ids) for own in together) / (64 * len(together))
    assert fill > 0.95
    assert packed(alone, 64) == together


def test_packed_examples_do_not_see_each_other(llama: Path) -> None:
    """The loss of a batch of packed sequences, and its gradient, are those of all examples, each by itself."""
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    data = examples(rows_of(12), "lm", 64, packing=True)
    assert len(data.train) < 12
    assert "12 training and 1 validation examples, packed into" in data.describe()
    batch = data.next_batch(len(data.train))
    assert batch.positions is not None
    together = token_losses(model, batch)
    together.backward()
    gradient = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    alone = examples(rows_of(12), "lm", 64)
    single = [token_losses(model, batch) for batch in alone.next_batch(12).split(1)]
    torch.stack(single).sum().backward()
    torch.testing.assert_close(together, torch.stack(single).sum(), rtol=1e-5, atol=1e-4)
    for name, p in model.named_parameters():
        torch.testing.assert_close(gradient[name], p.grad, rtol=1e-3, atol=1e-3)
    assert batch.weight() == alone.next_batch(12).weight()
    assert [part.positions is not None for part in batch.split(1)] == [True] * len(data.train)


def test_a_model_in_which_packed_examples_see_each_other_is_refused(llama: Path) -> None:
    check_packs("llama", AutoModelForCausalLM.from_pretrained(llama))
    config: PretrainedConfig = MambaConfig(
        vocab_size=32, hidden_size=16, state_size=4, num_hidden_layers=1, time_step_rank=4
    )
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(
        InputError, match=r"packing=True: in the model 'm' \(MambaForCausalLM\) packed examples would see"
    ):
        check_packs("m", model)


def test_a_sequence_longer_than_all_others_is_its_own(tmp_path: Path) -> None:
    assert (
        json.dumps([own.ids for own in packed([Encoded([1], [2]), Encoded([3] * 5, [4] * 5)], 4)])
        == "[[3, 3, 3, 3, 3], [1]]"
    )
