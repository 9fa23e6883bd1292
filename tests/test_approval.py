"""Approval: what is shown, and that only a whole, explicit yes moves a champion."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools.validation import validate
from pydantic import ValidationError
from stores import repository, run_stage

from flows import approve
from flows.approve import Approval
from pipelines.core import policy, promotion, references, registry, release, store, versions
from pipelines.core.errors import GateError, UserError

__all__ = ["repository"]
Put = Callable[[float], None]


@pytest.fixture
def put(repository) -> Put:
    """A run of the stage with these bits a byte, registered and judged."""
    root, model = repository

    def run(bits: float) -> None:
        run_stage(root, model, bits)
        registry.settle(root, "pretrain")

    return run


@pytest.fixture
def root(repository, put: Put) -> Path:
    """A champion, and a better version that passed its gate."""
    place = Path(repository[0])
    put(2.0)
    promotion.promote(place, "sluice-base", 1, why="the first", expected_champion=None)
    put(1.8)
    return place


def yes(**more: Any) -> Approval:
    return Approval(**{"approve": True, "approver": "Ada", "reason": "better", **more})


def champion(root: Path) -> str | None:
    client, _ = store.connect(root)
    return versions.alias(client, "sluice-base", policy.CHAMPION)


def test_no_field_of_the_form_has_a_default() -> None:
    """One that had would be the answer to a resume without any."""
    assert set(Approval.model_json_schema()["required"]) == {"approve", "approver", "reason"}
    shown = Approval.with_initial_data(description="a page")
    assert set(shown.model_json_schema()["required"]) == {"approve", "approver", "reason"}
    for answer in ({}, {"approve": True}, {"approve": True, "approver": " ", "reason": "x"}):
        with pytest.raises(ValidationError):
            shown(**answer)


def test_the_page_has_the_verdict_the_metrics_and_both_sides(root: Path) -> None:
    found = approve.offer(root, "sluice-base", None, False)
    assert found["members"] == [["sluice-base", "2", "1"]] and found["name"] == "sluice-base 2"
    assert "gate passed" in found["page"] and "not worse by 1.00% than champion" in found["page"]
    assert "| bits_per_byte | 2 | 1.8 |" in found["page"]
    assert "B - A, 95 %" in found["page"] and "B better" in found["page"]


def test_a_version_that_does_not_pass_is_not_offered(root: Path, put: Put) -> None:
    put(3.5)
    with pytest.raises(GateError, match="(?s)version 3: gate FAILED"):
        approve.offer(root, "sluice-base", None, False)


def test_yes_moves_the_champion_and_says_who_and_why(root: Path) -> None:
    found = approve.offer(root, "sluice-base", None, False)
    told, done = approve.decide(root, found, yes(), "bold-otter")
    assert done and "approved by Ada: better" in told and champion(root) == "2"
    client, _ = store.connect(root)
    tags = references.resolve(client, "sluice-base/2").tags
    assert tags["promotion.who"] == "Ada" and tags["promotion.why"] == "better (approved in flow run bold-otter)"
    told, done = approve.decide(root, {**found, "members": [["sluice-base", "2", "2"]]}, yes(), "again")
    assert not done and "in office already" in told


def test_no_leaves_it(root: Path) -> None:
    found = approve.offer(root, "sluice-base", None, False)
    told, done = approve.decide(root, found, yes(approve=False, reason="not yet"), "run")
    assert not done and "refused by Ada: not yet" in told and champion(root) == "1"


def test_what_has_changed_since_it_was_shown_is_refused(root: Path, put: Put) -> None:
    found = approve.offer(root, "sluice-base", "2", False)
    promotion.promote(root, "sluice-base", 2, why="somebody else", expected_champion="1")
    promotion.rollback(root, "sluice-base", why="and back", expected_champion="2")
    put(1.7)
    promotion.promote(root, "sluice-base", 3, why="another one", expected_champion="1")
    with pytest.raises(GateError, match="champion is version 3, not version 1"):
        approve.decide(root, found, yes(), "run")
    assert champion(root) == "3"


def test_a_release_is_put_together_again_and_must_be_the_one_that_was_shown(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    member = type("Member", (), {"model": "sluice-base", "version": "2", "champion": "1"})
    planned = release.Release("sluice-base 2", (member,), {})  # type: ignore[arg-type]
    asked: list[Any] = []
    monkeypatch.setattr(approve, "_plan", lambda root, model, version: asked.append((model, version)) or planned)
    monkeypatch.setattr(release, "promote", lambda root, found, *, who, why: asked.append((found, who)))
    shown = {"name": "release", "model": "sluice-base", "release": True, "members": [["sluice-base", "2", "1"]]}
    approve.decide(root, shown, yes(), "run")
    assert asked == [("sluice-base", "2"), (planned, "Ada")]
    with pytest.raises(GateError, match="not what was approved any more"):
        approve.decide(root, {**shown, "members": [["sluice-base", "2", None]]}, yes(), "run")
    assert len(asked) == 3, "nothing was promoted"


def test_what_a_release_retires_is_shown_and_approved_too(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client, _ = store.connect(root)
    member = release.Member(references.resolve(client, "sluice-base/2"), "1")
    retired = {"sluice-quantized-nf4": "7"}
    monkeypatch.setattr(approve, "_plan", lambda *_: release.Release("sluice-base 2", (member,), dict(retired)))
    done: list[release.Release] = []
    monkeypatch.setattr(release, "promote", lambda root, found, *, who, why: done.append(found))
    found = approve.offer(root, "sluice-base", "2", True)
    assert "## sluice-quantized-nf4 7\n\nIt was not made this time" in found["page"]
    assert found["retired"] == retired and json.loads(json.dumps(found)) == found
    approve.decide(root, found, yes(), "run")
    assert len(done) == 1
    for now in ({"sluice-quantized-nf4": "8"}, {}, {**retired, "sluice-quantized-int4": "1"}):
        retired = now
        with pytest.raises(GateError, match="not what was approved any more.*retired"):
            approve.decide(root, found, yes(), "run")
    assert len(done) == 1


def test_a_rollback_needs_a_name_and_a_reason(tmp_path: Path) -> None:
    with pytest.raises(GateError, match="needs who and why"):
        approve.rollback.fn(str(tmp_path), "sluice-base", who="Ada", why=" ")


def test_an_offer_that_can_no_more_be_taken_is_let_go(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def moved(*_: Any) -> Any:
        raise GateError("the champion is another one")

    gone: list[Any] = []
    monkeypatch.setattr(approve, "_shown", lambda *_: {"page": "", "members": []})
    monkeypatch.setattr(approve, "suspend_flow_run", lambda **_: yes())
    monkeypatch.setattr(approve, "decide", moved)
    monkeypatch.setattr(approve, "let_go", lambda *given: gone.append(given))
    with pytest.raises(GateError, match="another one"):
        approve.promote.fn(str(root))
    assert len(gone) == 1


@pytest.mark.parametrize("hours", [0.0, -1.0, float("nan"), float("inf")])
def test_a_time_out_that_is_none_is_refused_before_anything_is_measured(
    root: Path, monkeypatch: pytest.MonkeyPatch, hours: float
) -> None:
    monkeypatch.setattr(approve, "_shown", pytest.fail)
    with pytest.raises(UserError, match="approval_hours: .* is not in"):
        approve.promote.fn(str(root), approval_hours=hours)


def test_a_version_may_be_given_as_the_number_it_is() -> None:
    """`prefect deployment run promote/promote --param version=3` reads JSON: Prefect refused it, as no text."""
    schema = parameter_schema(approve.promote).model_dump_for_openapi()
    for version in (3, "3", None):
        validate({"model": "sluice-base", "version": version}, schema, raise_on_error=True)
        assert approve.promote.validate_parameters({"version": version})["version"] == version
