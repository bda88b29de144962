"""Probes of a run: what they write, and that they change nothing."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from subspan.training.config.settings import CheckpointConfig, PretrainConfig, ProbeConfig
from subspan.training.evaluation import token_losses
from subspan.training.monitor.probes import noise_and_signal
from subspan.training.pretraining import Pretraining
from subspan.utils.errors import InputError

Make = Callable[..., PretrainConfig]
PROBES = ProbeConfig(subspace=True, anchor=6, noise_every=5, noise_parts=2)


def rows(run: Path, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "probes.jsonl").read_text().splitlines()]
    return [row for row in found if row["kind"] == kind]


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{step:06d}" / "model.safetensors")


@pytest.mark.parametrize(
    "how", [{"optimizer": "galore_adamw"}, {"backward_side": True}, {"optimizer": "flora_adamw"}], ids=str
)
def test_a_run_with_probes_computes_the_same(how: dict[str, Any], small: Make, tmp_path: Path) -> None:
    probes = replace(PROBES, noise_every=None) if "backward_side" in how else PROBES
    for name, asked in (("with", probes), ("without", ProbeConfig())):
        Pretraining(small(probes=asked, out=str(tmp_path / name), **how)).run()
    first, second = (weights(tmp_path / name, 12) for name in ("with", "without"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not (tmp_path / "without" / "probes.jsonl").exists()
    found = rows(tmp_path / "with", "subspace")
    assert {row["step"] for row in found} >= ({1, 6, 11} if "backward_side" not in how else {6})
    after = [row for row in found if row["step"] > 6 and "overlap" in row]
    assert after
    assert all(0 <= row["overlap"] <= 1 and 0 <= row["anchor"] <= 1 for row in after)
    # The basis before is the anchor's if it was chosen at the anchor's step.
    if "backward_side" not in how:
        assert all(row["overlap"] == pytest.approx(row["anchor"], abs=1e-6) for row in after)
        if how["optimizer"] == "galore_adamw":  # no subspace of this rank holds more
            assert all(row["captured"] > row["captured_before"] for row in after)


def test_a_run_that_goes_on_writes_the_rows_of_an_unbroken_one(small: Make, tmp_path: Path) -> None:
    settings = {"probes": PROBES, "checkpoint": CheckpointConfig(every=4, keep=3)}
    Pretraining(small(out=str(tmp_path / "whole"), **settings)).run()
    Pretraining(small(out=str(tmp_path / "broken"), **settings)).run()
    # A kill leaves this: the newest checkpoint is missing, and the rows of later steps are there.
    run = tmp_path / "broken"
    shutil.rmtree(run / "checkpoints/step-000012")
    Pretraining(small(out=str(run), resume="auto", **settings)).run()
    for kind in ("subspace", "noise"):
        drop = ("step_seconds", "usual_seconds")
        a, b = (
            [{k: v for k, v in row.items() if k not in drop} for row in rows(tmp_path / n, kind)]
            for n in ("whole", "broken")
        )
        assert a == b


def test_bases_of_another_anchor_are_not_taken_for_this_one(small: Make, tmp_path: Path) -> None:
    settings = {"out": str(tmp_path / "run"), "checkpoint": CheckpointConfig(every=8, keep=3)}
    Pretraining(small(probes=PROBES, **settings)).run()
    shutil.rmtree(tmp_path / "run/checkpoints/step-000012")
    later = small(probes=replace(PROBES, anchor=7), resume="auto", **settings)
    with pytest.raises(
        InputError, match=r"probes.anchor=7: .*anchors.safetensors holds the bases of step 6.*--probes.anchor 6"
    ):
        Pretraining(later).run()
    Pretraining(replace(later, probes=PROBES)).run()


def test_noise_is_unbiased_for_known_noise() -> None:
    """For parts with the gradient mu + e, where e has the variance s² in each entry, the mean of the noise is s² d / k,
    and that of the signal ||mu||².
    """
    generator = torch.Generator().manual_seed(0)
    mu, s, k, d, trials = torch.full((6, 5), 0.3, dtype=torch.float64), 0.7, 4, 30, 4000
    noise, signal = [], []
    for _ in range(trials):
        found = noise_and_signal(
            [mu + s * torch.randn(6, 5, generator=generator, dtype=torch.float64) for _ in range(k)]
        )
        noise.append(found["noise"])
        signal.append(found["signal"])
    for values, expected in ((noise, s * s * d / k), (signal, float(mu.square().sum()))):
        found = torch.tensor(values, dtype=torch.float64)
        assert abs(float(found.mean()) - expected) < 5 * float(found.std()) / trials**0.5


def test_noise_is_that_of_the_batch_of_the_step(small: Make, tmp_path: Path) -> None:
    """The noise of a step is computed again by hand, in a run of its own."""
    Pretraining(small(probes=replace(PROBES, noise_every=1), steps=1)).run()
    run = Pretraining(small(steps=1, out=str(tmp_path / "other")))
    batch, weight = run.data.next_batch(4), run.model.model.layers[0].mlp.up_proj.weight  # type: ignore[union-attr, index]
    gradients = []
    for part in (batch.part(0, 2), batch.part(1, 2)):
        run.model.zero_grad()
        (token_losses(run.model, part) / part.tokens()).backward()
        gradients.append(weight.grad.clone())  # type: ignore[union-attr, operator]
    mean = (gradients[0] + gradients[1]) / 2
    noise = float((gradients[0] - gradients[1]).double().square().sum()) / 4  # ||g1 - g2||² / 4, for two parts
    found = next(row for row in rows(tmp_path / "run", "noise") if row["name"].endswith("layers.0.mlp.up_proj.weight"))
    assert found["noise"] == pytest.approx(noise, rel=1e-4)
    assert found["signal"] == pytest.approx(float(mean.double().square().sum()) - noise, rel=1e-3, abs=1e-9)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"optimizer": "adamw"}, "probes.subspace=True: adamw has no subspace here"),
        (
            {"probes": ProbeConfig(subspace=True, noise_every=0)},
            "probes.noise_every=0: expected a whole number of steps >= 1",
        ),
        (
            {"probes": ProbeConfig(subspace=True, noise_every=1, noise_parts=3)},
            "probes.noise_parts=3: expected 2 or more",
        ),
        ({"probes": ProbeConfig(subspace=True, anchor=0)}, "probes.anchor=0: expected a step >= 1"),
        ({"probes": PROBES, "backward_side": True}, "probes.noise_every: backward-side layers form no gradient"),
    ],
)
def test_what_cannot_be_measured_is_named(overrides: dict[str, Any], words: str, small: Make) -> None:
    with pytest.raises(InputError) as caught:
        Pretraining(small(**({"probes": PROBES} | overrides)))
    assert words in str(caught.value)
