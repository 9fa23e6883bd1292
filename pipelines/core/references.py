"""`MODEL@ALIAS`, `MODEL/VERSION`, `MODEL`: what a person types for a version of a registered model."""

from __future__ import annotations

import re
from typing import Any

from pipelines.core import lineage, moves, policy, versions
from pipelines.core.errors import GateError, UserError

SHAPE = re.compile(r"(?P<model>[^@/\s]+)(?:@(?P<alias>[^@/\s]+)|/(?P<version>\d+))?")


def resolve(client: Any, text: str) -> Any:
    """The version that a reference means; a bare `MODEL` is its champion.

    Raises:
        UserError: no reference, or nothing of that name; the message lists what there is.
    """
    matched = SHAPE.fullmatch(text)
    if matched is None:
        raise UserError(f"{text!r} names no version: MODEL@ALIAS, MODEL/VERSION or MODEL (its champion)")
    model, alias, number = matched["model"], matched["alias"], matched["version"]
    known = registered(client, model)
    if number is None:
        found = known.aliases.get(alias or policy.CHAMPION)
        if found is None:
            there = ", ".join(sorted(known.aliases)) or "none"
            raise UserError(f"{model} has no alias {alias or policy.CHAMPION!r}; there are: {there}")
        number = str(found)
    try:
        return moves.fetch(client, model, number)
    except GateError:
        there = ", ".join(str(entry.version) for entry in every(client, model)) or "none"
        raise UserError(f"{model} has no version {number}; there are: {there}") from None


def registered(client: Any, model: str) -> Any:
    """A registered model.

    Raises:
        UserError: there is none of that name; the message lists those there are.
    """
    from mlflow.exceptions import MlflowException

    try:
        return client.get_registered_model(model)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
    there = ", ".join(versions.models(client)) or "none yet, `sluice run` makes them"
    raise UserError(f"no model {model!r} in the registry; there are: {there}")


def every(client: Any, model: str) -> list[Any]:
    """All versions of a model, newest first, with their tags."""
    found = client.search_model_versions(f"name = '{model}'")
    return sorted(found, key=lambda entry: int(entry.version), reverse=True)


def newest(client: Any, model: str) -> Any:
    """The newest version of a model.

    Raises:
        UserError: no such model, or one without versions.
    """
    registered(client, model)
    found = every(client, model)
    if not found:
        raise UserError(f"{model} has no version yet: run its stage")
    return found[0]


def run(client: Any, entry: Any) -> Any | None:
    """The run that made a version; None where it has none, or the store has it no more (`mlflow gc`)."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(entry.run_id) if entry.run_id else None
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        return None


def shown(entry: Any) -> str:
    """A version in words: `sluice-base 3`."""
    return f"{entry.name} {entry.version}"


def content(entry: Any) -> str:
    """The content hash of a version.

    Raises:
        GateError: it has none: not made by a stage.
    """
    found = entry.tags.get(lineage.CONTENT)
    if found is None:
        raise GateError(f"{shown(entry)} carries no {lineage.CONTENT}: no stage of this repository made it")
    return str(found)


def logged(entry: Any) -> str | None:
    """The logged model of a version; a SQL store leaves the field of that name empty."""
    source = str(entry.source)
    return source.removeprefix("models:/") if source.startswith("models:/") else None
