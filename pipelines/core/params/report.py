"""Section `report`."""

from __future__ import annotations

from pydantic import Field

from pipelines.core.params.section import Section


class ReportParams(Section):
    """Stage `report`."""

    title: str
    samples: int = Field(ge=0, le=32)
