"""Two versions side by side on the same rows, and gates that are asked again of what the store keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import stores
from rich.console import Console
from stores import repository
from typer.testing import CliRunner

from flows import cli, compare, messages
from flows import promote as commands
from pipelines.core import (
    environment,
    policy,
    promotion,
    provenance,
    references,
    registry,
    rejudging,
    store,
    verdicts,
    versions,
)
from pipelines.core.errors import GateError, UserError

__all__ = ["repository"]
NAME = "sluice-base"
IDS = tuple(f"row-{n}" for n in range(40))


def run(root: Path, model: Path, bits: float, ids: Sequence[str] = IDS, said: str = "") -> str:
    """A registered version whose held-out examples are `ids` and that says something to a prompt of two lines."""
    original = stores.fill

    def fill(*args: object, **kwargs: object) -> None:
        original(*args, **kwargs)
        output = root / "artifacts/pretrain"
        stores.write_rows(output / "evaluation.parquet", bits, ids)
        (output / "samples.md").write_text(f"# Samples\n\n**Prompt:** `def f(\r⏎`\n\n- *after:* `{said or bits}`\n")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(stores, "fill", fill)
        stores.run_stage(root, model, bits, mark=ids[0])
    (registered,) = registry.settle(root, "pretrain")
    return registered.version


def entry(root: Path, version: str):
    return store.connect(root)[0].get_model_version(NAME, version)


def measure_as(bits: dict[str, float], ids: Sequence[str]):
    """A stage's `measure` that knows a model by the seed on its card."""

    def measure(model: Path, evaluation: Path) -> None:
        assert (model / "config.json").exists()
        measure.asked.append(evaluation)
        stores.write_rows(evaluation, bits[str(len(measure.asked))], ids)

    measure.asked = []
    return measure


def test_scores_on_the_same_rows_agree_with_ten_lines_of_numpy(repository):
    root, model = repository
    run(root, model, 2.5, said="one|two")
    run(root, model, 2.4)
    promotion.promote(root, NAME, 1, why="first", expected_champion=None)
    found = compare.compare(root, f"{NAME}@champion", f"{NAME}/2")
    rows = pd.read_parquet(root / "artifacts/pretrain/evaluation.parquet")
    (score,) = found.scores
    assert (score.name, score.examples, score.verdict) == ("bits per bytes", 40, "B better")
    assert score.b.estimate == pytest.approx(rows["bits"].sum() / rows["bytes"].sum(), rel=1e-9)
    size = rows["bytes"].to_numpy(float)
    better = np.array([2.4, 2.5])[:, None] * size
    drawn = np.random.default_rng(5).integers(0, 40, (2000, 40))
    differences = (better[0] - better[1])[drawn].sum(1) / size[drawn].sum(1)
    assert score.difference.estimate == pytest.approx(-0.1)
    assert score.difference[1:] == pytest.approx(np.quantile(differences, [0.025, 0.975]), abs=2e-3)
    assert score.wins is not None and score.wins.estimate == 1.0
    assert found.metrics == (("bits_per_byte", 2.5, 2.4),) and found.same_data
    assert [tuple(sample) for sample in found.samples] == [("`def f(\r⏎`", "- *after:* `one|two`", "- *after:* `2.4`")]
    console = Console(width=160, color_system=None)
    with console.capture() as said:
        compare.show(found, console)
    text = said.get()
    with console.capture() as said:
        compare.show(replace(found, samples=[("a\x1b[2Jb", "c\x07", "d")]), console)
    assert "a[2Jb" in said.get() and not set(said.get()) & {"\x1b", "\x07"}, "a sample does not clear the screen"
    assert "A: sluice-base 1 (champion)" in text and "100.0% [100.0%, 100.0%]" in text and "one|two" in text
    page = compare.markdown(found)
    assert "| bits per bytes (40 examples) | 2.5 [" in page and "one\\|two" in page


def test_different_examples_are_measured_again_or_not_compared(repository):
    root, model = repository
    run(root, model, 2.5)
    run(root, model, 2.4, ids=[f"new-{n}" for n in range(40)])
    client, _ = store.connect(root)
    from pipelines.core import comparing

    with pytest.raises(GateError, match="1 and sluice-base 2 were measured on different examples, and stage pretrain"):
        comparing.compare(root, client, f"{NAME}/1", f"{NAME}/2", None)
    measure = measure_as({"1": 2.45, "2": 2.35}, [f"today-{n}" for n in range(40)])
    found = comparing.compare(root, client, f"{NAME}/1", f"{NAME}/2", measure)
    assert len(measure.asked) == 2 and found.metrics == () and not found.same_data
    assert found.scores[0].a.estimate == pytest.approx(2.45, abs=1e-3)
    assert "scores are measured again" in compare.markdown(found)


def test_rows_that_are_no_numbers_are_one_message(repository, monkeypatch):
    root, model = repository
    for bits in (2.5, 2.4):
        run(root, model, bits)
    original = verdicts.copied

    def damaged(*given: object) -> Path:
        place = original(*given)
        rows = pd.read_parquet(place)
        rows.loc[3, "bits"] = float("nan")
        rows.to_parquet(place)
        return place

    monkeypatch.setattr(verdicts, "copied", damaged)
    with pytest.raises(GateError, match="sluice-base 1 and sluice-base 2: their evaluation.parquet .*no finite value"):
        compare.compare(root, f"{NAME}/1", f"{NAME}/2")


def test_an_old_version_is_judged_by_what_the_store_keeps(repository):
    root, model = repository
    for bits in (2.5, 2.51, 2.9):  # all judged while nobody is champion
        run(root, model, bits)
    promotion.promote(root, NAME, 2, why="first", expected_champion=None)
    run(root, model, 2.52)  # what stands is another content
    assert rejudging.stale(root, entry(root, "1"), "2") == "was asked about another champion"
    assert rejudging.stale(root, entry(root, "2"), "2") is None
    console = Console(width=160, color_system=None)
    with console.capture() as said:
        commands.promote(root, NAME, "1", "better", "2", console)
    assert "asked again: champion 2" in said.get() and "sluice-base: champion 1, after 2" in said.get()
    tags = entry(root, "1").tags
    assert tags["gate_champion"] == "2" and tags["gate"] == "passed"
    with pytest.raises(GateError, match=r"(?s)sluice-base version 3: gate FAILED.*not worse by 1.00% than champion"):
        commands.promote(root, NAME, "3", "hope", None, console)
    assert entry(root, "3").tags["gate"] == "failed" and entry(root, "3").tags["gate_champion"] == "1"
    client, _ = store.connect(root)
    assert versions.alias(client, NAME, "champion") == "1"
    verdict = rejudging.ask(root, client, entry(root, "3"), None)
    assert [row.passed for row in verdict.rows] == [True, True, False]
    assert verdict.rows[1].rule == "bits per bytes better than bits_before", "its own rows, not those of the pair"


def test_a_version_that_was_judged_by_other_rules_is_asked_todays(repository):
    """Somebody has tightened the gate since: what passed before became champion without a word."""
    root, model = repository
    run(root, model, 2.5)
    run(root, model, 2.4)  # what stands is another content
    rules, console = root / policy.FILE, Console(width=160, color_system=None)
    before = rules.read_text()
    rules.write_text(before.replace("at_most: 4.0", "at_most: 2.45"))
    for version, wanted in (("1", "passed"), ("2", "passed")):
        assert entry(root, version).tags["gate"] == wanted
        assert rejudging.stale(root, entry(root, version), None) == "has other rules by now"
    with console.capture() as said, pytest.raises(GateError, match="(?s)version 1: gate FAILED.*bits_per_byte at most"):
        commands.promote(root, NAME, "1", "hope", None, console)
    assert "sluice-base 1: its gate has other rules by now, asked again: no champion" in said.get()
    assert entry(root, "1").tags["gate"] == "failed" and rejudging.stale(root, entry(root, "1"), None) is None
    rules.write_text(before)
    commands.promote(root, NAME, "1", "as it was", None, console)
    assert versions.alias(store.connect(root)[0], NAME, "champion") == "1"


def test_what_another_clone_has_found_by_its_rules_is_asked_again(repository):
    """In a store that both share; the verdict at hand was given again, and the version refused for the other's."""
    root, model = repository
    run(root, model, 2.5)
    client, _ = store.connect(root)
    for tag, value in ((versions.GATE_RULES, "0" * 16), (versions.GATE, "failed")):
        client.set_model_version_tag(NAME, "1", tag, value)
    commands.promote(root, NAME, "1", "by ours", None, Console(quiet=True))
    assert versions.alias(client, NAME, "champion") == "1" and entry(root, "1").tags["gate"] == "passed"


def test_both_are_measured_again_when_their_examples_differ(repository):
    root, model = repository
    run(root, model, 2.5)
    run(root, model, 2.5, ids=[f"new-{n}" for n in range(40)])
    promotion.promote(root, NAME, 2, why="first", expected_champion=None)
    run(root, model, 2.4)
    client, _ = store.connect(root)
    with pytest.raises(GateError, match="were measured on different examples"):
        rejudging.ask(root, client, entry(root, "1"), None)
    assert entry(root, "1").tags["gate_champion"] == "none", "a question that could not be asked changes nothing"
    verdict = rejudging.ask(root, client, entry(root, "1"), measure_as({"1": 2.6, "2": 2.5}, IDS[:20]))
    row = verdict.rows[2]
    assert not row.passed and row.baseline is not None and row.baseline.startswith("champion v2: 2.5")


def test_what_stands_is_judged_as_its_stage_is(repository):
    root, model = repository
    run(root, model, 2.5)
    run(root, model, 2.4)
    promotion.promote(root, NAME, 1, why="first", expected_champion=None)
    client, _ = store.connect(root)
    verdict = rejudging.ask(root, client, entry(root, "2"), None)
    assert verdict.passed and verdict.champion == "1" and verdict.rows[2].baseline == "champion v1: 2.5"
    assert (root / environment.STATE / "registry/settled/sluice-base.json").exists()


@pytest.fixture
def sluice(repository, monkeypatch):
    """The command, in this process, over a repository with two versions of which the first is champion."""
    root, model = repository
    run(root, model, 2.5)
    run(root, model, 2.4)
    promotion.promote(root, NAME, 1, why="first", expected_champion=None)
    (root / "params.yaml").write_text("{}\n")
    monkeypatch.setenv("COLUMNS", "200")  # a line a promotion
    monkeypatch.chdir(root)
    monkeypatch.setattr(environment, "prepare", lambda root: None)
    monkeypatch.setattr(messages.signal, "signal", lambda *_: None)
    return lambda *words: CliRunner().invoke(cli.app, list(words))


def test_every_mistake_is_one_message(sluice):
    for words, code, message in [
        (("promote", "sluice-x", "--why", "y"), 2, "no model 'sluice-x' in the registry; there are: sluice-base"),
        (("promote", NAME, "9", "--why", "y"), 2, "sluice-base has no version 9; there are: 2, 1"),
        (("promote", NAME, "x", "--why", "y"), 2, "'sluice-base/x' names no version: MODEL@ALIAS, MODEL/VERSION"),
        (("promote", "--why", "y"), 2, "name a model, or type --release"),
        (("promote", NAME, "2", "--why", "y", "--expected", "7"), 3, "the champion is version 1, not version 7"),
        (("promote", "--release", "--why", "y"), 2, "no model 'sluice-policy' in the registry"),
        (("rollback", NAME), 3, "sluice-base has no previous champion to go back to (champion: 1)"),
        (("rollback", "sluice-x"), 2, "no model 'sluice-x'"),
        (("rollback", "--release"), 3, "no release was promoted here"),
        (("history", "sluice-x"), 2, "sluice-x was never promoted here; there are: sluice-base"),
        (("compare", NAME, f"{NAME}@beta"), 2, "sluice-base has no alias 'beta'; there are: champion"),
        (("compare", NAME, f"{NAME}/1"), 2, "sluice-base and sluice-base/1 are the same version"),
        (("lineage", "a b"), 2, "'a b' names no version"),
    ]:
        done = sluice(*words)
        assert done.exit_code == code and done.stderr.startswith("error: ") and message in done.stderr, done.stderr
        assert len(done.stderr.splitlines()) == 1 and done.stdout == "", words
    done = sluice("promote", NAME, "--why", "better")
    assert done.exit_code == 0 and "sluice-base: champion 2, after 1" in done.stdout
    assert "sluice-base: champion 1, after 2" in sluice("rollback", NAME).stdout
    told = sluice("history").stdout
    assert [line.split()[1] for line in told.splitlines()[1:]] == ["promote", "promote", "rollback"]


def test_a_run_that_was_purged_is_told_where_its_numbers_are_needed_and_only_there(sluice, repository):
    """`mlflow gc` removes runs that were put in the bin; versions of them stay."""
    root, _ = repository
    client, _ = store.connect(root)
    assert sluice("promote", NAME, "2", "--why", "better").exit_code == 0
    client._tracking_client.store._hard_delete_run(entry(root, "1").run_id)
    done = sluice("promote", NAME, "1", "--why", "it was better")
    assert done.exit_code == 3 and len(done.stderr.splitlines()) == 1
    assert f"error: sluice-base 1: the store no longer has run {entry(root, '1').run_id}" in done.stderr
    assert "`sluice run pretrain`" in done.stderr and versions.alias(client, NAME, "champion") == "2"
    said = sluice("compare", f"{NAME}/1", NAME)
    assert said.exit_code == 0 and "B better" in said.stdout and "bits_per_byte" not in said.stdout
    told = sluice("lineage", f"{NAME}/1")
    assert told.exit_code == 0 and "sluice-base version 1: gate passed" in told.stdout
    (last,) = [one for one in provenance.trace(root, client, "0", entry(root, "1")) if one.name == NAME]
    assert not last.known and "the store has no run that made it" in " ".join(provenance.doubts(root, [last]))
    assert sluice("rollback", NAME, "--why", "bad").exit_code == 0


def test_a_store_that_is_away_is_told(sluice, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://bob:hunter2@127.0.0.1:9")
    for words in (("promote", NAME, "--why", "y"), ("compare", NAME, f"{NAME}/2"), ("lineage", NAME)):
        done = sluice(*words)
        assert done.exit_code == 75 and "the MLflow store http://127.0.0.1:9 does not answer" in done.stderr
        assert "hunter2" not in done.stderr + done.stdout


def test_references(repository):
    root, model = repository
    run(root, model, 2.5)
    client, _ = store.connect(root)
    with pytest.raises(UserError, match="sluice-base has no alias 'champion'; there are: none"):
        references.resolve(client, NAME)
    client.set_registered_model_alias(NAME, policy.CHAMPION, "1")
    for text in (NAME, f"{NAME}@champion", f"{NAME}/1"):
        assert references.shown(references.resolve(client, text)) == "sluice-base 1"


def test_models_beyond_the_first_page_of_a_shared_server_are_there(repository, monkeypatch):
    """It tells of a thousand at once, by name: those called sluice-... of a larger one were none."""
    root, _ = repository
    client, _ = store.connect(root)
    monkeypatch.setattr(versions, "PAGE", 2)
    names = [f"model-{number}" for number in range(5)]
    for name in names:
        client.create_registered_model(name)
    assert versions.models(client) == names
    with pytest.raises(UserError, match=f"no model 'other' in the registry; there are: {', '.join(names)}"):
        references.resolve(client, "other")
