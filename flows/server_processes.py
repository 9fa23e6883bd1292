"""Processes that the servers of a clone have left, told from those of others that have their numbers by now."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import psutil

KEEPER = "flows.servers"  # the module, which a keeper has in its command
CLONE = "SLUICE_CLONE"  # variable: whose worker started a flow run
GRACE_SECONDS = 45.0  # runs write a checkpoint first; their own supervisors give them 30


def end_runs(root: Path) -> bool:
    """End the flow runs of a worker that was killed: each is in a session of its own and goes on. False without any."""
    left = runs = [process for process in psutil.process_iter() if _is_run(process, str(root.resolve()))]
    for end in (psutil.Process.terminate, psutil.Process.kill):
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                end(process)
        _, left = psutil.wait_procs(left, timeout=GRACE_SECONDS)
    return bool(runs)


def is_keeper(number: int, root: Path) -> bool:
    """Whether a process is this clone's keeper, and not one that got the number of a keeper that was killed."""
    try:
        command = psutil.Process(number).cmdline()
    except psutil.Error:
        return False
    return KEEPER in command and Path(command[command.index(KEEPER) + 1]).resolve() == root.resolve()


def _is_run(process: psutil.Process, clone: str) -> bool:
    """Whether it leads a flow run that a worker of this clone has started."""
    try:
        variables, own = process.environ(), os.getsid(process.pid) == process.pid
    except (psutil.Error, OSError):
        return False
    return own and variables.get(CLONE) == clone and "PREFECT__FLOW_RUN_ID" in variables
