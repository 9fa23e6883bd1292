"""Gates: what the rules accept, what they refuse, and how a mistake in them is told."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import yaml
from stores import REGISTRY, declare_stages, make_root, write_rows

from pipelines.core import declared, gates, policy
from pipelines.core.errors import GateError
from pipelines.core.gates import Baseline, Verdict, evaluate
from pipelines.core.policy import ModelPolicy

BETTER = {"score": "bits", "per": "bytes", "lower_is_better": True, "better_than": "bits_before"}
NOT_WORSE = {"score": "bits", "per": "bytes", "lower_is_better": True, "not_worse_than": "champion", "margin": 0.01}


def gate(*rules: dict[str, object]) -> ModelPolicy:
    raw = {"stage": "pretrain", "model": "model", "gate": list(rules), "promote": "auto"}
    return ModelPolicy.model_validate(raw)


@pytest.fixture
def rows(tmp_path: Path):
    def write(bits: float, name: str = "mine", **options) -> Path:
        place = tmp_path / f"{name}.parquet"
        write_rows(place, bits, **options)
        return place

    return write


@pytest.mark.parametrize(
    ("rule", "passed"),
    [
        ({"metric": "bits_per_byte", "at_most": 2.5}, True),
        ({"metric": "bits_per_byte", "at_most": 2.49}, False),
        ({"metric": "bits_per_byte", "at_least": 2.5}, True),
        ({"metric": "bits_per_byte", "at_least": 2.51}, False),
        ({"metric": "nothing", "at_most": 1.0}, False),
    ],
)
def test_budget(rule, passed):
    metrics = {"bits_per_byte": 2.5, "nothing": float("nan")}
    verdict = evaluate("m", gate(rule), metrics, None, {})
    assert verdict.passed is passed


@pytest.mark.parametrize(("bits", "passed"), [(2.5, True), (3.0, False), (3.5, False)])
def test_better_than_a_column(rows, bits, passed):
    verdict = evaluate("m", gate(BETTER), {}, rows(bits), {})
    (row,) = verdict.rows
    assert verdict.passed is passed
    assert row.low <= row.high and row.value == pytest.approx(bits, abs=0.01)


def test_better_needs_an_interval_that_excludes_zero(tmp_path):
    """Fewer bits in the sum, by one lucky example out of ten."""
    bits = [100.0] * 9 + [60.0]
    table = pd.DataFrame({"id": list("abcdefghij"), "bits": bits, "bits_before": 100.0, "bytes": 50})
    table.to_parquet(tmp_path / "lucky.parquet")
    verdict = evaluate("m", gate(BETTER), {}, tmp_path / "lucky.parquet", {})
    assert not verdict.passed and verdict.rows[0].low < 0 == verdict.rows[0].high


@pytest.mark.parametrize("rule", [BETTER, {**NOT_WORSE, "not_worse_than": "bits_before"}])
def test_too_few_groups_pass_no_comparison_and_are_told(rows, tmp_path, rule):
    table = pd.read_parquet(rows(2.5))
    for count in (1, 4, 5):
        table.assign(group=[f"site {n % count}" for n in range(len(table))]).to_parquet(tmp_path / "grouped.parquet")
        verdict = evaluate("m", gate(rule), {}, tmp_path / "grouped.parquet", {})
        told = (
            f"FAILED (the test side has {count} groups (column group), and at least 5 are needed: give it more groups"
        )
        assert verdict.passed is (count == 5) and (told in verdict.table()) is (count < 5)
        assert "Infinity" not in json.dumps(verdict.to_json())
    few = evaluate("m", gate(rule), {}, rows(2.5, ids=["a", "b"]), {})
    assert not few.passed and "the test side has 2 examples" in few.table()
    table.assign(bytes=table["bytes"] * (table.index < 3)).to_parquet(tmp_path / "weighed.parquet")
    weighed = evaluate("m", gate(rule), {}, tmp_path / "weighed.parquet", {})
    assert not weighed.passed and "with a weight in bytes there are 3 examples, and at least 5" in weighed.table()


def unseen(tmp_path: Path, weights: list[float]) -> Path:
    """Rows of which only those with a weight have a part; the others would turn the result around."""
    right = [3.0 if weight else -100.0 for weight in weights]
    table = pd.DataFrame({"id": [str(n) for n in range(len(weights))], "right": right, "chance": 2.0, "pairs": weights})
    table.to_parquet(tmp_path / "unseen.parquet")
    return tmp_path / "unseen.parquet"


def test_examples_without_weight_have_no_part(tmp_path):
    rule = {"score": "right", "per": "pairs", "lower_is_better": False, "better_than": "chance"}
    verdict = evaluate("m", gate(rule), {}, unseen(tmp_path, [4.0] * 20 + [0.0] * 20), {})
    assert verdict.passed and verdict.rows[0].value == pytest.approx(0.75)
    nothing = unseen(tmp_path, [0.0] * 20)
    with pytest.raises(GateError, match="no example has a weight in pairs"):
        evaluate("m", gate(rule), {}, nothing, {})
    verdict = evaluate("m", gate({**rule, "where_measured": True}), {}, nothing, {})
    assert verdict.passed and verdict.rows[0].value is None and verdict.rows[0].note == gates.NOT_MEASURED


def test_a_metric_that_only_some_data_give():
    rule = {"metric": "accuracy_unseen", "at_least": 0.5, "where_measured": True}
    assert evaluate("m", gate(rule), {}, None, {}).rows[0].note == gates.NOT_MEASURED
    assert not evaluate("m", gate(rule), {"accuracy_unseen": 0.4}, None, {}).passed


def test_a_waived_rule_that_only_a_person_may_do_without_is_told_with_what_to_type_and_to_give(tmp_path):
    wins = {"score": "right", "per": "pairs", "lower_is_better": False, "better_than": "chance", "where_measured": True}
    tax = {"metric": "tax", "at_least": 0, "where_measured": True}
    kl = {"metric": "kl", "at_most": 10}
    marked = gate({**wins, "by_hand_without": "prompts with a reference"}, kl, {**tax, "by_hand_without": "an arm"})
    nothing = unseen(tmp_path, [0.0] * 20)
    verdict = replace(evaluate("m", marked, {"kl": 1.0}, nothing, {}), version="3")
    assert verdict.passed and [bool(row.by_hand_without) for row in verdict.rows] == [True, False, True]
    told = "right per pairs better than chance (needs prompts with a reference); tax (needs an arm)"
    assert (
        verdict.unmeasured == told
        and f"`sluice promote m 3 --why ...`), for what was not measured: {told}" in (verdict.table().splitlines()[-1])
    )
    assert Verdict.from_json(json.loads(json.dumps(verdict.to_json()))) == verdict
    failed = evaluate("m", marked, {"kl": 11.0}, nothing, {})
    assert failed.unmeasured and not failed.by_hand and "sluice promote" not in failed.table()
    for rules, metrics, rows in (
        (gate(wins, kl, tax), {"kl": 1.0}, nothing),  # waived, and nothing follows from it
        (marked, {"kl": 1.0, "tax": 0.0}, unseen(tmp_path, [4.0] * 20)),  # measured
    ):
        measured = evaluate("m", rules, metrics, rows, {})
        assert measured.passed and not measured.by_hand and "sluice promote" not in measured.table()
    assert gates.gate_hash(marked) != gates.gate_hash(gate(wins, kl, tax)), "a verdict without the mark is asked again"


def test_where_measured_belongs_to_optional_metrics(tmp_path, monkeypatch):
    declare_stages(monkeypatch)
    monkeypatch.setattr(sys.modules["pipelines.pretrain"], "OPTIONAL", frozenset({"unseen"}), raising=False)
    root = make_root(tmp_path, None)

    def told(rule: dict[str, object]) -> str:
        entry = {"stage": "pretrain", "model": "model", "gate": [rule], "promote": "auto"}
        (root / "mlflow/registry.yaml").write_text(yaml.safe_dump({"models": {"sluice-base": entry}}))
        with pytest.raises(GateError) as caught:
            declared.check(root)
        return str(caught.value)

    assert "gate.0.where_measured: unseen is not given by all data" in told({"metric": "unseen", "at_least": 0.5})
    always = {"metric": "bits_per_byte", "at_most": 4.0, "where_measured": True}
    assert "gate.0.where_measured: bits_per_byte is always measured" in told(always)


def test_higher_is_better_turns_every_comparison_around(rows):
    rule = {**BETTER, "lower_is_better": False}
    assert not evaluate("m", gate(rule), {}, rows(2.5), {}).passed
    better = evaluate("m", gate(rule), {}, rows(3.5), {})
    assert better.passed and "-0 " not in better.table()
    bounded = {**NOT_WORSE, "lower_is_better": False}
    champion = {"champion": Baseline("champion v1", rows(2.5, "champion"))}
    assert evaluate("m", gate(bounded), {}, rows(2.49), champion).passed
    assert not evaluate("m", gate(bounded), {}, rows(2.4), champion).passed


@pytest.mark.parametrize(("bits", "passed"), [(2.4, True), (2.5, True), (2.52, True), (2.53, False)])
def test_margin_is_a_share_of_the_champion(rows, bits, passed):
    champion = {"champion": Baseline("champion v1", rows(2.5, "champion"))}
    verdict = evaluate("m", gate(NOT_WORSE), {}, rows(bits), champion)
    assert verdict.passed is passed
    assert verdict.rows[0].bound == pytest.approx(0.025, rel=0.01)


def test_rows_are_paired_by_id_whatever_their_order(rows, tmp_path):
    champion = rows(2.5, "champion")
    shuffled = tmp_path / "shuffled.parquet"
    pd.read_parquet(champion).sample(frac=1.0, random_state=1).to_parquet(shuffled)
    mine = rows(2.51)
    one = evaluate("m", gate(NOT_WORSE), {}, mine, {"champion": Baseline("c", champion)})
    two = evaluate("m", gate(NOT_WORSE), {}, mine, {"champion": Baseline("c", shuffled)})
    assert one.rows == two.rows


def test_numbers_from_other_examples_are_not_compared(rows):
    others = rows(2.5, "others", ids=[f"row-{n}" for n in range(1, 41)])
    with pytest.raises(GateError, match=r"1 are missing there, 1 are extra, e.g. row-0, row-40"):
        evaluate("m", gate(NOT_WORSE), {}, rows(2.5), {"champion": Baseline("champion v1", others)})


def test_same_ids_with_other_sizes_are_other_examples(rows, tmp_path):
    table = pd.read_parquet(rows(2.5))
    table["bytes"] += 1
    table.to_parquet(tmp_path / "other.parquet")
    with pytest.raises(GateError, match="counts bytes differently"):
        evaluate("m", gate(NOT_WORSE), {}, rows(2.5), {"champion": Baseline("c", tmp_path / "other.parquet")})


def test_no_champion_yet_passes_and_says_so(rows):
    verdict = evaluate("m", gate(NOT_WORSE), {}, rows(2.5), {"champion": gates.NO_CHAMPION})
    assert verdict.passed and "no champion yet" in verdict.table()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop(columns="bits"), "no column 'bits'; found: bits_before, bytes, id"),
        (lambda t: t.drop(columns="id"), "no column id"),
        (lambda t: t.assign(id="same"), "an id twice"),
        (lambda t: t.assign(bits=float("nan")), "no finite number at id 'row-0'"),
        (lambda t: t.assign(bits="many"), "not numeric"),
    ],
)
def test_bad_rows_are_named(rows, tmp_path, change, message):
    change(pd.read_parquet(rows(2.5))).to_parquet(tmp_path / "bad.parquet")
    with pytest.raises(GateError, match=message):
        evaluate("m", gate(BETTER), {}, tmp_path / "bad.parquet", {})


def test_verdict_survives_json_and_is_readable(rows):
    verdict = evaluate("sluice-base", gate({"metric": "x", "at_most": 1.0}, BETTER), {"x": 2.0}, rows(2.5), {})
    again = Verdict.from_json(json.loads(json.dumps(verdict.to_json())))
    assert again == verdict and verdict.to_json()["passed"] is False
    lines = verdict.table().splitlines()
    assert lines[0] == "sluice-base: gate FAILED"
    assert "x at most" in lines[2] and lines[2].endswith("FAILED")
    assert lines[3].endswith("passed") and "bits_before: 3" in lines[3]


def test_rows_hash_sees_examples_and_not_scores(rows, tmp_path):
    scores = frozenset({"bits", "bits_before", "bytes"})
    rules = gate({**BETTER, "per": "bits"}, NOT_WORSE)  # what only other rules divide by is a score like any
    base = gates.rows_hash(rows(2.5), rules, scores)
    assert gates.rows_hash(rows(2.9), rules, scores) == base
    assert gates.rows_hash(rows(2.5, ids=["a", "b"]), rules, scores) != base
    table = pd.read_parquet(rows(2.5))
    table.assign(bytes=table["bytes"] + 1).to_parquet(tmp_path / "longer.parquet")
    assert gates.rows_hash(tmp_path / "longer.parquet", rules, scores) != base


def test_registry_of_this_repository_is_well_formed():
    root = Path(__file__).parents[1]
    ((name, _),) = policy.load(root).of_stage("pretrain", root / "artifacts/pretrain")
    assert name == "sluice-base"


def test_the_gates_of_this_repository_leave_to_a_person_what_nothing_judged():
    """What data may leave unmeasured and nothing else shows: that a policy is preferred, that an index finds better."""
    models = policy.load(Path(__file__).parents[1]).models
    marked = {
        (name, rule.baseline) for name, model in models.items() for rule in model.comparisons if rule.by_hand_without
    }
    assert marked == {("sluice-policy", "chance"), ("sluice-index", "mrr_bm25")}


@pytest.mark.parametrize("judged", [0.0, 1.0])
def test_a_copy_of_the_sft_model_passes_where_nothing_judges_it_and_takes_a_person(tmp_path, judged):
    """Prompts without references under `judge: overlap`, and no second arm: rows as `policy_evaluation` writes them."""
    shipped = policy.load(Path(__file__).parents[1]).models["sluice-policy"]
    rows = {
        "id": [f"row-{n}" for n in range(20)],
        "judged": judged,
        "gold": judged,
        "wins": judged,
        "chance": judged / 2,
    }
    pd.DataFrame(rows).to_parquet(tmp_path / "rows.parquet")
    copied = {"kl": 0.0, "eos_share": 0.9, "alignment_tax_bits": 0.0}
    verdict = evaluate("sluice-policy", shipped, copied, tmp_path / "rows.parquet", {"champion": gates.NO_CHAMPION})
    assert verdict.passed and bool(verdict.by_hand) is (not judged)
    if not judged:
        assert verdict.unmeasured.startswith(
            "wins per judged better than chance (needs held-out prompts with a reference"
        )


def test_check_accepts_what_exists(tmp_path, monkeypatch):
    declare_stages(monkeypatch)
    declared.check(make_root(tmp_path / "root", None))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["stage"], "pretain", r"models.sluice-base.stage: no stage 'pretain' in dvc.yaml; there are: data, pre"),
        (["gate", 0, "metric"], "bits", r"gate.0.metric: pretrain has no metric 'bits'; known: bits_per_byte"),
        (["gate", 1, "score"], "bit", r"gate.1.score: .* no column 'bit'; known: bits, bits_before, bytes"),
        (["gate", 1, "per"], "letters", r"gate.1.per: .* no column 'letters'"),
        (["gate", 1, "better_than"], "before", r"gate.1.better_than: .* no column 'before'"),
        (["gate", 1, "better_than"], "stage:sfd", r"gate.1.better_than: no stage 'sfd'"),
        (
            ["gate", 1, "better_than"],
            "stage:sft",
            "gate.1.better_than: pretrain does not wait for stage sft, .*: data$",
        ),
        (["gate", 1, "not_worse_than"], "champion", r"gate.1: a comparison needs one of better_than or"),
        (["gate", 1, "margin"], 0.1, r"gate.1: margin: SHARE belongs to not_worse_than"),
        (["gate", 2, "margin"], 1.5, r"gate.2.margin: .* less than 1 \(found 1.5\)"),
        (
            ["gate", 0, "at_mots"],
            4.0,
            r"gate.0.at_mots: no such key; accepted here: at_least, at_most, by_hand_without, metric",
        ),
        (["gate", 0, "at_least"], 1.0, r"gate.0: a budget needs one of at_most: NUMBER or at_least"),
        (["gate", 0, "at_most"], "4", r"gate.0.at_most: .*number \(found '4'\)"),
        (["gate", 0], {"x": 1}, r"gate.0: a rule needs metric: NAME \(a budget\) or score: COLUMN"),
        (["gate", 1, "by_hand_without"], "rows", r"gate.1: by_hand_without: TEXT .* belongs to where_measured: true"),
        (["gate", 1, "by_hand_without"], True, r"gate.1.by_hand_without: .*string \(found True\)"),
        (["gate"], [], r"models.sluice-base.gate: "),
        (["promote"], "maybe", r"promote: .*'auto' or 'manual' \(found 'maybe'\)"),
        (["promotion"], "auto", r"promotion: no such key; accepted here: best, gate, model, promote, stage"),
    ],
)
def test_a_mistake_in_the_registry_is_told_by_its_key(tmp_path, monkeypatch, path, value, message):
    declare_stages(monkeypatch)
    root = make_root(tmp_path / "root", None)
    raw = yaml.safe_load(REGISTRY)
    place = raw["models"]["sluice-base"]
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    (root / "mlflow" / "registry.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(GateError, match=f"mlflow/registry.yaml: .*{message}"):
        declared.check(root)


def test_patterns_stand_for_the_metrics_of_many_tasks(tmp_path, monkeypatch):
    declare_stages(monkeypatch)
    root = make_root(tmp_path / "root", None)
    text = REGISTRY.replace("metric: bits_per_byte", "metric: task/score")
    (root / "mlflow" / "registry.yaml").write_text(text)
    declared.check(root)
