"""Measure the time of a training step of each row of a fine-tuning study, relative to the study's reference.

All runs are built first. Then each takes one step in turn, so that whatever else the machine does affects all of them
alike. Evaluations and saving are left out.

For each row the ratio of its time to the reference's time in the same round is taken. Printed are the median and the
quartiles over the rounds, and the ratio of the sums, in which the refreshes count too.
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from subspan.study.study_file import load_study
from subspan.training.runs import prepare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--study", type=Path, default=Path("studies/finetune_minilm.yaml"))
    parser.add_argument("--rounds", type=int, default=80, help="steps of each row; two periods of the committed study")
    given = parser.parse_args()
    study, seconds = load_study(given.study), {}
    with tempfile.TemporaryDirectory() as folder:
        runs = {
            row.name: prepare(replace(row.config, seed=0, threads=1, out=f"{folder}/{row.name}")) for row in study.rows
        }
        for _ in range(given.rounds):
            for name, run in runs.items():
                began = time.perf_counter()
                run._train_step()
                seconds.setdefault(name, []).append(time.perf_counter() - began)
    reference = seconds[study.reference]
    print(f"{study.name}, {given.rounds} rounds: time of a step over that of {study.reference}")
    for name, own in seconds.items():
        ratios = [a / b for a, b in zip(own, reference, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"{name:<16}{middle:.2f} [{low:.2f}, {high:.2f}]   with refreshes {sum(own) / sum(reference):.2f}")


if __name__ == "__main__":
    main()
