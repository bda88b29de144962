"""The ``subspan`` command as a rank runs it, on a disk that is filled before the fourth step."""

import shutil
from pathlib import Path
from typing import Any

from subspan.cli import main as subspan_main
from subspan.training.pretraining import Pretraining
from subspan.utils.errors import InputError


def main(disk: str, leave: str, said: str, *arguments: str) -> int:
    """Leave so many bytes free, and write into ``said.RANK`` the error that ends the run."""
    train_step, run_all = Pretraining._train_step, Pretraining.run

    def step(run: Pretraining) -> Any:
        if run.step == 3:
            if run.processes.first:
                Path(disk, "ballast").write_bytes(bytes(shutil.disk_usage(disk).free - int(leave)))
            run.processes.barrier()
        return train_step(run)

    def all_steps(run: Pretraining) -> Any:
        try:
            return run_all(run)
        except InputError as error:
            Path(f"{said}.{run.processes.rank}").write_text(str(error))
            raise

    if leave != "none":
        Pretraining._train_step = step  # type: ignore[method-assign]
    Pretraining.run = all_steps  # type: ignore[method-assign]
    return subspan_main(list(arguments))
