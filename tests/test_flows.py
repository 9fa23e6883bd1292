"""The flow on a small repository with real DVC: order, retries, gates, and what is left running (nothing)."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import fake_repository as fake
import httpx
import psutil
import pytest
from prefect.futures import PrefectConcurrentFuture
from processes import has_ended
from rich.console import Console

from flows import automations, failures, outcome, overrides, records, run, stages, train
from flows.ahead import Ahead
from flows.board import Board, Row
from flows.gate import Gate
from flows.measure import NOT_MEASURABLE
from flows.run_locks import alone
from flows.supervise import Crew, child_environment
from flows.train import Job, _conclude
from pipelines.core import hardware, promotion, registry
from pipelines.core.errors import GateError, StoreUnavailable, UserError
from pipelines.core.gates import Row as Rule
from pipelines.core.gates import Verdict
from pipelines.core.verdicts import NotMeasurable


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake.make(tmp_path_factory.mktemp("flows") / "repository")


@pytest.fixture
def root(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "repository"
    shutil.copytree(template, place)
    for key, value in fake.environment(place, tmp_path / "prefect").items():
        monkeypatch.setenv(key, value)
    return place


@pytest.fixture
def job(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Job]:
    """A flow without Prefect: its records go nowhere."""
    for name in ("metrics", "verdict", "update"):
        monkeypatch.setattr(records, name, lambda *_: None)
    monkeypatch.setattr(records, "progress", lambda _: uuid4())
    state = stages.look(root)
    board = Board(root, {name: Row(name, log=root / ".sluice" / f"{name}.log") for name in state.parents})
    crew, seats = Crew(), threading.Semaphore(2)
    dvc = Ahead(crew, root, root / ".sluice" / "dvc.log", child_environment(PYTHONUNBUFFERED="1"))
    yield Job(root, board, state, crew, seats, Gate(root, crew=crew, seats=seats), dvc)
    crew.stop()
    dvc.close()


def behave(root: Path, stage: str, words: str) -> None:
    (root / "behaviour" / stage).write_text(words)


def verdict(passed: bool, version: str = "2") -> Verdict:
    rule = Rule("loss at most 1", 1.5, None, None, 1.0, None, passed)
    return Verdict("data", "sluice-base", (rule,), content_hash="c", version=version, run_id="r")


def _free(seats: threading.Semaphore) -> int:
    taken = sum(iter(lambda: seats.acquire(blocking=False), False))
    if taken:
        seats.release(taken)
    return taken


def sluice(root: Path, *arguments: str, before: str = "") -> subprocess.CompletedProcess[str]:
    code = f"{before}\nfrom flows.cli import app; app()"
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=150)


# What DVC says


def test_a_state_holds_until_a_file_of_dvc_changes(root: Path) -> None:
    state = stages.look(root)
    assert state.holds(root) and not state.links
    (root / "dvc.lock").write_text("schema: '2.0'\nstages: {}\n")
    assert not state.holds(root)
    (root / ".dvc" / "config").write_text("[cache]\n    type = hardlink\n")
    assert stages.look(root).links


def test_the_graph_and_its_state_come_from_dvc(root: Path) -> None:
    state = stages.look(root)
    assert state.parents == {"data": (), "left": ("data",), "right": ("data",), "report": ("left", "right")}
    assert state.shows == {"data": "score"}
    assert state.suspects() == {"data", "left", "right", "report"}
    assert state.needed(["left"]) == ["data", "left"]
    with pytest.raises(UserError, match="no stage 'lift'.*data, left, right, report"):
        state.needed(["lift"])


def test_a_broken_graph_is_one_message(root: Path) -> None:
    (root / "dvc.yaml").write_text("stages:\n  data:\n   cmd: [")
    with pytest.raises(UserError, match=r"dvc\.yaml"):
        stages.look(root)


def test_stages_share_no_core(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "cores", lambda: 16)
    assert stages.side_by_side(root) == 1  # threads: 0 gives a stage every core
    place = root / "params.yaml"
    place.write_text(place.read_text().replace("threads: 0", "threads: 4"))
    assert stages.side_by_side(root) == 4


# One stage


def test_a_stage_is_run_then_cached_then_restored(root: Path, job: Job) -> None:
    job.stage("data", suspect=True)
    row = job.board.rows["data"]
    assert (row.state, row.metric, fake.ran(root)) == ("run", "score 0.25", ["data"])
    job.stage("data", suspect=True)
    assert (row.state, fake.ran(root)) == ("cached", [])
    (root / "stage.py").write_text((root / "stage.py").read_text() + "# new\n")
    job.stage("data", suspect=True)
    assert (row.state, fake.ran(root)) == ("run", ["data"])
    (root / "stage.py").write_text((root / "stage.py").read_text().removesuffix("# new\n"))
    (root / "metrics" / "data.json").unlink()
    job.stage("data", suspect=True)
    assert (row.state, fake.ran(root)) == ("restored", [])


def test_a_champion_is_measured_by_a_process_of_the_crew(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    codes = iter([0, NOT_MEASURABLE, 143])

    def run(command: list[str], *_: Any) -> int:
        asked.append(command[2:])
        return next(codes)

    monkeypatch.setattr(job.gate.crew, "run", run)
    measure = partial(job.gate._measure, job.board.rows["left"], True)
    measure(Path("model"), Path("rows"))
    assert asked == [["flows.measure", "left", "model", "rows"]]
    with pytest.raises(NotMeasurable):
        measure(Path("model"), Path("rows"))
    with pytest.raises(failures.StageFailed, match=r"champion could not be measured again, see .*left\.log"):
        measure(Path("model"), Path("rows"))


@pytest.mark.parametrize(
    ("code", "kind", "again"),
    [
        (2, UserError, False),
        (3, GateError, False),
        (75, StoreUnavailable, True),
        (143, failures.StageKilled, True),
        (1, failures.StageFailed, False),
    ],
)
def test_only_what_another_try_may_mend_is_tried_again(
    root: Path, job: Job, code: int, kind: type[UserError], again: bool
) -> None:
    behave(root, "data", f"fail {code}")
    with pytest.raises(UserError) as caught:
        job.stage("data", suspect=True)
    assert type(caught.value) is kind
    assert job.may_retry("data") is again
    assert job.board.rows["data"].state == "failed"
    if code in (2, 3, 75):
        assert str(caught.value) == "stage data: bad thing in data"
        assert caught.value.exit_code == code
    assert not (root / "artifacts" / "data").exists()


def test_a_stage_that_was_killed_is_tried_again_but_not_after_a_stop(root: Path, job: Job) -> None:
    behave(root, "data", "sleep 60")
    thread = threading.Thread(target=lambda: pytest.raises(UserError, job.stage, "data", True))
    thread.start()
    os.kill(_pid(root, "data"), signal.SIGKILL)
    thread.join(20)
    assert isinstance(job.board.rows["data"].error, failures.StageKilled)
    assert job.may_retry("data")
    job.crew.stop()
    assert not job.may_retry("data")


def test_an_error_before_the_stage_speaks_shows_what_dvc_printed(root: Path, job: Job) -> None:
    with pytest.raises(failures.StageFailed, match=r"(?s)stage left: .*artifacts/data"):
        job.stage("left", suspect=True)


def test_dvc_without_its_lock_is_tried_again(tmp_path: Path) -> None:
    error = failures.explain(tmp_path, "data", 255, "ERROR: Unable to acquire lock. Most likely another DVC process")
    assert isinstance(error, failures.LockTrouble) and failures.worth_retrying(error)


# Gates


def test_a_stage_that_is_judged_keeps_no_other_from_computing(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    free: list[int] = []
    monkeypatch.setattr(outcome, "judge", lambda *_: free.append(_free(job.seats)) or [verdict(True)])
    monkeypatch.setattr(outcome, "promote", lambda *_: None)
    job.stage("data", suspect=True)
    early = free[:-1]  # while DVC still had the stage's own seat, if the stage was seen to be done before DVC was
    assert free[-1] == 2 and early in ([], [1]) and _free(job.seats) == 2


def test_what_a_stage_has_made_is_judged_while_dvc_takes_it_and_promoted_after(
    root: Path, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []

    def judge(*_: Any) -> list[Verdict]:
        steps.append("judged, committed" if (root / "dvc.lock").exists() else "judged")
        if len(steps) == 1:
            raise StoreUnavailable("the store is away, for a moment")  # asked again
        return [verdict(True)]

    behave(root, "data", "linger 2 0")
    monkeypatch.setattr(outcome, "judge", judge)
    monkeypatch.setattr(outcome, "promote", lambda *_: steps.append("promoted"))
    job.stage("data", suspect=True)
    assert steps == ["judged", "judged, committed", "promoted"]
    job.stage("data", suspect=True)
    assert steps[3:] == ["judged, committed", "promoted"], "what did not run is judged once"


@pytest.mark.parametrize(("words", "judged"), [("fail 1", 0), ("linger 1 1", 1)])
def test_what_a_stage_that_fails_has_made_is_not_promoted(
    job: Job, monkeypatch: pytest.MonkeyPatch, words: str, judged: int
) -> None:
    steps: list[str] = []
    monkeypatch.setattr(outcome, "judge", lambda *_: time.sleep(2) or steps.append("judged") or [verdict(True)])
    monkeypatch.setattr(outcome, "promote", lambda *_: steps.append("promoted"))
    behave(job.root, "data", words)
    with pytest.raises(failures.StageFailed):
        job.stage("data", suspect=True)
    assert steps == ["judged"] * judged, "whoever tries again waits for the one that judges"


def test_a_champion_to_be_measured_again_is_looked_at_once_without_a_seat(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    free: list[int] = []

    def judge(_: Path, __: str, measure: Callable[[Path, Path], None], *___: Any) -> list[Verdict]:
        free.append(_free(job.seats))
        measure(Path("model"), Path("rows"))
        return [verdict(True)]

    monkeypatch.setattr(outcome, "judge", judge)
    monkeypatch.setattr(outcome, "promote", lambda *_: None)
    monkeypatch.setattr(job.gate.crew, "run", lambda *_: 0)
    behave(job.root, "data", "linger 2 0")
    job.stage("data", suspect=True)
    assert free == [1, 1], "while DVC was at work, and with a seat for the measuring"


def test_a_champion_that_is_measured_waits_for_a_seat_and_nobody_waits_for_it(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[int] = []

    def judge(_: Path, stage: str, measure: Callable[[Path, Path], None], *__: Any) -> list[Verdict]:
        if stage == "left":
            measure(Path("model"), Path("rows"))
        return [verdict(True)]

    monkeypatch.setattr(outcome, "judge", judge)
    monkeypatch.setattr(outcome, "promote", lambda *_: None)
    monkeypatch.setattr(job.gate.crew, "run", lambda *_: measured.append(_free(job.seats)) or 0)
    left, right = (
        threading.Thread(target=job.gate.ask, args=(job.board.rows[name], True), daemon=True)
        for name in ("left", "right")
    )
    with job.seats, job.seats:  # two other stages compute
        left.start()
        left.join(0.5)
        right.start()
        right.join(10)
        assert left.is_alive() and not right.is_alive() and not measured
    left.join(10)
    assert measured == [1] and _free(job.seats) == 2 and job.board.rows["left"].verdict


def test_a_failed_gate_fails_the_stage_with_its_table(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outcome, "judge", lambda *_: [verdict(False)])
    monkeypatch.setattr(outcome, "promote", lambda *_: pytest.fail("promoted what did not pass"))
    with pytest.raises(GateError, match=r"(?s)what depends on stage data does not run.*FAILED.*loss at most 1"):
        job.stage("data", suspect=True)
    row = job.board.rows["data"]
    assert (row.state, row.verdict) == ("failed", "sluice-base 2 FAILED")
    assert not job.may_retry("data")


def test_what_nobody_foresaw_in_a_gate_fails_the_stage_and_is_told(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no such column")

    monkeypatch.setattr(outcome, "judge", broken)
    with pytest.raises(RuntimeError, match="no such column"):
        job.stage("data", suspect=True)
    row = job.board.rows["data"]
    assert row.state == "failed" and str(job.board.error()) == "stage data: RuntimeError: no such column"
    assert not job.may_retry("data")
    with pytest.raises(failures.StageFailed, match="RuntimeError: no such column"):
        _conclude(job, ["data"])


def test_a_failed_gate_only_notes_its_table_where_the_params_say_so(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outcome, "judge", lambda *_: [verdict(False)])
    monkeypatch.setattr(outcome, "promote", lambda *_: pytest.fail("promoted what did not pass"))
    job.gate.stops = False
    job.stage("data", suspect=True)
    row = job.board.rows["data"]
    assert (row.state, row.verdict) == ("run", "sluice-base 2 FAILED")
    assert "loss at most 1" in row.notes[-1]


def test_of_several_models_those_that_passed_are_promoted_and_one_that_did_not_stops(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    promoted: list[Any] = []
    monkeypatch.setattr(outcome, "judge", lambda *_: [verdict(True), verdict(False)])
    monkeypatch.setattr(outcome, "promote", lambda _, one, __: promoted.append(one.passed))
    with pytest.raises(GateError, match="loss at most 1"):
        job.stage("data", suspect=True)
    assert promoted == [True]
    assert job.board.rows["data"].verdict == "1 of 2 models passed, sluice-base 2 FAILED"


def test_a_store_that_is_away_stops_no_stage(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: Any) -> None:
        raise StoreUnavailable("away")

    monkeypatch.setattr(outcome, "judge", away)
    job.stage("data", suspect=True)
    assert job.board.rows["data"].state == "run"
    assert [str(error) for error in job.gate.trouble] == ["away"]


@pytest.mark.parametrize(
    ("champion", "compared", "before", "fresh_output", "expected"),
    [
        (None, None, False, False, True),
        (None, None, False, True, True),
        ("1", "1", True, True, True),
        ("1", "1", False, False, True),  # a run was cut off between the stage and its promotion
        ("1", "1", True, False, False),  # a person has rolled back
        (None, None, True, False, False),  # the same, to nobody
        ("1", "0", False, False, False),  # the champion is another one than it was compared with
        ("2", "1", False, True, False),  # it is the champion
    ],
)
def test_what_passed_is_promoted_but_never_over_a_persons_rollback(
    root: Path, monkeypatch: pytest.MonkeyPatch, champion: str | None, compared: str | None, before: bool,
    fresh_output: bool, expected: bool,
) -> None:  # fmt: skip
    rule = {"metric": "score", "at_most": 1.0}
    entry = {"stage": "data", "model": "model", "gate": [rule], "promote": "auto"}
    (root / "mlflow" / "registry.yaml").write_text(json.dumps({"models": {"sluice-base": entry}}))
    calls: list[Any] = []
    monkeypatch.setattr(registry, "champion", lambda _, model: champion if model == "sluice-base" else None)
    monkeypatch.setattr(promotion, "promote", lambda *args, **kwargs: calls.append(kwargs["expected_champion"]))
    monkeypatch.setattr(promotion, "was_promoted", lambda *_: before)
    monkeypatch.setattr(promotion, "was_rolled_back", lambda *_: False)
    judged = replace(verdict(True), champion=compared)
    done = outcome.promote(root, judged, fresh_output)
    assert (done is not None, calls) == (expected, [judged.champion] if expected else [])
    entry["promote"] = "manual"
    (root / "mlflow" / "registry.yaml").write_text(json.dumps({"models": {"sluice-base": entry}}))
    assert outcome.promote(root, verdict(True), fresh_output) is None


@pytest.mark.parametrize(
    ("promote", "before", "champion", "waits"),
    [
        ("auto", False, None, True),
        ("auto", False, "2", False),  # a person has promoted it
        ("auto", True, "1", False),  # and another one since
        ("manual", False, None, False),  # it always waits for a person
    ],
)
def test_what_passed_unmeasured_is_not_promoted_and_tells_what_to_type(
    root: Path, monkeypatch: pytest.MonkeyPatch, promote: str, before: bool, champion: str | None, waits: bool
) -> None:
    rule = {"metric": "score", "at_most": 1.0, "where_measured": True, "by_hand_without": "references"}
    entry = {"stage": "data", "model": "model", "gate": [rule], "promote": promote}
    (root / "mlflow" / "registry.yaml").write_text(json.dumps({"models": {"sluice-base": entry}}))
    monkeypatch.setattr(registry, "champion", lambda *_: champion)
    monkeypatch.setattr(promotion, "promote", lambda *_, **__: pytest.fail("nobody was asked"))
    monkeypatch.setattr(promotion, "was_promoted", lambda *_: before)
    monkeypatch.setattr(promotion, "was_rolled_back", lambda *_: False)
    (waived, *_) = verdict(True).rows
    judged = replace(verdict(True), rows=(replace(waived, by_hand_without="references"),), champion=champion)
    told: list[str] = []
    assert outcome.promote_all(root, [judged], False, list, told.append) == [judged]
    expected = (
        "sluice-base 2 is promoted by hand alone (`sluice promote sluice-base 2 --why ...`), for what was not "
        f"measured: {waived.rule} (needs references)"
    )
    assert told == [expected] * waits
    cell = f"sluice-base 2 passed, not measured: {waived.rule} (needs references)"
    assert outcome.cell([judged]) == cell
    assert (
        outcome.cell([verdict(True), judged, verdict(False)]) == f"2 of 3 models passed, {cell}, sluice-base 2 FAILED"
    )


def test_what_prefect_shows_of_a_run_does_not_end_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A progress bar that could not be moved, of a server that is away for minutes, stopped every stage of the flow."""

    def away(*_: Any, **__: Any) -> None:
        raise httpx.ConnectError("connection refused")

    for name in ("create_progress", "update_progress", "create_table", "create_link"):
        monkeypatch.setattr(records, f"{name}_artifact", away)
    assert records.progress("data") is None
    records.update(uuid4(), 0.5)
    records.metrics("data", {"rows": 1.0})
    records.verdict(verdict(True))
    assert capsys.readouterr().err == "warning: Prefect was not told of the run: connection refused\n" * 4


def test_the_way_to_a_run_holds_no_login(monkeypatch: pytest.MonkeyPatch) -> None:
    links: list[str] = []
    monkeypatch.setattr(records, "create_table_artifact", lambda *_, **__: None)
    monkeypatch.setattr(records, "create_link_artifact", lambda link, **_: links.append(link))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://bob:hunter2@mlflow.example.org/")
    records.verdict(verdict(True))
    assert links == ["https://mlflow.example.org/#/runs/r"]


@pytest.mark.parametrize("way", ["a run", "a run with nothing to do", "servers"])
def test_a_promotion_that_was_cut_off_is_brought_to_an_end_by_whoever_comes_by(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], way: str
) -> None:
    """And where the store is away it holds up no run and no server."""
    asked: list[Path] = []

    def recover(place: Path) -> None:
        asked.append(place)
        raise StoreUnavailable("the store is away")

    monkeypatch.setattr(promotion, "recover", recover)
    if way == "a run":
        with alone(root), pytest.raises(failures.LockTrouble):  # before it takes a lock
            train.train(stages.look(root)).fn(str(root), [], False, False)
    elif way == "servers":
        called: list[list[str]] = []
        monkeypatch.setattr(automations, "_set_up", lambda: asyncio.sleep(0))
        monkeypatch.setattr(subprocess, "run", lambda command, **_: called.append(command))
        automations.set_up(root)
        assert called[0][-2:] == ["deploy", "--all"]
    else:
        monkeypatch.setattr(registry, "reconcile", lambda *_: [])
        with pytest.raises(StoreUnavailable, match="the store is away"):
            run._catch_up(root, stages.look(root), ["left"], Console())
    assert asked == [root]
    told = capsys.readouterr()
    assert way == "a run with nothing to do" or "the store is away" in told.out + told.err


def test_one_flow_at_a_time(root: Path) -> None:
    with alone(root), pytest.raises(failures.LockTrouble, match=f"process {os.getpid()}"), alone(root):
        pass
    with alone(root):
        pass


@pytest.mark.parametrize("words", [("run", "--profile", "tiny"), ("profile", "tiny")])
def test_a_profile_is_not_put_under_a_flow_that_goes_on(root: Path, words: tuple[str, ...]) -> None:
    """Somebody else's, in the same clone: its stages to come would run with these values."""
    before = (root / "params.yaml").read_text()
    with alone(root):
        done = sluice(root, *words)
    assert done.returncode == 1 and "another flow is running" in done.stderr, done.stdout + done.stderr
    assert (root / "params.yaml").read_text() == before and "->" not in done.stdout


# The whole thing, with Prefect


def test_a_run_from_nothing_and_then_nothing_to_do(root: Path) -> None:
    behave(root, "left", "fail 75 once")
    first = sluice(root, "run", "--plain")
    assert first.returncode == 0, first.stdout + first.stderr
    assert first.stderr == ""
    assert fake.ran(root) == ["data", "left", "left", "report", "right"]
    assert "will be tried again: stage left: bad thing in left" in first.stdout
    assert "data       | hello from data" in first.stdout
    assert len(list((root / ".sluice" / "logs").glob("*/left.log"))) == 1
    second = sluice(root, "run")
    assert second.returncode == 0, second.stdout + second.stderr
    assert fake.ran(root) == []
    assert "nothing has changed, no stage runs" in second.stdout


@pytest.mark.slow
def test_only_takes_the_rest_as_it_stands(root: Path) -> None:
    assert sluice(root, "run").returncode == 0
    fake.ran(root)
    (root / "stage.py").write_text((root / "stage.py").read_text() + "# newer\n")
    overrides.apply(root, ["pretrain.tokens=4096"])
    done = sluice(root, "run", "--only", "right")
    assert done.returncode == 0, done.stdout + done.stderr
    assert fake.ran(root) == ["right"]
    assert set(stages.look(root).reasons) == {"data"}


@pytest.mark.slow
def test_a_failed_gate_ends_the_flow_before_what_depends_on_it(root: Path) -> None:
    before = """
from flows import outcome
from pipelines.core.gates import Row, Verdict
bad = Verdict("left", "sluice-base", (Row("loss at most 1", 1.5, None, None, 1.0, None, False),), version="7")
outcome.judge = lambda root, stage, *_: [bad] if stage == "left" else []
"""
    done = sluice(root, "run", before=before)
    assert done.returncode == 3, done.stdout + done.stderr
    assert fake.ran(root) == ["data", "left", "right"]
    assert "loss at most 1" in done.stderr and "Traceback" not in done.stderr
    assert "not run" in done.stdout
    again = sluice(root, "run", "left", before=before)  # `left` is fresh now: its gate is still closed
    assert (again.returncode, fake.ran(root)) == (3, [])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "last"),
    [
        (signal.SIGKILL, -signal.SIGKILL, None),
        (signal.SIGINT, 130, "stopped by Ctrl-C"),
        (signal.SIGTERM, 143, "stopped by SIGTERM"),
    ],
)
def test_a_flow_that_is_stopped_leaves_nothing_running(root: Path, number: int, code: int, last: str | None) -> None:
    behave(root, "data", "sleep 300")
    command = [sys.executable, "-m", "flows.cli", "run"]
    output = (root / "output.txt").open("w+")
    # A shell that starts this in the background would have SIGINT ignored; Python then never sees it.
    process = subprocess.Popen(
        command, cwd=root, stdout=output, stderr=subprocess.STDOUT, preexec_fn=_default_interrupt
    )
    trainer = _pid(root, "data")
    family = psutil.Process(process.pid).children(recursive=True)
    assert trainer in [one.pid for one in family] and len(family) >= 4  # server, supervisors, dvc, stage
    process.send_signal(number)
    assert process.wait(30) == code
    _, alive = psutil.wait_procs(family, timeout=10)
    assert [one for one in alive if not has_ended(one)] == []
    output.seek(0)
    printed = output.read()
    assert "Traceback" not in printed
    if last is not None:
        assert printed.splitlines()[-1].startswith(last)


def _default_interrupt() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _pid(root: Path, stage: str) -> int:
    place = root / f"{stage}.pid"
    for _ in range(900):
        if place.exists() and place.read_text():
            return int(place.read_text())
        time.sleep(0.1)
    raise AssertionError(f"stage {stage} never started")


def test_watching_takes_no_alarm_and_leaves_nothing_with_the_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """An alarm could end the wait while a lock was taken: the task that ended then waited for it for ever."""
    monkeypatch.setattr(train, "POLL_SECONDS", 0.001)
    monkeypatch.setattr("signal.setitimer", lambda *_: pytest.fail("an alarm was set"))
    work: Future[None] = Future()
    task: PrefectConcurrentFuture[None] = PrefectConcurrentFuture(uuid4(), work)
    polls: list[int] = []

    def update() -> None:
        polls.append(len(task._prefect_done_callbacks))
        if len(polls) == 20:
            work.set_result(None)

    train._watch(SimpleNamespace(board=SimpleNamespace(rows={}), progress={}), [task], update)  # type: ignore[arg-type]
    assert polls == [0] * 20
