"""What a study file says, and what is wrong with one."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.studies import make, write

from subspan.factory import residual_of
from subspan.study.study_file import load_study
from subspan.training.config.settings import EvaluationConfig
from subspan.utils.errors import InputError

STAGES = {"seeds": [9], "stages": [{"lr": [1, 2]}]}


def test_rows_have_the_base_and_their_own(tmp_path: Path) -> None:
    rows = {"a": {"optimizer": "sara_adamw", "evaluation": {"tokens": 32}, "optim": {"selector": {"power": 2.0}}}}
    (row,) = make(tmp_path, rows=rows).rows
    assert row.config.steps == 4
    assert row.config.evaluation == EvaluationConfig(every=2, tokens=32)
    assert row.config.optim.selector == {"power": 2.0}
    assert row.lr == 0.01  # the method's own


def test_the_rows_of_the_sketch_are_of_one_width() -> None:
    """Each row of ``sketch_nano`` looks at 32 directions, and stands on both sides; no two of a side are alike."""
    study = load_study(Path(__file__).parents[2] / "studies" / "sketch_nano.yaml")
    rows = {row.name: row.config for row in study.rows if row.name != "full_adam"}
    ordinary = {name: config for name, config in rows.items() if not name.endswith("_backward")}
    assert len(ordinary) == 7
    assert rows.keys() - ordinary.keys() == {f"{name}_backward" for name in ordinary}
    for name, config in ordinary.items():
        rank = config.rank or 16  # that of llama-nano
        assert rank + residual_of(config.optimizer, config.optim.residual).sketch_width(64, int(rank)) == 32
        assert replace(config, backward_side=True) == rows[f"{name}_backward"]
    assert len({str(config) for config in ordinary.values()}) == 7


def test_a_grid_is_a_row_for_each_point_compared_point_by_point(tmp_path: Path) -> None:
    grid = {"rank": [4, 8], "optim.transfer": ["keep", "rotate"]}
    rows = {
        "full": {"optimizer": "adamw"},
        "galore": {"optimizer": "galore_adamw", "versus": "full", "grid": grid},
        "sara": {"optimizer": "sara_adamw", "versus": "galore", "grid": grid},
    }
    found = {row.name: row for row in make(tmp_path, rows=rows).rows}
    assert len(found) == 9
    row = found["sara[rank=8,transfer=rotate]"]
    assert (row.config.rank, row.config.optim.transfer) == (8, "rotate")
    assert row.versus == "galore[rank=8,transfer=rotate]"
    assert found["galore[rank=4,transfer=keep]"].versus == "full"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seedz": [1]}, "'seedz': no key of a study; did you mean seeds or sweep?"),
        ({"seeds": [0, 0]}, "seeds=[0, 0]: expected a list of different whole numbers"),
        ({"seeds": None}, "seeds=None: expected a list"),
        ({"rows": {}}, "rows: expected a mapping"),
        ({"rows": {"a": "sara"}}, "rows.a='sara': expected settings"),
        ({"rows": {"a": {"optimizer": "sarra_adamw"}}}, "rows.a: optimizer 'sarra_adamw' is unknown; did you mean"),
        ({"rows": {"a": {"optimizer": "sara_adamw", "stepz": 3}}}, "rows.a: "),
        ({"rows": {"a": {"optimizer": "sara_adamw", "steps": "many"}}}, "rows.a: "),
        ({"rows": {"a": {"optimizer": "sara_adamw", "steps": 0}}}, "rows.a: steps=0: expected a whole number >= 1"),
        ({"rows": {"a": {"optimizer": "sara_adamw", "seed": 3}}}, "rows.a.seed: belongs to seeds"),
        ({"rows": {"a": {"versus": "bb"}, "b": {}}}, "rows.a.versus='bb': no row of this name; did you mean b?"),
        (
            {"rows": {"a": {"optimizer": None}}},
            "rows.a: optimizer=null: expected str; leave it out for the default",
        ),
        ({"rows": {"a": {"evaluation": {"tokens": None}}}}, "rows.a: evaluation.tokens=null: expected int"),
        ({"rows": {"a": {"optim": [1]}}}, "rows.a: optim=[1]: expected a mapping of settings"),
        ({"rows": {"a": {"grid": {3: [4]}}}}, "rows.a.grid={3: [4]}: expected a list of values for each setting"),
        ({"rows": {"a": {"versus": [1]}}}, "rows.a.versus='[1]': no row of this name; known are a"),
        ({"rows": {"a": {"grid": {"rank": 3}}}}, "rows.a.grid={'rank': 3}: expected a list of values"),
        ({"reference": "ful"}, "reference='ful': no row of this name; did you mean full?"),
        (
            {"sweep": STAGES | {"seeds": [0]}},
            "sweep.seeds=[0]: expected a list of different whole numbers >= 0, none of",
        ),
        ({"sweep": STAGES | {"seeds": 9}}, "sweep.seeds=9: expected a list"),
        ({"sweep": STAGES | {"stages": [{"lr": [2, 1]}]}}, "{'lr': [2, 1]}: expected two or more rising numbers > 0"),
        ({"sweep": STAGES | {"stages": [{"lr": [2]}]}}, "{'lr': [2]}: expected two or more values"),
        (
            {"sweep": STAGES | {"stages": [{"optim.betaz": [1, 2]}]}},
            "'optim.betaz' is no setting; did you mean optim.betas",
        ),
        (
            {"sweep": STAGES | {"stages": [{"rank": [1, 2], "extend": 1}]}},
            "extend=1: expected a whole number >= 0, for lr",
        ),
        ({"sweep": STAGES | {"stages": [{"rank": [1, 2], "lr": [1, 2]}]}}, "expected one setting with its values"),
        ({"sweep": STAGES | {"stages": []}}, "sweep.stages=[]: expected a list"),
        ({"sweep": STAGES | {"within": -1}}, "sweep.within=-1: expected a loss >= 0"),
        ({"sweep": {"seed": 9, "factors": [1, 2]}}, "sweep={'seed': 9, 'factors': [1, 2]}: expected seeds, stages"),
        ({"rows": {"a": {"sweep": ["lr"]}}}, "rows.a.sweep: 'lr' has no stage in the sweep"),
        ({"rows": {"a": {"sweep": "lr"}}}, "rows.a.sweep='lr': expected a list of settings that have a stage"),
        ({"hashes": ["x"]}, "hashes=['x']: expected names of files"),
        ({"base": {"seed": 1}}, "base.seed: belongs to seeds"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = write(tmp_path, **changes)
    with pytest.raises(InputError) as caught:
        load_study(path)
    lines, (key, _) = path.read_text().splitlines(), next(iter(changes.items()))
    found = re.match(rf"{path}(:(\d+))?: ", str(caught.value))
    assert found
    if key in (
        "seedz",
        "seeds",
        "reference",
        "base",
        "sweep",
        "rows",
        "hashes",
    ):  # the line of the key, or of one within
        at = int(found[2])
        begin = next(number for number, line in enumerate(lines, 1) if line.startswith(f"{key}:"))
        end = next(
            (number for number, line in enumerate(lines, 1) if number > begin and line[0] not in " -"), len(lines) + 1
        )
        assert begin <= at < end
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_line_is_that_of_the_row(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("seeds: [0]\nrows:\n  full: {optimizer: adamw}\n\n  a: {optimizer: sarra_adamw}\n")
    with pytest.raises(InputError, match=rf"^{path}:5: rows.a: optimizer 'sarra_adamw' is unknown"):
        load_study(path)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (
            "  a: {optimizer: adamw}\n  a: {optimizer: sara_adamw}\n",
            r":4: 'rows.a' stands in line 3 too; rename or remove one$",
        ),
        (
            "  a: {grid: {optim.selector: [{power: 0, power: 1}]}}\n",
            r":3: 'rows.a.grid.optim.selector.0.power' stands in line 3 too",
        ),
        ("  a: &a\n    b: *a\n", r": is no YAML: maximum recursion depth"),
        ("  a: {optimizer: sara_adamw, grid: {rank: [4, 4]}}\n", r":3: rows.a\[rank=4\]: 2 rows have this name"),
    ],
)
def test_a_row_that_would_be_lost_is_refused(rows: str, words: str, tmp_path: Path) -> None:
    """YAML takes the last of two keys that are alike, and drops the other in silence."""
    path = tmp_path / "a.yaml"
    path.write_text(f"seeds: [0]\nrows:\n{rows}")
    with pytest.raises(InputError, match=f"^{path}{words}"):
        load_study(path)


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent.yaml: No such file"):
        load_study(tmp_path / "absent.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("rows: [")
    with pytest.raises(ValueError, match=r"broken.yaml: is no YAML"):
        load_study(broken)


def test_every_committed_study_is_sound() -> None:
    for path in (Path(__file__).parents[2] / "studies").glob("*.yaml"):
        assert load_study(path).rows
