"""Delivers spooled runs to MLflow: `python -m pipelines.core.courier ROOT`, started by every stage.

A flow starts one for all its stages (`ROOT -`: until its standard input closes), since importing MLflow takes longer
than many a stage.

In: `.sluice/spool/` (see `pipelines.core.tracking`). Out: one MLflow run for each spool. Everything may be cut
off and done again: a run is searched by its key before it is created, a metric point carries the time at which
it was logged (MLflow drops an equal one), params, tags, inputs and files overwrite themselves, and the offset of
what is delivered is written after the fact.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pipelines.core import artifacts, environment, store, tracking
from pipelines.core.errors import StoreUnavailable

TICK = 2.0  # seconds between deliveries while a stage runs
BATCH = 1000  # MLflow's limit of metrics in one call
PARAMS = 100  # its limit of params, and of tags


def deliver(root: Path) -> dict[str, str]:
    """Deliver whatever is spooled, one process at a time. Returns the MLflow run id of each spool by its key.

    Raises:
        StoreUnavailable: the store does not answer; what was not delivered stays in the spool.
    """
    if tracking.backlog(root):
        client, experiment = store.connect(root)  # seconds, the first time: before the lock, not while others wait
        with store.locked(root, "delivery"), store.answering(root):
            for spool in tracking.spools(root):
                if not spool.settled():
                    _deliver(client, experiment, spool)
            _close_orphans(client, experiment, root)
            tracking.prune(root)
    known: dict[str, str] = {}
    for spool in tracking.spools(root):
        with contextlib.suppress(FileNotFoundError):  # pruned just now
            known[spool.key] = spool.state()["run_id"]
    return known


def run_of(root: Path, client: Any, spool: tracking.Spool) -> str:
    """The MLflow run of a spool. What was delivered to a store that has lost it is delivered again.

    Raises:
        StoreUnavailable: as `deliver`.
    """
    run_id = deliver(root)[spool.key]
    with store.answering(root):
        if _usable(client, run_id):
            return run_id
    _, experiment = store.connect(root)
    with store.locked(root, "delivery"), store.answering(root):
        _deliver(client, experiment, spool)
        return str(spool.state()["run_id"])


def _deliver(client: Any, experiment: str, spool: tracking.Spool) -> None:
    """Bring one MLflow run up to date with its spool."""
    owned = spool.owned()  # asked before the events are read: who is dead now has written its last
    state = spool.state()
    if state["run_id"] is None or not _usable(client, state["run_id"]):
        state = {"run_id": _run(client, experiment, spool), "offset": 0, "store": store.place(spool.root)}
        _save(spool, state)
    elif state.get("store") != store.place(spool.root):  # the folder was moved, and its store with it
        state["store"] = store.place(spool.root)
        _save(spool, state)
    run_id = state["run_id"]
    for events, offset in _batches(spool, state["offset"]):
        if state.get("ended") and any(event["event"] == "start" for event in events):
            client.update_run(run_id, status="RUNNING")  # a new attempt at the same run
        _points(client, run_id, (event for event in events if event["event"] == "metrics"))
        for event in events:
            if event["event"] == "finish":
                _finish(client, run_id, spool, event)
        ends = [event for event in events if event["event"] in ("start", "finish")]
        if ends:
            state["end"] = [ends[-1]["status"], ends[-1]["time"]] if ends[-1]["event"] == "finish" else None
        state.update(offset=offset, ended=False, last=events[-1]["time"])
        _save(spool, state)
    end = state.get("end") or (None if owned else ["KILLED", state["last"]])
    if end is not None and not state["ended"]:
        client.set_terminated(run_id, *end)
        _save(spool, {**state, "ended": True})


def _usable(client: Any, run_id: str) -> bool:
    """Whether the run is in this store; one that a person put in the bin is taken out again."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False
    if run.info.lifecycle_stage == "deleted":
        client.restore_run(run_id)
    return True


def _run(client: Any, experiment: str, spool: tracking.Spool) -> str:
    """The run of a spool: the one that carries its key, else a new one."""
    found = client.search_runs([experiment], f"tags.`sluice.spool` = '{spool.key}'")
    if found:
        return str(found[0].info.run_id)
    start = next(iter(spool.events()))[0]
    tags = {
        "sluice.spool": spool.key,
        "sluice.stage": spool.stage,
        "mlflow.source.name": f"pipelines/{spool.stage}.py",
        "mlflow.source.type": "LOCAL",
    }
    run = client.create_run(experiment, start["time"], tags, run_name=spool.place.name)
    return str(run.info.run_id)


def _batches(spool: tracking.Spool, offset: int) -> Iterator[tuple[list[dict[str, Any]], int]]:
    """Undelivered events in groups whose points fit one call, each with the offset behind it."""
    group: list[dict[str, Any]] = []
    points = 0
    for event, behind in spool.events(offset):
        size = len(event.get("values", ()))
        if group and points + size > BATCH:
            yield group, offset
            group, points = [], 0
        group.append(event)
        points += size
        offset = behind
    if group:
        yield group, offset


def _points(client: Any, run_id: str, events: Iterable[dict[str, Any]]) -> None:
    from mlflow.entities import Metric

    points = [
        Metric(key, value, event["time"], event["step"]) for event in events for key, value in event["values"].items()
    ]
    for first in range(0, len(points), BATCH):
        client.log_batch(run_id, metrics=points[first : first + BATCH])


def _finish(client: Any, run_id: str, spool: tracking.Spool, event: dict[str, Any]) -> None:
    """Log the record of a run's end: params, final metrics, lineage tags, inputs, files."""
    from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag

    record = event["record"]
    step = spool.last_step()
    metrics = [Metric(key, value, event["time"], step) for key, value in record["metrics"].items()]
    params = [Param(key, value) for key, value in record["params"].items()]
    tags = [RunTag(key, value) for key, value in record["tags"].items()]
    for first in range(0, len(metrics), BATCH):
        client.log_batch(run_id, metrics=metrics[first : first + BATCH])
    for first in range(0, max(len(params), len(tags)), PARAMS):
        part = slice(first, first + PARAMS)
        client.log_batch(run_id, params=params[part], tags=tags[part])
    inputs = [
        DatasetInput(
            # MLflow keeps 36 characters of a digest, and 500 of a name; the whole hash is among the tags
            Dataset(name[-500:], digest[:32], "local", json.dumps({"uri": name})),
            [InputTag("mlflow.data.context", spool.stage)],
        )
        for name, digest in record["inputs"].items()
    ]
    if inputs:
        client.log_inputs(run_id, inputs)
    for name in record["files"]:
        client.log_artifact(run_id, str(spool.place / "files" / name))


def _close_orphans(client: Any, experiment: str, root: Path) -> None:
    """End runs whose spool was deleted while they ran. Only in the clone's own store: another one has others' runs."""
    if store.embedded(root) != store.own(root):
        return
    known = {spool.key for spool in tracking.spools(root)}
    for run in client.search_runs([experiment], "attributes.status = 'RUNNING'"):
        key = run.data.tags.get("sluice.spool")
        if key is not None and key not in known:
            client.set_terminated(run.info.run_id, "KILLED")


def _save(spool: tracking.Spool, state: dict[str, Any]) -> None:
    artifacts.write_json(spool.place / "state.json", state)


def main(root: Path, attend: bool = False) -> None:
    """Deliver every two seconds until no stage runs and nothing waits, or until nobody can take it.

    Args:
        attend: whether more stages are to be expected for as long as somebody holds the other end of standard input.
    """
    environment.prepare(root)
    os.nice(10)  # the stage has the cores
    (root / environment.STATE / "locks").mkdir(parents=True, exist_ok=True)
    with (root / environment.STATE / "locks" / "courier").open("a") as alone:
        fcntl.flock(alone, fcntl.LOCK_EX)  # one at a time; the next one waits here, having imported nothing
        while True:
            attend = attend and not select.select([0], [], [], 0)[0]
            running = attend or any(spool.owned() for spool in tracking.spools(root))
            try:
                deliver(root)
            except StoreUnavailable as error:
                print(error, file=sys.stderr, flush=True)
                if not running:
                    return
            if not running and not tracking.backlog(root):
                return
            select.select([0] if attend else [], [], [], TICK)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] == ["-"])
