"""Drift: what has not changed raises no alarm, what has does, and what is sure but small concerns nobody."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import station
from scipy import stats
from stores import repository, run_stage, write_rows

from flows import remeasure, workspace
from pipelines.core import artifacts, drift, promotion, registry, runner, store
from pipelines.core.drift import Change
from pipelines.core.errors import ArtifactError, GateError, StoreUnavailable

__all__ = ["repository"]


def rows(count: int, bits: float, seed: int, prefix: str = "r", spread: float = 0.3) -> pd.DataFrame:
    random_ = np.random.default_rng(seed)
    size = random_.integers(50, 150, count).astype(float)
    values = size * (bits + spread * random_.standard_normal(count))
    return pd.DataFrame({"id": [f"{prefix}{n}" for n in range(count)], "bits": values, "bytes": size})


def ask(before: pd.DataFrame, now: pd.DataFrame, lower: bool = True, margin: float = 0.01) -> Change:
    return drift.score("m bits", before, now, "bits", "bytes", lower, margin)


def test_a_score_that_got_worse_on_other_examples() -> None:
    found = ask(rows(400, 2.0, 0), rows(400, 2.2, 1, "other"))
    assert found.size == pytest.approx(0.1, abs=0.03) and found.p < 1e-6
    assert drift.judge([found]) == [True]
    better = ask(rows(400, 2.2, 0), rows(400, 2.0, 1, "other"))
    assert better.size < 0 and better.p > 0.99 and drift.judge([better]) == [False]
    assert ask(rows(400, 2.2, 0), rows(400, 2.0, 1, "other"), lower=False).p < 1e-6  # of a score, less is worse


def test_the_probability_is_that_of_a_two_sample_test() -> None:
    before, now = rows(500, 2.0, 2), rows(300, 2.02, 3, "other")
    for table in (before, now):
        table["bytes"] = 1.0
        table["bits"] = np.random.default_rng(len(table)).normal(2.0 if len(table) == 500 else 2.05, 0.5, len(table))
    reference = stats.ttest_ind(now["bits"], before["bits"], equal_var=False, alternative="greater").pvalue
    assert ask(before, now).p == pytest.approx(float(reference), abs=0.01)


def test_the_same_examples_are_paired() -> None:
    before = rows(200, 2.0, 4, spread=1.0)
    now = before.sample(frac=1.0, random_state=0)  # in another order
    assert ask(before, now)[2:4] == (pytest.approx(ask(before, before).now), 0.0)
    assert drift.judge([ask(before, now)]) == [False]
    now = before.assign(bits=before["bits"] * 1.02)
    assert ask(before, now).p < 1e-6  # which no test of two samples with this spread would see
    assert drift.judge([ask(before, now, margin=0.01), ask(before, now, margin=0.05)]) == [True, False]


@pytest.mark.parametrize("prefix", ["r", "other"], ids=["the same examples", "others"])
def test_a_handful_of_groups_tells_of_nothing(prefix: str) -> None:
    """Of one example on a side there is no error at all, and whatever is worse would be sure."""
    for groups in (1, 2, 4):
        before, now = (rows(groups * 3, bits, 5, name, spread=0.0) for bits, name in ((2.0, "r"), (2.4, prefix)))
        for table in (before, now):
            table["group"] = [f"{prefix}{n % groups}" for n in range(len(table))]
        found = ask(before, now)
        assert found.size == pytest.approx(0.2) and drift.judge([found]) == [False], groups
    assert drift.judge([ask(rows(5, 2.0, 5, spread=0.0), rows(5, 2.4, 5, prefix, spread=0.0))]) == [True]


def test_chance_alone_cries_wolf_in_one_evaluation_of_twenty_at_most() -> None:
    alarms = 0
    for seed in range(40):
        pairs = [(rows(60, 2.0, 100 * seed + n), rows(60, 2.0, 100 * seed + 50 + n, "other")) for n in range(5)]
        changes = [ask(before, now, margin=0.0) for before, now in pairs]
        alarms += any(drift.judge(changes))
    assert alarms <= 5  # 40 x 5 % is 2; more than 5 has a probability of 1.4 %


def test_holm_goes_on_only_as_long_as_each_is_sure() -> None:
    changes = [Change(str(n), None, None, 1.0, 0.0, p) for n, p in enumerate((0.04, 0.01, 0.02, 0.5))]
    assert drift.judge(changes) == [False, True, False, False]  # bounds: 0.0125, 0.0167, ...
    assert drift.judge(changes[:1]) == [True] and drift.judge([]) == []


WORDS = {
    "docs": ["function", "returns", "list", "argument", "raises", "object", "module", "string"],
    "food": ["butter", "onion", "simmer", "garlic", "oven", "slice", "pepper", "sauce"],
}


def sentences(topic: str, count: int, seed: int, length: int = 12) -> list[str]:
    random_ = random.Random(seed)
    return [" ".join(random_.choices(WORDS[topic], k=length)) for _ in range(count)]


def test_another_topic_is_seen_and_the_same_one_is_not() -> None:
    old = sentences("docs", 300, 0)
    same, mixed = drift.texts("t", old, sentences("docs", 300, 1)), drift.texts("t", old, sentences("food", 300, 1))
    assert drift.judge([same]) == [False] and mixed.now > 0.95 and drift.judge([mixed]) == [True]
    # Half of the rows, also where there are more of them than there were
    partly = drift.texts("t", old, [*sentences("docs", 300, 2), *sentences("food", 300, 3)][::2])
    assert drift.judge([partly]) == [True]
    assert drift.texts("t", old, old).size <= 0.0  # a text on both sides is a coin's toss


def test_longer_rows_are_seen() -> None:
    old = sentences("docs", 300, 0)
    assert drift.judge([drift.lengths("t", old, sentences("docs", 300, 1))]) == [False]
    longer = drift.lengths("t", old, sentences("docs", 300, 1, length=16))
    assert longer.now is not None and longer.before is not None and longer.now > longer.before
    assert drift.judge([longer]) == [True]


def test_held_out_tables_are_read_whole_and_small_ones_left_out(tmp_path: Path) -> None:
    message = [{"role": "user", "content": "what is a list"}, {"role": "assistant", "content": "a sequence"}]
    for side in ("before", "now"):
        for name, count in (("demonstrations/test", 30), ("corpus/train", 30), ("tasks/a/test", 5)):
            place = tmp_path / side / f"{name}.parquet"
            place.parent.mkdir(parents=True)
            ids = [str(n) for n in range(count)]
            table = {"id": ids, "group": ids, "source": ["s"] * count, "messages": [message] * count}
            parquet.write_table(pa.table(table), place)
    found = list(drift.tables(tmp_path / "before", tmp_path / "now"))
    assert [name for name, _, _ in found] == ["demonstrations"]
    assert found[0][1][0] == "user what is a list assistant a sequence"


def test_other_groups_of_the_same_kind_are_no_other_data(tmp_path: Path) -> None:
    """Rows of a group are alike in length and words: 1,500 rows of 60 groups say as much as 60."""
    found = []
    for seed in range(40):
        random_ = random.Random(seed)
        place = tmp_path / ("before", "now")[seed % 2] / "corpus" / "test.parquet"
        place.parent.mkdir(parents=True, exist_ok=True)
        rows: dict[str, list[str]] = {"id": [], "group": [], "text": []}
        for group in range(60):
            length, own = random_.randint(5, 60), random_.choices(WORDS["docs"], k=3)
            for number in range(25):
                rows["id"].append(f"{group}-{number}")
                rows["group"].append(f"{seed}-{group}")
                rows["text"].append(" ".join(random_.choices(own, k=length)))
        parquet.write_table(pa.table(rows), place)
        if seed % 2:
            for name, old, new in drift.tables(tmp_path / "before", tmp_path / "now"):
                found += drift.judge([drift.lengths(name, old, new), drift.texts(name, old, new)])
    assert len(found) == 40 and sum(found) <= 3


def test_a_page_says_first_what_has_drifted_and_an_alarm_names_the_numbers() -> None:
    from flows import evaluate

    changes = [Change("a bits", 2.0, 2.0, 0.0, 0.01, 0.6), Change("b bits", 2.0, 2.4, 0.2, 0.01, 1e-9)]
    judged = [{**one._asdict(), "drifted": yes} for one, yes in zip(changes, drift.judge(changes), strict=True)]
    page = evaluate.page(json.loads(json.dumps({"rows": judged, "notes": ["c cannot be measured"]})))
    assert page.index("b bits") < page.index("a bits") and "* c cannot be measured" in page
    assert evaluate.told(judged[1]) == "b bits drifted: 2 -> 2.4 (size 0.2, allowed 0.01, p 1e-09)"


def test_a_champion_that_cannot_be_measured_is_a_note_and_the_others_are_measured(
    repository: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, model = repository
    for name, stage in (("sluice-base", "pretrain"), ("sluice-sft", "sft")):
        run_stage(root, model, 2.5, stage, stage=stage)
        registry.settle(root, stage)
        promotion.promote(root, name, 1, why="test", expected_champion=None)
    broken: dict[str, Exception] = {}

    def measure_for(root: Path, name: str) -> object:
        def measure(model: Path, evaluation: Path) -> None:
            if name in broken:
                raise broken[name]
            write_rows(evaluation, 2.7)

        return measure

    monkeypatch.setattr(runner, "measure_for", measure_for)
    for trouble in (ArtifactError("of a task that is none of today's"), OSError("torn"), KeyError("bits")):
        broken["pretrain"] = trouble
        found = remeasure.measure(root)
        assert [(row["about"], row["drifted"]) for row in found.rows()] == [("sluice-sft 1 bits", True)]
        assert found.notes[0] == f"sluice-base 1 could not be measured: {type(trouble).__name__}: {trouble}"
    broken.clear()
    place = Path(store.connect(root)[0].get_model_version_download_uri("sluice-sft", "1").removeprefix("file://"))
    (place / "artifacts/evaluation.parquet").unlink()
    found = remeasure.measure(root)
    assert [row["about"] for row in found.rows()] == ["sluice-base 1 bits"]
    assert "sluice-sft 1 has no evaluation.parquet in the store" in found.notes[0]
    data = (root / "artifacts" / "data").rename(root / "elsewhere")
    with pytest.raises(ArtifactError, match="no data to measure on: there is no artifacts/data in"):
        remeasure.measure(root)
    data.rename(root / "artifacts" / "data")
    broken["pretrain"] = StoreUnavailable("away")
    with pytest.raises(StoreUnavailable):
        remeasure.measure(root)


@pytest.mark.parametrize("error", [GateError("no such file"), StoreUnavailable("away")])
def test_the_measurement_ends_with_the_code_of_its_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: GateError
) -> None:
    def fail(root: Path) -> None:
        raise error

    monkeypatch.setattr(remeasure.environment, "prepare", lambda root: None)
    monkeypatch.setattr(remeasure, "measure", fail)
    assert remeasure.main(tmp_path, tmp_path / "answers.json") == error.exit_code
    assert capsys.readouterr().err == f"error: {error}\n" and not (tmp_path / "answers.json").exists()
    monkeypatch.setattr(remeasure, "measure", lambda root: remeasure.Found(notes=["nothing"]))
    assert remeasure.main(tmp_path, tmp_path / "answers.json") == 0
    assert json.loads((tmp_path / "answers.json").read_text()) == {"rows": [], "notes": ["nothing"]}


def test_the_data_of_an_old_champion_are_found_however_many_there_have_been_since(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where data come by the hour, the ten newest are those of today: none was compared, and the cache was blamed."""
    root, day = tmp_path / "clone", 86_400
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    for number in range(15):
        outs = [{"path": "artifacts/data", "md5": f"{number}.dir"}]
        (root / "dvc.lock").write_text(json.dumps({"stages": {"data": {"outs": outs}}}))
        when = f"{1_700_000_000 + number * day} +0000"
        monkeypatch.setenv("GIT_COMMITTER_DATE", when)
        station.commit(root, f"data {number}")

    class Cache:
        def __init__(self, root: str, rev: str) -> None:
            self.rev = rev

        def get(self, path: str, target: str, recursive: bool) -> None:
            Path(target).mkdir(parents=True)
            (Path(target) / "rows").write_text(str(workspace.locked(root, self.rev)))

    monkeypatch.setattr("dvc.api.DVCFileSystem", Cache)
    third = workspace.resolve(root, "HEAD~12")
    Cache(str(root), third).get("artifacts/data", str(tmp_path / "third"), True)
    wanted, made = artifacts.content_hash(tmp_path / "third"), 1_700_000_000.0 + 2 * day - 600
    found = remeasure._accepted(root, wanted, made, Path("artifacts/data"), tmp_path / "found")
    assert found == tmp_path / "found" / third
