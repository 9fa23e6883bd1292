"""Section `feedback`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from pipelines.core.params.section import Section


class FeedbackParams(Section):
    """Stage `feedback`."""

    seed: int = Field(ge=0)
    labeler: Literal["reference", "file", "data"] = Field(
        description="reference: simulated; file: people's rankings of this run's samples; data: given comparisons"
    )
    judge: Literal["overlap", "slots"] = Field(description="what gold is, and what simulated labelers look at")
    rankings: str | None = Field(description="labeler: file: where the rankings are, or will be")
    labelers: tuple[str, ...] = Field(description="labeler: reference: names of the simulated labelers")
    shared_share: float = Field(ge=0.0, le=1.0, description="share of prompts that every simulated labeler ranks")
    prompts: int = Field(ge=1, description="training prompts to sample for")
    test_prompts: int = Field(ge=1, description="held-out prompts to sample for")
    completions: int = Field(ge=4, le=9, description="samples a prompt (InstructGPT: 4 to 9)")
    max_new_tokens: int = Field(ge=1)
    max_prompt_tokens: int = Field(ge=1)
    too_long: Literal["refuse", "drop"]
    temperature: float = Field(gt=0.0, le=2.0)
    samples: int = Field(ge=0, le=32)

    def rankings_in(self, root: Path) -> Path | None:
        """Where people's rankings are, or will be; a relative path starts from `root`."""
        return root / Path(self.rankings).expanduser() if self.rankings else None

    @model_validator(mode="after")
    def _labeler_has_what_it_needs(self) -> FeedbackParams:
        if (self.labeler == "file") != (self.rankings is not None):
            raise ValueError(
                "labeler: file needs rankings: PATH (it need not exist yet: the first run writes the tasks to rank), "
                "and no other labeler has one"
            )
        if self.labeler == "reference" and not self.labelers:
            raise ValueError("labeler: reference needs at least one name in labelers, for example [ada, ben, eve]")
        if len(set(self.labelers)) < len(self.labelers) or not all(name.strip() for name in self.labelers):
            raise ValueError(f"labelers: {list(self.labelers)} must be different names that are not blank")
        return self
