"""The table: gaps, reductions, tests, and rows that are not whole."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from support.studies import cell_of, make, record

from subspan.cli import main
from subspan.study.records import append_records
from subspan.study.reported import perplexities
from subspan.study.study_file import Study
from subspan.study.table import as_latex, as_text, compare, tokens_at

ROWS = {
    "full": {"optimizer": "adamw"},
    "galore": {"optimizer": "galore_adamw"},
    "sara": {"optimizer": "sara_adamw", "versus": "galore"},
}
LOSSES = {"full": [1.0, 1.1, 1.2], "galore": [2.0, 2.2, 2.1], "sara": [1.7, 2.0, 1.9]}


def filled(folder: Path, losses: dict[str, list[float | None]]) -> Study:
    study = make(folder, rows=ROWS, seeds=[0, 1, 2])
    for row in study.rows:
        cells = [cell_of(row, row.lr, seed) for seed in range(len(losses[row.name]))]
        append_records(study.results, [record(cell, loss) for cell, loss in zip(cells, losses[row.name], strict=True)])
    return study


def test_gaps_and_their_reduction_by_hand(tmp_path: Path) -> None:
    table = compare(filled(tmp_path, dict(LOSSES)))
    full, galore, sara = table["rows"]
    assert [row["n"] for row in table["rows"]] == [3, 3, 3]
    assert (full["gap"], full["versus"], full["p_value"]) == (0.0, None, None)
    assert galore["gap"] == pytest.approx(1.0)
    assert galore["versus"] == "full"
    assert galore["gap_reduction"] is None
    assert sara["difference"] == pytest.approx(-0.7 / 3)
    assert sara["gap_reduction"] == pytest.approx(0.7 / 3)
    assert sara["gap_reduction_low"] < 0.7 / 3 < sara["gap_reduction_high"]
    assert sara["bootstrap_low"] is not None
    assert table["pairs"] == 2
    # Holm over the two tests: the smaller p twice, the larger at least that.
    small, large = sorted([galore, sara], key=lambda row: row["p_value"])
    assert small["p_holm"] == pytest.approx(2 * small["p_value"])
    assert large["p_holm"] == pytest.approx(max(large["p_value"], small["p_holm"]))


def test_what_is_missing_or_diverged_is_shown(tmp_path: Path) -> None:
    study = filled(tmp_path, {"full": [1.0, 1.1, 1.2], "galore": [2.0, None, 2.1], "sara": [1.7]})
    _, galore, sara = compare(study)["rows"]
    assert (galore["n"], galore["diverged"], galore["missing"]) == (2, 1, 0)
    assert galore["mean"] == pytest.approx(2.05)
    assert galore["gap"] == pytest.approx(((2.0 - 1.0) + (2.1 - 1.2)) / 2)  # of the seeds that both have
    assert (sara["n"], sara["missing"]) == (1, 2)
    assert sara["p_value"] is None
    text = as_text(compare(study))
    assert "2 (1 diverged)" in text
    assert "1 (2 missing)" in text


def test_a_comparison_of_fewer_seeds_than_the_row_has_says_so(tmp_path: Path) -> None:
    study = filled(tmp_path, {"full": [1.0, 1.1, 1.2], "galore": [2.0, None, 2.1], "sara": [1.7, 2.0, 1.9]})
    _, galore, sara = compare(study)["rows"]
    assert (galore["n"], galore["pairs"], galore["gap_pairs"]) == (2, 2, 2)
    assert (sara["n"], sara["pairs"], sara["gap_pairs"]) == (3, 2, 3)
    assert sara["difference"] == pytest.approx(((1.7 - 2.0) + (1.9 - 2.1)) / 2)
    line = next(line for line in as_text(compare(study)).splitlines() if line.startswith("sara"))
    assert line.count("(2 of 3)") == 1
    assert "of 3)" not in as_text(compare(filled(tmp_path / "whole", dict(LOSSES))))


def test_runs_of_code_that_is_in_no_commit_are_counted(tmp_path: Path) -> None:
    study = filled(tmp_path, {"full": [1.0, 1.1, 1.2], "galore": [2.0, 2.2, 2.1], "sara": [1.7, 2.0]})
    assert "in no commit" not in as_text(compare(study))
    sara = study.rows[2]
    append_records(study.results, [record(cell_of(sara, sara.lr, 2), 1.9) | {"commit": "0123abc-dirty"}])
    assert "! 1 of 9 runs were computed by code with changes that are in no commit" in as_text(compare(study))
    assert compare(study)["commits"] == ["0123abc-dirty", "None"]


def test_what_a_paper_reports_is_of_its_own_method_alone(tmp_path: Path) -> None:
    rows = {
        "sara": {"optimizer": "sara_adamw", "lr": 0.02, "rank": 8},
        "random": {"optimizer": "sara_adamw", "optim": {"selector": {"name": "random"}}},
        "scaled": {"optimizer": "sara_adamw", "scale": 1.0},
        "backward": {"optimizer": "sara_adamw", "backward_side": True},
    }
    found = compare(make(tmp_path, rows=rows))["rows"]
    assert [row["name"] for row in found if row["as_published"]] == ["sara"]
    assert perplexities("sara_adamw", as_published=True) == (30.47, 24.21, 19.16)
    assert set(perplexities("sara_adamw", as_published=False)) == {None}


def test_runs_of_different_precisions_are_not_compared_in_silence(tmp_path: Path) -> None:
    study = filled(tmp_path, {"full": [1.0, 1.1, 1.2], "galore": [2.0, 2.2, 2.1], "sara": [1.7, 2.0]})
    assert "computed in" not in as_text(compare(study))
    sara = study.rows[2]
    append_records(study.results, [record(cell_of(sara, sara.lr, 2), 1.9) | {"precision": "bf16-mixed"}])
    note = "! computed in a precision not recorded and in bf16-mixed"
    assert note in as_text(compare(study))
    assert f"% {note}" in as_latex(compare(study))


def test_forms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = filled(tmp_path, dict(LOSSES))
    path = tmp_path / "studies" / "small.yaml"
    assert main(["study", "table", str(path), "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert {"name", "n", "mean", "std", "gap", "gap_reduction", "p_value"} <= table["rows"][0].keys()
    assert main(["study", "table", str(path), "--latex"]) == 0
    latex = capsys.readouterr().out
    assert latex.count(r"\\") == 4
    assert main(["study", "table", str(path), "--metric", "val_ppl"]) == 0
    assert "val_ppl" in capsys.readouterr().out
    assert as_latex(compare(study)) == latex.rstrip("\n")


def test_some_rows_and_the_short_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    filled(tmp_path, dict(LOSSES))
    path = str(tmp_path / "studies" / "small.yaml")
    assert main(["study", "table", path, "--rows", "full, galore", "--short"]) == 0
    _, names, *rows = capsys.readouterr().out.splitlines()
    assert names.split("  ")[0] == "name"
    assert "versus" not in names
    assert [row.split()[0] for row in rows] == ["full", "galore"]
    for rows_given, words in (("full,sara", "others are compared with 'galore'"), ("galor", "did you mean galore")):
        with pytest.raises(SystemExit):
            main(["study", "table", path, "--rows", rows_given])
        assert words in capsys.readouterr().err


def test_a_broken_record_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = filled(tmp_path, dict(LOSSES))
    with open(study.results, "a") as file:
        file.write("oops\n")
    with pytest.raises(SystemExit) as caught:
        main(["study", "table", str(tmp_path / "studies" / "small.yaml")])
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert f"{study.results}:10: is no record" in err
    assert err.count("\n") == 1


def test_tokens_to_the_loss_of_the_reference(tmp_path: Path) -> None:
    """Between two evaluations the curve is a straight line; a row that never gets there has no such number."""
    study = make(tmp_path, rows=ROWS, seeds=[0, 1])
    curves = {"full": [[2, 4.0], [4, 2.0]], "galore": [[2, 3.0], [4, 1.0]], "sara": [[2, 5.0], [4, 2.5]]}
    for row in study.rows:
        for seed in study.seeds:
            ends = curves[row.name][-1][1]
            append_records(
                study.results, [record(cell_of(row, row.lr, seed), ends) | {"curve": curves[row.name], "tokens": 400}]
            )
    full, galore, sara = compare(study)["rows"]
    assert (full["tokens_to_reference"], full["tokens_share"]) == (400, 1.0)
    assert (galore["tokens_to_reference"], galore["tokens_share"]) == (300, 0.75)
    assert (sara["tokens_to_reference"], sara["tokens_reached"], sara["tokens_pairs"]) == (None, 0, 2)
    assert tokens_at([(10, 1.0), (20, 0.5)], 1.5) == 10
    assert tokens_at([], 1.5) is None


def test_the_test_text_is_compared_where_every_run_has_one(tmp_path: Path) -> None:
    study = make(tmp_path, rows=ROWS, seeds=[0, 1])
    for row in study.rows[:2]:
        runs = [record(cell_of(row, row.lr, seed), 2.0 + seed) | {"test_loss": 1.0 + seed} for seed in study.seeds]
        append_records(study.results, runs)
    table = compare(study)
    assert (table["metric"], table["rows"][0]["mean"], table["rows"][0]["val_loss"]) == ("test_loss", 1.5, 2.5)
    append_records(study.results, [record(cell_of(study.rows[2], study.rows[2].lr, 0), 2.0)])
    assert compare(study)["metric"] == "val_loss"


def test_both_rates_and_what_the_sweep_chose_are_named(tmp_path: Path) -> None:
    rows = {"full": {"optimizer": "adamw", "optim": {"lr_full": 0.02}, "lr": 0.005, "sweep": []},
            "galore": {"optimizer": "galore_adamw", "lr": 0.04}}  # fmt: skip
    sweep = {"seeds": [9], "stages": [{"weight_decay": [0.0, 0.1]}]}
    study = make(tmp_path, rows=rows, sweep=sweep)
    full, galore = compare(study)["rows"]
    assert [full[name] for name in ("lr", "lr_matrices", "lr_full", "chosen")] == [0.005, 0.005, 0.02, {}]
    assert [galore[name] for name in ("lr", "lr_matrices", "lr_full")] == [None] * 3  # it is not chosen yet
    row = study.rows[1]
    for decay, loss in ((0.0, 3.0), (0.1, 2.0)):
        append_records(study.results, [record(row.cell(replace(row.config, weight_decay=decay), 9), loss)])
    _, galore = compare(study)["rows"]
    assert [galore[name] for name in ("lr", "lr_matrices", "lr_full")] == [0.04, 0.01, 0.04]
    assert (galore["chosen"], galore["sweep_runs"]) == ({"weight_decay": 0.1}, 2)
