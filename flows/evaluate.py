"""The flow behind the deployment `evaluate`: is what was accepted still good on today's data, and are they the same?

In a worktree at a commit (flows/workspace.py) the stages without parents make today's data; DVC runs nothing where
sources, code and params are those of the commit's `dvc.lock`. On these data every champion is measured again, and they
are compared with those that the champions were made from (flows/remeasure.py, a child that ends with the flow). The
answers are a table in Prefect; what has drifted is an event `sluice.drift`, one for each model or table, which somebody
hears of (flows/automations.py). Nothing is committed, promoted or taken back by this.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run

from flows import news, sources, stages, workspace
from flows.isolated import may_retry, run_name, run_stages, work
from flows.workspace import Workspace
from pipelines.core import graph
from pipelines.core.environment import STATE

COLUMNS = ("about", "before", "now", "size", "allowed", "p", "drifted")


@flow(name="evaluate")
def evaluate(root: str = ".", revision: str = "HEAD", hours: float = 2.0) -> list[str]:
    """Measure champions and today's data against what was accepted. Returns what has drifted, in words.

    Args:
        root: the clone; a deployment's working directory.
        revision: the commit whose code and params make the data and measure.
        hours: how long the data may take, and then the measurement.

    Raises:
        UserError: no such commit, data that are refused, or a model cannot be measured.
        StoreUnavailable: a store is away.
    """
    news.begin()
    name = run_name(str(flow_run.name), str(flow_run.id))
    with workspace.opened(Path(root).resolve(), name, revision) as place:
        first = [spec.name for spec in graph.load(place.place).values() if not spec.parents]
        sources.keep(place.place)
        if not stages.look(place.place).suspects().isdisjoint(first):  # `sluice run` of what is fresh judges all models
            run_stages(place, first, True, hours)
        answers = place.place / STATE / "evaluate.json"
        _measure(place, answers, hours)
        found = json.loads(answers.read_text(encoding="utf-8"))
    create_markdown_artifact(page(found), key="drift", description=f"champions on today's data, at {place.base[:12]}")
    drifted = [row for row in found["rows"] if row["drifted"]]
    for row in drifted:
        news.tell("drift", row["about"].split()[0], told(row))
    return [told(row) for row in drifted]


@task(name="measure", cache_policy=NO_CACHE, retries=1, retry_delay_seconds=600, retry_condition_fn=may_retry)
def _measure(place: Workspace, answers: Path, hours: float) -> None:
    """`flows.remeasure` in the worktree, with the worktree's own code."""
    work(place, [sys.executable, "-m", "flows.remeasure", str(answers)], hours)


def told(row: dict[str, Any]) -> str:
    """One change in words."""
    ends = f"{row['before']:.4g} -> {row['now']:.4g}"
    return f"{row['about']} drifted: {ends} (size {row['size']:.3g}, allowed {row['allowed']:.3g}, p {row['p']:.2g})"


def page(found: dict[str, Any]) -> str:
    """All answers as Markdown, what has drifted first."""
    lines = [f"| {' | '.join(COLUMNS)} |", "| --- | ---: | ---: | ---: | ---: | ---: | --- |"]
    for row in sorted(found["rows"], key=lambda one: not one["drifted"]):
        numbers = [f"{row[name]:.4g}" for name in COLUMNS[1:-1]]
        lines.append(f"| {' | '.join([row['about'], *numbers, '**yes**' if row['drifted'] else 'no'])} |")
    return "\n".join([*lines, "", *(f"* {note}" for note in found["notes"])])
