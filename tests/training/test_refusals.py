"""Refusals and directories: what is wrong is named, and no run overwrites another."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertLMHeadModel

from subspan.checkpoints import directory as checkpoints
from subspan.checkpoints.checksums import RECORD, seal
from subspan.checkpoints.directory import list_checkpoints
from subspan.training.config.resolve import resolve
from subspan.training.config.settings import OptimConfig, PretrainConfig
from subspan.training.data.tokenizer import load_tokenizer
from subspan.training.models.build import build_model
from subspan.training.pretraining import Pretraining
from subspan.training.run_directory import hold
from subspan.utils.errors import InputError, UserError

Make = Callable[..., PretrainConfig]


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"rank": 0}, "rank=0: expected a whole number >= 1"),
        ({"rank": 1.0}, "rank=1.0: expected a whole number >= 1, or a share of each compressed side"),
        ({"rank": float("nan")}, "rank=nan: expected a whole number >= 1, or a share of each compressed side"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern['q_proj']=0: expected a whole number >= 1, or a share"),
        ({"rank_pattern": {"[": 4}}, "rank_pattern: '[' is no regular expression"),
        ({"rank_pattern": {"q_porj": 4}}, "rank_pattern: 'q_porj' matches no projected matrix; the names look like"),
        ({"rank_pattern": {"q_porj": 4}, "backward_side": True}, "rank_pattern: 'q_porj' matches no projected matrix"),
        ({"optimizer": "sara_adm"}, "optimizer 'sara_adm' is unknown; did you mean sara_adamw"),
        ({"model": "llama-mini"}, "model 'llama-mini' is unknown; did you mean llama-"),
        ({"data": "no/such/file.txt"}, "data 'no/such/file.txt': no such file"),
        ({"sequence_length": 10**6}, "sequence_length=1000000: the train part of the data holds"),
        ({"steps": 0}, "steps=0: expected a whole number >= 1"),
        ({"micro_batch_size": 3}, "micro_batch_size=3: expected a divisor of batch_size=4"),
        ({"clip": 0.0}, "clip=0.0: expected a number > 0"),
        ({"lr": -1.0}, "lr=-1.0: expected a number >= 0"),
        ({"packing": False}, "packing=False: only streamed data"),
        (
            {"optim": OptimConfig(selector={"powr": 2})},
            "selector setting 'powr'=2: Importance has power, floor, method",
        ),
        ({"optim": OptimConfig(proj_type="up")}, "proj_type='up': expected one of std"),
        ({"lr": float("nan")}, "lr=nan: expected a number >= 0"),
        ({"optimizer": "adamw", "weight_decay": -0.1}, "weight_decay=-0.1: expected a number >= 0"),
        ({"seed": -1}, "seed=-1: expected a whole number from 0"),
        ({"optim": OptimConfig(selector={"power": "x"})}, "power='x': expected a number"),
        ({"optim": OptimConfig(selector={"floor": None})}, "floor=None: expected a share"),
        ({"optim": OptimConfig(residual={"limiter": 1})}, "residual setting 'limiter'=1: Discard has no settings"),
        ({"optimizer": "golore_hybrid_adamw", "optim": OptimConfig(selector={"first": "random"})}, "expected a part"),
        ({"optim": OptimConfig(eps=1e-300)}, "eps=1e-300: expected 0, or a number from 1e-30 to 1e+18"),
        ({"optim": OptimConfig(rule={"eps": 10**30})}, f"eps={10**30}: expected 0, or a number from 1e-30 to 1e+18"),
        ({"optim": OptimConfig(eta=1e-300)}, "eta=1e-300: expected a number > 0, from 1e-30 to 1e+18"),
        ({"scale": 10**30}, f"scale={10**30}: expected a number >= 0, and at most 1e+18"),
        ({"optim": OptimConfig(targets="[")}, "targets: '[' is no regular expression"),
        ({"optim": OptimConfig(targets=[])}, "targets=[]: nothing would be projected"),
        ({"validation_data": "no/such"}, "validation_data 'no/such': no such file"),
        (
            {"data": "c4:no/such", "validation_data": "x"},
            "validation_data='x': c4:no/such has a training and a validation half",
        ),
        ({"optim": OptimConfig(targets=["nothing"])}, "targets: 'nothing' matches no matrix"),
        ({"resume": "no/such/checkpoint"}, "resume='no/such/checkpoint': no checkpoint there"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(overrides: dict, message: str, small: Make, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        Pretraining(small(**overrides))
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_overwritten(small: Make, tmp_path: Path) -> None:
    Pretraining(small()).run()
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=r"out=.* holds a run already; continue it with --resume auto"):
        Pretraining(small())
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"optimizer": "galore_adamw"}, "optimizer was sara_adamw, is galore_adamw"),
        ({"rank": 8}, "rank was 4, is 8"),
        ({"rank": 0.25}, "rank was 4, is 0.25"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern was None, is {'q_proj': 8}"),
        ({"model": "llama-tiny", "tokenizer": "bytes"}, "model was llama-nano, is llama-tiny"),
        ({"steps": 99}, "steps was 12, is 99"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(overrides: dict, message: str, small: Make, tmp_path: Path) -> None:
    Pretraining(small()).run()
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=message):
        Pretraining(small(resume="auto", **overrides))
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_default_directories(small: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A taken name gets a number; resume finds the newest run with the same settings, or starts another."""
    monkeypatch.chdir(tmp_path)
    first, second = Pretraining(small(out=None)), Pretraining(small(out=None, rank=8))
    second.run()  # both were ready before either had a directory
    first.run()
    assert (str(second.out), str(first.out)) == (
        "runs/llama-nano-sara_adamw-seed0",
        "runs/llama-nano-sara_adamw-seed0-2",
    )
    again = Pretraining(small(out=None, resume="auto"))
    assert (again.out, again.step) == (first.out, 12)
    assert Pretraining(small(out=None, resume="auto", rank=8)).out == second.out
    other = Pretraining(small(out=None, resume="auto", rank=2))
    assert (str(other.out), other.step) == ("runs/llama-nano-sara_adamw-seed0-3", 0)


def test_a_folder_named_like_a_known_name_is_not_meant(
    small: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`embedded` and `c4` keep their meaning beside folders of that name; a path to data holds from any directory."""
    monkeypatch.chdir(tmp_path)
    for name in ("embedded", "c4", "llama-nano", "bytes"):
        (tmp_path / name).mkdir()
    settings = resolve(small(data="c4", tokenizer="bytes"))
    assert (settings.data, settings.tokenizer, settings.model) == ("c4", "bytes", "llama-nano")
    assert resolve(small(data="embedded")).data == "embedded"
    assert resolve(small(data="corpus.jsonl")).data == str(tmp_path / "corpus.jsonl")
    assert resolve(small(data="c4:c4")).data == f"c4:{tmp_path / 'c4'}"


def test_two_runs_cannot_start_in_one_directory(small: Make, tmp_path: Path) -> None:
    first, second = Pretraining(small()), Pretraining(small(rank=8))
    first.run()
    before = files(tmp_path / "run")
    with pytest.raises(InputError, match="holds a run already"):
        second.run()
    assert files(tmp_path / "run") == before


def test_two_processes_do_not_train_in_one_directory(small: Make, tmp_path: Path) -> None:
    """This happens if a launcher is killed and its process lives on. The second leaves the first's files alone."""
    out = tmp_path / "run"
    Pretraining(small(steps=2, out=str(out))).run()
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    again = Pretraining(small(steps=2, out=str(out), resume="auto"))
    with hold(out), pytest.raises(InputError, match=r"out=.*another process trains there; wait for it"):
        again.run()
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    again.run()


def test_resume_auto_compares_settings_before_the_first_checkpoint(small: Make, tmp_path: Path) -> None:
    """A run killed before its first checkpoint is started again by the same settings, and not by others."""
    Pretraining(small()).run()
    for path in list_checkpoints(tmp_path / "run" / "checkpoints"):
        path.rename(tmp_path / path.name)
    with pytest.raises(InputError, match=r"is of another run: lr was 0\.01, is 0\.5"):
        Pretraining(small(resume="auto", lr=0.5))
    assert Pretraining(small(resume="auto")).run().steps == 12


def test_a_checkpoint_never_goes_on_inside_another_run(small: Make, tmp_path: Path) -> None:
    Pretraining(small(out=str(tmp_path / "a"))).run()
    Pretraining(small(out=str(tmp_path / "b"), rank=8)).run()
    before = files(tmp_path / "b")
    with pytest.raises(InputError, match=r"out=.*holds another run"):
        Pretraining(small(out=str(tmp_path / "b"), resume=str(tmp_path / "a" / "checkpoints" / "step-000008")))
    assert files(tmp_path / "b") == before


@pytest.mark.parametrize("form", ["step-000008", "../checkpoints/step-000008", "..", "absolute"])
def test_a_checkpoint_by_path_goes_on_in_its_own_run(
    form: str, small: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Pretraining(small()).run()
    monkeypatch.chdir(tmp_path / "run" / "checkpoints")
    path = str(tmp_path / "run" / "checkpoints" / "step-000008") if form == "absolute" else form
    run = Pretraining(small(out=None, resume=path))
    assert run.out.resolve() == tmp_path / "run"
    assert run.step == (12 if form == ".." else 8)


def test_a_later_checkpoint_is_made_anew(small: Make, tmp_path: Path) -> None:
    """A run that continues from an older checkpoint writes the newer one again, which mends a damaged one."""
    Pretraining(small()).run()
    old, new = list_checkpoints(tmp_path / "run" / "checkpoints")
    sound = (new / "model.safetensors").read_bytes()
    for name in ("optimizer.pt", "model.safetensors"):
        (new / name).write_bytes(b"x")
    with pytest.raises(InputError, match=r"step-000012: (model.safetensors|optimizer.pt) holds 1 bytes"):
        Pretraining(small(resume=str(new)))
    Pretraining(small(resume=str(old))).run()
    assert (new / "model.safetensors").read_bytes() == sound
    assert Pretraining(small(resume="auto")).step == 12


def test_changed_data_is_noticed(small: Make, corpus: Path) -> None:
    Pretraining(small()).run()
    corpus.write_text("".join(corpus.read_text().splitlines(keepends=True)[:25]))
    with pytest.raises(InputError, match="the documents or the tokenizer have changed since the checkpoint"):
        Pretraining(small(resume="auto"))


def test_untouched_data_under_a_new_date_is_the_same(small: Make, corpus: Path) -> None:
    Pretraining(small()).run()
    corpus.write_text(corpus.read_text())
    assert Pretraining(small(resume="auto")).step == 12


@pytest.mark.parametrize("target", ["/proc/nope", "corpus.jsonl/run"])
def test_a_directory_that_cannot_be(target: str, small: Make, tmp_path: Path) -> None:
    out = target if target.startswith("/") else str(tmp_path / target)
    with pytest.raises(
        InputError, match=r"out=.* (is no directory that can be written|give a directory that can be written)"
    ):
        Pretraining(small(out=out)).run()


# --- models that cannot be trained ---


def test_a_model_that_sees_the_future(small: Make, tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=257, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    BertLMHeadModel(config).save_pretrained(tmp_path / "bert")
    with pytest.raises(InputError, match="it is not causal"):
        Pretraining(small(model=str(tmp_path / "bert"), tokenizer="bytes"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_position_embeddings": 8}, "sequence_length=16: the model .* has 8 positions"),
        ({"hidden_size": 65}, "cannot be loaded: "),
        ({"hidden_size": "big"}, "cannot be loaded: "),
    ],
)
def test_a_config_that_does_not_fit(change: dict, message: str, small: Make, tmp_path: Path) -> None:
    build_model("llama-nano", load_tokenizer("bytes"), 16, seed=0).config.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=message):
        Pretraining(small(model=str(path), tokenizer="bytes"))


def test_a_local_model_without_a_tokenizer(small: Make, tmp_path: Path) -> None:
    build_model("llama-nano", load_tokenizer("bytes"), 16, seed=0).save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match=r"tokenizer=None: the model .* brings none; give --tokenizer"):
        Pretraining(small(model=str(tmp_path / "model")))


def test_broken_weights(small: Make, tmp_path: Path) -> None:
    build_model("llama-nano", load_tokenizer("bytes"), 16, seed=0).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(InputError, match="cannot be loaded"):
        Pretraining(small(model=str(tmp_path / "model"), tokenizer="bytes"))


# --- checkpoints ---


def test_a_save_that_is_cut_short_leaves_the_last_checkpoint(
    small: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Pretraining(small())
    saves = torch.save

    def fails_at_eight(part: dict, path: Path) -> None:
        if part.get("step") == 8:
            path.write_bytes(b"half")
            raise KeyboardInterrupt
        saves(part, path)

    monkeypatch.setattr(torch, "save", fails_at_eight)
    with pytest.raises(KeyboardInterrupt):
        run.run()
    monkeypatch.undo()
    folder = tmp_path / "run" / "checkpoints"
    assert [path.name for path in checkpoints.list_checkpoints(folder)] == ["step-000004"]
    resumed = Pretraining(small(resume="auto"))
    assert resumed.step == 4
    resumed.run()
    assert not (folder / "unfinished").exists()


def test_a_damaged_checkpoint_is_named(small: Make, tmp_path: Path) -> None:
    Pretraining(small()).run()
    newest = checkpoints.list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    (newest / "optimizer.pt").write_bytes(b"damaged")
    with pytest.raises(InputError, match=rf"{newest.name}: optimizer.pt holds 7 bytes, was written with"):
        Pretraining(small(resume=str(newest)))


def test_a_run_of_a_version_that_knew_fewer_settings_goes_on(small: Make, tmp_path: Path) -> None:
    """A setting that it did not know counts as its default, and as nothing else."""
    Pretraining(small(steps=4)).run()
    (folder,) = (tmp_path / "run/checkpoints").iterdir()
    saved = torch.load(folder / "training.pt", weights_only=True)
    del saved["settings"]["optim"]["min_8bit_size"]
    torch.save(saved, folder / "training.pt")
    (folder / RECORD).unlink()
    seal(folder)
    assert Pretraining(small(steps=4, resume="auto")).step == 4
    with pytest.raises(InputError, match=r"optim was .*, is .*'min_8bit_size': 1"):
        Pretraining(small(steps=4, resume="auto", optim=OptimConfig(min_8bit_size=1)))
