"""Section `flow`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipelines.core.params.section import Section


class FlowParams(Section):
    """What `sluice run` does that DVC does not. No DVC parameter."""

    failed_gate: Literal["stop", "go_on"] = Field(
        "stop", description="go_on: record the verdict and run what depends on the model, as `dvc repro` does"
    )
