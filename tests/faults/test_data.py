"""Data that shrinks, vanishes or is broken, before, while and after a run reads it.

An error names it, and nothing crashes.
"""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from subspan.training.config.settings import CheckpointConfig, EvaluationConfig, PretrainConfig
from subspan.training.data.documents import find_documents
from subspan.training.data.streams import TokenStream
from subspan.training.data.token_cache import tokenise
from subspan.training.data.tokenizer import load_tokenizer
from subspan.training.monitor.metrics import read_metrics
from subspan.training.pretraining import Pretraining
from subspan.training.signals import RunInterruptedError
from subspan.utils.errors import InputError

Make = Callable[..., PretrainConfig]
TOKENIZER = load_tokenizer("bytes")


def after(run: Pretraining, batches: int, happens: Callable[[], object]) -> Pretraining:
    """``run``, in which ``happens`` is called before it reads the batch of that number."""
    read, count = run.data.next_batch, iter(range(10**6))

    def next_batch(size: int) -> object:
        if next(count) == batches:
            happens()
        return read(size)

    run.data.next_batch = next_batch  # type: ignore[method-assign]
    return run


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of tokens that belongs to this test only."""
    path = tmp_path / "tokens"
    monkeypatch.setenv("SUBSPAN_CACHE", str(path))
    return path


def refused(call: Callable[[], object], *words: str) -> None:
    with pytest.raises(InputError) as error:
        call()
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


# --- the cache of tokens ---


@pytest.mark.parametrize("left", [0, 1001])
def test_the_cache_shrinks_while_a_run_reads_it(left: int, tiny: Make, cache: Path) -> None:
    """The run ends with an error that names the file, and goes on from its last checkpoint when the cache is made
    again.
    """
    run = Pretraining(tiny(evaluation=tiny().evaluation))
    (file,) = cache.glob("*/train.bin")
    refused(after(run, 4, lambda: os.truncate(file, left)).run, str(file), "is damaged", "ends at token")
    again = Pretraining(tiny(resume="auto"))
    assert again.step == 4
    assert again.run().steps == 6


def test_a_process_survives_a_shrinking_cache(tiny: Make, tmp_path: Path, cache: Path) -> None:
    """It is a process of its own, because a memory map would end it by SIGBUS, with neither a word nor a status."""
    (tmp_path / "settings.json").write_text(json.dumps(asdict(tiny())))
    script = textwrap.dedent(
        """
        import glob, json, os, sys
        from subspan.cli import main
        from subspan.training.data.token_cache import TokenWindows
        read = TokenWindows.next_batch
        def shrinking(self, size):
            for file in glob.glob(os.environ["SUBSPAN_CACHE"] + "/*/train.bin"):
                os.truncate(file, 0)
            return read(self, size)
        TokenWindows.next_batch = shrinking
        sys.exit(main(["pretrain", "--config", sys.argv[1]]))
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "settings.json")], capture_output=True, text=True
    )
    assert done.returncode == 2, done
    assert done.stderr.splitlines()[-1].startswith("subspan: error: the cache of tokens ")
    assert "Traceback" not in done.stderr


def test_the_cache_vanishes_while_a_run_reads_it(tiny: Make, cache: Path) -> None:
    """An open file outlives its name. The run does not notice, and the next one makes the cache again."""
    run = after(Pretraining(tiny()), 3, lambda: shutil.rmtree(cache))
    assert run.run().steps == 6
    assert Pretraining(tiny(resume="auto")).step == 6


def test_a_token_beyond_the_vocabulary(tiny: Make, cache: Path) -> None:
    run = Pretraining(tiny())
    (file,) = cache.glob("*/train.bin")
    refused(after(run, 2, lambda: file.write_bytes(b"\xff" * file.stat().st_size)).run, str(file), "holds token 65,535")


@pytest.mark.parametrize("name", ["train.bin", "validation.bin", "meta.json"])
@pytest.mark.parametrize("how", ["truncated", "gone"])
def test_a_damaged_cache_is_made_anew(
    how: str, name: str, tiny: Make, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Pretraining(tiny())
    whole = {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()}
    (file,) = cache.glob(f"*/{name}")
    if how == "gone":
        file.unlink()
    else:
        os.truncate(file, 20)
    Pretraining(tiny())
    assert f"{file.parent}: the cache of tokens there is damaged and is made again" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()} == whole


def test_documents_change_while_they_are_read(corpus: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens may be a mixture of two versions, so nothing of them is kept."""
    documents = find_documents(str(corpus))

    def chunks(found: Iterator) -> Iterator[list]:
        yield list(found)
        corpus.write_text("other")

    monkeypatch.setattr("subspan.training.data.token_cache._chunks", chunks)
    refused(lambda: tokenise(documents, TOKENIZER), "data: its files changed while they were read")
    assert not list(cache.iterdir())


# --- documents ---


def test_documents_vanish(tiny: Make, corpus: Path, cache: Path, tmp_path: Path) -> None:
    """They vanish after they are found and before they are read, before a resume, and while the run reads its tokens,
    which does no harm.
    """
    documents = find_documents(str(corpus))
    run = after(Pretraining(tiny(steps=6)), 3, corpus.unlink)
    assert run.run().steps == 6
    refused(lambda: tokenise(documents, TOKENIZER), f"data file {corpus}", "No such file")
    refused(lambda: list(documents.split()), f"data file {corpus}", "No such file")
    refused(lambda: Pretraining(tiny(resume="auto")), f"data '{corpus}': no such file")
    assert len(read_metrics(tmp_path / "run")) >= 1


@pytest.mark.parametrize("kept", [0.5, 0.999])
def test_documents_shrink_before_a_resume(kept: float, tiny: Make, corpus: Path) -> None:
    """Cut at a line's end they are another data set; cut within a line they are broken."""
    Pretraining(tiny()).run()
    lines = corpus.read_text().splitlines(keepends=True)
    corpus.write_text("".join(lines[: int(len(lines) * kept)]) + ("" if kept == 0.5 else lines[-1][:20]))
    words = (
        ["have changed since the checkpoint"]
        if kept == 0.5
        else [f"{corpus}, line 40", "expected one JSON object a line"]
    )
    refused(lambda: Pretraining(tiny(resume="auto")), *words)


@pytest.mark.parametrize(
    "line",
    [
        "{broken",
        "[" * 100_000,
        "1" * 5000,
        '{"text": ' + "1" * 5000 + "}",
        "null",
        "[]",
        '"text"',
        '{"text": null}',
        '{"text": ["a"]}',
        '{"body": "a"}',
        '{"text": "a", "split": ["train"]}',
        '{"text": "\\ud800"}',
        '{"text": "a"}{"text": "b"}',
        "\x00" * 50,
    ],
)
def test_broken_lines(line: str, tiny: Make, corpus: Path) -> None:
    """Each is refused with its file and number, because a line left out silently would make another data set."""
    with open(corpus, "a") as file:
        file.write(line + "\n")
    refused(lambda: Pretraining(tiny()), f"{corpus}, line 41")


@pytest.mark.parametrize("content", [b"\xff\xfe", b"\x80abc"])
def test_bytes_that_are_no_text(content: bytes, tiny: Make, corpus: Path) -> None:
    with open(corpus, "ab") as file:
        file.write(content)
    refused(lambda: Pretraining(tiny()), f"data file {corpus} cannot be read", "expected UTF-8 text")


@pytest.mark.parametrize("cut", [5, 40, 200])
def test_a_compressed_file_cut_short(cut: int, tiny: Make, corpus: Path) -> None:
    packed = corpus.with_suffix(".jsonl.gz")
    packed.write_bytes(gzip.compress(corpus.read_bytes())[:cut])
    refused(lambda: Pretraining(tiny(data=str(packed))), f"data file {packed} cannot be read")


# --- streams ---


@pytest.fixture
def c4(tmp_path: Path) -> Path:
    """Two training files and a validation file, with the names and fields of C4."""
    folder = tmp_path / "c4" / "en"
    folder.mkdir(parents=True)
    for half, number in (("train", 0), ("train", 1), ("validation", 0)):
        rows = [json.dumps({"text": f"document {i} of file {number} " + "words " * 30}) + "\n" for i in range(12)]
        (folder / f"c4-{half}.{number:05d}-of-00002.json").write_text("".join(rows))
    return folder


def streamed(folder: Path) -> dict[str, object]:
    return {"data": f"c4:{folder.parent}", "steps": 200}


def second_of(folder: Path) -> Path:
    return folder / "c4-train.00001-of-00002.json"


@pytest.mark.parametrize("how", ["gone", "broken", "null", "truncated"])
def test_a_stream_breaks_off(how: str, tiny: Make, c4: Path) -> None:
    """The second file goes bad while the first is read. An error comes at its turn, with checkpoints before it."""
    second = second_of(c4)
    happens: dict[str, Callable[[], object]] = {
        "gone": second.unlink,
        "broken": lambda: second.write_text("{broken\n"),
        "null": lambda: second.write_text('{"text": null}\n' * 3),
        "truncated": lambda: os.truncate(second, 150),
    }
    run = after(Pretraining(tiny(**streamed(c4))), 3, happens[how])
    refused(run.run, f"data 'c4:{c4.parent}'", "expected readable rows")
    assert run.step > 4


@pytest.mark.parametrize(("number", "resumed"), [(0, False), (1, False), (0, True)])
def test_a_stream_is_cut_between_two_lines(number: int, resumed: bool, tiny: Make, c4: Path, tmp_path: Path) -> None:
    """The reader takes the cut for the end of the file, where it is noticed. With the file put back the run goes on as
    if unbroken.
    """
    settings = streamed(c4) | {
        "checkpoint": CheckpointConfig(every=40),
        "evaluation": EvaluationConfig(every=200, tokens=32),
    }
    unbroken = Pretraining(tiny(**settings, out=str(tmp_path / "unbroken"))).run()
    if resumed:
        with pytest.raises(RunInterruptedError):
            after(Pretraining(tiny(**settings)), 5, lambda: signal.raise_signal(signal.SIGTERM)).run()
    file = c4 / f"c4-train.{number:05d}-of-00002.json"
    whole = file.read_text()
    cut = "".join(whole.splitlines(keepends=True)[:-1])
    run = after(Pretraining(tiny(**settings, resume="auto")), 3, lambda: file.write_text(cut))
    change = f"({len(whole):,} bytes, now {len(cut):,} bytes)"
    refused(run.run, f"data 'c4:{c4.parent}': {file.name} has changed while it was read {change}", "--resume auto")
    assert 50 < run.step < 200, "it was noticed at the end of the file, or of the epoch"
    refused(
        lambda: Pretraining(tiny(**settings, resume="auto")), f"{file.name} has changed since the checkpoint {change}"
    )
    file.write_text(whole)
    again = Pretraining(tiny(**settings, resume="auto"))
    assert 0 < again.step <= run.step
    assert again.run().val_loss == unbroken.val_loss


@pytest.mark.parametrize("how", ["gone", "truncated", "grown"])
def test_a_stream_changes_before_a_resume(how: str, tiny: Make, c4: Path) -> None:
    """The cursor is a place in files; in other files it would be any place."""
    Pretraining(tiny(**(streamed(c4) | {"steps": 6}))).run()
    second = second_of(c4)
    if how == "gone":
        second.unlink()
    else:
        second.write_text(second.read_text()[:250] if how == "truncated" else second.read_text() * 2)
    refused(
        lambda: Pretraining(tiny(**(streamed(c4) | {"steps": 6, "resume": "auto"}))),
        second.name,
        "since the checkpoint",
    )


def test_a_stream_without_text(c4: Path) -> None:
    data = TokenStream(f"c4:{c4.parent}", TOKENIZER, 16, 32, packing=True)
    for path in c4.glob("c4-train*"):
        path.write_text("")
    refused(lambda: data.next_batch(2), f"data 'c4:{c4.parent}'")
