"""The flow behind the deployment `backfill`: today's code and params over the data of many commits, a run for each.

A version of the data is what `dvc.lock` says of the stages that make them. Commits with the same data are one version,
so a range of a whole branch is a handful of runs. They are runs of a deployment of `isolated-run` that lets them wait
for one another; asking for the same again starts nothing new but what has not ended well.
"""

from __future__ import annotations

import hashlib
import json
from itertools import count
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.deployments import run_deployment

from flows import workspace
from pipelines.core import graph
from pipelines.core.errors import UserError

DEPLOYMENT = "isolated-run/backfill-version"


@flow(name="backfill")
def backfill(
    root: str = ".",
    revisions: list[str] | None = None,
    from_stage: str | None = None,
    until_stage: str | None = None,
    params: list[str] | None = None,
) -> list[str]:
    """Start a run for every version of the data. Returns the commits, oldest first.

    Args:
        revisions: commits, branches, tags, or ranges `A..B` of them.
        from_stage: as of `isolated-run`, like the other two.

    Raises:
        UserError: nothing is named, a name that is no commit, or no commit of them has data.
    """
    clone = Path(root).resolve()
    today = workspace.resolve(clone, "HEAD")
    chosen = versions(clone, revisions or [])
    for commit in chosen:
        given = {
            "revision": today,
            "data_of": commit,
            "from_stage": from_stage,
            "until_stage": until_stage,
            "params": params,
        }
        _start(given)
    return chosen


def _start(given: dict[str, Any]) -> None:
    """Start a run with these parameters, unless one of them goes on or has ended well."""
    for attempt in count():
        key = hashlib.sha256(json.dumps([given, attempt]).encode()).hexdigest()
        run: Any = run_deployment(
            DEPLOYMENT, parameters=given, idempotency_key=key, timeout=0, as_subflow=False,
            flow_run_name=f"backfill-{given['data_of'][:8]}", tags=["sluice"],
        )  # fmt: skip
        if run.state is None or not run.state.is_final() or run.state.is_completed():
            return


def versions(root: Path, revisions: list[str]) -> list[str]:
    """The commits whose data differ from those of all before them, oldest first.

    Raises:
        UserError: nothing is named, a name that is no commit, or no commit of them has data.
    """
    if not revisions:
        raise UserError("name the versions of the data: commits, tags, or a range such as v1..main")
    named: dict[str, None] = {}
    for one in revisions:
        first, dots, last = one.partition("..")
        if not dots:
            named[workspace.resolve(root, one)] = None
            continue
        ends = (workspace.resolve(root, first), workspace.resolve(root, last or "HEAD"))
        named |= dict.fromkeys(workspace.git(root, "rev-list", f"{ends[0]}..{ends[1]}", "--", "dvc.lock").split())
    if not named:
        raise UserError(f"no commit in {', '.join(revisions)} changes dvc.lock: there are no other data")
    ordered = workspace.git(root, "rev-list", "--no-walk=sorted", "--reverse", *named).split()
    sources = [spec.name for spec in graph.load(root).values() if not spec.parents]
    seen: dict[str, str] = {}
    for commit in ordered:
        stages = workspace.locked(root, commit)
        outs = [stages[name].get("outs") for name in sources if name in stages]
        if outs:
            seen.setdefault(json.dumps(outs, sort_keys=True), commit)
    if not seen:
        raise UserError(f"dvc.lock has no data at {', '.join(revisions)}")
    return list(seen.values())
