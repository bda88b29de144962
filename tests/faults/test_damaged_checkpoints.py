"""Checkpoints whose bytes have changed are refused and left as they are; the newest sound one is continued."""

import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from subspan.checkpoints.checksums import RECORD, damage
from subspan.checkpoints.directory import list_checkpoints
from subspan.training.config.settings import CheckpointConfig, PretrainConfig
from subspan.training.pretraining import Pretraining
from subspan.training.run_directory import locate
from subspan.utils.errors import InputError

Make = Callable[..., PretrainConfig]


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def flip(path: Path, dice: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    path.write_bytes(content)


def truncate(path: Path, dice: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: dice.randrange(len(content))])


def zero(path: Path, dice: random.Random) -> None:
    content = bytearray(path.read_bytes())
    while True:  # until something changes: files hold zeros of their own
        start = dice.randrange(len(content))
        block = content[start : start + 512]
        if any(block):
            break
    content[start : start + 512] = bytes(len(block))
    path.write_bytes(content)


def delete(path: Path, dice: random.Random) -> None:
    path.unlink()


DAMAGES = [flip, truncate, zero, delete]


@pytest.fixture
def run(tiny: Make, tmp_path: Path) -> Path:
    """A finished run with checkpoints of steps 2, 4 and 6."""
    Pretraining(tiny()).run()
    return tmp_path / "run"


@pytest.fixture
def settings(tiny: Make, run: Path, tmp_path: Path) -> dict[str, object]:
    return Pretraining(tiny(out=str(tmp_path / "other"))).settings


def test_two_hundred_damaged_checkpoints(
    run: Path, tiny: Make, settings: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whichever file of the newest is hit: auto takes the one before and says why, and its own path is refused."""
    dice = random.Random(0)
    newest, before = list_checkpoints(run / "checkpoints")[:0:-1]
    kept = tmp_path / "kept"
    shutil.copytree(newest, kept)
    whole = files(newest)
    for number in range(200):
        hit = dice.choice([path for path in whole if path.name != RECORD or number % 2])
        how = DAMAGES[number % 4]
        if how is delete and hit.name == RECORD:  # as one of before there were records: see below
            how = truncate
        how(hit, dice)
        left = files(run)
        case = f"{number}: {how.__name__} {hit.name}"
        capsys.readouterr()
        assert locate(tiny(resume="auto"), settings) == (run, before), case
        err = capsys.readouterr().err
        assert err.count("\n") == 1, case
        assert f"damaged and passed over, left as they are: {newest} ({hit.name}" in err, case
        assert "step-000004 is sound" in err
        with pytest.raises(InputError, match=rf"checkpoint {re.escape(str(newest))}: {re.escape(hit.name)}") as refused:
            locate(tiny(resume=str(newest)), settings)
        assert "\n" not in str(refused.value)
        assert files(run) == left, case
        shutil.rmtree(newest)
        shutil.copytree(kept, newest)
    assert damage(newest) is None


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", ["optimizer.pt", "training.pt", "model.safetensors"])
def test_the_sound_one_is_continued(how: Callable, name: str, run: Path, tiny: Make, tmp_path: Path) -> None:
    """A run that passed over a damaged checkpoint ends where the unbroken one did; saving again mends the damage."""
    whole = files(run / "checkpoints" / "step-000006")
    how(run / "checkpoints" / "step-000006" / name, random.Random(1))
    again = Pretraining(tiny(resume="auto"))
    assert again.step == 4
    again.run()
    weights = run / "checkpoints" / "step-000006" / "model.safetensors"
    assert weights.read_bytes() == whole[weights]
    assert damage(weights.parent) is None


def test_a_run_is_named(run: Path, tiny: Make, settings: dict) -> None:
    """The path of a run leaves the choice of its checkpoint open, so the newest sound one is taken."""
    (run / "checkpoints" / "step-000006" / "training.pt").unlink()
    assert locate(tiny(resume=str(run)), settings) == (run, run / "checkpoints" / "step-000004")


def test_none_is_sound(run: Path, tiny: Make, settings: dict) -> None:
    """The run is not started again behind its user's back."""
    for path in list_checkpoints(run / "checkpoints"):
        truncate(path / "optimizer.pt", random.Random(0))
    left = files(run)
    for resume in ("auto", str(run)):
        with pytest.raises(
            InputError, match=r"no checkpoint of it is sound: .*step-000006 \(optimizer.pt holds .*step-000002"
        ):
            locate(tiny(resume=resume), settings)
    assert files(run) == left


@pytest.mark.parametrize("resume", ["auto", "checkpoint"])
@pytest.mark.parametrize("how_many", [1, 3])
@pytest.mark.parametrize("name", ["optimizer.pt", "training.pt", RECORD])
def test_other_settings_are_named_first(how_many: int, name: str, resume: str, run: Path, tiny: Make) -> None:
    """A user who mistyped a setting is not sent to look for a damaged disk."""
    checkpoints = list_checkpoints(run / "checkpoints")
    for path in checkpoints[-how_many:]:
        truncate(path / name, random.Random(0))
    with pytest.raises(InputError, match=r"is of another run: rank was 4, is 5"):
        Pretraining(tiny(rank=5, resume="auto" if resume == "auto" else str(checkpoints[-1])))


def test_checkpoints_of_before_there_were_checksums(
    run: Path, tiny: Make, settings: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    """Checkpoints without checksums are continued with a note; one that cannot even be read is passed over."""
    for path in list_checkpoints(run / "checkpoints"):
        (path / RECORD).unlink()
    capsys.readouterr()
    assert locate(tiny(resume="auto"), settings) == (run, run / "checkpoints" / "step-000006")
    assert "step-000006: checksums.json is missing, so damage to it would not be seen" in capsys.readouterr().err
    (run / "checkpoints" / "step-000006" / "optimizer.pt").write_bytes(b"damaged")
    assert locate(tiny(resume="auto"), settings) == (run, run / "checkpoints" / "step-000004")
    assert "step-000006 (optimizer.pt cannot be read (UnpicklingError)" in capsys.readouterr().err


def test_damaged_newer_ones_do_not_push_out_sound_ones(run: Path, tiny: Make) -> None:
    """The checkpoints that ``keep`` counts are the newest of this continuation, not damaged ones of a higher step."""
    for name in ("step-000004", "step-000006"):
        truncate(run / "checkpoints" / name / "training.pt", random.Random(0))
    again = Pretraining(tiny(resume="auto", checkpoint=CheckpointConfig(every=1, keep=1)))
    saved = again._save
    seen: list[list[bool]] = []

    def save() -> None:
        saved()
        seen.append([damage(path) is None for path in list_checkpoints(run / "checkpoints")])

    again._save = save  # type: ignore[method-assign]
    again.run()
    assert len(seen) == 4
    assert all(any(sound) for sound in seen)


def test_what_stands_beside_the_files_may_change(run: Path, tiny: Make, settings: dict) -> None:
    (run / "checkpoints" / "step-000006" / "notes.txt").write_text("the good one")
    assert locate(tiny(resume="auto"), settings) == (run, run / "checkpoints" / "step-000006")


def test_numbered_runs(run: Path, tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without ``out``, auto finds the run by its settings, also if its newest checkpoint is damaged."""
    monkeypatch.chdir(tmp_path)
    Pretraining(tiny(out=None)).run()
    own = Path("runs") / "config.json-sara_adamw-seed0"
    truncate(own / "checkpoints" / "step-000006" / "training.pt", random.Random(0))
    again = Pretraining(tiny(out=None, resume="auto"))
    assert (again.out, again.step) == (own, 4)
    assert Pretraining(tiny(out=None, resume="auto", rank=3)).step == 0
