"""What a run does that fails. A process imports it by name, which it cannot do with a file of tests."""

from subspan.study import runner
from subspan.training import runs


def fail(error: BaseException, log: str) -> None:
    """Runs as a run of a study does, where ``error`` is raised before anything is trained."""

    def prepare(config: object) -> None:
        raise error

    runs.prepare = prepare  # type: ignore[assignment]
    runner._run(None, log)
