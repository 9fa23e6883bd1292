"""A release: what belongs together moves together, whoever races or is killed, and goes back together."""

from __future__ import annotations

import io
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from stores import python, repository

from flows import gc
from flows import promote as commands
from pipelines.core import artifacts, moves, promotion, release, store, versions
from pipelines.core.errors import GateError, UserError
from pipelines.core.ledger import FileLedger

__all__ = ["repository"]
PARENTS = {
    "data": [], "pretrain": ["data"], "transfer": ["data", "pretrain"], "sft": ["data", "pretrain"],
    "ppo": ["data", "sft"], "quantize": ["data", "ppo"], "rag": ["data"],
}  # fmt: skip
MODELS = {"sluice-base": "pretrain", "sluice-sft": "sft", "sluice-policy": "ppo", "sluice-rag": "rag",
          "sluice-quantized-*": "quantize", "sluice-transfer-*": "transfer"}  # fmt: skip
CHAIN = ("sluice-base", "sluice-sft", "sluice-policy", "sluice-quantized-int8", "sluice-rag")


@pytest.fixture
def root(repository) -> Path:
    """A repository whose graph has every kind of relative: ancestor, descendant, one of the data alone, one beside."""
    place, _ = repository
    stages = [
        f"  {name}:\n    cmd: none\n    deps: [{', '.join(f'artifacts/{one}' for one in parents)}]\n"
        f"    outs: [artifacts/{name}]\n    metrics: [metrics/{name}.json]\n"
        for name, parents in PARENTS.items()
    ]
    (place / "dvc.yaml").write_text("stages:\n" + "".join(stages))
    entries = [
        f"  {name}:\n    stage: {stage}\n    model: {'models/*' if '*' in name else 'model'}\n"
        "    gate: [{metric: bits, at_most: 4}]\n    promote: manual\n"
        for name, stage in MODELS.items()
    ]
    (place / "mlflow/registry.yaml").write_text("models:\n" + "".join(entries))
    return place


def add(root: Path, model: str, mark: str, gate: str = "passed", against: str = "any", **inputs: str) -> str:
    """A version whose content is `STAGE-MARK`, made from the given artifacts (of the same mark if none is given)."""
    client, _ = store.connect(root)
    stage = next(stage for name, stage in MODELS.items() if model.startswith(name.rstrip("*")))
    if versions.find(client, model, "") is None and model not in [m.name for m in client.search_registered_models()]:
        client.create_registered_model(model)
    made = {name: f"{name}-{mark}" for name in PARENTS[stage]} | inputs
    tags = {"gate": gate, "gate_champion": against, "sluice.content_hash": f"{stage}-{mark}"}
    tags |= {f"sluice.input.{name}": digest for name, digest in made.items()}
    return str(client.create_model_version(model, source=f"file://{root}/artifacts/data", tags=tags).version)


def add_chain(root: Path, mark: str, data: str = "data-x") -> None:
    for model in CHAIN:
        add(root, model, mark, data=data)


def champions(root: Path) -> dict[str, str]:
    client, _ = store.connect(root)
    found = {m.name: versions.alias(client, m.name, "champion") for m in client.search_registered_models()}
    return {name: version for name, version in found.items() if version is not None}


def plan(root: Path, *named: str) -> release.Release:
    return release.plan(root, store.connect(root)[0], *named)


def names(planned: release.Release) -> dict[str, str]:
    return {one.model: one.version for one in planned.members}


def every(version: str) -> dict[str, str]:
    return dict.fromkeys(CHAIN, version)


def test_what_belongs_to_a_version_is_its_line_and_what_comes_of_the_data_alone(root):
    add_chain(root, "a")
    add(root, "sluice-transfer-topics", "a", data="data-x")
    planned = plan(root)
    assert planned.name == "sluice-policy 1" and names(planned) == every("1") and planned.retired == {}
    assert names(plan(root, "sluice-sft")) == every("1")
    done = release.promote(root, planned, who="ada", why="first")
    assert done is not None and champions(root) == every("1")
    client, _ = store.connect(root)
    tags = client.get_model_version("sluice-rag", "1").tags
    assert tags["promotion.who"] == "ada" and tags["promotion.release"] == "sluice-policy 1"
    assert release.promote(root, plan(root), why="again") is None
    assert [state for state, _ in promotion.history(root)] == ["intent", "done"], "one entry covers all"


def test_versions_agree_on_the_content_they_read(root):
    add_chain(root, "a")
    add_chain(root, "b")
    assert names(plan(root)) == every("2")
    assert names(plan(root, "sluice-policy", "1")) == every("1") | {"sluice-rag": "2"}, "only the data tie it"
    add(root, "sluice-rag", "c", data="data-other")
    assert names(plan(root))["sluice-rag"] == "2", "made from other data"
    add(root, "sluice-quantized-int8", "b2", gate="failed", ppo="ppo-b", data="data-x")
    assert names(plan(root))["sluice-quantized-int8"] == "2", "the newest that passed"
    add(root, "sluice-policy", "c", data="data-x", sft="sft-b")
    with pytest.raises(
        GateError, match=r"(?s)no whole release of sluice-policy 3.*quantized-int8: .*sluice run quantize"
    ):
        plan(root)
    add(root, "sluice-policy", "d", data="data-x")
    with pytest.raises(
        GateError, match=r"(?s)sluice-sft: no version was made from the same artifacts as sluice-policy 4"
    ):
        plan(root)


def test_what_was_not_measured_of_a_release_is_told_to_whoever_promotes_it(root):
    """A release is promoted by a person alone; once in office, it is told no more."""
    add_chain(root, "a")
    client, _ = store.connect(root)
    client.set_model_version_tag("sluice-policy", "1", versions.GATE_UNMEASURED, "wins (needs references)")
    for told in (1, 0):
        console = Console(file=io.StringIO(), width=200)
        commands.promote_release(root, None, None, "looked at it", None, console)
        line = "sluice-policy 1: not measured, which is left to whoever promotes it: wins (needs references)\n"
        assert console.file.getvalue().count(line) == console.file.getvalue().count("not measured") == told
        assert champions(root) == every("1")


def test_a_model_that_failed_or_was_judged_against_another_moves_none(root):
    add_chain(root, "a")
    release.promote(root, plan(root), why="first")
    for model in CHAIN:
        bad = {"sluice-sft": "failed"}.get(model, "passed")
        add(root, model, "b", gate=bad, against="9" if model == "sluice-rag" else "any", data="data-x")
    with pytest.raises(GateError) as told:
        release.promote(root, plan(root), why="hope")
    assert "release sluice-policy 2 moves together or not at all" in str(told.value)
    assert "sluice-sft version 2 cannot become champion: gate verdict failed" in str(told.value)
    assert "sluice-rag version 2 was judged against champion 9, and the champion is 1 now" in str(told.value)
    assert champions(root) == every("1")


def test_a_champion_that_moved_meanwhile_refuses_all(root):
    add_chain(root, "a")
    add_chain(root, "b")
    planned = plan(root)
    promotion.promote(root, "sluice-sft", 1, why="alone", expected_champion=None)
    with pytest.raises(GateError, match="sluice-sft: the champion is version 1, not nobody as expected"):
        release.promote(root, planned, why="late")
    assert champions(root) == {"sluice-sft": "1"}


def test_a_variant_that_was_dropped_retires_and_comes_back(root):
    add_chain(root, "a")
    add(root, "sluice-quantized-nf4", "a", data="data-x")
    release.promote(root, plan(root), why="first")
    add_chain(root, "b")
    planned = plan(root)
    assert planned.retired == {"sluice-quantized-nf4": "1"}
    release.promote(root, planned, why="without nf4")
    assert champions(root) == every("2")
    quiet = Console(quiet=True)
    commands.rollback(root, "sluice-quantized-nf4", "missed", "none", quiet)  # it has none, and was seen to have none
    assert champions(root) == every("2") | {"sluice-quantized-nf4": "1"}
    with pytest.raises(GateError, match="the champion is version 1, not nobody as expected"):
        commands.rollback(root, "sluice-quantized-nf4", "again", "none", quiet)
    release.rollback(root, release.last(root, FileLedger(root)), why="bad")
    assert champions(root) == every("1") | {"sluice-quantized-nf4": "1"}


def test_what_a_dropped_variant_was_stays_as_long_as_its_release_may_be_rolled_back(root):
    add_chain(root, "a")
    add(root, "sluice-quantized-nf4", "a", data="data-x")
    release.promote(root, plan(root), why="first")
    add_chain(root, "b")
    release.promote(root, plan(root), why="without nf4")
    add_chain(root, "c")
    add(
        root, "sluice-quantized-nf4", "c", data="data-x"
    )  # nobody was champion before it: no alias, no tag names the first
    release.promote(root, plan(root), why="with it again")
    for one in gc._versions(root, store.connect(root)[0]):
        one.remove()
    for _ in range(2):
        release.rollback(root, release.last(root, FileLedger(root)), why="bad")
    assert champions(root) == every("1") | {"sluice-quantized-nf4": "1"}


def test_a_stage_whose_data_gave_it_nothing_holds_up_no_release(root):
    """Of data without knowledge `rag` makes no index, however often it runs."""
    place = root / "mlflow/registry.yaml"
    place.write_text(place.read_text().replace("    stage: rag\n", "    stage: rag\n    where_made: true\n"))
    rest = [model for model in CHAIN if model != "sluice-rag"]
    for model in rest:
        add(root, model, "a", data=artifacts.content_hash(root / "artifacts/data"))
    with pytest.raises(GateError, match="sluice-rag: no version .*`sluice run rag` makes one"):
        plan(root)
    (root / "artifacts/rag").mkdir()  # it has run
    assert names(plan(root)) == dict.fromkeys(rest, "1") and plan(root).retired == {}
    (root / "artifacts/data/corpus.txt").write_text("of other data, which may have knowledge")
    with pytest.raises(GateError, match="sluice-rag: no version"):
        plan(root)


def test_rollback_goes_back_release_by_release_and_not_over_what_moved(root):
    for mark in "abc":
        add_chain(root, mark)
        release.promote(root, plan(root), why=mark)
    first = release.last(root, FileLedger(root))
    done = release.rollback(root, first, who="bob", why="bad")
    assert champions(root) == every("2") and done.release == "sluice-policy 3"
    with pytest.raises(GateError, match="the release in office is sluice-policy 2 .* somebody was quicker"):
        release.rollback(root, first, why="twice")
    client, _ = store.connect(root)
    assert versions.alias(client, "sluice-rag", "previous") == "1"
    promotion.promote(root, "sluice-sft", 3, why="alone", expected_champion=2)
    with pytest.raises(GateError, match="sluice-sft: release sluice-policy 2 has made 2 its champion, and now it is 3"):
        release.rollback(root, release.last(root, FileLedger(root)), why="bad too")
    assert champions(root) == every("2") | {"sluice-sft": "3"}
    promotion.rollback(root, "sluice-sft", why="bad", expected_champion=3)
    promotion.rollback(root, "sluice-sft", why="by hand", expected_champion=2)
    release.rollback(root, release.last(root, FileLedger(root)), why="bad too")
    assert champions(root) == every("1")
    release.rollback(root, release.last(root, FileLedger(root)), why="all")
    assert champions(root) == {}
    with pytest.raises(GateError, match="no release was promoted here, or all were rolled back"):
        release.last(root, FileLedger(root))


def test_a_release_whose_predecessor_was_deleted_is_gone_back_from_whole_or_not_at_all(root):
    """A person deletes versions in MLflow's pages: the store knew so only once other champions had moved."""
    for mark in "abc":
        add_chain(root, mark)
        release.promote(root, plan(root), why=mark)
    store.connect(root)[0].delete_model_version("sluice-rag", "2")
    with pytest.raises(GateError, match="sluice-rag: version 2, which release sluice-policy 3 has replaced, is not"):
        release.rollback(root, release.last(root, FileLedger(root)), why="bad")
    assert champions(root) == every("3")
    assert [state for state, _ in promotion.history(root)] == ["intent", "done"] * 3, "nothing was begun"


def test_a_folder_that_was_moved_with_its_store_can_be_rolled_back(root, monkeypatch):
    for mark in "ab":
        add_chain(root, mark)
        release.promote(root, plan(root), why=mark)
    moved = root.rename(root.with_name("moved"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{moved}/.sluice/mlflow/mlflow.db")
    assert champions(moved) == every("2")
    found = release.last(moved, FileLedger(moved))
    release.rollback(moved, found, why="bad")
    assert champions(moved) == every("1")
    root.joinpath(".sluice/mlflow").mkdir(parents=True)
    root.joinpath(".sluice/mlflow/mlflow.db").touch()
    assert release.standing(moved, FileLedger(moved)) == [], "another clone stands there"
    other = moved.with_name("other.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{other}")
    assert release.standing(moved, FileLedger(moved)) == [], "those are of this folder's store"


def test_a_killed_process_lets_go_and_is_finished(root):
    add_chain(root, "a")
    code = (
        "import os\nfrom mlflow import MlflowClient\nfrom pipelines.core import release, store\n"
        "client, _ = store.connect(root)\nplanned = release.plan(root, client)\n"
        "move, moved = MlflowClient.set_registered_model_alias, []\n"
        "def once(*a, **k):\n    if moved: os.kill(os.getpid(), 9)\n    moved.append(move(*a, **k))\n"
        "MlflowClient.set_registered_model_alias = once\nrelease.promote(root, planned, why='killed')\n"
    )
    assert python(root, code).wait() == -9
    assert len(champions(root)) == 1
    with moves.desk(root, FileLedger(root, patience=1.0)):
        assert champions(root) == every("1")


def race(root: Path, version: str, rounds: int, barrier: Any, results: Any) -> None:
    """One of several processes that promote a release of their own, at the same time, again and again."""
    client, _ = store.connect(root)
    for number in range(rounds):
        planned = release.plan(root, client, "sluice-policy", version)
        barrier.wait(600)
        try:
            outcome = "moved" if release.promote(root, planned, why="race") else "in office"
        except GateError as error:
            outcome = str(error)
        results.put((number, version, outcome))
        barrier.wait(600)


def run_race(root: Path, racers: int, rounds: int) -> None:
    for number in range(racers):
        add_chain(root, f"r{number}", data=f"data-{number}")
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(racers), context.Queue()
    asked = [(root, str(number + 1), rounds, barrier, results) for number in range(racers)]
    processes = [context.Process(target=race, args=each) for each in asked]
    for process in processes:
        process.start()
    found = [results.get(timeout=600) for _ in range(racers * rounds)]
    for process in processes:
        process.join(60)
    winner = ""
    for number in range(rounds):
        outcomes = {version: outcome for at, version, outcome in found if at == number}
        (winner,) = [version for version, outcome in outcomes.items() if outcome == "moved"]
        for outcome in outcomes.values():
            assert outcome in ("moved", "in office") or f"the champion is version {winner}, not" in outcome, outcome
    assert champions(root) == every(winner)
    assert len(promotion.history(root)) == 2 * rounds


def test_racing_releases_leave_one_set_and_clear_refusals(root):
    run_race(root, racers=3, rounds=1)


@pytest.mark.slow
def test_eight_racers_twenty_times(root):
    run_race(root, racers=8, rounds=20)


def test_the_commands_say_what_they_do(root):
    console = Console(width=160, color_system=None)
    add_chain(root, "a")
    with console.capture() as said:
        commands.promote_release(root, None, None, "first", "none", console)
        commands.promote_release(root, None, None, "first", None, console)
        commands.history(root, "sluice-rag", console)
        commands.rollback_release(root, "bad", console)
    lines = said.get().splitlines()
    assert lines[0] == "release sluice-policy 1" and "sluice-rag: champion 1, after nobody" in lines
    assert "release sluice-policy 1 is in office already" in lines
    assert any("promote (release sluice-policy 1)" in line and "sluice-rag" in line for line in lines)
    assert lines[-1] == "sluice-rag: champion nobody, after 1" or "champion nobody, after 1" in lines[-1]
    commands.promote_release(root, None, None, "again", None, console)
    for model in CHAIN:
        client = store.connect(root)[0]
        client.delete_registered_model_alias(model, "champion")
    with console.capture() as said:
        commands.rollback_release(root, "bad", console)
    told = "release sluice-policy 1: every champion that it made had been taken back already"
    assert said.get().strip() == told, "and not nothing at all"
    with pytest.raises(GateError, match="sluice-policy: the champion is nobody, not version 7"):
        commands.promote_release(root, None, None, "no", "7", console)
    with pytest.raises(UserError, match="no model 'sluice-x' in the registry; there are: sluice-base, "):
        commands.promote_release(root, "sluice-x", None, "no", None, console)
