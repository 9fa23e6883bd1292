"""Processes that the servers of a clone have left, told from those of others that have their numbers by now."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import psutil

KEEPER = "flows.servers"  # the module, which a keeper has in its command
CLONE = "SLUICE_CLONE"  # variable: whose worker started a flow run
GRACE_SECONDS = 45.0  # runs write a checkpoint first; their own supervisors give them 30


def end_runs(clones: set[Path]) -> bool:
    """End the flow runs of a worker that was killed: each is in a session of its own and goes on. False without any.

    Args:
        clones: where the clone is, and where it was when its worker was started.
    """
    names = {str(clone) for clone in clones}
    left = runs = [process for process in psutil.process_iter() if _is_run(process, names)]
    for end in (psutil.Process.terminate, psutil.Process.kill):
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                end(process)
        _, left = psutil.wait_procs(left, timeout=GRACE_SECONDS)
    return bool(runs)


def kept_by(number: int, lock: Path) -> Path | None:
    """The clone that a process keeps; None where it is not the keeper that has this lock.

    The number of one that was killed is another process's by now, and a keeper of another clone has another lock. The
    clone is where it was when the keeper was started: a folder may be moved under it.
    """
    try:
        process = psutil.Process(number)
        command, opened = process.cmdline(), [Path(one.path) for one in process.open_files()]
        if KEEPER in command and any(place.samefile(lock) for place in opened):
            return Path(command[command.index(KEEPER) + 1])
    except (psutil.Error, OSError):
        pass
    return None


def _is_run(process: psutil.Process, clones: set[str]) -> bool:
    """Whether it leads a flow run that a worker of one of these clones has started."""
    try:
        variables, own = process.environ(), os.getsid(process.pid) == process.pid
    except (psutil.Error, OSError):
        return False
    return own and variables.get(CLONE) in clones and "PREFECT__FLOW_RUN_ID" in variables
