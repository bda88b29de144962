"""Prompts with answers, and chats, as tokens of which only the answers are learnt."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from subspan.training.data.instructions import Turn
from subspan.training.data.labelled_files import Row
from subspan.training.models.build import padding_of
from subspan.utils.errors import InputError, first_line

PLAIN = (
    "{% for message in messages %}"
    "### {{ message.role | capitalize }}:{{ '\\n' }}{{ message.content }}"
    "{% if message.tool_calls %}{{ message.tool_calls | tojson }}{% endif %}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif %}"
)
"""The chat template of a tokenizer that has none. A heading names the speaker, and an end of text ends an answer."""


@dataclass(frozen=True)
class Tokens:
    """An example: its tokens, and whether each is learnt."""

    ids: list[int]
    learnt: list[bool]
    """Whether the token of this place is a target. The first token has nothing before it, so it never is one."""


@dataclass
class Cuts:
    """How many examples were too long, and how many tokens were lost so."""

    examples: int = 0
    tokens: int = 0
    of_examples: int = 0
    of_tokens: int = 0

    def count(self, before: int, after: int) -> None:
        self.of_examples, self.of_tokens = self.of_examples + 1, self.of_tokens + before
        if after < before:
            self.examples, self.tokens = self.examples + 1, self.tokens + before - after

    def words(self, max_length: int) -> list[str]:
        """Return one line, or none if nothing was cut."""
        if not self.examples:
            return []
        return [
            f"max_length={max_length}: {self.examples:,} of {self.of_examples:,} examples are longer and are cut, by "
            f"{self.tokens:,} of {self.of_tokens:,} tokens in all; a larger --max_length keeps them"
        ]


def set_chat_template(tokenizer: PreTrainedTokenizerBase, given: str | None) -> str:
    """Give ``tokenizer`` the template of chats, which is saved with it, and return in words which it is.

    Args:
        tokenizer: the model's tokenizer.
        given: ``plain``, or the path of a template in Jinja. By default the tokenizer's own stays, if it has one.

    Raises:
        InputError: the file cannot be read.
    """
    if given is None and tokenizer.chat_template is not None:
        return "the tokenizer's chat template"
    if given in (None, "plain"):
        tokenizer.chat_template = PLAIN
        return "the plain chat template" + ("" if given else ", since the tokenizer has none")
    try:
        tokenizer.chat_template = Path(str(given)).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise InputError(
            f"chat_template={given!r}: cannot be read: {first_line(error)}; give 'plain' or a file of Jinja"
        ) from error
    return f"the chat template {given}"


@dataclass
class Continuations:
    """The encoder of prompts with answers and of chats.

    Args:
        tokenizer: the model's tokenizer, with a chat template where there are chats.
        length: largest number of predictions of an example.
        learn_prompts: whether prompts are learnt too.
    """

    tokenizer: PreTrainedTokenizerBase
    length: int
    learn_prompts: bool = False
    cuts: Cuts = field(default_factory=Cuts)

    def __call__(self, rows: Sequence[Row]) -> list[Tokens]:
        talks = iter(self._talks([row for row in rows if row.turns]))
        plain = iter(self._plain([row for row in rows if not row.turns]))
        return [next(talks if row.turns else plain) for row in rows]

    def _plain(self, rows: Sequence[Row]) -> list[Tokens]:
        """Encode ``end, text, answer, end``. The answer and its end are learnt, or all if there is no answer."""
        eos = self.tokenizer.eos_token_id if self.tokenizer.eos_token_id is not None else self.tokenizer.sep_token_id
        end = padding_of(self.tokenizer) if eos is None else eos
        begin = self.tokenizer.bos_token_id if self.tokenizer.bos_token_id is not None else end
        prompts = self._encode([row.text for row in rows])
        answers = self._encode(["" if row.label is None else str(row.label) for row in rows])
        found = []
        for row, prompt, answer in zip(rows, prompts, answers, strict=True):
            known = [] if row.label is None else prompt
            said = [*(prompt if row.label is None else answer), end]
            before = len(known) + len(said)
            said = said[: self.length]
            # The end of the prompt, which is next to the answer, is kept.
            known = [begin, *known[len(known) - min(len(known), self.length - len(said)) :]]
            self.cuts.count(before, len(known) + len(said) - 1)
            learnt = [False, *[self.learn_prompts] * (len(known) - 1), *[True] * len(said)]
            found.append(Tokens([*known, *said], learnt))
        return found

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return list(self.tokenizer(texts, add_special_tokens=False)["input_ids"]) if texts else []

    # --- chats -----------------------------------------------------------------------------------------------------

    def _talks(self, rows: Sequence[Row]) -> list[Tokens]:
        found = []
        for row in rows:
            text, spans = self._rendered(row)
            ids, learnt = self._marked(text, spans)
            if not any(learnt[1:]):
                raise InputError(
                    f"{row.where}: the chat template leaves no answer to learn; mend the record, or give another "
                    "--chat_template, such as plain"
                )
            learnt = [self.learn_prompts or own for own in learnt]
            start = self._start(learnt)
            kept = slice(start, start + self.length + 1)
            self.cuts.count(len(ids), len(ids[kept]))
            found.append(Tokens(ids[kept], [False, *learnt[kept][1:]]))
        return found

    def _start(self, learnt: list[bool]) -> int:
        """Return where an example begins: at its beginning, unless it is too long and nothing learnt would be left."""
        if len(learnt) <= self.length + 1 or any(learnt[1 : self.length + 1]):
            return 0
        first = learnt.index(True, 1)
        return max(0, min(first - self.length // 2, len(learnt) - self.length - 1))

    def _marked(self, text: str, spans: list[tuple[int, int]]) -> tuple[list[int], list[bool]]:
        """Return the tokens of ``text``, and whether each lies in one of the ``spans``, in order."""
        if not self.tokenizer.is_fast:  # it does not say where its tokens are
            ids: list[int] = []
            learnt: list[bool] = []
            place = 0
            for start, stop in [*spans, (len(text), len(text))]:
                for own, part in ((False, text[place:start]), (True, text[start:stop])):
                    tokens = self._encode([part])[0] if part else []
                    ids, learnt = ids + tokens, learnt + [own] * len(tokens)
                place = stop
            return ids, learnt
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        left = iter([*spans, (len(text) + 1, len(text) + 1)])
        start, stop = next(left)
        learnt = []
        for begin, end in found["offset_mapping"]:
            while begin >= stop:
                start, stop = next(left)
            learnt.append(end > start and begin < stop)
        return list(found["input_ids"]), learnt

    def _rendered(self, row: Row) -> tuple[str, list[tuple[int, int]]]:
        """Return the text of a chat, and where in it the answers are, with what ends them."""
        turns = list(row.turns)
        try:
            try:
                text = self._render(turns, row.tools)
            except TemplateError:
                if turns[0]["role"] != "system" or len(turns) < 2 or turns[1]["role"] != "user":
                    raise
                # A template without a place for the system's turn.
                merged = replace(row, turns=(_merged(turns[0], turns[1]), *turns[2:]), context=max(0, row.context - 1))
                return self._rendered(merged)
        except (TemplateError, ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"{row.where}: the chat template refuses it: {first_line(error)}; mend the record, or give another "
                "--chat_template, such as plain"
            ) from error
        spans, place = [], 0
        for i, turn in enumerate(turns):
            if turn["role"] != "assistant" or i < row.context:
                continue
            span = self._span(turns, i, row.tools, text) or self._said(turn, text, place)
            if span is not None and span[1] > span[0] >= place:
                spans.append(span)
                place = span[1]
        return text, spans

    def _span(self, turns: list[Turn], i: int, tools: Any, text: str) -> tuple[int, int] | None:
        """Return where turn ``i`` is, behind the words that ask the model for it."""
        try:
            before = self._render(turns[:i], tools, asks=True) if i else ""
            silent = self._render(turns[:i], tools) if i else ""
            until = self._render(turns[: i + 1], tools)
        except (TemplateError, ValueError, TypeError, KeyError):  # a template that wants to see whole chats
            return None
        if not (text.startswith(until) and until.startswith(before)):
            return None
        own, content = until[len(before) :], str(turns[i]["content"]).strip()
        # Where the template does not ask for an answer, the speaker's name stands before it, which is not learnt.
        skipped = max(0, own.find(content)) if content and before == silent else 0
        stop = max(len(own.rstrip()), skipped + len(content))
        return len(before) + skipped, len(before) + stop

    def _said(self, turn: Turn, text: str, place: int) -> tuple[int, int] | None:
        """Return where the content of a turn stands in ``text`` behind ``place``, with an end of text behind it."""
        content = str(turn["content"]).strip() or json.dumps(turn.get("tool_calls"))
        begin = text.find(content, place)
        stop = begin + len(content)
        end = str(self.tokenizer.eos_token or "")
        return None if begin < 0 else (begin, stop + len(end) * text.startswith(end, stop))

    def _render(self, turns: list[Turn], tools: Any, *, asks: bool = False) -> str:
        return str(self.tokenizer.apply_chat_template(turns, tools=tools, tokenize=False, add_generation_prompt=asks))


def _merged(system: Turn, user: Turn) -> Turn:
    return {**user, "content": f"{system['content']}\n\n{user['content']}"}
