"""Examples in tokens: what is cut, what is predicted, and that padding changes nothing."""

from pathlib import Path

import pytest
import torch
from support.labelled import examples, words_tokenizer
from transformers import AutoModelForSequenceClassification

from subspan.training.data.batches import IGNORED
from subspan.training.data.labelled_batches import Examples
from subspan.training.data.labelled_files import Row
from subspan.training.data.task_specs import TASKS
from subspan.training.data.tokenizer import load_tokenizer
from subspan.utils.errors import InputError

LABELS = ("neg", "pos")


def rows(count: int, seed: int) -> list[Row]:
    return [Row(row["text"], None, row["label"], f"line {i}") for i, row in enumerate(examples(count, seed), 1)]


def of_bytes(found: list[Row], task: str = "classification", length: int = 12) -> Examples:
    return Examples(found, found, TASKS[task], LABELS if task != "lm" else (), load_tokenizer("bytes"), length, seed=0)


@pytest.mark.parametrize("length", range(2, 9))
@pytest.mark.parametrize("sizes", [(0, 3), (3, 0), (2, 9), (9, 2), (9, 9), (1, 1)])
def test_a_pair_is_cut_where_it_is_longer(sizes: tuple[int, int], length: int) -> None:
    """Both texts stay as far as there is room: the one that is cut keeps at least half of it."""
    pair = Row("a" * sizes[0], "b" * sizes[1], "neg", "")
    ids = of_bytes([pair], length=length).train[0].ids
    first, second = ids.count(ord("a")), ids.count(ord("b"))
    assert ids == [ord("a")] * first + [256] + [ord("b")] * second
    assert len(ids) == min(length, sum(sizes) + 1)
    room = length - 1
    assert first == sizes[0] or first >= room // 2
    assert second == sizes[1] or second >= room // 2


def test_a_pair_is_wrapped_as_the_model_knows_it() -> None:
    data = Examples([Row("river", "stone lamp", "pos", "")], [Row("river", "so", "pos", "")], TASKS["rte"], LABELS,
                    words_tokenizer(), 16, seed=0)  # fmt: skip
    example = data.train[0]
    assert words_tokenizer().convert_ids_to_tokens(example.ids) == ["[CLS]", "river", "[SEP]", "stone", "lamp", "[SEP]"]
    assert example.kinds == [0, 0, 0, 1, 1, 1]
    assert example.target == 1


@pytest.mark.parametrize("length", [4, 6, 8, 20])
def test_what_a_continuation_predicts(length: int) -> None:
    """Each token of the answer and its end is predicted; a prompt that is too long loses its beginning."""
    example = of_bytes([Row("abcdefg", None, "XYZ", "")], "lm", length).train[0]
    assert isinstance(example.target, list)
    assert len(example.ids) == len(example.target) <= length
    predicted = [target for target in example.target if target != IGNORED]
    assert predicted == [*b"XYZ", 256][:length]
    said = example.target.index(ord("X"))
    assert example.ids[0] == 256
    prompt = bytes(example.ids[1 : said + 1])
    assert b"abcdefg".endswith(prompt)
    assert len(prompt) == min(7, length - 4)
    assert example.ids[said + 1 :] == predicted[:-1]


def test_without_an_answer_the_text_is_predicted_whole() -> None:
    example = of_bytes([Row("abc", None, None, "")], "lm").train[0]
    assert (example.ids, example.target) == ([256, *b"abc"], [*b"abc", 256])


def test_an_empty_text_is_one_token() -> None:
    assert of_bytes([Row("", None, "neg", "")]).train[0].ids == [256]


def test_a_label_that_training_does_not_know() -> None:
    with pytest.raises(InputError, match=r"line 7: the label 'sad' is not one of training \(neg, pos\)"):
        Examples(
            rows(4, 0),
            [Row("x", None, "sad", "line 7")],
            TASKS["classification"],
            LABELS,
            load_tokenizer("bytes"),
            8,
            0,
        )


def test_padding_changes_nothing(bert: Path) -> None:
    """Logits of a batch are those of each example by itself."""
    data = Examples(rows(6, 0), rows(9, 1), TASKS["classification"], LABELS, words_tokenizer(), 24, seed=0)
    model = AutoModelForSequenceClassification.from_pretrained(bert, dtype=torch.float32).eval()
    for batch in data.validation_batches(4):
        together = model(input_ids=batch.inputs, attention_mask=batch.mask, token_type_ids=batch.kinds).logits
        assert (
            int(batch.mask.sum()) == batch.tokens() < batch.inputs.numel() or len(set(batch.mask.sum(1).tolist())) == 1
        )
        for own, ids, mask in zip(together, batch.inputs, batch.mask, strict=True):
            alone = model(input_ids=ids[mask.bool()][None]).logits[0]
            torch.testing.assert_close(own, alone, rtol=0, atol=1e-5)


def test_every_example_once_in_an_epoch_and_the_cursor_goes_on() -> None:
    data, other = of_bytes(rows(10, 0)), of_bytes(rows(10, 0))
    seen = [data.next_batch(4) for _ in range(5)]
    texts = [
        "".join(map(chr, ids[mask.bool()].tolist()))
        for batch in seen
        for ids, mask in zip(batch.inputs, batch.mask, strict=True)
    ]
    assert sorted(texts[:10]) == sorted(texts[10:]) == sorted(row.text[:12] for row in rows(10, 0))
    assert texts[:10] != texts[10:]
    for _ in range(2):
        other.next_batch(4)
    again = of_bytes(rows(10, 0))
    again.load_state_dict(other.state_dict())
    assert all(torch.equal(again.next_batch(4).inputs, batch.inputs) for batch in seen[2:])
    with pytest.raises(InputError, match="have changed since the checkpoint"):
        of_bytes(rows(10, 5)).load_state_dict(other.state_dict())


def test_validation_examples_that_have_changed() -> None:
    """Other validation examples are refused; an older checkpoint, which says nothing of them, still loads."""

    def of(validation: list[Row]) -> Examples:
        return Examples(rows(10, 0), validation, TASKS["classification"], LABELS, load_tokenizer("bytes"), 12, seed=0)

    state = of(rows(6, 1)).state_dict()
    of(rows(6, 1)).load_state_dict(state)
    changed = of(rows(6, 2))
    with pytest.raises(InputError, match=r"validation_data: the validation examples have changed .* put them back"):
        changed.load_state_dict(state)
    del state["held_digest"]
    changed.load_state_dict(state)


def test_majority_is_of_the_label_most_common_in_training() -> None:
    train = [Row("x", None, label, "") for label in ("neg", "neg", "pos")]
    held = [Row("x", None, label, "") for label in ("neg", "pos", "pos", "pos")]
    data = Examples(train, held, TASKS["classification"], LABELS, load_tokenizer("bytes"), 8, seed=0)
    assert data.majority() == 0.25
