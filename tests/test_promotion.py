"""Promotion: one champion, whoever races or is killed, and a way back."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pwd
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from rich.console import Console
from stores import python, repository

from flows import gc
from flows import promote as commands
from pipelines.core import ledger, moves, promotion, rejudging, store, versions
from pipelines.core.errors import GateError, StoreUnavailable, UserError
from pipelines.core.ledger import FileLedger, LedgerHeld, Move, Promotion

__all__ = ["repository"]
NAME = "sluice-base"


@pytest.fixture
def models(repository) -> Path:
    """Versions 1 to 3 have passed their gate, version 4 has failed, version 5 was never judged."""
    root, _ = repository
    client, _ = store.connect(root)
    client.create_registered_model(NAME)
    for outcome in ("passed", "passed", "passed", "failed", None):
        tags = {"gate": outcome} if outcome else {}
        client.create_model_version(NAME, source=f"file://{root}/artifacts/data", tags=tags)
    return root


def aliases(root: Path) -> tuple[str | None, str | None]:
    client, _ = store.connect(root)
    return versions.alias(client, NAME, "champion"), versions.alias(client, NAME, "previous")


def test_a_user_without_a_name_promotes_too(tmp_path, monkeypatch):
    """As in a container that runs under a number (`docker run --user 4711`)."""
    for variable in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(variable, raising=False)

    def nobody(number: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    assert Promotion.begin(tmp_path, "promote", [], "", "why").who == f"user {os.getuid()}"


def states(root: Path) -> list[str]:
    return [state for state, _ in promotion.history(root)]


def test_champion_previous_and_the_record_of_it(models):
    promotion.promote(models, NAME, 1, who="ada", why="first", expected_champion=None)
    assert aliases(models) == ("1", None)
    promotion.promote(models, NAME, "2", who="ada", why="better", expected_champion=1)
    assert aliases(models) == ("2", "1")
    client, _ = store.connect(models)
    tags = client.get_model_version(NAME, "2").tags
    assert tags["promotion.who"] == "ada" and tags["promotion.why"] == "better"
    assert tags["promotion.from"] == "1" and tags["promotion.when"].endswith("+00:00")
    state, last = promotion.history(models)[-1]
    assert (state, last.moves) == ("done", (Move(NAME, "1", "2", previous="1"),))


@pytest.mark.parametrize(
    ("version", "expected", "message"),
    [
        (4, None, "version 4 cannot become champion: gate verdict failed"),
        (5, None, "gate verdict none"),
        (9, None, "has no version 9"),
        (1, 3, "the champion is nobody, not version 3"),
    ],
)
def test_refusals_change_nothing(models, version, expected, message):
    with pytest.raises(GateError, match=message):
        promotion.promote(models, NAME, version, why="no", expected_champion=expected)
    assert aliases(models) == (None, None) and promotion.history(models) == []


def test_a_reason_of_another_encoding_is_kept_and_holds_up_nobody(models):
    """As `--why` typed in Latin 1 comes in: a text that no UTF-8 can write, and no store can take."""
    promotion.promote(models, NAME, 1, who="Jos\udce9", why="f\udcfcr alle", expected_champion=None)
    promotion.promote(models, NAME, 2, why="better", expected_champion=1)
    client, _ = store.connect(models)
    tags = client.get_model_version(NAME, "1").tags
    assert (tags["promotion.who"], tags["promotion.why"]) == ("Jos\\udce9", "f\\udcfcr alle")


def test_promoting_the_champion_is_no_move(models):
    promotion.promote(models, NAME, 1, why="first", expected_champion=None)
    assert promotion.promote(models, NAME, 1, why="again", expected_champion=None) is None
    assert aliases(models) == ("1", None) and states(models) == ["intent", "done"]


def test_rollback_goes_back_step_by_step(models):
    for version, before in ((1, None), (2, 1), (3, 2)):
        promotion.promote(models, NAME, version, why="better", expected_champion=before)
    with pytest.raises(GateError, match="the champion is version 3, not version 2"):
        promotion.rollback(models, NAME, why="bad", expected_champion=2)
    promotion.rollback(models, NAME, who="bob", why="bad", expected_champion="3")
    assert aliases(models) == ("2", "1")
    promotion.rollback(models, NAME, why="bad too", expected_champion=2)
    assert aliases(models) == ("1", None)
    with pytest.raises(GateError, match="no previous champion"):
        promotion.rollback(models, NAME, why="more", expected_champion=1)
    client, _ = store.connect(models)
    assert client.get_model_version(NAME, "2").tags["rollback.who"] == "bob"
    assert [promotion.was_promoted(models, NAME, version) for version in ("1", "3", "4")] == [True, True, False]
    gone = [promotion.was_rolled_back(models, NAME, version) for version in ("1", "2", "3")]
    assert gone == [False, True, True], "and not the one that came back"


def test_what_was_gone_back_from_is_not_gone_back_to(models):
    """1, 2, and 1 again: from there it is back to 2, to 1, and no further; not to 2 for ever and ever."""
    for version, before in ((1, None), (2, 1), (1, 2)):
        promotion.promote(models, NAME, version, why="better", expected_champion=before)
    for now, after in (("1", ("2", "1")), ("2", ("1", None))):
        promotion.rollback(models, NAME, why="bad", expected_champion=now)
        assert aliases(models) == after
    with pytest.raises(GateError, match="no previous champion"):
        promotion.rollback(models, NAME, why="more", expected_champion=1)
    promotion.promote(models, NAME, 3, why="better", expected_champion=1)
    promotion.rollback(models, NAME, why="bad", expected_champion=3)
    assert aliases(models) == ("1", None)


def test_a_champion_that_was_moved_by_hand_onto_the_previous_one_is_not_gone_back_from(models):
    """As in MLflow's pages: the champion in office would be marked as one that somebody went back from."""
    for version, before in ((1, None), (2, 1)):
        promotion.promote(models, NAME, version, why="better", expected_champion=before)
    client, _ = store.connect(models)
    client.set_registered_model_alias(NAME, "champion", "1")
    with pytest.raises(GateError, match="previous names the champion itself, version 1.*sluice promote sluice-base"):
        promotion.rollback(models, NAME, why="bad", expected_champion=1)
    assert aliases(models) == ("1", "1") and states(models) == ["intent", "done"] * 2
    assert not promotion.was_rolled_back(models, NAME, "1")


def test_where_the_journal_knows_nothing_the_versions_do(models):
    """As on another machine than the one that promoted them."""
    for version, before in ((1, None), (2, 1), (3, 2)):
        promotion.promote(models, NAME, version, why="better", expected_champion=before)
    FileLedger(models).journal.unlink()
    promotion.rollback(models, NAME, why="bad", expected_champion="3")
    assert aliases(models) == ("2", "1")


def test_a_reason_without_end_holds_up_nobody(models):
    """A report pasted into the form of an approval: more than the store takes in a tag."""
    promotion.promote(models, NAME, 1, who="Ada", why="because " * 20_000, expected_champion=None)
    promotion.promote(models, NAME, 2, why="better", expected_champion=1)
    client, _ = store.connect(models)
    assert aliases(models) == ("2", "1") and states(models) == ["intent", "done"] * 2
    assert client.get_model_version(NAME, "1").tags["promotion.why"].startswith("because because")


def test_racers_leave_one_champion_and_clear_refusals(models):
    promotion.promote(models, NAME, 1, why="first", expected_champion=None)
    code = (
        "import sys\nfrom pipelines.core import promotion\nfrom pipelines.core.errors import GateError\n"
        "try:\n    promotion.promote(root, 'sluice-base', VERSION, why='race', expected_champion=1)\n"
        "except GateError as error:\n    print(error); sys.exit(3)\n"
    )
    racers = {v: python(models, code.replace("VERSION", str(v))) for v in (2, 3)}
    answers = {version: process.communicate() for version, process in racers.items()}
    codes = {version: process.returncode for version, process in racers.items()}
    assert sorted(codes.values()) == [0, 3], answers
    winner = next(version for version, code in codes.items() if code == 0)
    loser = next(version for version, code in codes.items() if code == 3)
    assert f"the champion is version {winner}, not version 1 as expected" in answers[loser][0]
    assert aliases(models) == (str(winner), "1")


@pytest.mark.parametrize(
    ("moment", "champion", "end"),
    [
        ("MlflowClient.set_registered_model_alias = die", "1", "aborted"),
        ("moves.Desk._finish = die", "2", "done"),
    ],
)
def test_kill_between_intent_and_end_is_put_right_by_the_next_call(models, moment, champion, end):
    promotion.promote(models, NAME, 1, why="first", expected_champion=None)
    code = (
        "import os\nfrom mlflow import MlflowClient\nfrom pipelines.core import moves, promotion\n"
        f"def die(*a, **k): os.kill(os.getpid(), 9)\n{moment}\n"
        "promotion.promote(root, 'sluice-base', 2, why='better', expected_champion=1)\n"
    )
    assert python(models, code).wait() == -9
    assert states(models)[-1] == "intent" and aliases(models) == (champion, None)
    promotion.promote(models, NAME, 3, why="next", expected_champion=champion)
    assert states(models) == ["intent", "done", "intent", end, "intent", "done"]
    assert aliases(models) == ("3", champion)
    client, _ = store.connect(models)
    assert client.get_model_version(NAME, "2").tags.get("promotion.from") == ("1" if end == "done" else None)


def test_half_a_line_in_the_journal_is_dropped(models):
    promotion.promote(models, NAME, 1, why="first", expected_champion=None)
    journal = models / ".sluice/registry/promotions.jsonl"
    with journal.open("a") as file:
        file.write('{"state": "int')
    promotion.promote(models, NAME, 2, why="better", expected_champion=1)
    assert states(models) == ["intent", "done", "intent", "done"] and aliases(models) == ("2", "1")


@pytest.mark.parametrize("line", ["", "{}", "[]", '{"state": "done", "id"', "\0" * 40, "<<<<<<< HEAD"])
def test_a_line_of_the_journal_that_is_none_is_told_by_its_number(models, line):
    """As a disk, an editor or a merge leaves one: each promotion, rollback, history and lineage was a traceback."""
    promotion.promote(models, NAME, 1, why="first", expected_champion=None)
    journal = models / ".sluice/registry/promotions.jsonl"
    first, second = journal.read_text().splitlines()
    journal.write_text(f"{first}\n{line}\n{second}\n")
    with pytest.raises(UserError, match=r"promotions\.jsonl, line 2: found '.*take that line out"):
        promotion.promote(models, NAME, 2, why="better", expected_champion=1)
    with pytest.raises(UserError, match="line 2"):
        promotion.history(models)
    assert aliases(models) == ("1", None)


def test_a_deleted_version_does_not_block_the_next_promotion(models):
    client, _ = store.connect(models)
    promotion.promote(models, NAME, 1, why="first", expected_champion=None)
    promotion.promote(models, NAME, 2, why="better", expected_champion=1)
    client.delete_model_version(NAME, "1")
    promotion.promote(models, NAME, 3, why="best", expected_champion=2)
    assert aliases(models) == ("3", "2")
    promotion.rollback(models, NAME, why="bad", expected_champion=3)
    assert aliases(models) == ("2", None), "where 2 came from is gone"
    begun = Promotion.begin(models, "promote", [Move(NAME, "2", "3", "2")], "ada", "cut off")
    FileLedger(models).write("intent", begun)
    client.delete_model_version(NAME, "3")
    with pytest.raises(GateError, match="no previous champion"):
        promotion.rollback(models, NAME, why="more", expected_champion=2)
    assert states(models)[-2:] == ["intent", "aborted"] and aliases(models) == ("2", None)


def half_moved(root: Path) -> None:
    """Two champions that move together, of which one has moved when the process is killed."""
    client, _ = store.connect(root)
    client.create_registered_model("sluice-sft")
    client.create_model_version("sluice-sft", source=f"file://{root}/artifacts/data")
    steps = [Move(NAME, None, "1", None), Move("sluice-sft", None, "1", None)]
    FileLedger(root).write("intent", Promotion.begin(root, "promote", steps, "ada", "cut off", "sluice-sft 1"))
    client.set_registered_model_alias(NAME, "champion", "1")


def test_what_is_half_moved_is_brought_to_an_end_without_another_promotion(models, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(store, "connect", lambda _: pytest.fail("nothing is open"))
        promotion.recover(models)
    half_moved(models)
    (line,) = promotion.unfinished(models)
    assert line.startswith("promote of release sluice-sft 1 was begun by ada (20") and "`sluice run`" in line
    with monkeypatch.context() as patch, FileLedger(models).held():
        patch.setattr(ledger, "of", functools.partial(FileLedger, patience=0.1))
        promotion.recover(models)  # left to whoever is at it
    assert states(models) == ["intent"]
    promotion.recover(models)
    assert states(models) == ["intent", "done"] and promotion.unfinished(models) == []
    assert versions.alias(store.connect(models)[0], "sluice-sft", "champion") == "1"


def test_a_store_that_goes_away_in_the_middle_is_told_with_what_was_begun(models, monkeypatch):
    def fails(*words):
        raise requests.ConnectionError("refused")

    def away():
        raise StoreUnavailable("the store is away")

    with monkeypatch.context() as patch:
        patch.setattr(moves, "_point", fails)
        with pytest.raises(StoreUnavailable, match=f"promote of {NAME} was begun by ada .*`sluice run`.*finish it, or"):
            promotion.promote(models, NAME, 1, who="ada", why="first", expected_champion=None)
        patch.setattr(store, "connect", lambda _: away())
        with pytest.raises(StoreUnavailable, match="is away\npromote of .* was begun by ada"):
            promotion.recover(models)
    promotion.recover(models)
    assert states(models) == ["intent", "aborted"] and aliases(models) == (None, None)


def test_who_holds_the_lock_is_said_and_nothing_is_changed(models, monkeypatch):
    holder, waiting = FileLedger(models), FileLedger(models, patience=0.1)
    with holder.held(), pytest.raises(LedgerHeld, match=f"process {os.getpid()} on .* since 20.*Nothing was changed"):
        promotion.promote(models, NAME, 1, why="first", expected_champion=None, ledger=waiting)
    assert aliases(models) == (None, None) and LedgerHeld.exit_code == 75
    assert promotion.promote(models, NAME, 1, why="first", expected_champion=None, ledger=waiting) is not None


def test_lines_of_before_there_were_releases_are_read(models):
    journal = models / ".sluice/registry/promotions.jsonl"
    journal.parent.mkdir(parents=True)
    line = {"state": "intent", "id": "a", "action": "promote", "model": NAME, "source": None, "target": "1",
            "previous": None, "who": "ada", "why": "old", "when": "2026", "store": store.place(models)}  # fmt: skip
    journal.write_text(json.dumps(line) + "\n")
    store.connect(models)[0].set_registered_model_alias(NAME, "champion", "1")
    promotion.promote(models, NAME, 2, why="better", expected_champion=1)
    assert states(models) == ["intent", "done", "intent", "done"]
    assert promotion.history(models)[1][1].moves == (Move(NAME, None, "1", None),)


class SqliteLedger:
    """A lock and a journal in a database, as several hosts would share one."""

    def __init__(self, place: Path) -> None:
        self.place = place
        with sqlite3.connect(place) as made:
            made.execute("create table journal (state text, promotion text)")

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        with contextlib.closing(sqlite3.connect(f"{self.place}.lock", isolation_level=None, timeout=10)) as database:
            database.execute("begin exclusive")
            yield

    def entries(self) -> list[tuple[ledger.State, Promotion]]:
        with contextlib.closing(sqlite3.connect(self.place)) as database:
            rows = database.execute("select state, promotion from journal order by rowid").fetchall()
        return [(state, Promotion.from_json(json.loads(text))) for state, text in rows]

    def write(self, state: ledger.State, promoted: Promotion) -> None:
        with contextlib.closing(sqlite3.connect(self.place)) as database, database:
            database.execute("insert into journal values (?, ?)", (state, json.dumps(promoted.to_json())))


def test_a_database_takes_the_place_of_the_files(models, tmp_path, monkeypatch):
    """In one place, for everything that a user calls: no file of a ledger is made or looked at."""
    shared: ledger.Ledger = SqliteLedger(tmp_path / "ledger.db")
    monkeypatch.setattr(ledger, "of", lambda _: shared)
    monkeypatch.setattr(rejudging, "stale", lambda *_: None)  # no stage made these versions
    client, _ = store.connect(models)
    for version in "123":
        client.set_model_version_tag(NAME, version, "sluice.content_hash", version)
    console = Console(width=200, color_system=None)
    commands.promote(models, NAME, "1", "first", None, console)
    shared.write("intent", Promotion.begin(models, "promote", [Move(NAME, "1", "2", "1")], "bob", "cut off"))
    client.set_registered_model_alias(NAME, "champion", "2")
    assert len(promotion.unfinished(models)) == 1
    commands.rollback(models, NAME, "bad", "2", console)
    assert [state for state, _ in shared.entries()] == ["intent", "done"] * 3
    assert aliases(models) == ("1", None)
    release = Promotion.begin(models, "promote", [Move(NAME, "1", "3", "1")], "ada", "all", f"{NAME} 3")
    shared.write("done", release)
    client.set_registered_model_alias(NAME, "champion", "3")
    # A rollback would go back to version 1, which the journal alone says: no alias and no tag does
    assert [one.name for one in gc._versions(models, client)] == [f"{NAME} 2"]
    commands.rollback_release(models, "bad too", console)
    assert aliases(models)[0] == "1" and shared.entries()[-1][1].release == f"{NAME} 3"
    with console.capture() as printed:
        commands.history(models, None, console)
    assert f"rollback (release {NAME} 3)" in printed.get()
    assert not FileLedger(models).journal.exists() and not FileLedger(models).lock.exists()


@pytest.mark.parametrize(
    ("address", "kept"),
    [
        ("https://bob:hunter2@mlflow.example.org:8080/x", "https://mlflow.example.org:8080/x"),
        ("https://token@mlflow.example.org", "https://mlflow.example.org"),
        ("https://bob:p/w?@mlflow.example.org/x", "https://mlflow.example.org/x"),
        ("https://mlflow.example.org:8080/a@b", "https://mlflow.example.org:8080/a@b"),
        ("https://mlflow.example.org/a@b", "https://mlflow.example.org/a@b"),
        ("postgresql://bob:p@ss@db/mlflow", "postgresql://db/mlflow"),
        ("postgresql://db/mlflow?user=bob&password=hunter2", "postgresql://db/mlflow"),
        ("sqlite:////srv/a@b/mlflow.db", "sqlite:////srv/a@b/mlflow.db"),
    ],
)
def test_no_password_in_what_a_store_is_called(tmp_path, monkeypatch, address, kept):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    assert store.place(tmp_path) == kept
