"""The best of several models: an alias that follows the champions of those that an entry with `*` stands for.

`mlflow/registry.yaml` names it under `best`. One model at a time has it: the champion in office whose metric, as its
run has it, is the lowest. Every move of a champion (`pipelines.core.moves`) takes it along, and nothing else moves it:
where `promote: manual` is said and nobody promotes, it stays.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pipelines.core import policy, versions
from pipelines.core.errors import GateError


def follow(root: Path, client: Any, models: Iterable[str]) -> None:
    """Point the aliases of the families that models belong to at the best of their champions as they are now.

    A policy that cannot be read holds up no promotion: the next one, or the next gate of the stage, catches up.
    """
    try:
        declared = policy.load(root).models
    except GateError:
        return
    moved = list(models)
    for family, found in declared.items():
        if found.best is not None and any(_part(family, model) for model in moved):
            point(client, family, found.best)


def point(client: Any, family: str, best: policy.Best) -> str | None:
    """Point the alias of a family at the best of its champions; at none where there is no champion.

    The new one first, so that there is always one that has it. Doing it again changes nothing. A champion without the
    metric is compared with nobody.

    Args:
        family: name of an entry with `*`.

    Returns what was done, in words; nothing where nothing was to do.
    """
    names = versions.models(client)
    members = {name: part for name in names if (part := _part(family, name)) is not None}
    ranked: list[tuple[float, str, str]] = []
    for name, part in members.items():
        allowed = not best.only or any(fnmatchcase(part, one) for one in best.only)
        champion = versions.alias(client, name, policy.CHAMPION) if allowed else None
        if champion is not None:
            value = _metrics(client, name, champion).get(best.lowest.replace(policy.ANY, part))
            ranked += [] if value is None else [(value, name, champion)]
    held = {name: versions.alias(client, name, best.alias) for name in members}
    _, chosen, version = min(ranked, default=(0.0, None, None))
    if chosen is not None and held[chosen] != version:
        client.set_registered_model_alias(chosen, best.alias, version)
    others = [name for name, its in held.items() if its is not None and name != chosen]
    for name in others:
        client.delete_registered_model_alias(name, best.alias)
    if chosen is None:
        return f"no champion is left to be {best.alias}" if others else None
    return None if held[chosen] == version else f"{chosen} {version} is {best.alias} now"


def _part(family: str, model: str) -> str | None:
    """What `*` stands for in the name of a model; None for a model of another family."""
    matched = re.fullmatch(re.escape(family).replace(re.escape(policy.ANY), "(.+)"), model)
    return None if matched is None else matched[1]


def _metrics(client: Any, model: str, version: str) -> dict[str, float]:
    """The metrics of the run that made a version; none where it has no run any more."""
    from mlflow.exceptions import MlflowException

    try:
        run_id = client.get_model_version(model, version).run_id
        found: dict[str, float] = client.get_run(run_id).data.metrics if run_id else {}
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return {}
    return found
