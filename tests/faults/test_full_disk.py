"""A disk that fills up: what was saved before stands, one line says what is needed, and the run can go on later."""

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import sharded_worker
from faults import full_disk_worker
from support.processes import launch

from subspan.checkpoints import sharded
from subspan.checkpoints.checksums import damage
from subspan.checkpoints.directory import list_checkpoints
from subspan.checkpoints.sharded import save_sharded, save_sharded_async
from subspan.checkpoints.writer import new_checkpoint
from subspan.cli import main
from subspan.training.config.settings import CheckpointConfig, EvaluationConfig, PretrainConfig
from subspan.training.data.documents import find_documents
from subspan.training.data.token_cache import tokenise
from subspan.training.data.tokenizer import load_tokenizer
from subspan.training.monitor.metrics import Metrics, read_metrics
from subspan.training.pretraining import Pretraining
from subspan.utils.atomic_files import write_text
from subspan.utils.errors import InputError

Make = Callable[..., PretrainConfig]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of a megabyte and a half."""
    path = tmp_path / "disk"
    path.mkdir()
    if (
        not shutil.which("mount")
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1536k", "tmpfs", path]).returncode
    ):
        pytest.skip("a small tmpfs cannot be mounted here (needs Linux and root)")
    yield path
    subprocess.run(["umount", "-l", path], check=True)


def fill(disk: Path, leave: int) -> Path:
    """Write a file that leaves ``leave`` bytes free."""
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(max(0, shutil.disk_usage(disk).free - leave)))
    return ballast


def same(first: Path, second: Path) -> bool:
    return (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


def flags(config: PretrainConfig) -> list[str]:
    """Return the words of a command that trains with these settings."""
    names = ("model", "tokenizer", "data", "steps", "batch_size", "rank")
    given = [f"--{name}={getattr(config, name)}" for name in names]
    return ["pretrain", *given, "--sequence_length=16", "--checkpoint.every=2", "--device=cpu"]


def filling(run: Pretraining, before: int, disk: Path, leave: int) -> Pretraining:
    """Return ``run``, whose disk is filled before the batch of that number is read."""
    read, count = run.data.next_batch, iter(range(10**6))

    def next_batch(size: int) -> object:
        if next(count) == before:
            fill(disk, leave)
        return read(size)

    run.data.next_batch = next_batch  # type: ignore[method-assign]
    return run


@pytest.mark.parametrize("leave", [0, 4096, 20_000, 32_000, 48_000, 64_000, 80_000, 96_000])
def test_a_checkpoint_that_does_not_fit(leave: int, disk: Path, tiny: Make, tmp_path: Path) -> None:
    """The space ends at one place of the checkpoint after another."""
    every = {"checkpoint": CheckpointConfig(every=2, keep=3)}
    Pretraining(tiny(**every, out=str(tmp_path / "whole"))).run()
    size = sum(path.stat().st_size for path in (tmp_path / "whole" / "checkpoints" / "step-000004").iterdir())
    run = filling(Pretraining(tiny(**every, out=str(disk / "run"), log_every=100)), 3, disk, leave)
    assert leave < size
    with pytest.raises(InputError) as error:
        run.run()
    message = str(error.value)
    assert "\n" not in message
    assert "--resume auto" in message
    assert (
        f"{disk / 'run' / 'checkpoints' / 'step-000004'} cannot be written: no space is left; it needs about "
        in message
    )
    assert " kB, " in message
    assert f"free under {disk / 'run' / 'checkpoints'}" in message
    folder = disk / "run" / "checkpoints"
    assert [path.name for path in folder.iterdir()] == ["step-000002"], "and nothing unfinished that takes space"
    assert damage(folder / "step-000002") is None

    (disk / "ballast").unlink()
    again = Pretraining(tiny(**every, out=str(disk / "run"), resume="auto", log_every=100))
    assert again.step == 2
    again.run()
    assert same(folder / "step-000006", tmp_path / "whole" / "checkpoints" / "step-000006")


def test_a_sharded_checkpoint_that_does_not_fit(disk: Path, tmp_path: Path) -> None:
    """One process writes it at once and in the background, with ``new_checkpoint`` and without."""
    model, optimizer = sharded_worker.build("sara_adamw", sharded=False)
    sharded_worker.train(model, optimizer, 2, first=0)
    save_sharded(tmp_path / "whole", model, optimizer)
    size = sum(path.stat().st_size for path in (tmp_path / "whole").iterdir())
    with new_checkpoint(disk / "run", step=1, keep=2) as scratch:
        save_sharded(scratch, model, optimizer)

    def published() -> None:
        with new_checkpoint(disk / "run", step=2, keep=2) as scratch:
            pending = save_sharded_async(scratch, model, optimizer)
            pending.wait()

    def alone() -> None:
        save_sharded(disk / "run" / "step-000002", model, optimizer)

    for save in (published, alone):
        for leave in range(0, size, 8192):
            ballast = fill(disk, leave)
            with pytest.raises(InputError) as error:
                save()
            place = disk / "run" / "step-000002"
            assert str(error.value).startswith(
                f"checkpoint {place} cannot be written: no space is left; it needs about "
            )
            assert not list(place.iterdir()) if place.exists() else True
            assert not (disk / "run" / "unfinished").exists()
            assert sharded.damage(disk / "run" / "step-000001") is None
            ballast.unlink()
        save()
        assert sharded.damage(place) is None
        shutil.rmtree(place)


@pytest.mark.distributed
def test_a_sharded_checkpoint_of_two_ranks_that_does_not_fit(disk: Path) -> None:
    launch(sharded_worker.main, 2, "small_disk", str(disk))


@pytest.mark.distributed
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_run_of_two_ranks(parallel: str, disk: Path, tiny: Make, tmp_path: Path) -> None:
    """All ranks end with the same error, which is said once; the run goes on when there is room."""
    said = tmp_path / "said"
    command = [*flags(tiny()), f"--out={disk / 'run'}", f"--parallel={parallel}", "--optim.proj_type=right"]
    done = launch(full_disk_worker.main, 2, str(disk), "30000", str(said), *command, check=False)
    assert done.returncode == 2, done.stderr
    place = disk / "run" / "checkpoints" / "step-000004"
    message = f"checkpoint {place} cannot be written: no space is left; it needs about "
    assert done.stderr.count(f"subspan: error: {message}") == 1
    first, second = (Path(f"{said}.{rank}").read_text() for rank in (0, 1))
    assert first == second
    assert first.startswith(message)
    assert [path.name for path in place.parent.iterdir()] == ["step-000002"]
    (disk / "ballast").unlink()
    launch(full_disk_worker.main, 2, str(disk), "none", str(said), *command, "--resume=auto")
    assert sorted(path.name for path in place.parent.iterdir()) == ["step-000004", "step-000006"]


def test_the_command_says_so_in_one_line(
    disk: Path, tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = Pretraining.__init__

    def init(self: Pretraining, config: PretrainConfig, *ranks: Any) -> None:
        made(self, config, *ranks)
        filling(self, 3, disk, 30_000)

    monkeypatch.setattr(Pretraining, "__init__", init)
    with pytest.raises(SystemExit) as status:
        main([*flags(tiny()), f"--out={disk / 'run'}"])
    assert status.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(
        f"subspan: error: checkpoint {disk / 'run' / 'checkpoints' / 'step-000004'} cannot be written: no space"
    )


def test_metrics_that_cannot_be_written(disk: Path, tiny: Make, tmp_path: Path) -> None:
    """A line is cut where the space ends; the next start drops what is left of it."""
    settings = {"log_every": 1, "checkpoint": CheckpointConfig(every=2)}
    run = filling(Pretraining(tiny(**settings, out=str(disk / "run"))), 3, disk, 0)
    path = disk / "run" / "metrics.jsonl"
    write = Metrics.write

    def until_full(self: Metrics, row: dict) -> None:
        for _ in range(60 if row["step"] > 3 else 1):  # to the end of the page that the file has already
            write(self, row)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Metrics, "write", until_full)
        with pytest.raises(
            InputError, match=rf"{path} cannot be written: no space is left; it needs about .* free under"
        ):
            run.run()
    assert not path.read_text().endswith("\n"), "the space ended within a line"
    (disk / "ballast").unlink()
    Pretraining(tiny(**settings, out=str(disk / "run"), resume="auto")).run()
    assert [row["step"] for row in read_metrics(disk / "run") if "loss" in row] == [1, 2, 3, 4, 5, 6]


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("when", ["at the start", "while it trains"])
def test_tensorboard_that_cannot_be_written(
    when: str, tiny: Make, disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line says so, without a traceback of tensorboard's thread; the run goes on."""
    out = tmp_path / "run"
    out.mkdir()
    (out / "tensorboard").symlink_to(disk)
    fill(disk, 0 if when == "at the start" else 4096)
    late = {"checkpoint": CheckpointConfig(every=400), "evaluation": EvaluationConfig(every=400, tokens=32)}
    assert Pretraining(tiny(tensorboard=True, steps=60, log_every=1, **late)).run().steps == 60
    err = capsys.readouterr().err
    line = f"{out / 'tensorboard'} cannot be written: [Errno 28] No space left on device; it ends here, and metrics.jsonl goes on"
    assert err.count(line) == 1
    assert "Traceback" not in err
    assert [row["step"] for row in read_metrics(out) if "loss" in row] == [*range(1, 61)]


def test_the_summary_and_the_metrics_stand_where_they_cannot_be_replaced(disk: Path) -> None:
    path = disk / "summary.json"
    path.write_text("before")
    fill(disk, 0)
    with pytest.raises(
        InputError, match=rf"{path} cannot be written: no space is left; it needs about 10.0 kB, 0 bytes are free"
    ):
        write_text(path, "after " * 1667)
    assert path.read_text() == "before"
    assert sorted(file.name for file in disk.iterdir()) == ["ballast", "summary.json"]


def test_a_cache_of_tokens_that_does_not_fit(disk: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUBSPAN_CACHE", str(disk / "cache"))
    fill(disk, 8192)
    with pytest.raises(
        InputError, match=rf"the cache of tokens {disk}/cache/\w+ .* cannot be written: no space is left"
    ):
        tokenise(find_documents(str(corpus)), load_tokenizer("bytes"))
    assert not list((disk / "cache").iterdir())
    (disk / "ballast").unlink()
    assert tokenise(find_documents(str(corpus)), load_tokenizer("bytes")).is_dir()


# --- the same without a file system of one's own ---


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_write_that_fails(number: int, tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, saves = Pretraining(tiny()), torch.save

    def save(part: dict, path: Path) -> None:
        if part.get("step") == 4:
            raise OSError(number, os.strerror(number), str(path))
        saves(part, path)

    monkeypatch.setattr(torch, "save", save)
    cause = os.strerror(number) if number == errno.EIO else "no space is left"
    with pytest.raises(InputError, match=rf"step-000004 cannot be written: {cause}; it needs about [\d.]+ kB, "):
        run.run()
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000002"]
    assert Pretraining(tiny(resume="auto")).run().steps == 6


def test_a_rename_that_fails(tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint that should have been replaced is put back."""
    Pretraining(tiny()).run()
    again, rename = Pretraining(tiny(resume="auto")), Path.rename

    def fails(self: Path, target: Path) -> Path:
        if self.name == "unfinished":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(InputError, match="step-000006 cannot be written: no space is left"):
        again.run()
    assert damage(list_checkpoints(tmp_path / "run" / "checkpoints")[-1]) is None


def test_metrics_with_broken_lines(tiny: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Broken lines are counted and left out; the file as it was is kept."""
    Pretraining(tiny(log_every=1, steps=4, schedule=tiny().schedule)).run()
    path = tmp_path / "run" / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    spoilt = "".join([lines[0], "\x00\x00\n", "[1]\n", '{"loss": 1}\n', *lines[1:], '{"step": 5, "lo'])
    path.write_text(spoilt)
    with Metrics(tmp_path / "run", 4, tensorboard=False):
        pass
    assert path.read_text() == "".join(lines)
    assert (tmp_path / "run" / "metrics.damaged.jsonl").read_text() == spoilt
    assert f"{path}: 3 lines cannot be read and are left out" in capsys.readouterr().err
