"""The flows behind the deployments `promote` and `rollback`: a champion changes when a person has looked and agreed.

1. The gate is asked again, and a page is made: the verdict, the metrics that differ, scores with intervals, samples
   side by side. It is computed in a worktree (flows/workspace.py), kept as a task's result and shown with the form.
2. The flow is suspended: no process waits. The form has no field with a default, so a bare "resume" is refused by the
   server, and so is a blank name. A time-out fails the run. Either way the champion stays.
3. What was approved is what was shown: the versions and the champions of the page, those that a release retires among
   them. If one has changed meanwhile, the promotion is refused (`pipelines.core.promotion` compares and sets).
4. What waits is kept: its versions carry a tag with the end of the time-out, at which `sluice gc` looks.

Prefect's own server knows no users: the name in the form is a signature, not a log-in. Who may open the form is decided
by whoever guards the server.
"""

from __future__ import annotations

import contextlib
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import flow, suspend_flow_run, task
from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas.objects import State
from prefect.input import RunInput
from prefect.runtime import flow_run
from prefect.states import Completed
from pydantic import Field

from flows import gc, news, workspace
from flows.isolated import run_name
from pipelines.core import policy
from pipelines.core.errors import GateError, StoreUnavailable, UserError

if TYPE_CHECKING:
    from pipelines.core.release import Release

Offer = dict[str, Any]  # see `offer`: JSON, since it is stored between the page and the answer
LONGEST_HOURS = 366 * 24
GRACE = 1.0  # hours; the time-out begins a little after the page is made


class Approval(RunInput):
    """The form. No field may ever get a default: a resume without an answer would then be one."""

    approve: bool = Field(description="Shall it become champion?")
    approver: str = Field(pattern=r"\S", description="Your name; it goes into the journal.")
    reason: str = Field(pattern=r"\S", description="Why, or why not.")


@flow(name="promote", persist_result=True)
def promote(
    root: str = ".",
    model: str = "sluice-policy",
    version: str | int | None = None,
    release: bool = False,
    approval_hours: float = 72.0,
) -> State[str]:
    """Show a version (the newest if none is named) beside the champion, ask a person, and do what the answer says.

    Args:
        release: with everything that belongs to the version (`pipelines.core.release`).
        approval_hours: after which the run fails and the champion stays.

    Raises:
        UserError: no such model or version, or a time-out that is none.
        GateError: the gate did not pass, or something has changed since the page was made.
        StoreUnavailable: the store is away.
    """
    if not 0 < approval_hours <= LONGEST_HOURS:
        raise UserError(f"approval_hours: {approval_hours:g} is not in (0, {LONGEST_HOURS}]: nobody could answer")
    clone = Path(root).resolve()
    named = None if version is None else str(version)  # `--param version=3` is a number to Prefect
    shown = _shown(clone, model, named, release, approval_hours)
    form = Approval.with_initial_data(description=shown["page"])
    answer = suspend_flow_run(wait_for_input=form, timeout=round(approval_hours * 3600), key="approval")
    try:
        message, done = decide(clone, shown, answer, str(flow_run.name))
    finally:  # refused by the gate, too, this offer can no more be taken
        let_go(clone, shown, str(flow_run.id))
    news.tell("promoted" if done else "refused", model, message)
    return Completed(name="Promoted" if done else "Refused", message=message)


@flow(name="rollback")
def rollback(root: str = ".", model: str = "sluice-policy", who: str = "", why: str = "", release: bool = False) -> str:
    """Make the previous champion of a model champion again, or put back what the last release has replaced. At once.

    Raises:
        GateError: there is nothing to go back to, or no reason is given.
        StoreUnavailable: the store is away.
    """
    from pipelines.core import ledger, promotion, registry
    from pipelines.core import release as releases

    if not (who.strip() and why.strip()):
        raise GateError("a rollback needs who and why: both go into the journal")
    clone = Path(root).resolve()
    if release:
        step = releases.rollback(clone, releases.last(clone, ledger.of(clone)), who=who, why=why)
    else:
        seen = registry.champion(clone, model)
        step = promotion.rollback(clone, model, who=who, why=why, expected_champion=seen)
    moved = "; ".join(f"{move.model}: {move.source or 'nobody'} -> {move.target or 'nobody'}" for move in step.moves)
    message = f"rolled back by {who}: {moved} ({why})"
    news.tell("rolled-back", model, message)
    return message


@task(name="what is on offer", persist_result=True)
def _shown(clone: Path, model: str, version: str | None, whole: bool, hours: float) -> Offer:
    """`offer` in a worktree, as an artifact and as news. A run that is resumed gets it from its storage."""
    with workspace.opened(clone, run_name(str(flow_run.name), str(flow_run.id))) as place:
        found = offer(place.place, model, version, whole)
        hold(clone, found, str(flow_run.id), hours + GRACE)  # while nothing is collected
    create_markdown_artifact(found["page"], key="promotion", description=f"{found['name']} waits for approval")
    news.tell("approval", model, f"{found['name']} waits for approval (flow run {flow_run.name})")
    return found


def offer(root: Path, model: str, version: str | None, whole: bool) -> Offer:
    """What a person is asked to approve: `name`, `members` (model, version, champion) and the `page`, Markdown.

    Of a release `retired` too: models that were dropped, and their champion, which they have no more afterwards.

    Raises:
        UserError: no such model or version.
        GateError: a gate did not pass; the message has its table. Nobody is asked then.
        StoreUnavailable: the store is away.
    """
    from flows import compare
    from pipelines.core import references, rejudging, runner, store, versions

    client, _ = store.connect(root)
    retired: dict[str, str] = {}
    with store.answering(root):
        if whole:
            planned = _plan(root, model, version)
            entries, retired = [one.entry for one in planned.members], planned.retired
            name = f"release {planned.name}"
        else:
            entry = references.resolve(client, f"{model}/{version}") if version else references.newest(client, model)
            entries, name = [entry], references.shown(entry)
        members, parts, failed = [], [f"# {name}"], []
        for entry in entries:
            champion = versions.alias(client, entry.name, policy.CHAMPION)
            stage = entry.tags.get(rejudging.STAGE)
            verdict = rejudging.ask(root, client, entry, runner.measure_for(root, stage) if stage else None)
            failed += [] if verdict.passed else [verdict.table()]
            members.append([str(entry.name), str(entry.version), champion])
            parts += [f"## {references.shown(entry)}", f"```\n{verdict.table()}\n```"]
            if champion is None:
                parts.append("There is no champion yet.")
            elif champion == str(entry.version):
                parts.append("It is the champion already.")
            else:
                both = compare.compare(root, f"{entry.name}/{champion}", f"{entry.name}/{entry.version}")
                parts.append(compare.markdown(both))
    if failed:
        raise GateError("\n".join(failed))
    for gone, champion in retired.items():
        parts += [f"## {gone} {champion}", "It was not made this time: the model has no champion then."]
    found = {"name": name, "model": model, "members": members, "retired": retired, "release": whole}
    return {**found, "page": "\n\n".join(parts)}


def hold(root: Path, shown: Offer, run: str, hours: float) -> None:
    """Keep the versions on offer from `sluice gc` for so long.

    Args:
        run: id of the flow run that asks; several may ask about one version.

    Raises:
        StoreUnavailable: the store is away.
    """
    from pipelines.core import store

    client, _ = store.connect(root)
    until = (datetime.now(UTC) + timedelta(hours=hours)).isoformat(timespec="seconds")
    with store.answering(root):
        for model, version, _ in shown["members"]:
            client.set_model_version_tag(model, version, gc.OFFERED + run, until)


def let_go(root: Path, shown: Offer, run: str) -> None:
    """The inverse of `hold`, once it is decided. Where the store is away, it ends when its time is over."""
    from pipelines.core import store

    with contextlib.suppress(StoreUnavailable):
        client, _ = store.connect(root)
        with store.answering(root):
            for model, version, _ in shown["members"]:
                client.delete_model_version_tag(model, version, gc.OFFERED + run)


def decide(root: Path, shown: Offer, answer: Approval, run: str) -> tuple[str, bool]:
    """Do what the answer says. Returns what happened, in words, and whether champions have changed.

    Raises:
        GateError: the versions or champions are not those that were shown.
        StoreUnavailable: the store is away; nothing has changed.
    """
    from pipelines.core import promotion
    from pipelines.core import release as releases

    if not answer.approve:
        return f"{shown['name']} was refused by {answer.approver}: {answer.reason}. The champion stays.", False
    who, why = answer.approver, f"{answer.reason} (approved in flow run {run})"
    if shown["release"]:
        _, version, _ = next(one for one in shown["members"] if one[0] == shown["model"])
        planned = _plan(root, shown["model"], version)
        members = [[one.model, one.version, one.champion] for one in planned.members]
        before, now = (sorted(shown["members"]), shown.get("retired", {})), (sorted(members), planned.retired)
        if before != now:
            raise GateError(
                f"{shown['name']} is not what was approved any more: {before[0]}, retired {before[1]}; "
                f"now {now[0]}, retired {now[1]}"
            )
        done = releases.promote(root, planned, who=who, why=why)
    else:
        model, version, champion = shown["members"][0]
        done = promotion.promote(root, model, version, who=who, why=why, expected_champion=champion)
    if done is None:
        return f"{shown['name']} was in office already.", False
    return f"{shown['name']} is in office, approved by {answer.approver}: {answer.reason}", True


def _plan(root: Path, model: str, version: str | None) -> Release:
    from pipelines.core import release, store

    client, _ = store.connect(root)
    with store.answering(root):
        return release.plan(root, client, model, version)
