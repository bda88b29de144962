"""The key of a record holds everything that decides what a run computes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from subspan.recipes import RECIPES
from subspan.residuals import Fira
from subspan.study import meaning
from subspan.study.meaning import check_hashes, key_of, meaning_of
from subspan.training.config.settings import EvaluationConfig, OptimConfig, PretrainConfig, ScheduleConfig
from subspan.training.models import presets
from subspan.utils.errors import InputError

BASE = PretrainConfig(optimizer="sara_adamw", model="llama-nano", lr=0.01)


def key(config: PretrainConfig, hashes: dict[str, str] | None = None) -> str:
    return key_of(meaning_of(config, hashes or {}))


def test_a_default_that_is_spelled_out_changes_nothing() -> None:
    spelled: list[dict[str, Any]] = [
        {"rank": 16, "update_proj_gap": 50, "steps": 1500},
        {"optim": OptimConfig(lr_full=0.01)},
        {"optim": OptimConfig(betas=(0.9, 0.999))},
        {"schedule": ScheduleConfig(warmup_steps=150)},
        {"evaluation": EvaluationConfig(every=7)},
        {"threads": 2, "log_every": 3, "out": "x"},
    ]
    assert {key(replace(BASE, **changes)) for changes in spelled} == {key(BASE)}


def test_what_is_computed_differently_has_another_key() -> None:
    different: list[dict[str, Any]] = [
        {"seed": 1}, {"lr": 0.02}, {"steps": 5}, {"rank": 8}, {"weight_decay": 0.1}, {"clip": None}, {"packing": False},
        {"optimizer": "galore_adamw"}, {"optim": OptimConfig(lr_full=0.02)}, {"optim": OptimConfig(stagger=False)},
        {"optim": OptimConfig(selector={"power": 2.0})}, {"evaluation": EvaluationConfig(tokens=32)},
        {"rank_pattern": {"q_proj": 8, "proj": 4}},
        {"rank_pattern": {"proj": 4, "q_proj": 8}}, {"rank": 0.5}, {"tokenizer": "embedded"},
        {"schedule": ScheduleConfig(warmup_steps=0)},
    ]  # fmt: skip
    assert len({key(BASE), *(key(replace(BASE, **changes)) for changes in different)}) == 1 + len(different)


def test_a_changed_recipe_default_or_preset_is_another_run(monkeypatch: pytest.MonkeyPatch) -> None:
    before = key(BASE)
    with monkeypatch.context() as patch:
        patch.setitem(RECIPES, "sara_adamw", RECIPES["sara_adamw"]._replace(residual=Fira()))
        assert key(BASE) != before
    with monkeypatch.context() as patch:
        patch.setitem(RECIPES, "sara_adamw", RECIPES["sara_adamw"]._replace(scale=0.5))
        assert key(BASE) != before
    with monkeypatch.context() as patch:
        patch.setitem(presets.PRESETS, "llama-nano", replace(presets.PRESETS["llama-nano"], heads=4))
        assert key(BASE) != before
    assert key(BASE) == before


def test_a_setting_that_a_later_version_adds_leaves_the_keys() -> None:
    defaults = {"new": None, "other": False, "section": {"new": None}, "optim": {}}
    assert meaning._with_effect({"lr": 0.1} | defaults, defaults) == {"lr": 0.1}
    assert meaning._with_effect({"new": False}, {"new": None}) == {"new": False}  # set by hand


def test_contents_count_and_not_their_names(tmp_path: Path) -> None:
    texts = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path in texts:
        path.write_text('{"text": "x"}\n')
    model = tmp_path / "config.json"
    model.write_text(json.dumps(LlamaConfig().to_dict()))
    first = meaning_of(replace(BASE, data=str(texts[0]), model=str(model), tokenizer="bytes"), {})
    second = meaning_of(replace(BASE, data=str(texts[1]), model=str(model), tokenizer="bytes"), {})
    assert first["contents"] == second["contents"]
    texts[1].write_text('{"text": "y"}\n')
    config = json.loads(model.read_text())
    model.write_text(json.dumps(config | {"num_hidden_layers": 1}))
    changed = meaning_of(replace(BASE, data=str(texts[1]), model=str(model), tokenizer="bytes"), {})["contents"]
    assert all(changed[name] != second["contents"][name] for name in ("data", "model"))
    assert changed["tokenizer"] == second["contents"]["tokenizer"]


def test_a_committed_hash_stands_for_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    config = replace(BASE, data=str(path))
    with pytest.raises(InputError, match=r"no such file.*commit its hash in the study file"):
        key(config)
    path.write_text('{"text": "x"}\n')
    whole = key(config)
    committed = {str(path): meaning_of(config, {})["contents"]["data"]}
    check_hashes(config, committed)
    path.unlink()
    assert key(config, committed) == whole
    path.write_text('{"text": "y"}\n')
    with pytest.raises(InputError, match=r"hashes: data=.* has the hash .*, and the study file commits to"):
        check_hashes(config, committed)
