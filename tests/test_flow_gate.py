"""The gate of a flow's stages while somebody else holds the ledger or moves a champion: nothing is lost."""

from __future__ import annotations

import functools
import io
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import fake_repository as fake
import pandas as pd
import pytest
from conftest import own_environment
from conftest import run_stage as run_real_stage
from rich.console import Console
from stores import python, repository, run_stage

import flows.run
from flows import outcome, records, stages, status
from flows import promote as commands
from flows.board import Row
from flows.gate import Gate
from flows.measure import NOT_MEASURABLE
from pipelines.core import ledger, promotion, registry, store, tracking, versions
from pipelines.core.errors import GateError, StoreUnavailable
from pipelines.core.gates import Row as Rule
from pipelines.core.gates import Verdict
from pipelines.core.ledger import FileLedger, LedgerHeld

__all__ = ["repository"]
NAME = "sluice-base"


@pytest.fixture
def gate(repository, monkeypatch: pytest.MonkeyPatch) -> Gate:
    """Over a repository with a real store; its records go nowhere, and it waits for a ledger for a moment only."""
    monkeypatch.setattr(records, "verdict", lambda *_: None)
    monkeypatch.setattr(ledger, "of", functools.partial(FileLedger, patience=0.2))
    return Gate(repository[0])


def champion(root: Path) -> str | None:
    return versions.alias(store.connect(root)[0], NAME, "champion")


def judged(passed: bool) -> Verdict:
    return Verdict("pretrain", NAME, (Rule("loss at most 1", 1.5, None, None, 1.0, None, passed),), version="2")


def test_a_held_ledger_fails_no_stage_and_what_passed_is_promoted_at_the_end(gate, repository, monkeypatch):
    root, model = repository
    run_stage(root, model, 2.5)
    row, other = Row("pretrain"), Row("pretrain")
    with FileLedger(root).held():
        gate.ask(row, fresh_output=True)
        with monkeypatch.context() as patch:
            patch.setattr(outcome, "promote", lambda *_: pytest.fail("waits for it as well"))
            gate.ask(other, fresh_output=True)
    assert row.verdict == "sluice-base 1 passed" and champion(root) is None
    assert "promotes when the other stages are over" in row.notes[0] and f"process {os.getpid()}" in row.notes[0]
    gate.promote_left()
    assert (champion(root), gate.trouble, row.error) == ("1", [], None)
    assert row.notes[1] == "sluice-base 1 is the champion now"


def test_a_ledger_that_stays_held_is_told_with_what_is_to_be_done(gate, repository):
    root, model = repository
    run_stage(root, model, 2.5)
    row = Row("pretrain")
    with FileLedger(root).held():
        gate.ask(row, fresh_output=True)
        gate.promote_left()
    (error,) = gate.trouble
    assert isinstance(error, LedgerHeld) and error.exit_code == 75
    assert "passed and not promoted: sluice-base 1 (`sluice promote MODEL VERSION --why ...`)" in str(error)
    assert row.error is None and outcome.judge(root, "pretrain")[0].passed


@pytest.mark.parametrize("trouble", [LedgerHeld("held"), StoreUnavailable("away")])
def test_a_gate_that_failed_is_closed_whatever_holds_up_a_promotion(gate, monkeypatch, trouble):
    def promote(*_: Any) -> None:
        raise trouble

    monkeypatch.setattr(outcome, "judge", lambda *_: [judged(True), judged(False)])
    monkeypatch.setattr(outcome, "promote", promote)
    with pytest.raises(GateError, match="loss at most 1"):
        gate.ask(Row("pretrain"), fresh_output=True)


def test_the_same_where_no_stage_has_to_run(tmp_path, monkeypatch):
    def promote(*_: Any, **__: Any) -> None:
        raise LedgerHeld("held")

    root = fake.make(tmp_path / "repository")
    state = stages.look(root)
    monkeypatch.setattr(outcome, "promote", promote)
    monkeypatch.setattr(registry, "reconcile", lambda *_: [])
    for passed, error in (([True], LedgerHeld), ([True, False], GateError)):
        monkeypatch.setattr(outcome, "judge", lambda *_, passed=passed: [judged(one) for one in passed])
        console = Console(file=io.StringIO(), width=200)
        with pytest.raises(error):
            flows.run._catch_up(root, state, ["left"], console)
        assert "sluice-base 2" in console.file.getvalue()


def test_a_version_that_somebody_removed_is_registered_again_although_no_stage_has_to_run(gate, repository):
    """By hand, in MLflow's pages: what is known here of the version that stands is out of date."""
    root, model = repository
    (root / "params.yaml").write_text((fake.ROOT / "params.yaml").read_text())
    run_stage(root, model, 2.5)
    gate.ask(Row("pretrain"), fresh_output=True)
    client, _ = store.connect(root)
    client.delete_model_version(NAME, "1")
    state = stages.State({"pretrain": ()}, {}, {})
    console = Console(file=io.StringIO(), width=200)
    flows.run._catch_up(root, state, ["pretrain"], console)
    assert "sluice-base 2 is the champion now" in console.file.getvalue() and champion(root) == "2"


def test_a_champion_that_somebody_has_moved_is_compared_with_and_replaced(gate, repository):
    root, model = repository
    for bits, seen in ((2.5, None), (2.4, "1"), (2.3, "1")):
        run_stage(root, model, bits)
        (made,) = registry.settle(root, "pretrain")
        if made.version == "1":
            promotion.promote(root, NAME, "1", why="first", expected_champion=seen)
    promotion.promote(root, NAME, "2", why="by hand, while 3 was judged", expected_champion="1")
    row = Row("pretrain")
    gate.ask(row, fresh_output=True)
    assert champion(root) == "3" and row.notes == ["sluice-base 3 is the champion now, after 2"]
    (verdict,) = outcome.judge(root, "pretrain")
    assert verdict.champion == "2" and verdict.rows[2].baseline == "champion v2: 2.4"


def test_what_a_person_has_rolled_back_does_not_come_back_with_the_next_nightly_run(gate, repository):
    """It makes the same bytes again, or DVC brings them back: both are an output that is fresh."""
    root, model = repository
    for bits in (2.5, 2.4):
        run_stage(root, model, bits)
        gate.ask(Row("pretrain"), fresh_output=True)
    assert champion(root) == "2"
    promotion.rollback(root, NAME, why="bad", expected_champion="2")
    row = Row("pretrain")
    gate.ask(row, fresh_output=True)
    assert champion(root) == "1" and row.verdict == "sluice-base 2 passed"
    told = "sluice-base 2 was rolled back, so it is not promoted by itself: `sluice promote sluice-base 2 --why ...`"
    assert row.notes == [told]
    promotion.promote(root, NAME, "2", why="it was the data after all", expected_champion="1")
    assert not promotion.was_rolled_back(root, NAME, "2")


def test_what_was_not_measured_waits_for_a_person_who_is_told_what(gate, repository, monkeypatch):
    """Through the store: the run, `sluice status`, the promotion by hand, and a gate that asks for it no more."""
    root, model = repository
    monkeypatch.setattr(sys.modules["pipelines.pretrain"], "OPTIONAL", frozenset({"unseen"}), raising=False)
    place = root / "mlflow/registry.yaml"
    rules = place.read_text()
    marked = "    - {metric: unseen, at_least: 0.5, where_measured: true, by_hand_without: labelers}\n    promote: auto"
    place.write_text(rules.replace("    promote: auto", marked))
    run_stage(root, model, 2.5)
    row, unmeasured = Row("pretrain"), "unseen (needs labelers)"
    gate.ask(row, fresh_output=True)
    typed = "`sluice promote sluice-base 1 --why ...`"
    waits = f"sluice-base 1 is promoted by hand alone ({typed}), for what was not measured: {unmeasured}"
    assert (champion(root), row.notes) == (None, [waits])
    assert row.verdict == f"sluice-base 1 passed, not measured: {unmeasured}"
    console = Console(file=io.StringIO(), width=250)
    monkeypatch.setattr(stages, "look", lambda _: stages.State({"pretrain": ()}, {}, {}))
    status.show(root, console)
    assert f"waits     {waits}" in console.file.getvalue()
    commands.promote(root, NAME, "1", "looked at it", None, console)
    told = f"sluice-base 1: not measured, which is left to whoever promotes it: {unmeasured}"
    assert champion(root) == "1" and told in console.file.getvalue()
    page = Console(file=io.StringIO(), width=250)
    status.show(root, page)
    assert "waits     sluice-base" not in page.file.getvalue() and row.verdict in page.file.getvalue()
    place.write_text(rules)
    gate.ask(Row("pretrain"), fresh_output=False)
    assert store.connect(root)[0].get_model_version(NAME, "1").tags[versions.GATE_UNMEASURED] == ""


def test_one_that_is_no_better_than_a_champion_moved_meanwhile_fails(gate, repository):
    root, model = repository
    for bits in (2.3, 2.5):
        run_stage(root, model, bits)
        registry.settle(root, "pretrain")  # both judged without a champion
    promotion.promote(root, NAME, "1", why="by hand", expected_champion=None)
    row = Row("pretrain")
    with pytest.raises(GateError, match="sluice-base.*FAILED"):
        gate.ask(row, fresh_output=True)
    assert champion(root) == "1" and row.verdict == "sluice-base 2 FAILED"


def test_a_verdict_of_other_rules_or_of_another_store_is_none(gate, repository, tmp_path, monkeypatch):
    root, model = repository
    other, place = tmp_path / "other.db", root / "mlflow" / "registry.yaml"
    shutil.copyfile(root / ".sluice/mlflow/mlflow.db", other)
    run_stage(root, model, 2.5)
    gate.ask(Row("pretrain"), fresh_output=True)
    rules = place.read_text()
    place.write_text(rules.replace("at_most: 4.0", "at_most: 2.0"))
    row = Row("pretrain")
    with pytest.raises(GateError, match="bits_per_byte at most"):
        gate.ask(row, fresh_output=False)
    assert row.verdict == "sluice-base 1 FAILED"
    place.write_text(rules)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{other}")
    (verdict,) = outcome.judge(root, "pretrain")
    assert verdict.passed and verdict.run_id == store.connect(root)[0].get_model_version(NAME, "1").run_id


def test_whoever_waits_for_the_ledger_is_told_for_whom(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ledger, "QUIET", 0.1)
    holder, entered = FileLedger(tmp_path), threading.Event()

    def hold() -> None:
        with holder.held():
            entered.set()
            time.sleep(0.5)

    thread = threading.Thread(target=hold)
    thread.start()
    entered.wait()
    with FileLedger(tmp_path).held():
        thread.join()
    said = capsys.readouterr().err
    assert said.startswith(f"waiting until another promotion ends: process {os.getpid()} on ") and said.count("\n") == 1


@pytest.mark.slow
def test_the_flow_registers_for_its_stages_and_measures_a_champion_in_a_process_of_its_own(prepared, tmp_path):
    root = Path(shutil.copytree(prepared, tmp_path / "w", symlinks=True))
    run_real_stage(root, "pretrain", **{tracking.ATTENDED: "1"})
    assert tracking.backlog(root) and not (root / ".sluice/registry").exists()  # no courier was started either
    code = "from flows import outcome\nprint([one.version for one in outcome.judge(root, 'pretrain')])\n"
    process = python(root, code, MLFLOW_TRACKING_URI=f"sqlite:///{root}/.sluice/mlflow/mlflow.db")
    assert process.communicate()[0].splitlines()[-1] == "['1']"
    rows = tmp_path / "rows.parquet"
    for stage, model, exit_code in (("pretrain", "artifacts/pretrain/model", 0), ("quantize", "none", NOT_MEASURABLE)):
        command = [sys.executable, "-m", "flows.measure", stage, model, str(rows)]
        assert subprocess.run(command, cwd=root, env=own_environment()).returncode == exit_code
    made = pd.read_parquet(root / "artifacts/pretrain/evaluation.parquet")
    pd.testing.assert_frame_equal(pd.read_parquet(rows)[["id", "bits"]], made[["id", "bits"]])


@pytest.mark.slow
def test_a_run_goes_through_beside_a_held_ledger_and_says_so(tmp_path):
    root = fake.make(tmp_path / "repository")
    code = f"""
from flows import outcome
from pipelines.core.gates import Row, Verdict
from pipelines.core.ledger import FileLedger
row = Row("loss at most 1", 0.5, None, None, 1.0, None, True)
one = Verdict("left", "{NAME}", (row,), content_hash="c", version="2", run_id="r")
outcome.judge = lambda root, stage, *_: [one] if stage == "left" else []
outcome.automatic = lambda *_: True
def promote(root, verdict, fresh):
    with FileLedger(root, patience=0.5).held():
        pass
outcome.promote = promote
from flows.cli import app
app()
"""
    command = [sys.executable, "-c", code, "run", "--plain"]
    with FileLedger(root).held():
        env = fake.environment(root, tmp_path / "prefect")
        done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    assert done.returncode == 75, done.stdout + done.stderr
    assert fake.ran(root) == ["data", "left", "report", "right"]
    assert done.stderr.startswith("error: another promotion holds") and f"process {os.getpid()}" in done.stderr
    assert f"passed and not promoted: {NAME} 2" in done.stderr and "Traceback" not in done.stderr
    assert "sluice-base 2 passed" in done.stdout
