"""News of a flow that somebody may have to act on: events of Prefect, which `flows.automations` sends to a webhook."""

from __future__ import annotations

from typing import Literal

from prefect.events import emit_event

Kind = Literal["approval", "promoted", "refused", "rolled-back", "drift"]


def tell(kind: Kind, about: str, message: str) -> None:
    """Emit `sluice.KIND` about a model or a table of the data. The message is what a person reads."""
    resource = {"prefect.resource.id": f"sluice.{about}", "prefect.resource.name": about}
    emit_event(event=f"sluice.{kind}", resource=resource, payload={"message": f"sluice: {message}"})
