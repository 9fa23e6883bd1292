"""What follows when a stage has ended well: its gate is asked and what passes is promoted, one stage at a time.

A stage that does not wait for the verdict may compute meanwhile: what is copied and compared here takes no seat. Only
to measure a champion again takes one, and nothing is held while it is waited for: others ask the registry, too.
Nothing here but a failed gate stops a stage. What depends on it needs its verdict, not a champion, so a store that is
away and somebody else's promotion that does not end are waited for while the other stages run: what could not be
promoted is tried again when all are over, and what then still cannot be is told, with the command for it.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from flows import outcome, records
from flows.board import Row
from flows.failures import StageFailed
from flows.measure import NOT_MEASURABLE
from flows.supervise import Crew, child_environment
from pipelines.core.errors import GateError, StoreUnavailable, UserError
from pipelines.core.gates import Verdict
from pipelines.core.ledger import LedgerHeld
from pipelines.core.verdicts import NotMeasurable


class _NoSeat(Exception):
    """A champion has to be measured again, which takes a seat."""


@dataclass(frozen=True)
class Left:
    """A stage that was judged and whose models could not be promoted."""

    row: Row
    judged: list[Verdict]
    fresh_output: bool

    def names(self, root: Path) -> list[str]:
        """The versions that the next run would not promote by itself, since its output is not fresh any more."""
        passed = [one for one in self.judged if one.passed and self.fresh_output and outcome.automatic(root, one)]
        return [f"{one.model} {one.version}" for one in passed]


@dataclass
class Gate:
    """The gate of a flow's stages."""

    root: Path
    stops: bool = True  # whether a model that does not pass fails its stage
    crew: Crew = field(default_factory=Crew)  # of the flow: whose process measures a champion again
    seats: threading.Semaphore = field(default_factory=threading.Semaphore)  # one of which it takes for that
    left: list[Left] = field(default_factory=list)
    trouble: list[UserError] = field(default_factory=list)  # what failed no stage, for the flow's end
    seated: set[str] = field(default_factory=set)  # stages whose champion has to be measured again
    registry: threading.Lock = field(default_factory=threading.Lock)  # judging and promoting both write it

    def begin(self, row: Row, over: threading.Event) -> None:
        """Register and judge what a stage has just made, while DVC takes it into its cache: both copy and hash.

        Nothing is promoted. What is missing or wrong here, `ask` meets again.

        Args:
            over: set when DVC has ended, well or not: `ask` does it all then.
        """
        with contextlib.suppress(Exception), self.registry:
            try:
                if not over.is_set():
                    self._judge(row, seated=False)
            except _NoSeat:
                self.seated.add(row.stage)

    def ask(self, row: Row, fresh_output: bool) -> None:
        """Judge what a stage made and promote what passed.

        Args:
            fresh_output: whether it was made, or brought back, in this run.

        Raises:
            GateError: a model did not pass, or a rule cannot be asked.
        """
        if row.stage not in self.seated:
            try:
                self._ask(row, fresh_output, seated=False)
                return
            except _NoSeat:
                pass
        with self.seats:
            self._ask(row, fresh_output, seated=True)

    def _ask(self, row: Row, fresh_output: bool, seated: bool) -> None:
        """Raises `_NoSeat` where that is what is missing; then it can be asked again."""
        with self.registry:
            try:
                judged = self._judge(row, seated)
            except StoreUnavailable as error:
                row.verdict = row.verdict or "not judged: store away"
                self.trouble.append(error)
                return
            row.verdict = outcome.cell(judged)
            if fresh_output and row.log is not None:
                with row.log.open("a", encoding="utf-8") as log:
                    log.writelines(f"{one.table()}\n" for one in judged)
            for one in judged:
                records.verdict(one)
            try:
                if self.left:  # what that one waits for would hold up every stage after it
                    self.left.append(Left(row, judged, fresh_output))
                else:
                    judged = self._promote(row, judged, fresh_output, seated)
            except (StoreUnavailable, LedgerHeld) as error:
                row.notes.append(f"promotes when the other stages are over, if that is possible then: {error}")
                self.left.append(Left(row, judged, fresh_output))
            self._enforce(row, judged)

    def _judge(self, row: Row, seated: bool, again: bool = False) -> list[Verdict]:
        return outcome.judge(self.root, row.stage, partial(self._measure, row, seated), again)

    def _measure(self, row: Row, seated: bool, model: Path, evaluation: Path) -> None:
        """Measure a champion again, in a process as a stage is, so that no model is loaded into this one."""
        assert row.log is not None
        if not seated:
            raise _NoSeat
        command = [sys.executable, "-m", "flows.measure", row.stage, str(model), str(evaluation)]
        code = self.crew.run(command, self.root, row.log, child_environment(PYTHONUNBUFFERED="1"))
        if code == NOT_MEASURABLE:
            raise NotMeasurable(row.stage)
        if code:
            raise StageFailed(f"stage {row.stage}: its champion could not be measured again, see {row.log}")

    def promote_left(self) -> None:
        """Try again, when every stage is over, what could not be promoted before."""
        for number, one in enumerate(self.left):
            try:
                self._enforce(one.row, self._promote(one.row, one.judged, one.fresh_output, seated=True))
            except (StoreUnavailable, LedgerHeld) as error:
                names = [name for later in self.left[number:] for name in later.names(self.root)]
                told = f"\npassed and not promoted: {', '.join(names)} (`sluice promote MODEL VERSION --why ...`)"
                self.trouble.insert(0, type(error)(f"{error}{told if names else ''}"))
                return
            except GateError as error:
                one.row.error = error
                one.row.end("failed")

    def _promote(self, row: Row, judged: list[Verdict], fresh_output: bool, seated: bool) -> list[Verdict]:
        """Promote what passed. Returns the verdicts: new ones where somebody has moved a champion meanwhile."""
        again = partial(self._judge, row, seated, again=True)
        judged = outcome.promote_all(self.root, judged, fresh_output, again, row.notes.append)
        row.verdict = outcome.cell(judged)
        if pointed := outcome.point_best(self.root, row.stage):
            row.notes.append(pointed)
        return judged

    def _enforce(self, row: Row, judged: list[Verdict]) -> None:
        if failed := "\n".join(one.table() for one in judged if not one.passed):
            if self.stops:
                raise GateError(f"what depends on stage {row.stage} does not run\n{failed}")
            row.notes.append(f"goes on (flow.failed_gate) although\n{failed}")
