"""What every section of `params.yaml` is made of."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Share = Annotated[float, Field(ge=0.0, lt=1.0)]


class Section(BaseModel):
    """A frozen section in which an unknown key is an error and a string is not a number."""

    model_config = ConfigDict(frozen=True, extra="forbid")
