"""The flow behind the deployments `train` and `refresh`: a run in a place of its own, kept on a branch of its own.

A worktree at a commit (flows/workspace.py), overrides of params committed first, so that what is registered names a
commit that makes it again; then `sluice run` of that commit's code, as a child that ends when this flow ends, however
it ends. Whether it went well or not, `dvc.lock` and metrics are committed on `runs/<id>`: a stage that is done need
not be done again. With a DVC remote everything is pushed.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import yaml
from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run

from flows import failures, news, overrides, sources, stages, workspace
from flows.supervise import detached_environment, printed, run_within
from flows.workspace import Workspace
from pipelines.core import artifacts, graph, store
from pipelines.core.errors import ArtifactError, GateError, StoreUnavailable, UserError

RETRY_SECONDS = [60.0, 600.0]  # a store or a remote that is away
LAST_LINES = 15
NAME_LENGTH = 60  # of a flow run's name in that of its branch; a person may give any


@flow(name="isolated-run")
def isolated_run(
    root: str = ".",
    revision: str = "HEAD",
    data_of: str | None = None,
    from_stage: str | None = None,
    until_stage: str | None = None,
    only: list[str] | None = None,
    params: list[str] | None = None,
    hours: float = 12.0,
) -> str | None:
    """Bring stages up to date in a worktree of their own. Returns the commit on `runs/<id>`; None if nothing changed.

    Args:
        root: the clone; a deployment's working directory.
        revision: the commit whose code and params run.
        data_of: a commit whose data the run takes, instead of making today's.
        from_stage: leave out what does not depend on this stage; what it needs is taken as it stands.
        until_stage: leave out what this stage does not need.
        only: these stages alone, over what stands of all others, in place of the two before.
        params: `KEY=VALUE`, values that differ from the commit's `params.yaml`.
        hours: how long the stages may take.

    Raises:
        UserError: something in what was asked for is wrong, a stage failed or a model did not pass.
        StoreUnavailable: a store is away, and was still away at the last try.
    """
    news.begin()
    if only and (from_stage or until_stage):
        raise UserError("only names the stages that run: from_stage and until_stage do not go with it")
    clone = Path(root).resolve()
    name = run_name(str(flow_run.name), str(flow_run.id))
    with workspace.opened(clone, name, revision) as place:
        changed = overrides.apply(place.place, params or [])
        if changed:
            changed += sources.keep(place.place)
        if data_of is not None:
            changed += take_data(place, data_of)
        if changed:
            place.commit(f"{place.branch}: {'; '.join(changed)}")
        wanted = only or stages.look(place.place).between(from_stage, until_stage)
        trouble: UserError | None = None
        try:
            run_stages(place, wanted, bool(only or from_stage), hours)
        except UserError as error:
            trouble = error
        except BaseException:  # cancelled: what is done is kept, nothing more is begun
            place.commit(f"{place.branch}: {', '.join(wanted)}: cut off")
            raise
        outcome = f"stopped by {type(trouble).__name__}" if trouble else "done"
        made = place.commit(f"{place.branch}: {', '.join(wanted)}: {outcome}")
        create_markdown_artifact(told(place, made, changed), key="isolated-run", description=f"what {name} made")
        if made and place.remote:
            _push(place)
        if trouble:
            raise trouble
    return made


def run_name(name: str, identity: str) -> str:
    """A name for branch and worktree: the flow run's, made unique, of small letters, digits and dashes."""
    words = re.sub("[^a-z0-9]+", "-", name.lower())[:NAME_LENGTH].strip("-")
    return f"{words or 'run'}-{identity[:8]}"


def take_data(place: Workspace, revision: str) -> list[str]:
    """Give the workspace the data that another commit has in its `dvc.lock`, and freeze the stages that make it.

    Raises:
        UserError: the commit has no `dvc.lock`, or its data are of another shape of the graph.
        ArtifactError: neither cache nor remote have the data any more.
        StoreUnavailable: the remote does not answer.
    """
    commit = workspace.resolve(place.root, revision)
    first = [spec for spec in graph.load(place.place).values() if not spec.parents]
    lock = place.place / "dvc.lock"
    there: dict[str, Any] = yaml.safe_load(lock.read_text(encoding="utf-8")) if lock.exists() else {"schema": "2.0"}
    then = workspace.locked(place.root, commit)
    for spec in first:
        if spec.name not in then:
            raise UserError(f"dvc.lock at {revision} has no stage {spec.name}, which makes the data")
        there.setdefault("stages", {})[spec.name] = then[spec.name]
        workspace.git(place.place, "checkout", commit, "--", spec.metrics)  # byte for byte: dvc.lock has its hash
    artifacts.write_text(lock, yaml.safe_dump(there, sort_keys=False))
    place.dvc("freeze", *(spec.name for spec in first))
    outputs = [spec.output for spec in first]
    if place.remote:
        place.fetch(*outputs)
    try:
        place.dvc("checkout", "--force", *outputs)
    except StoreUnavailable as error:
        raise ArtifactError(f"the data of {revision} are neither in DVC's cache nor in its remote: {error}") from None
    return [f"data of {commit[:12]}"]


def told(place: Workspace, made: str | None, changed: list[str]) -> str:
    """What a run made, as Markdown: branch, commit, what it was given, and every metric that moved."""
    lines = [f"* from `{place.base[:12]}`, on `{place.branch}`: {f'`{made[:12]}`' if made else 'nothing changed'}"]
    lines += [f"* {change}" for change in changed]
    rows = []
    for path in sorted((place.place / "metrics").glob("*.json")):
        before = _metrics_at(place, path)
        for key, value in sorted(json.loads(path.read_text(encoding="utf-8")).items()):
            if before.get(key) != value:
                old = f"{before[key]:.6g}" if key in before else ""
                rows.append(f"| {path.stem} | {key} | {old} | {value:.6g} |")
    if rows:
        lines += ["", "| stage | metric | before | now |", "| --- | --- | ---: | ---: |", *rows]
    return "\n".join(lines)


def _metrics_at(place: Workspace, path: Path) -> dict[str, float]:
    name = path.relative_to(place.place).as_posix()
    if not workspace.git(place.root, "ls-tree", "--name-only", place.base, name):
        return {}
    found: dict[str, float] = json.loads(workspace.git(place.root, "show", f"{place.base}:{name}"))
    return found


def may_retry(task: Any, run: Any, state: Any) -> bool:
    """Whether a task that failed is tried again: Prefect's `retry_condition_fn`."""
    return failures.worth_retrying(state.result(raise_on_failure=False))


@task(name="stages", cache_policy=NO_CACHE, retries=2, retry_delay_seconds=RETRY_SECONDS, retry_condition_fn=may_retry)
def run_stages(place: Workspace, wanted: list[str], only: bool, hours: float) -> None:
    """`sluice run` in the worktree, with the worktree's own code.

    Args:
        wanted: the stages, and what they depend on.
        only: without what they depend on: what stands of it is taken as it is.
        hours: how long they may take.

    Raises:
        UserError: as `work`.
    """
    command = [sys.executable, "-m", "flows.cli", "run", "--plain", *(["--only"] if only else []), *wanted]
    work(place, command, hours)


@task(name="push", cache_policy=NO_CACHE, retries=2, retry_delay_seconds=RETRY_SECONDS, retry_condition_fn=may_retry)
def _push(place: Workspace) -> None:
    """Outputs to DVC's remote."""
    place.push()


def work(place: Workspace, command: list[str], hours: float) -> None:
    """Run a command in a workspace, under a supervisor; its output goes to the run's log.

    Raises:
        UserError: it failed; of the kind that its exit code says, with the last lines it printed.
    """
    # A store that is named relative to the clone, sqlite:///mlflow.db, would be one of the worktree, and go with it
    environment = detached_environment() | {"MLFLOW_TRACKING_URI": store.address(place.root)}
    begun = place.log.stat().st_size if place.log.exists() else 0
    code = run_within(hours * 3600, command, place.place, place.log, environment)
    if code is None:
        raise failures.StageFailed(f"took longer than {hours:g} hours and was stopped; see {place.log}")
    if code == 0:
        return
    kinds: dict[int, type[UserError]] = {2: UserError, 3: GateError, StoreUnavailable.exit_code: StoreUnavailable}
    kinds |= dict.fromkeys(failures.KILL_CODES, failures.StageKilled)
    lines = printed(place.log, begun)
    raise kinds.get(code, failures.StageFailed)("\n".join(lines[-LAST_LINES:]) or f"exit code {code}, nothing printed")
