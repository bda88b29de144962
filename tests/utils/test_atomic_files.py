"""Files that appear whole on every system: syncing as Windows wants it, and one encoding everywhere."""

import ast
import errno
import fcntl
import os
from pathlib import Path
from typing import Any

import pytest

from subspan.utils import atomic_files

SOURCE = Path(__file__).parents[2] / "src"


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let ``os.open`` and ``os.fsync`` refuse what they refuse there. Returns the names of what has been synced."""
    synced: list[str] = []
    names: dict[int, str] = {}
    real_open, real_fsync = os.open, os.fsync

    def open_(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        descriptor = real_open(path, flags, *rest, **more)
        names[descriptor] = os.path.basename(path)
        return descriptor

    def fsync(descriptor: int) -> None:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        synced.append(names[descriptor])
        real_fsync(descriptor)

    monkeypatch.setattr("shutil._use_fd_functions", False)
    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "fsync", fsync)
    return synced


def test_as_on_windows(tmp_path: Path, windows: list[str]) -> None:
    """Files are synced, directories are left out, and both are written."""
    atomic_files.write_text(tmp_path / "a.txt", "ä→\n")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "ä→\n"
    for text in ("one", "two"):
        with atomic_files.written("a model", tmp_path / "model", 1) as scratch:
            (scratch / "inside").mkdir()
            (scratch / "inside" / "f").write_text(text, encoding="utf-8")
    assert (tmp_path / "model" / "inside" / "f").read_text(encoding="utf-8") == "two"
    assert windows == [".a.txt.unfinished", "f", "f"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EBADF])
def test_a_file_system_that_syncs_no_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Directories may be left out; a file that does not reach the disk is an error."""

    def refuse(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    atomic_files.sync(tmp_path)
    (tmp_path / "f").write_text("f", encoding="utf-8")
    with pytest.raises(OSError, match=os.strerror(number)):
        atomic_files.sync(tmp_path / "f")


def test_another_error_of_the_disk_is_not_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room is asked for only where there is none."""

    def refuse(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(atomic_files.NotWrittenError, match=r"Input/output error.*; mend it, then save again") as caught:
        atomic_files.write_text(tmp_path / "a.txt", "x")
    assert "make room" not in str(caught.value)


def test_a_read_only_file_is_synced(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_text("f", encoding="utf-8")
    path.chmod(0o444)
    atomic_files.sync(path)


def test_every_text_file_names_its_encoding() -> None:
    """Another default, as on Windows, would read and write other letters."""
    bare = []
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            called = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            of_os = isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name)
            if of_os and node.func.value.id in ("os", "Image", "webbrowser"):  # type: ignore[attr-defined]
                continue
            if called == "write_text" and isinstance(node.func, ast.Name):
                continue  # ours, which writes UTF-8
            if called in ("open", "read_text", "write_text", "NamedTemporaryFile"):
                modes = [one.value for one in node.args if isinstance(one, ast.Constant) and isinstance(one.value, str)]
                if not any("b" in mode and len(mode) < 4 for mode in modes) and "encoding" not in {
                    keyword.arg for keyword in node.keywords
                }:
                    bare.append(f"{path.relative_to(SOURCE)}:{node.lineno}")
    assert not bare
