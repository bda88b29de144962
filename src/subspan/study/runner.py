"""The runner of a study: it runs the cells, several at a time, each in a process and a directory of its own."""

import contextlib
import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from subspan.study.meaning import check_hashes
from subspan.study.missing_runs import cells_of
from subspan.study.progress import StudyProgress
from subspan.study.records import Record, append_records, is_of_committed_code, read_all, read_records
from subspan.study.study_file import Cell, Study
from subspan.training.config.kinds import resolve_run
from subspan.training.config.settings import CheckpointConfig, PretrainConfig, names_without_effect, without_defaults
from subspan.training.monitor.metrics import read_metrics
from subspan.training.monitor.provenance import stamp
from subspan.training.scores import SCORES
from subspan.training.signals import RunInterruptedError, collect_signals
from subspan.utils.errors import InputError, SettingError, UserError
from subspan.utils.messages import say

_DIVERGED, _REFUSED, _FAULT = 3, 78, 70
"""Statuses of a run's process. Python itself ends a process with 1 that fails before the run can begin."""
_STOPPED = (128 + signal.SIGTERM, 128 + signal.SIGINT, -signal.SIGTERM, -signal.SIGINT)
_TOLD = {"optimizer", "seed", "lr", "evaluation"} | names_without_effect()
"""Settings that a record names elsewhere, or that change nothing."""
_OF_FINETUNING = ("metric", "majority", "saved_activation_bytes", "trainable", "best_step")
_MODULES = [
    "subspan.study.forkserver",
    "subspan.training.pretraining",
    "subspan.training.finetuning",
]
"""Modules that the process imports from which the runs are forked. It imports them once; the last two take seconds."""


@dataclass
class _Running:
    cell: Cell
    process: BaseProcess
    folder: Path


class Runner:
    """Runs what is missing of a study, as ``subspan study run`` does.

    Args:
        study: the study to run.
        runs: the folder for the directories of runs, which are ``runs/STUDY/ROW/lr-X-seed-S-KEY``.
        jobs: how many run at a time, with one thread each unless ``base`` sets ``threads``.

    Raises:
        SettingError: ``jobs`` is no number of processes.
        InputError: a content that a run would read is not there, or not the one that the study file commits to.
    """

    def __init__(self, study: Study, runs: Path, jobs: int) -> None:
        if jobs < 1:
            raise SettingError(f"jobs={jobs}: expected a whole number >= 1")
        for row in study.rows:
            check_hashes(row.config, row.hashes)
        self.study, self.runs, self.jobs = study, runs / study.name, jobs
        self._stamp = stamp()
        # A run of code that was in no commit is run again by code that is.
        found, committed = read_all(study.results.parent, study.results), is_of_committed_code(self._stamp)
        self.records = {key: run for key, run in found.items() if is_of_committed_code(run) or not committed}
        self.failed: dict[str, str] = {}  # by key: how the run failed, and where more is said

    def run(self) -> int:
        """Run what is missing.

        Returns:
            0 if every run finished or diverged; 1 if one failed; 128 + the signal if one came. After a signal the same
            command goes on where it stopped.
        """
        study = self.study
        running: list[_Running] = []
        context = get_context("forkserver")
        context.set_forkserver_preload(_MODULES)
        known, whole = self._known()
        if known.keys() - self.records:
            append_records(study.results, [])  # if it cannot be written, say so before anything runs
        with StudyProgress(study.name) as bar, collect_signals() as received:
            while True:
                under_way = {entry.cell.key for entry in running}
                for key, cell in known.items():
                    if received or len(running) >= self.jobs:
                        break
                    if key not in self.records and key not in self.failed and key not in under_way:
                        running.append(self._start(context, cell))
                bar.update(len(known.keys() & self.records), whole, [entry.cell for entry in running])
                if received:  # a terminal sends it to the runs too, which may have ended by it
                    # The other signal is passed on: runs that got the same one too would take it for a second one and
                    # die unsaved.
                    passed_on = signal.SIGINT if received[0] == signal.SIGTERM else signal.SIGTERM
                    for entry in running:
                        if entry.process.pid:
                            with contextlib.suppress(ProcessLookupError):
                                os.kill(entry.process.pid, passed_on)
                    for entry in running:
                        entry.process.join()
                        self._collect(entry)
                    say("stopped; runs under way are saved, and the same command goes on with them")
                    return 128 + received[0]
                if not running:
                    break
                ended = wait([entry.process.sentinel for entry in running], timeout=1.0)
                for entry in [entry for entry in running if entry.process.sentinel in ended]:
                    entry.process.join()
                    running.remove(entry)
                    self._collect(entry)
                    known, whole = self._known()
        for key, how in self.failed.items():
            say(f"error: run {key} {how}")
        return 1 if self.failed else 0

    def _known(self) -> tuple[dict[str, Cell], int]:
        """Return the runs that are known by now, by key, and how many there will be.

        What other studies have found of them is copied into the record of this one, of which its table is made.
        """
        known, whole = cells_of(self.study, self.records)
        own = read_records(self.study.results)
        found = [self.records[key] for key in known if key in self.records and key not in own]
        if found:
            append_records(self.study.results, found)
        return known, whole

    def _start(self, context: Any, cell: Cell) -> _Running:
        row = re.sub(r"[^\w.=,-]+", "_", cell.row)
        # The key is part of the name: after a change of the study's settings the old directory is that of another run.
        folder = (self.runs / row / f"lr-{cell.config.lr:.4g}-seed-{cell.config.seed}-{cell.key[:8]}").absolute()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{folder}: cannot be made ({error.strerror}); give another folder with --runs") from error
        config, checkpoint = cell.config, cell.config.checkpoint
        if self.study.sweep and cell.config.seed in self.study.sweep.seeds and isinstance(config, PretrainConfig):
            # A choice needs the loss at the end, and no curve.
            config = replace(config, evaluation=replace(config.evaluation, every=resolve_run(config).steps))
        config = replace(
            config,
            out=str(folder / "run"),
            resume="auto",
            threads=cell.config.threads or 1,
            checkpoint=CheckpointConfig(every=500, keep=1) if checkpoint == CheckpointConfig() else checkpoint,
        )
        process = context.Process(target=_run, args=(config, str(folder / "log.txt")))
        process.start()
        return _Running(cell, process, folder)

    def _collect(self, entry: _Running) -> None:
        """Append the record of a run that finished or diverged, and note how any other one failed."""
        code, run = entry.process.exitcode, entry.folder / "run"
        if code == 0:
            record = self._record(
                entry.cell, "finished", json.loads((run / "summary.json").read_text(encoding="utf-8")), run
            )
        elif code == _DIVERGED:
            record = self._record(entry.cell, "diverged", {}, run)
        else:
            log = entry.folder / "log.txt"
            if code == _FAULT:
                self.failed[entry.cell.key] = f"failed by a fault of the program; its traceback is in {log}"
            elif code not in _STOPPED:
                self.failed[entry.cell.key] = f"failed; its last words are in {log}"
            return
        append_records(self.study.results, [record])
        self.records[entry.cell.key] = record

    def _record(self, cell: Cell, status: str, summary: Mapping[str, Any], run: Path) -> Record:
        measured = {
            name: summary.get(name)
            for name in ("steps", "tokens", "val_loss", "test_loss", "val_ppl", "state_bytes", "seconds")
        }
        measured |= {name: summary[name] for name in (*_OF_FINETUNING, *SCORES) if name in summary}
        resolved = resolve_run(cell.config)
        curve = [[row["step"], round(row["val_loss"], 5)] for row in read_metrics(run) if "val_loss" in row]
        return {
            "key": cell.key,
            "status": status,
            "study": self.study.name,
            "row": cell.row,
            "optimizer": cell.config.optimizer,
            "seed": cell.config.seed,
            "lr": cell.config.lr,
            "settings": without_defaults(
                {key: value for key, value in asdict(cell.config).items() if key not in _TOLD}
            ),
            **measured,
            "curve": curve,
            "device": resolved.device,
            "precision": resolved.precision,
            **self._stamp,
        }


def _run(config: Any, log: str) -> None:
    """Run one cell in its own process, which ends with a status that :meth:`Runner._collect` knows."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # ignored by the process that this one is forked from
    with open(log, "a", buffering=1, encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import logging

    from subspan.training.loop import RunDivergedError
    from subspan.training.runs import prepare

    logging.getLogger("subspan").setLevel(logging.WARNING)
    try:
        prepare(config).run()
    except RunInterruptedError as error:
        say(str(error))
        sys.exit(128 + error.signum)
    except RunDivergedError as error:
        say(str(error))
        sys.exit(_DIVERGED)
    except KeyboardInterrupt:  # before the run takes signals for itself
        sys.exit(128 + signal.SIGINT)
    except UserError as error:
        say(f"error: {error}")
        sys.exit(_REFUSED)
    except BaseException:  # the log is the only place where its traceback is kept
        traceback.print_exc()
        sys.exit(_FAULT)
