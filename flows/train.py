"""The flow: every stage of `dvc.yaml` as a Prefect task, in the order DVC gives, with retries and gates.

What depends on what, and whether a stage has to run at all, is DVC's business. The flow decides when: a stage
starts as soon as the stages it waits for are done and passed their gates. Stages that do not wait for one
another go side by side when each leaves room: `compute.threads: 0` gives a stage every core, so then they take
turns; with `threads: 4` on 16 cores four go at once. A stage's own thread count never depends on its neighbours,
or its bytes would.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import Flow, Task, flow
from prefect.futures import PrefectConcurrentFuture
from prefect.runtime import flow_run
from rich.console import Console

from flows import failures, outcome, records, run_locks, stages, view
from flows.ahead import Ahead
from flows.board import Board, Row, StageState
from flows.gate import Gate
from flows.supervise import Crew, child_environment
from pipelines.core import promotion, store, tracking
from pipelines.core.environment import STATE
from pipelines.core.errors import UserError
from pipelines.core.params import whole

RETRY_SECONDS = (2.0, 10.0)
POLL_SECONDS = 0.25
DONE_SECONDS = 0.1
PUBLISH_SECONDS = 5.0


@dataclass
class Job:
    """One run of the flow: what its tasks share."""

    root: Path
    board: Board
    graph: stages.State
    crew: Crew
    seats: threading.Semaphore  # how many stages may compute at once
    gate: Gate
    dvc: Ahead
    progress: dict[str, UUID] = field(default_factory=dict)

    def stage(self, name: str, suspect: bool) -> None:
        """Run one stage if DVC finds that it has to, then let its model through its gate.

        Raises:
            UserError: the stage failed, or its model did not pass; `exit_code` says which.
            Exception: nobody foresaw it; the row has it as a `StageFailed`.
        """
        row = self.board.rows[name]
        row.error = None
        try:
            if suspect:
                failures.forget_live(self.root, name)
            with self._judged_meanwhile(row) if suspect and not self.graph.links else nullcontext(), self.seats:
                row.begin()
                if (bar := records.progress(name)) is not None:
                    self.progress[name] = bar
                state: StageState = self._repro(row) if suspect else "cached"
            # Its seat is free: registering copies files and computes nothing
            row.metric = outcome.key_metric(self.root, name, self.graph.shows.get(name))
            self.gate.ask(row, fresh_output=state != "cached")
            row.end(state)
        except UserError as error:
            row.error = error
            row.end("failed")
            raise
        except Exception as error:
            row.error = failures.StageFailed(f"stage {name}: {type(error).__name__}: {store.without_login(str(error))}")
            row.end("failed")
            raise
        records.metrics(name, outcome.metrics(self.root, name))

    def may_retry(self, name: str) -> bool:
        """Whether the failure of a stage is one that another try may mend."""
        row = self.board.rows[name]
        again = row.error is not None and failures.worth_retrying(row.error) and not self.crew.stopped
        if again:
            row.notes.append(f"will be tried again: {row.error}")
        return again

    def _repro(self, row: Row) -> StageState:
        """`dvc repro` of one stage; what DVC did is told by what it prints."""
        assert row.log is not None
        start = row.log.stat().st_size if row.log.exists() else 0
        code = self.dvc.run(["--wait-for-lock", "repro", "-s", row.stage], row.log)
        with row.log.open("rb") as file:
            file.seek(start)
            printed = file.read().decode("utf-8", "replace")
        if code:
            raise failures.explain(self.root, row.stage, code, printed)
        if f"Running stage '{row.stage}'" in printed:
            return "run"
        return "cached" if "didn't change, skipping" in printed else "restored"

    @contextmanager
    def _judged_meanwhile(self, row: Row) -> Iterator[None]:
        """Once the stage itself is done, its model does not wait for what DVC still has to do with the output."""
        over = threading.Event()

        def watch() -> None:
            while not over.wait(DONE_SECONDS):
                if failures.live(self.root, row.stage).get("state") == "done":
                    self.gate.begin(row, over)
                    return

        watching = threading.Thread(target=watch)
        watching.start()
        try:
            yield
        finally:
            over.set()
            watching.join()


def train(state: stages.State) -> Flow[..., None]:
    """The flow, over a graph that DVC was asked for just now; it is asked again where its files have changed since.

    Its parameters: the repository's root, the wanted stages (all, if none is named), whether to print plain lines, and
    whether what they depend on is taken as it stands. It raises a UserError: the first failure in the graph's order,
    with the exit code that belongs to it.
    """

    @flow(name="train", log_prints=False)
    def train(root: str, wanted: list[str], plain: bool, only: bool) -> None:
        _train(Path(root).resolve(), wanted, plain, only, state)

    return train


def _train(place: Path, wanted: list[str], plain: bool, only: bool, known: stages.State) -> None:
    console = Console()
    try:
        promotion.recover(place)
    except UserError as error:  # fails no stage; whatever promotes at its end tries first, and tells
        console.print(str(error), markup=False, highlight=False, soft_wrap=True)
    with run_locks.alone(place):
        run_locks.dvc_at_work(place)  # so that no process that is no more is waited for
        graph = known if known.holds(place) else stages.look(place)
        needed, suspects = graph.needed(wanted, only), graph.suspects()
        logs = place / STATE / "logs" / str(flow_run.name)
        board = Board(place, {name: Row(name, log=logs / f"{name}.log") for name in needed})
        board.title = f"{flow_run.name}   output: {logs.relative_to(place)}/"
        crew = Crew()
        seats = threading.Semaphore(stages.side_by_side(place))
        gate = Gate(place, whole.load(place / "params.yaml").flow.failed_gate == "stop", crew, seats)
        with tracking.attended(place) as environment:
            # The environment tells a stage that the flow registers for it
            env = child_environment(PYTHONUNBUFFERED="1", **environment)
            job = Job(place, board, graph, crew, seats, gate, Ahead(crew, place, logs / "dvc.log", env))
            try:
                if not suspects.isdisjoint(needed):
                    job.dvc.prepare()
                futures = _submit(job, needed, suspects)
                with view.shown(board, console, plain) as update:
                    _watch(job, futures, update)
                    gate.promote_left()
            except BaseException:
                job.crew.stop()
                raise
            finally:
                job.dvc.close()
        console.print(view.stages_table(board))
        _conclude(job, needed)


def _submit(job: Job, needed: list[str], suspects: set[str]) -> list[PrefectConcurrentFuture[None]]:
    """One task a stage, parents first."""
    futures: dict[str, PrefectConcurrentFuture[None]] = {}
    for name in needed:
        parents = [futures[parent] for parent in job.graph.parents[name] if parent in futures]
        future = _task(job, name).submit(name, name in suspects, wait_for=parents, return_state=False)
        assert isinstance(future, PrefectConcurrentFuture)  # of the flow's thread pool
        futures[name] = future
    return list(futures.values())


def _task(job: Job, name: str) -> Task[[str, bool], None]:
    def run_stage(stage: str, suspect: bool) -> None:
        job.stage(stage, suspect)

    def may_retry(task: Task[..., Any], run: Any, state: Any) -> bool:
        return job.may_retry(name)

    return Task(
        run_stage,
        name=name,
        task_run_name=name,
        retries=len(RETRY_SECONDS),
        retry_delay_seconds=list(RETRY_SECONDS),
        retry_condition_fn=may_retry,
    )


def _watch(job: Job, futures: list[PrefectConcurrentFuture[None]], update: Callable[[], None]) -> None:
    """Keep the terminal and Prefect's progress bars up to date until every task is over.

    Prefect's own `wait` ends by an alarm, which may come while the lock of what it waits on is taken and never given
    back: a task that ends then waits for it for ever. And each call leaves a callback with every task.
    """
    published = time.monotonic()
    tasks = [future.wrapped_future for future in futures]
    while wait(tasks, timeout=POLL_SECONDS).not_done:
        update()
        if time.monotonic() - published >= PUBLISH_SECONDS:
            published = time.monotonic()
            for name, row in job.board.rows.items():
                share = row.share()
                if row.state == "running" and name in job.progress and share is not None:
                    records.update(job.progress[name], share)


def _conclude(job: Job, needed: list[str]) -> None:
    """Raise what there is to complain about: a failed stage first, then a store or ledger, then DVC's last word."""
    if error := job.board.error():
        raise error
    if unfinished := [name for name, row in job.board.rows.items() if row.state in ("waiting", "running")]:
        raise failures.StageFailed(f"Prefect ended the flow before these stages: {', '.join(unfinished)}")
    if job.gate.trouble:
        raise job.gate.trouble[0]
    left = stages.look(job.root).reasons
    if stale := [f"{name} ({', '.join(left[name])})" for name in needed if name in left]:
        raise failures.StageFailed(f"changed while the flow ran, run it again: {'; '.join(stale)}")
