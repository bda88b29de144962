"""Instruction data in the forms that people have it in: which form a file has, and what each record says.

    text       a text that stands for itself, or a prompt and its answer in ``text`` and ``label`` or in named columns
    answers    a prompt and its answer, found under their usual names; a line break is put between if nothing else is
    Alpaca     an instruction, what it is about, and the answer, joined by the template of Stanford's Alpaca
    chat       turns with a role and a content, as transformers' chat templates take them
    ShareGPT   turns with ``from`` and ``value``, which become those of a chat

Source of the template: github.com/tatsu-lab/stanford_alpaca, ``PROMPT_DICT`` in ``train.py``. Deviations: none.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from subspan.training.data.columns import (
    ANSWERS,
    CHATS,
    INPUTS,
    PROMPTS,
    SYSTEMS,
    find_text,
    first_of,
    samples,
    texts_of,
    unused_texts,
)
from subspan.training.data.records import Record
from subspan.utils.errors import InputError
from subspan.utils.suggestions import near_names

Turn = dict[str, Any]
"""A turn of a chat: ``role``, ``content``, and what else the chat template knows, such as ``tool_calls``."""
ROLES = {
    "user": "user", "human": "user", "prompter": "user", "customer": "user", "instruction": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant",
    "ai": "assistant", "bing": "assistant", "bard": "assistant", "function_call": "assistant", "tool_call": "assistant",
    "output": "assistant", "system": "system", "developer": "system", "tool": "tool", "function": "tool",
    "observation": "tool", "tool_response": "tool", "function_response": "tool", "ipython": "tool",
}  # fmt: skip
"""What data sets call the speakers, and the role that is meant."""
_ROLE, _CONTENT = ("role", "from", "speaker", "author"), ("content", "value", "text", "message")
_ALPACA = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n"
    "### Response:\n"
)
_ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
Kind = Literal["text", "answers", "Alpaca", "chat", "ShareGPT"]


@dataclass(frozen=True)
class Instruction:
    """A record as a prompt with its answer, or as the turns of a chat."""

    prompt: str
    answer: str | None
    """The answer; ``None`` where the prompt is a text to be learnt as a whole."""
    turns: tuple[Turn, ...] = ()
    context: int = 0
    """Number of turns at the beginning in which nothing is learnt."""
    tools: Any = None
    """The tools that the chat may use, as the chat template takes them."""


@dataclass(frozen=True)
class Form:
    """The form of a file, and the columns of its parts."""

    kind: Kind
    prompt: str
    """Column of the prompt, of the text, or of the turns."""
    answer: str | None = None
    about: str | None = None
    """Column of what the instruction is about."""
    system: str | None = None
    tools: str | None = None
    parts: tuple[str, ...] = ()
    """The names of a turn's speaker and content."""

    def words(self) -> str:
        """Return the form and its columns in words."""
        columns = [name for name in (self.system, self.prompt, self.about, self.answer, self.tools) if name]
        return f"{self.kind} ({', '.join(columns)}{': ' if self.parts else ''}{', '.join(self.parts)})"

    def instruction(self, record: Record) -> Instruction | None:
        """Return what a record says, or ``None`` if it has no answer to learn.

        Raises:
            InputError: a column is missing, or holds something else than expected.
        """
        if self.prompt not in record.values:
            hint = near_names(self.prompt, map(str, record.values))
            raise InputError(f"{record.where}: has no column {self.prompt!r}; {hint}; name it with --text_column")
        prompt, answer = record.values[self.prompt], record.values.get(self.answer) if self.answer else None
        system = record.values.get(self.system) if self.system else None
        if self.kind in ("chat", "ShareGPT"):
            if not prompt:
                return None
            turns = _turns(_unwritten(prompt), record.where, self.prompt)
            context = 0
            if self.answer:
                context = len(turns)
                turns += _turns(_unwritten(answer), record.where, self.answer)
            if isinstance(system, str) and system.strip() and turns[0]["role"] != "system":
                turns, context = [{"role": "system", "content": system}, *turns], context + bool(context)
            if all(turn["role"] != "assistant" for turn in turns[context:]):
                return None
            return Instruction(json.dumps(turns), None, tuple(turns), context, self._tools(record))
        if prompt is None and self.kind != "text":
            return None
        prompt = _text(prompt, record.where, self.prompt, "text_column")
        if self.answer is None or answer is None or answer == "":
            # An empty cell is how CSV says that a text has no answer, and null how JSON does.
            return Instruction(prompt, None) if self.kind == "text" else None
        answer = _text(answer, record.where, self.answer, "label_column", numbers=True)
        if isinstance(system, str) and system.strip():
            turns = [{"role": "system", "content": system}, {"role": "user", "content": prompt}]
            turns.append({"role": "assistant", "content": answer})
            return Instruction(json.dumps(turns), None, tuple(turns))
        if self.kind == "Alpaca":
            value = record.values.get(self.about) if self.about else None
            about = "" if value is None else _text(value, record.where, self.about or "", "pair_column")
            template = _ALPACA if about.strip() else _ALPACA_WITHOUT_INPUT
            return Instruction(template.format(instruction=prompt, input=about), answer)
        if self.kind == "answers" and not (prompt[-1:].isspace() or answer[:1].isspace()):
            prompt += "\n"
        return Instruction(prompt, answer)

    def _tools(self, record: Record) -> Any:
        tools = record.values.get(self.tools) if self.tools else None
        if isinstance(tools, str) and tools.strip():
            try:
                return json.loads(tools)
            except ValueError as error:
                raise InputError(f"{record.where}: {self.tools!r} is no JSON: {error}; mend the record") from error
        return tools or None


def find_form(
    first: Sequence[Record], text: str | None, about: str | None, answer: str | None
) -> tuple[Form, list[str]]:
    """Return the form of a file, and lines about the columns that are not used.

    Args:
        first: the records at the beginning of the file.
        text: the column of the prompt, of the text or of the turns, if it is named.
        about: the column of what an instruction is about, if it is named.
        answer: the column of the answer, if it is named.

    Raises:
        InputError: it is not clear, or a named column is not there.
    """
    cells = {name: [_unwritten(cell) for cell in own] for name, own in samples(first).items()}
    known = {str(name): None for record in first for name in record.values}
    for name, flag in ((text, "text_column"), (about, "pair_column"), (answer, "label_column")):
        if name is not None and name not in known:
            raise InputError(
                f"{first[0].where}: has no column {name!r}; {near_names(name, known)}; name it with --{flag}"
            )
    form = _form(cells, known, text, about, answer)
    if form is None:
        raise InputError(
            f"{first[0].where}: what is the prompt and what the answer is not clear; there are {', '.join(known)}; name "
            "them with --text_column and --label_column"
        )
    used = (form.prompt, form.answer, form.about, form.system, form.tools)
    others = [
        *unused_texts(cells, used),
        *(name for name, own in cells.items() if name not in used and _are_turns(own)),
    ]
    notes = []
    if others:
        answers = form.kind == "text" and form.answer is None and others[0].casefold() not in (*CHATS, *PROMPTS)
        flag = "label" if answers else "text"
        notes.append(
            f"data: the text in {' and '.join(map(repr, others))} is not used; --{flag}_column {others[0]} takes it, and "
            "--pair_column is what an instruction is about"
        )
    return form, notes


def _form(
    cells: Mapping[str, list[Any]], known: Mapping[str, Any], text: str | None, about: str | None, answer: str | None
) -> Form | None:
    texts, turns = texts_of(cells), {name: own for name, own in cells.items() if _are_turns(own)}
    system, tools = first_of(SYSTEMS, texts), first_of(("tools", "functions"), known)
    if text is None:
        text = "text" if "text" in known else first_of(CHATS, turns)
    if text in turns:
        return _chat(turns, text, answer if answer in turns else None, system, tools)
    if text is None and (talk := first_of(PROMPTS, turns)) and (reply := first_of(ANSWERS, turns)):
        return _chat(turns, talk, reply, system, tools)
    if text == "text" and about is None:
        return Form("text", text, answer or ("label" if "label" in known else None))
    prompt = text or first_of(PROMPTS, {name: own for name, own in texts.items() if name not in (answer, about)})
    asks = prompt is not None and prompt.strip().casefold() in PROMPTS
    looked_for = answer is None
    if answer is None and (asks or prompt == "text"):
        answer = first_of(ANSWERS, {name: None for name, own in cells.items() if own and name not in (prompt, about)})
    if answer is None and "label" in known and text is not None:
        answer = "label"
    if prompt is not None and answer is not None:
        instructs = (text is None or looked_for) and prompt.strip().casefold() == "instruction"
        if about is None and instructs:
            about = first_of(INPUTS, {name: None for name in known if name not in (prompt, answer)})
        found: Kind = "Alpaca" if about or instructs else "answers" if text is None else "text"
        return Form(found, prompt, answer, about, system if text is None else None)
    if asks and text is None and len(known) > 1:  # a prompt whose answer is not found is no text to learn
        return None
    alone = text or find_text(cells)
    return Form("text", alone, answer) if alone is not None else None


def _chat(turns: Mapping[str, list[Any]], talk: str, reply: str | None, system: str | None, tools: str | None) -> Form:
    first = next(cell[0] for cell in turns[talk] if _has_turns(cell))
    parts = tuple(name for name in (first_of(_ROLE, first), first_of(_CONTENT, first)) if name)
    return Form("ShareGPT" if "from" in first else "chat", talk, reply, None, system, tools, parts)


def _are_turns(cells: Sequence[Any]) -> bool:
    """Whether the cells are lists of turns that have a speaker each; one that is not is named when it is read."""
    return any(_has_turns(cell) for cell in cells)


def _has_turns(cell: Any) -> bool:
    return (
        isinstance(cell, (list, tuple))
        and bool(cell)
        and isinstance(cell[0], dict)
        and first_of(_ROLE, cell[0]) is not None
    )


def _unwritten(cell: Any) -> Any:
    """Return the turns that a cell holds as a text in JSON, as in CSV, or else the cell itself."""
    if isinstance(cell, str) and cell.lstrip()[:1] == "[":
        try:
            turns = json.loads(cell)
        except (ValueError, RecursionError):
            return cell
        return turns if _has_turns(turns) else cell
    return cell


def _turns(given: Any, where: str, column: str) -> list[Turn]:
    if not isinstance(given, (list, tuple)) or not given:
        raise InputError(f"{where}: {column!r} is {given!r:.40}, expected a list of turns; mend the record")
    turns = []
    for number, turn in enumerate(given, 1):
        place = f"{where}: turn {number} of {column!r}"
        if not isinstance(turn, dict):
            raise InputError(f"{place} is {turn!r:.40}, expected a role and a content; mend the record")
        role, content = first_of(_ROLE, turn), first_of(_CONTENT, turn)
        if role is None or (content is None and not turn.get("tool_calls")):
            raise InputError(
                f"{place} has {', '.join(map(str, turn))}, expected one of {', '.join(_ROLE)} and one of "
                f"{', '.join(_CONTENT)}; mend the record"
            )
        said = ROLES.get(str(turn[role]).strip().casefold())
        if said is None:
            raise InputError(f"{place} is of {turn[role]!r:.40}, expected one of {', '.join(ROLES)}; mend the record")
        # A table writes what a turn does not have as null.
        others = {name: value for name, value in turn.items() if name not in (role, content) and value is not None}
        turns.append({"role": said, "content": _said(turn[content] if content else None, place), **others})
    return turns


def _said(content: Any, place: str) -> str:
    if isinstance(content, (list, tuple)):  # the parts of a message
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            raise InputError(f"{place} holds more than text; only text can be learnt; leave such records out")
        content = "".join(part["text"] for part in content)
    if isinstance(content, dict):
        content = json.dumps(content)
    if content is not None and not isinstance(content, str):
        raise InputError(f"{place} says {content!r:.40}, expected text; mend the record")
    return _sound(content or "", place)


def _text(value: Any, where: str, column: str, flag: str, *, numbers: bool = False) -> str:
    if numbers and isinstance(value, (int, float)) and column != "label":
        return str(value)
    if not isinstance(value, str):
        raise InputError(f"{where}: {column!r} is {value!r:.40}, expected text; name another column with --{flag}")
    return _sound(value, f"{where}: {column!r}")


def _sound(text: str, place: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{place} is {text!r:.40}, expected text: it holds half a surrogate pair; mend the record"
        ) from error
    return text
