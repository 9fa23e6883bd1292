"""Section `compute`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipelines.core.params.section import Section


class ComputeParams(Section):
    """Where and how to compute. No DVC parameter: moving to another machine re-trains nothing."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="auto: time both once on this machine, take the faster"
    )
    threads: int = Field(0, ge=0, description="0: as many as the cores this process may use")
    processes: int = Field(
        1, ge=1, description="of each node; training stages but distill split their batches over them"
    )
    nodes: int = Field(1, ge=1, description="machines that share this folder; torchrun starts the stage on each")
    sharding: Literal["none", "full"] = Field(
        "none", description="none: every process has the whole model (DDP); full: its blocks are split (FSDP)"
    )
