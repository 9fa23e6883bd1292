"""News of a flow that somebody may have to act on: events of Prefect, which `flows.automations` sends to a webhook."""

from __future__ import annotations

from typing import Literal
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.events import emit_event
from prefect.runtime import flow_run

Kind = Literal["approval", "promoted", "refused", "rolled-back", "drift"]


def tell(kind: Kind, about: str, message: str) -> None:
    """Emit `sluice.KIND` about a model or a table of the data. The message is what a person reads."""
    resource = {"prefect.resource.id": f"sluice.{about}", "prefect.resource.name": about}
    emit_event(event=f"sluice.{kind}", resource=resource, payload={"message": f"sluice: {message}"})


def begin() -> None:
    """Say that this run was scheduled, where Prefect has not: or nobody hears for a quarter of an hour how it ends.

    A run's events follow one another, and Prefect acts on none before the one that it follows. Of a run that a schedule
    made it leaves out the first (seen in 3.8.8), and gives up waiting for it after 15 minutes.
    """
    if flow_run.id is None:
        return
    with get_client(sync_client=True) as client:
        run = client.read_flow_run(UUID(str(flow_run.id)))
        if run.auto_scheduled:
            first = client.read_flow_run_states(run.id)[0]
            resource = {"prefect.resource.id": f"prefect.flow-run.{run.id}", "prefect.resource.name": run.name}
            emit_event(event=f"prefect.flow-run.{first.name}", resource=resource, occurred=first.timestamp, id=first.id)
