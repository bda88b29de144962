"""Instruction data: each form is found, joined as it is documented, and only the answers are learnt."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from subspan.training.data.batches import IGNORED
from subspan.training.data.continuations import PLAIN, set_chat_template
from subspan.training.data.labelled_batches import Examples
from subspan.training.data.labelled_files import Columns, Found, Row, read_examples
from subspan.training.data.task_specs import TASKS
from subspan.training.data.tokenizer import load_tokenizer
from subspan.utils.errors import InputError

LM = TASKS["lm"]
NO_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:\n"
)
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\n{}\n\n### Input:\n{}\n\n### Response:\n"
)
CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WITHOUT_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
LAST_ONLY = (  # as templates do that drop the thoughts of earlier turns
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' and not loop.last %}"
    "{{ m['content'].split('</think>')[-1] }}{% else %}{{ m['content'] }}{% endif %}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
USER, REPLY = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
CALL = {"type": "function", "function": {"name": "sky", "arguments": {"at": "sea"}}}


def find(path: Path, content: Any, text: str = "text", pair: str | None = None, label: str = "label") -> Found:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return read_examples(str(path), "data", LM, Columns(text, pair, label))


def encoded(rows: list[Row], template: str | None = None, length: int = 500, **settings: bool) -> tuple[str, str]:
    """The first example as text, and the part of it that is learnt."""
    tokenizer = load_tokenizer("bytes")
    tokenizer.chat_template = template
    set_chat_template(tokenizer, None)
    example = Examples(rows, rows, LM, (), tokenizer, length, seed=0, **settings).train[0]
    assert isinstance(example.target, list)
    whole = [*example.ids, *example.target[-1:]] if example.target[-1] != IGNORED else example.ids
    for token, target in zip(example.ids[1:], example.target, strict=False):
        assert target in (IGNORED, token), "a target is the token that follows"
    return said(tokenizer, whole), said(tokenizer, [target for target in example.target if target != IGNORED])


def said(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids))


FORMS: dict[str, tuple[Any, str, str, str]] = {
    # the rows of a file, its form in words, the prompt of the first row, and what is learnt of it
    "alpaca": (
        [{"instruction": "Add", "input": "1 2", "output": "3"}],
        "Alpaca (instruction, input, output)", "<eos>" + WITH_INPUT.format("Add", "1 2"), "3<eos>",
    ),
    "alpaca-without-input": (
        [{"instruction": "Say {a}", "input": "", "output": "b"}, {"instruction": "x", "input": "y", "output": "z"}],
        "Alpaca (instruction, input, output)", "<eos>" + NO_INPUT.format("Say {a}"), "b<eos>",
    ),
    "alpaca-of-two-columns": (
        [{"Instruction": "Say a", "Response": "b"}],
        "Alpaca (Instruction, Response)", "<eos>" + NO_INPUT.format("Say a"), "b<eos>",
    ),
    "dolly": (
        [{"instruction": "Say", "context": "so", "response": "b", "category": "open"}],
        "Alpaca (instruction, context, response)", "<eos>" + WITH_INPUT.format("Say", "so"), "b<eos>",
    ),
    "sharegpt": (
        [{"id": "1", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}],
        "ShareGPT (conversations: from, value)", "### User:\nhi\n\n### Assistant:\n", "hello<eos>",
    ),
    "chat": (
        [{"messages": [USER, REPLY]}],
        "chat (messages: role, content)", "### User:\nhi\n\n### Assistant:\n", "hello<eos>",
    ),
    "chat-with-a-system-turn": (
        [{"messages": [{"role": "system", "content": "Be brief."}, USER, REPLY]}],
        "chat (messages: role, content)",
        "### System:\nBe brief.\n\n### User:\nhi\n\n### Assistant:\n", "hello<eos>",
    ),
    "chat-in-parts": (
        [{"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, REPLY]}],
        "chat (messages: role, content)", "### User:\nhi\n\n### Assistant:\n", "hello<eos>",
    ),
    "system-in-a-column": (
        [{"system": "Be brief.", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}],
        "ShareGPT (system, conversations: from, value)",
        "### System:\nBe brief.\n\n### User:\nhi\n\n### Assistant:\n", "hello<eos>",
    ),
    "prompt-and-completion": (
        [{"prompt": "2 + 2 =", "completion": " 4"}],
        "answers (prompt, completion)", "<eos>2 + 2 =", " 4<eos>",
    ),
    "question-and-answer": (
        [{"question": "2 + 2?", "answer": "4"}], "answers (question, answer)", "<eos>2 + 2?\n", "4<eos>",
    ),
    "an-answer-that-is-a-number": (
        [{"question": "2 + 2?", "answer": 4}], "answers (question, answer)", "<eos>2 + 2?\n", "4<eos>",
    ),
    "turns-as-prompt-and-completion": (
        [{"prompt": [USER, REPLY, USER], "completion": [REPLY]}], "chat (prompt, completion: role, content)",
        "### User:\nhi\n\n### Assistant:\nhello<eos>\n\n### User:\nhi\n\n### Assistant:\n", "hello<eos>",
    ),
    "orca": (
        [{"system_prompt": "Be.", "question": "2 + 2?", "response": "4"}],
        "answers (system_prompt, question, response)",
        "### System:\nBe.\n\n### User:\n2 + 2?\n\n### Assistant:\n", "4<eos>",
    ),
    "turns-in-a-text": (
        [{"messages": json.dumps([USER, REPLY])}],
        "chat (messages: role, content)", "### User:\nhi\n\n### Assistant:\n", "hello<eos>",
    ),
    "preferences": ([{"prompt": "Why?", "chosen": "So.", "rejected": "No."}],
        "answers (prompt, chosen)", "<eos>Why?\n", "So.<eos>",
    ),
    "texts-of-chats-in-an-array": (
        [[USER, REPLY]], "chat (messages: role, content)", "### User:\nhi\n\n### Assistant:\n", "hello<eos>",
    ),
    "text": ([{"text": "as a whole"}], "text (text)", "<eos>", "as a whole<eos>"),
    "text-beside-label": ([{"text": "so good", "label": "yes"}], "text (text, label)", "<eos>so good", "yes<eos>"),
    "another-text": ([{"content": "as a whole", "url": "x"}], "text (content)", "<eos>", "as a whole<eos>"),
    "texts-in-an-array": (["as a whole", "and more"], "text (text)", "<eos>", "as a whole<eos>"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_each_form_is_found_and_its_answers_are_learnt(name: str, tmp_path: Path) -> None:
    rows, form, prompt, learnt = FORMS[name]
    found = find(tmp_path / "a.json", rows)
    assert found.form == form
    assert found.notes == []
    whole, own = encoded(found.rows)
    assert own == learnt
    assert whole.startswith(prompt + learnt)


@pytest.mark.parametrize("name", [name for name in FORMS if not name.startswith("texts")])
def test_lines_and_nested_objects_say_the_same(name: str, tmp_path: Path) -> None:
    """An array, lines with a byte order mark, an object that holds the rows, and objects over several lines."""
    rows = FORMS[name][0]

    def bare(found: Found) -> list[Any]:
        return [(row.text, row.label, row.turns) for row in found.rows]

    array = bare(find(tmp_path / "a.json", rows))
    assert bare(find(tmp_path / "b.jsonl", "\ufeff" + "".join(json.dumps(row) + "\r\n\n" for row in rows))) == array
    assert bare(find(tmp_path / "c.json", {"version": 2, "data": rows})) == array
    assert bare(find(tmp_path / "d.json", json.dumps({"data": rows}, indent=2))) == array
    assert bare(find(tmp_path / "e.json", "\n".join(json.dumps(row, indent=1) for row in rows))) == array
    assert (
        bare(find(tmp_path / "g.json", {"features": [{"name": "x"}], "rows": [{"row": row} for row in rows]})) == array
    )
    parts = find(tmp_path / "f.json", {"train": rows, "validation": rows[:1], "test": rows})
    assert bare(parts) == array + array[:1]
    assert [row.part for row in parts.rows] == ["train"] * len(rows) + ["validation"]
    assert parts.notes == [f"data: {len(rows)} examples are filed as test and are left out"]


def test_every_column_can_be_named(tmp_path: Path) -> None:
    row = {"auftrag": "Add", "dazu": "1 2", "antwort": "3", "turns of it": [USER, REPLY]}
    found = find(tmp_path / "a.jsonl", row, "auftrag", "dazu", "antwort")
    assert found.form == "Alpaca (auftrag, dazu, antwort)"
    assert encoded(found.rows) == ("<eos>" + WITH_INPUT.format("Add", "1 2") + "3<eos>", "3<eos>")
    assert "'turns of it' is not used; --text_column turns of it" in found.notes[0]
    found = find(tmp_path / "a.jsonl", row, "turns of it")
    assert found.form == "chat (turns of it: role, content)"
    alpaca = {"text": "all of it", "instruction": "Add", "input": "1 2", "output": "3"}
    assert find(tmp_path / "b.json", [alpaca], "instruction").form == "Alpaca (instruction, input, output)"
    found = find(tmp_path / "a.jsonl", row, "auftrag", None, "antwort")
    assert (found.rows[0].text, found.rows[0].label) == ("Add", "3")
    with pytest.raises(
        InputError, match=r"line 1: has no column 'antwrt'; did you mean antwort\?; name it with --label"
    ):
        find(tmp_path / "a.jsonl", row, "auftrag", None, "antwrt")


def test_a_text_that_is_not_used_is_said_once(tmp_path: Path) -> None:
    rows = [{"text": f"number {i}", "summary": "what it says in some few words"} for i in range(9)]
    assert find(tmp_path / "a.json", rows).notes == [
        "data: the text in 'summary' is not used; --label_column summary takes it, and --pair_column is what an "
        "instruction is about"
    ]
    assert find(tmp_path / "a.json", rows, label="summary").notes == []


# --- chats ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "whole", "learnt"),
    [
        (
            CHATML,
            "<|system|>Be.<|end|>\n<|user|>hi<|end|>\n<|assistant|>hello<|end|>\n<|user|>hi<|end|>\n<|assistant|>bye<|end|>",
            "hello<|end|>bye<|end|>",
        ),
        (
            WITHOUT_SYSTEM,  # the system's turn goes into the user's
            "<|user|>Be.\n\nhi<|end|>\n<|assistant|>hello<|end|>\n<|user|>hi<|end|>\n<|assistant|>bye<|end|>",
            "hello<|end|>bye<|end|>",
        ),
        (PLAIN, None, "hello<eos>bye<eos>"),
    ],
)  # fmt: skip
def test_the_tokenizers_own_template(template: str, whole: str | None, learnt: str, tmp_path: Path) -> None:
    """Each answer of several is learnt, with what ends it, and nothing else is."""
    turns = [{"role": "system", "content": "Be."}, USER, REPLY, USER, {"role": "assistant", "content": "bye"}]
    text, own = encoded(find(tmp_path / "a.json", [{"messages": turns}]).rows, template)
    assert own == learnt
    assert whole is None or text == whole


def test_a_template_that_changes_earlier_turns(tmp_path: Path) -> None:
    """What the chat really shows of an earlier answer is learnt, and not what it was alone."""
    turns = [USER, {"role": "assistant", "content": "<think>so</think>hello"}, USER, {**REPLY, "content": "bye"}]
    rows = find(tmp_path / "a.json", [{"messages": turns}]).rows
    text, own = encoded(rows, LAST_ONLY)
    assert text == "<|user|>hi<eos><|assistant|>hello<eos><|user|>hi<eos><|assistant|>bye<eos>"
    assert own in ("bye<eos>", "hello<eos>bye<eos>")


def test_tool_turns(tmp_path: Path) -> None:
    """A call of a tool is an answer, and what the tool says is none. A null of a table is no entry of a turn."""
    turns = [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "blue"},
             {"role": "assistant", "content": "It is blue.", "tool_calls": None}]  # fmt: skip
    rows = find(tmp_path / "a.json", [{"messages": turns, "tools": "[]"}]).rows
    assert "tool_calls" not in rows[0].turns[3]
    whole, learnt = encoded(rows)
    assert whole.count("### Tool:\nblue\n") == 1
    assert learnt == json.dumps([CALL]) + "<eos>It is blue.<eos>"
    names = ["human", "function_call", "observation", "gpt"]
    share = [{"from": name, "value": f"by {name}"} for name in names]
    rows = find(tmp_path / "b.json", [{"conversations": share}]).rows
    assert encoded(rows)[1] == "by function_call<eos>by gpt<eos>"


@pytest.mark.parametrize("name", ["alpaca", "chat", "prompt-and-completion", "text"])
def test_prompts_are_learnt_if_asked(name: str, tmp_path: Path) -> None:
    rows, _, prompt, learnt = FORMS[name]
    whole, own = encoded(find(tmp_path / "a.json", rows).rows, learn_prompts=True)
    assert (whole[0] if name == "chat" else "<eos>") + own == whole
    assert own.startswith((prompt + learnt).removeprefix("<eos>").removeprefix("#" * (name == "chat")))


def test_the_template_is_named_and_saved_with_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("bytes")
    assert set_chat_template(tokenizer, None) == "the plain chat template, since the tokenizer has none"
    tokenizer.save_pretrained(tmp_path / "saved")
    again = load_tokenizer(str(tmp_path / "saved"))
    assert again.apply_chat_template([USER], tokenize=False, add_generation_prompt=True) == (
        "### User:\nhi\n\n### Assistant:\n"
    )
    assert set_chat_template(again, None) == "the tokenizer's chat template"
    (tmp_path / "own.jinja").write_text(CHATML)
    assert set_chat_template(again, str(tmp_path / "own.jinja")) == f"the chat template {tmp_path / 'own.jinja'}"
    assert again.chat_template == CHATML
    assert set_chat_template(again, "plain") == "the plain chat template"
    with pytest.raises(InputError, match=r"chat_template='gone.jinja': cannot be read: .*give 'plain' or a file"):
        set_chat_template(again, "gone.jinja")


# --- what cannot be learnt --------------------------------------------------------------------------------------------


def test_examples_without_an_answer_are_left_out_and_counted(tmp_path: Path) -> None:
    alpaca = [{"instruction": "a", "output": answer} for answer in ("b", None, "", "c")] + [
        {"instruction": None, "output": "d"}
    ]
    found = find(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in alpaca))
    assert [row.label for row in found.rows] == ["b", "c"]
    place = f"data file {tmp_path / 'a.jsonl'}, line 2"
    assert found.notes == [f"data: 3 examples have nothing to learn and are left out, the first: {place}"]
    chats = [{"messages": [USER, REPLY]}, {"messages": [USER]}, {"messages": None}, {"messages": []}]
    found = find(tmp_path / "b.json", chats)
    assert len(found.rows) == 1
    assert found.notes[0].startswith("data: 3 examples have nothing to learn")
    with pytest.raises(InputError, match=r"holds no example; .*1 examples have nothing to learn"):
        find(tmp_path / "c.json", [{"messages": [USER]}])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([{"a": "x", "b": "y"}], ["line 1", "there are a, b", "--text_column and --label_column"]),
        ([{"question": "x", "answers": ["y"]}], ["line 1", "there are question, answers", "--label_column"]),
        ([{"messages": [USER, {"role": "boss", "content": "x"}]}], ["line 1: turn 2 of 'messages' is of 'boss'", "assistant"]),
        ([{"messages": [USER, {"role": "assistant"}]}], ["turn 2 of 'messages' has role", "content"]),
        ([{"messages": [USER, REPLY]}, {"messages": "hi"}], ["'messages' is 'hi'", "expected a list of turns"]),
        ([{"messages": [USER, REPLY]}, {"messages": [3]}], ["turn 1 of 'messages' is 3"]),
        ([{"messages": [{"role": "user", "content": [{"type": "image"}]}, REPLY]}], ["turn 1", "only text can be learnt"]),
        ([{"messages": [USER, {**REPLY, "content": "\ud800"}]}], ["turn 2", "half a surrogate"]),
        ([{"instruction": 3, "output": "b"}, {"instruction": "a", "output": "b"}], ["line 1: 'instruction' is 3, expected text"]),
        ([{"instruction": "a", "output": "b"}, {"instruction": "a", "output": ["b"]}], ["'output' is ['b']", "--label_column"]),
        ([{"instruction": "a", "output": "b"}, {"task": "a", "output": "b"}], ["has no column 'instruction'", "--text_column"]),
        ([{"prompt": "a", "completion": "b"}, 3], ["is int", "an array of objects"]),
        ('{"prompt": "a", "prompt": "b", "completion": "c"}', ["line 1", "the column 'prompt' more than once"]),
        ('[{"prompt": "a",\n "completion": "b"},\n {"prompt": }]', ["line 3", "an array of objects"]),
        ('[{"prompt": "a", "completion": "b"}', ["line 1", "an array of objects"]),
        ('[{"prompt": "a", "completion": "b"}] more', ["'more' stands behind the end"]),
        ("", ["holds no example"]),
        ("[]", ["holds no example"]),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(content: Any, words: list[str], tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        find(tmp_path / "a.json", content)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


def test_a_template_that_refuses_a_chat_is_named(tmp_path: Path) -> None:
    rows = find(tmp_path / "a.jsonl", {"messages": [USER, REPLY]}).rows
    with pytest.raises(InputError, match=r"a\.jsonl, line 1: the chat template refuses it: no; .*--chat_template"):
        encoded(rows, "{{ raise_exception('no') }}")
    with pytest.raises(InputError, match=r"a\.jsonl, line 1: the chat template leaves no answer to learn"):
        encoded(rows, "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}")
