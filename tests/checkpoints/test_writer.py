"""A new checkpoint stands as a whole or not at all; what the disk does not take is told from every other error."""

import errno
import os
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from subspan.checkpoints.checksums import damage, is_sealed
from subspan.checkpoints.writer import new_checkpoint
from subspan.utils.atomic_files import written
from subspan.utils.errors import InputError, SettingError


def save(folder: Path, step: int, **more: Any) -> None:
    with new_checkpoint(folder, step=step, **{"keep": 2, **more}) as scratch:
        torch.save({"step": step}, scratch / "training.pt")
        (scratch / "below").mkdir()
        (scratch / "below" / "notes.txt").write_text(str(step))


def meet(error: BaseException, folder: Path, **more: Any) -> None:
    """Meet an error while the checkpoint of step 2 is half written."""
    with new_checkpoint(folder, step=2, keep=1, **more) as scratch:
        (scratch / "half").touch()
        raise error


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def intact(folder: Path, *steps: int) -> None:
    """These checkpoints stand, and nothing else is there."""
    assert names(folder) == [f"step-{step:06d}" for step in steps]
    for path in folder.iterdir():
        assert is_sealed(path)
        assert damage(path) is None
        assert (path / "below" / "notes.txt").read_text() == str(int(path.name[5:]))


def test_what_is_kept(tmp_path: Path) -> None:
    """The newest, the best, and those of later steps."""
    for step in (1, 2, 30, 3):
        save(tmp_path, step)
    intact(tmp_path, 2, 3, 30)
    for step in (4, 5, 6):
        save(tmp_path, step, keep=1, best=4)
    intact(tmp_path, 4, 6, 30)
    save(tmp_path, 6)
    intact(tmp_path, 4, 6, 30)


def test_what_a_kill_has_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "unfinished" / "below").mkdir(parents=True)
    (tmp_path / "unfinished" / "left").touch()
    save(tmp_path, 1)
    intact(tmp_path, 1)


OF_THE_DISK = {
    "ENOSPC": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    "EDQUOT": OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
    "torch": RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
    "torch, while it writes": RuntimeError("PytorchStreamWriter failed writing file data/2: file write failed"),
    "safetensors": SafetensorError(
        "Error while serializing: I/O error: No space left on device (os error 28)"
    ),
    "older safetensors": SafetensorError("Error while serializing: IoError(Os { code: 28, kind: StorageFull })"),
    "tokenizers": Exception("No space left on device (os error 28)"),
    "a copy of a directory": shutil.Error([("a", "b", "[Errno 28] No space left on device")]),
}  # fmt: skip


@pytest.mark.parametrize("kind", OF_THE_DISK)
def test_a_full_disk(kind: str, tmp_path: Path) -> None:
    """One line says so; what stood before stands, and the next one may be saved."""
    save(tmp_path, 1)
    with pytest.raises(InputError) as caught:
        meet(OF_THE_DISK[kind], tmp_path, needed=2**60)
    message = str(caught.value)
    place = tmp_path / "step-000002"
    assert message.startswith(f"checkpoint {place} cannot be written: no space is left; it needs about 1,152,921,504.6")
    assert f" are free under {tmp_path}; make room, then save again, or continue" in message
    assert "\n" not in message
    intact(tmp_path, 1)
    save(tmp_path, 2)
    intact(tmp_path, 1, 2)


def test_another_trouble_of_the_disk_is_named(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with pytest.raises(
        InputError, match=r"step-000002 cannot be written: Input/output error; it needs about [\d.]+ kB"
    ):
        meet(OSError(errno.EIO, os.strerror(errno.EIO)), tmp_path)
    intact(tmp_path, 1)
    with pytest.raises(InputError, match=r"cannot be written: Permission denied; .*; mend it, then save again"):
        meet(PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "unfinished")), tmp_path, needed=2**60)


NOT_OF_THE_DISK = [
    KeyError("layer"), ValueError("zip() argument 2 is shorter than argument 1"), AssertionError(), MemoryError(),
    RuntimeError("CUDA error: out of memory"), RuntimeError("Expected all tensors to be on the same device"),
    OSError("Can't load the configuration"), ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
    Exception("expected str"), SafetensorError("Error while deserializing header: invalid"),
    FileNotFoundError(errno.ENOENT, "No such file or directory", "/elsewhere/text"),
    InputError("data 'moon': is made of cheese"), SettingError("rank=0: expected 1 or more"), KeyboardInterrupt(),
    SystemExit(3),
]  # fmt: skip


@pytest.mark.parametrize("error", NOT_OF_THE_DISK, ids=lambda error: type(error).__name__)
def test_another_error_comes_out_as_it_is(error: BaseException, tmp_path: Path) -> None:
    save(tmp_path, 1)
    with pytest.raises(type(error)) as caught:
        meet(error, tmp_path)
    assert caught.value is error
    intact(tmp_path, 1)
    save(tmp_path, 2)


def failing(real: Callable[..., Any], at: int) -> Callable[..., Any]:
    """Return ``real``, which fails when it is called for this time."""
    calls = count(1)

    def wrapped(*arguments: Any, **keywords: Any) -> Any:
        if next(calls) == at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments, **keywords)

    return wrapped


@pytest.mark.parametrize("before", [(1,), (1, 2)], ids=["new", "in place of another"])
@pytest.mark.parametrize(("owner", "name"), [(os, "fsync"), (Path, "rename"), (Path, "mkdir"), (Path, "write_text")])
def test_whatever_fails(
    owner: Any, name: str, before: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each call that a checkpoint needs fails in turn, until there is no further one."""
    for number in count(1):
        folder = tmp_path / str(number)
        for step in before:
            save(folder, step)
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, failing(getattr(owner, name), number))
            try:
                save(folder, 2)
                break
            except InputError as error:
                said = str(error)
        assert "step-000002 cannot be written: no space is left" in said
        intact(folder, *before)
        save(folder, 3, keep=9)
    assert number > 1


def test_an_old_one_that_cannot_be_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new one stands, and the message does not speak of room."""
    save(tmp_path, 1)

    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("subspan.checkpoints.writer.remove_directory", refuse)
    with pytest.raises(
        InputError, match=r"step-000001 cannot be removed: Permission denied; that of step 2 is saved; let its"
    ):
        save(tmp_path, 2, keep=1)
    intact(tmp_path, 1, 2)


@pytest.mark.parametrize("error", [OF_THE_DISK["torch"], KeyError("x"), KeyboardInterrupt()], ids=repr)
def test_a_single_directory(error: BaseException, tmp_path: Path) -> None:
    """``written``, for one process, keeps the same promise."""
    place = tmp_path / "model"

    def write(text: str, error: BaseException | None = None) -> None:
        with written("model", place, 2**60) as scratch:
            (scratch / "file").write_text(text)
            if error:
                raise error

    write("one")
    of_the_disk = type(error) is RuntimeError
    with pytest.raises(InputError if of_the_disk else type(error), match="no space is left" if of_the_disk else None):
        write("two", error)
    assert names(tmp_path) == ["model"]
    assert (place / "file").read_text() == "one"
