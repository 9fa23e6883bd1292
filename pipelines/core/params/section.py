"""What every section of `params.yaml`, and of `mlflow/registry.yaml`, is made of, and how its mistakes are told."""

from collections.abc import Callable, Container
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

Share = Annotated[float, Field(ge=0.0, lt=1.0)]
Location = tuple[int | str, ...]


class Section(BaseModel):
    """A frozen section in which an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def explain(
    file: str, error: ValidationError, tags: Container[int | str], known_keys: Callable[[Location], list[str]]
) -> str:
    """One line a mistake: the key as one would type it, what was found, what is accepted.

    `tags` are parts of a location that name a kind of section and are not typed; `known_keys` tells what is
    accepted at the location of a section.
    """
    lines = []
    mistakes = error.errors(include_url=False)
    inner = {item["loc"][:length] for item in mistakes for length in range(len(item["loc"]))}
    for item in mistakes:
        if item["loc"] in inner:  # a list that is refused because of what is wrong in it: told there
            continue
        key = ".".join(str(part) for part in item["loc"] if part not in tags) or "(top level)"
        accepted = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            accepted = f"no such key; accepted here: {', '.join(known_keys(item['loc'][:-1]))}"
        found = "" if isinstance(item["input"], (dict, BaseModel)) else f" (found {item['input']!r})"
        lines.append(f"{file}: {key}: {accepted}{found}")
    return "\n".join(dict.fromkeys(lines))
