"""What a flow leaves in Prefect: a progress bar, the metrics table, the verdict, the way to the MLflow run."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from uuid import UUID

import httpx
from prefect.artifacts import (
    create_link_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.exceptions import PrefectException

from flows.outcome import cell
from flows.server import PAGES
from pipelines.core import store
from pipelines.core.gates import Verdict

MLFLOW_PAGES = "http://127.0.0.1:5000"  # where `make ui` serves the embedded store


@contextlib.contextmanager
def _for_people() -> Iterator[None]:
    """What people look at is no reason to end hours of training: a server that is away for long does without it."""
    try:
        yield
    except (httpx.HTTPError, PrefectException, RuntimeError) as error:
        told = store.without_login(str(error)) or type(error).__name__
        print(f"warning: Prefect was not told of the run: {told}", file=sys.stderr, flush=True)


def progress(stage: str) -> UUID | None:
    """A progress bar of a stage, at 0. Returns its id for `update`; None where the server does not take it."""
    with _for_people():
        bar = create_progress_artifact(0.0, key=_key(stage, "progress"), description=f"How far stage {stage} is")
        assert isinstance(bar, UUID)  # not a coroutine: this is no async function
        return bar
    return None


def update(bar: UUID, share: float) -> None:
    """Move a progress bar; `share` is 0 to 1."""
    with _for_people():
        update_progress_artifact(bar, 100.0 * share)


def metrics(stage: str, found: dict[str, float]) -> None:
    """The metrics of a stage as a table."""
    rows = [{"metric": key, "value": value} for key, value in sorted(found.items())]
    with _for_people():
        create_table_artifact(rows, key=_key(stage, "metrics"), description=f"metrics of stage {stage}")


def verdict(judged: Verdict) -> None:
    """The gate's table and a link to the MLflow run of the version."""
    with _for_people():
        create_table_artifact(
            [asdict(row) for row in judged.rows], key=_key(judged.model, "verdict"), description=cell([judged])
        )
        if judged.run_id:
            address = store.without_login(os.environ.get("MLFLOW_TRACKING_URI", ""))
            pages = address.rstrip("/") if address.startswith("http") else os.environ.get(PAGES, MLFLOW_PAGES)
            create_link_artifact(
                f"{pages}/#/runs/{judged.run_id}",
                link_text=f"{judged.model} {judged.version} in MLflow",
                key=_key(judged.model, "mlflow-run"),
                description="`make ui` serves it when the store is the embedded one",
            )


def _key(stage: str, what: str) -> str:
    """Prefect allows lower-case letters, digits and dashes."""
    return f"{stage}-{what}".replace("_", "-").lower()
