"""Makes a run wait at a step, so that a test can do something to it there, however fast the machine is.

Python imports this module when it starts with this folder on its path. Where ``GATE`` names a folder and ``GATE_STEP``
a step, a run that has taken so many steps makes the file ``there`` and waits for the file ``open`` or for a signal.
"""

import importlib.abc
import importlib.machinery
import os
import signal
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

MODULE = "subspan.training.loop"


def wait(folder: Path) -> None:
    """Waits for the file ``open``, or for a signal, which is then delivered as if it came between two steps."""
    asked = {signal.SIGINT, signal.SIGTERM}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, asked)
    (folder / "there").touch()
    came = None
    while came is None and not (folder / "open").exists():
        came = signal.sigtimedwait(asked, 0.05)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if came is not None:
        signal.raise_signal(came.si_signo)


def install(module: ModuleType) -> None:
    train_step = module.Training._train_step

    def gated(run: Any) -> Any:
        if run.step == int(os.environ["GATE_STEP"]):
            wait(Path(os.environ["GATE"]))
        return train_step(run)

    module.Training._train_step = gated


class Watcher(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the module as others would, and changes it once it is imported."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != MODULE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec is not None
        assert spec.loader is not None
        self.loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: Any) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        install(module)


if "GATE" in os.environ:
    sys.meta_path.insert(0, Watcher())
