"""Labelled examples as batches of tokens: encoded once, shuffled by the seed, padded to the longest of a batch."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from subspan.training.data.batches import IGNORED, Batch, Order
from subspan.training.data.continuations import Continuations, Cuts
from subspan.training.data.labelled_files import Row
from subspan.training.data.task_specs import TaskSpec
from subspan.training.models.build import padding_of
from subspan.utils.errors import InputError


@dataclass(frozen=True)
class Encoded:
    """An example in tokens, with its class, its number, or the target of each token."""

    ids: list[int]
    target: int | float | list[int]
    kinds: list[int] | None = None
    positions: list[int] | None = None
    """For examples that are packed into one sequence: the place of each token in its own example."""


class Examples:
    """Training and validation examples; see ``DataSource``.

    Args:
        train: the training examples.
        validation: the validation examples.
        spec: the task.
        labels: the classes, by number.
        tokenizer: the model's tokenizer.
        max_length: tokens of an example at most; longer ones are cut.
        seed: of the order of the training examples.
        learn_prompts: for ``lm``, whether prompts are learnt too.
        packing: for ``lm``, whether training examples are joined into sequences of ``max_length`` tokens.
        notes: lines about the examples, for a person.
    """

    def __init__(
        self,
        train: Sequence[Row],
        validation: Sequence[Row],
        spec: TaskSpec,
        labels: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        seed: int,
        *,
        learn_prompts: bool = False,
        packing: bool = False,
        notes: Sequence[str] = (),
    ) -> None:
        self.labels, self.padding = tuple(labels), padding_of(tokenizer)
        encode: _Encoder | _Learnt
        if spec.kind == "lm":
            encode = _Learnt(Continuations(tokenizer, max_length, learn_prompts))
        else:
            encode = _Encoder(spec, labels, tokenizer, max_length)
        self.train = encode(train)
        self._examples = len(self.train)
        if packing:
            self.train = packed(self.train, max_length)
        # By length, so that little is padded; the order does not matter to a score.
        self.held = sorted(encode(validation), key=lambda example: len(example.ids))
        self._notes = [*notes, *encode.cuts.words(max_length)]
        self.order = Order(len(self.train), seed)
        self.digest = _digest(self.train)
        self.held_digest = _digest(sorted(self.held, key=lambda example: (example.ids, str(example.target))))

    def next_batch(self, size: int) -> Batch:
        return self._batch([self.train[i] for i in self.order.take(size).tolist()])

    def validation(self) -> Batch:
        return self._batch(self.held)

    def test(self) -> None:
        """There is no test part."""

    def validation_batches(self, size: int) -> list[Batch]:
        """Return the validation set in batches, each padded to its own longest example."""
        return [self._batch(self.held[start : start + size]) for start in range(0, len(self.held), size)]

    def majority(self) -> float | None:
        """Return the accuracy, on the validation set, of always saying the label that is most common in training."""
        if not self.labels:
            return None
        common = torch.bincount(torch.tensor([example.target for example in self.train])).argmax()
        return sum(example.target == int(common) for example in self.held) / len(self.held)

    def state_dict(self) -> dict[str, Any]:
        return {**self.order.state_dict(), "digest": self.digest, "held_digest": self.held_digest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["digest"] != self.digest:
            raise InputError(
                "data: the examples or the tokenizer have changed since the checkpoint; start again with another --out"
            )
        # Checkpoints of earlier versions have none.
        if state.get("held_digest", self.held_digest) != self.held_digest:
            raise InputError(
                "validation_data: the validation examples have changed since the checkpoint, whose best score is of "
                "those before; put them back, or start again with another --out"
            )
        self.order.load_state_dict(state)

    def describe(self) -> str:
        labels = f", {len(self.labels)} labels" if self.labels else ""
        packed = f", packed into {len(self.train):,} sequences" if len(self.train) < self._examples else ""
        return f"{self._examples:,} training and {len(self.held):,} validation examples{labels}{packed}"

    def notes(self) -> list[str]:
        return self._notes

    def _batch(self, examples: Sequence[Encoded]) -> Batch:
        first = examples[0]
        ids = _filled([example.ids for example in examples], self.padding)
        if isinstance(first.target, list):  # causal attention: padding comes behind the sequence
            targets = _filled([example.target for example in examples], IGNORED)  # type: ignore[misc]
            positions = None if first.positions is None else _counted([own.positions or [] for own in examples])
            return Batch(ids, targets, positions=positions)
        mask = _filled([[1] * len(example.ids) for example in examples], 0)
        kinds = None if first.kinds is None else _filled([example.kinds or [] for example in examples], 0)
        return Batch(ids, torch.tensor([example.target for example in examples]), mask, kinds)


def _digest(examples: Sequence[Encoded]) -> str:
    content = json.dumps([[example.ids, example.target] for example in examples])
    return hashlib.sha256(content.encode()).hexdigest()


def _filled(rows: Sequence[list[int]], value: int) -> torch.Tensor:
    whole = torch.full((len(rows), max(map(len, rows))), value)
    for row, own in zip(whole, rows, strict=True):
        row[: len(own)] = torch.tensor(own)
    return whole


def _counted(rows: Sequence[list[int]]) -> torch.Tensor:
    """Return the positions, which begin again in the padding behind a sequence: an example sees no other."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *range(longest - len(row))] for row in rows])


def packed(examples: Sequence[Encoded], length: int) -> list[Encoded]:
    """Join examples into sequences of at most ``length`` tokens: the longest first, each where it leaves least room."""
    bins: list[list[Encoded]] = []
    with_room: dict[int, list[int]] = {}
    rooms = 0  # bit n is set if a sequence has room for n more tokens
    for example in sorted(examples, key=lambda own: -len(own.ids)):
        size = len(example.ids)
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            number = with_room[room].pop()
            if not with_room[room]:
                rooms &= ~(1 << room)
        else:
            room, number = max(length, size), len(bins)
            bins.append([])
        bins[number].append(example)
        with_room.setdefault(room - size, []).append(number)
        rooms |= 1 << (room - size)
    return [
        Encoded(
            [token for example in own for token in example.ids],
            [target for example in own for target in example.target],  # type: ignore[union-attr]  # a list, for lm
            positions=[place for example in own for place in range(len(example.ids))],
        )
        for own in bins
    ]


class _Learnt:
    """Examples of which some tokens are predicted."""

    def __init__(self, encode: Continuations) -> None:
        self.encode, self.cuts = encode, encode.cuts

    def __call__(self, rows: Sequence[Row]) -> list[Encoded]:
        return [
            Encoded(
                own.ids[:-1],
                [token if learnt else IGNORED for token, learnt in zip(own.ids[1:], own.learnt[1:], strict=True)],
            )
            for own in self.encode(rows)
        ]


class _Encoder:
    def __init__(
        self, spec: TaskSpec, labels: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> None:
        self.spec, self.tokenizer, self.length = spec, tokenizer, max_length
        self.cuts = Cuts()
        self.numbers = {label: number for number, label in enumerate(labels)}
        # Whether the model wraps texts in tokens of its own. If not, an end-of-text token stands between a pair.
        self.wraps = tokenizer.num_special_tokens_to_add(pair=True) > tokenizer.num_special_tokens_to_add(pair=False)
        end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
        self.end = padding_of(tokenizer) if end is None else end

    def __call__(self, rows: Sequence[Row]) -> list[Encoded]:
        targets = [self._target(row) for row in rows]
        if rows[0].pair is not None and not self.wraps:
            firsts, seconds = self._plain([row.text for row in rows]), self._plain([row.pair or "" for row in rows])
            ids = [self._joined(first, second) for first, second in zip(firsts, seconds, strict=True)]
            for first, second, own in zip(firsts, seconds, ids, strict=True):
                self.cuts.count(len(first) + len(second) + 1, len(own))
            return [Encoded(own, target) for own, target in zip(ids, targets, strict=True)]
        pairs = None if rows[0].pair is None else [row.pair for row in rows]
        found = self.tokenizer([row.text for row in rows], pairs, truncation=True, max_length=self.length)
        self._count(rows, found["input_ids"])
        kinds = found.get("token_type_ids") or [None] * len(rows)
        return [
            Encoded(own or [self.end], target, kind if own else None)
            for own, target, kind in zip(found["input_ids"], targets, kinds, strict=True)
        ]

    def _target(self, row: Row) -> int | float:
        if self.spec.kind == "regression":
            return float(row.label or 0.0)
        if row.label not in self.numbers:
            known = ", ".join(list(self.numbers)[:8]) + (" ..." if len(self.numbers) > 8 else "")
            raise InputError(
                f"{row.where}: the label {row.label!r} is not one of training ({known}); mend it, or add examples of it "
                "to --data"
            )
        return self.numbers[str(row.label)]

    def _count(self, rows: Sequence[Row], ids: Sequence[list[int]]) -> None:
        """Count what is cut. Only an example of the full length can have been, and it is encoded again as a whole."""
        for row, own in zip(rows, ids, strict=True):
            whole = self.tokenizer(row.text, row.pair)["input_ids"] if len(own) == self.length else own
            self.cuts.count(len(whole), len(own))

    def _plain(self, texts: list[str]) -> list[list[int]]:
        return list(self.tokenizer(texts, add_special_tokens=False)["input_ids"])

    def _joined(self, first: list[int], second: list[int]) -> list[int]:
        """Join two texts with an end of text between; if they are too long, the longer is cut first."""
        room = self.length - 1
        first = first[: max(room - len(second), (room + 1) // 2)]
        return [*first, self.end, *second[: room - len(first)]]
