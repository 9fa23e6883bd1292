"""Processes that a test has ended: one may go between two looks at it."""

import psutil


def has_ended(process: psutil.Process) -> bool:
    """Whether it is gone, or a zombie: in a container nobody may ask for what has ended."""
    try:
        return not process.is_running() or bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def exists(pid: int) -> bool:
    """Whether a process of this number has not ended."""
    try:
        return not has_ended(psutil.Process(pid))
    except psutil.NoSuchProcess:
        return False
