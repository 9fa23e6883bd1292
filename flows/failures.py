"""Why a stage failed, and whether trying again could help.

DVC exits with 255 whatever happened, so the cause is read from the stage's live file
(`.sluice/live/<stage>.json`) and, when the stage never came so far, from what DVC printed.
"""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

from pipelines.core.environment import STATE
from pipelines.core.errors import GateError, StoreUnavailable, UserError

_LOCK_TROUBLE = re.compile(r"Unable to acquire lock|is busy, it is being blocked by")
_EXIT_CODE = re.compile(r"exited with (-?\d+)")
_STOP_CODES = {128 + signal.SIGINT, 128 + signal.SIGTERM}
KILL_CODES = {-signal.SIGKILL, 128 + signal.SIGKILL, -signal.SIGTERM, *_STOP_CODES}


class StageFailed(UserError):
    """A stage ended in a way that nobody foresaw."""

    exit_code = 1


class StageKilled(StageFailed):
    """A stage was ended by a signal from outside: out of memory, a preempted machine. Worth trying again."""


class LockTrouble(StageFailed):
    """DVC did not get its lock. Worth trying again."""


def live(root: Path, stage: str) -> dict[str, Any]:
    """What the stage last said of itself; empty when it has said nothing."""
    try:
        found = json.loads((root / STATE / "live" / f"{stage}.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return found if isinstance(found, dict) else {}


def forget_live(root: Path, stage: str) -> None:
    """Remove what an earlier run of the stage said."""
    (root / STATE / "live" / f"{stage}.json").unlink(missing_ok=True)


def explain(root: Path, stage: str, code: int, log: str) -> UserError:
    """The error to raise for a stage whose `dvc repro` exited with `code`. `log` is what it printed."""
    said = live(root, stage)
    own = said.get("exit_code")
    if own is None and (match := _EXIT_CODE.search(log)):
        own = int(match[1])
    message = said.get("message") or _tail(log)
    where = f"stage {stage}: "
    if _LOCK_TROUBLE.search(log):
        return LockTrouble(where + _tail(log, lines=3))
    kinds: dict[int, type[UserError]] = {2: UserError, 3: GateError, StoreUnavailable.exit_code: StoreUnavailable}
    if own in kinds:
        return kinds[own](where + message)
    if own in KILL_CODES or code in KILL_CODES or (own is None and said.get("state") == "running"):
        return StageKilled(
            f"{where}killed from outside, perhaps for memory. What it had written stays in .work/ and the next "
            "`sluice run` goes on from there."
        )
    return StageFailed(f"{where}exit code {own if own is not None else code}\n{message}")


def worth_retrying(error: BaseException) -> bool:
    """True for what another try may mend; never for bad data, bad params or a failed gate."""
    return isinstance(error, StoreUnavailable | StageKilled | LockTrouble)


def _tail(log: str, lines: int = 15) -> str:
    return "\n".join([line for line in log.splitlines() if line.strip()][-lines:]) or "it printed nothing"
