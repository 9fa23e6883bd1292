"""Profiles: named sets of values for `params.yaml`, written into it so that DVC sees plain values.

`profiles/default.yaml` holds the default of every key that any profile sets. `apply(root, NAME)` writes NAME's
values; a key that NAME does not set goes back to its default when its value is one that some profile would have
written, and stays when it is the user's own. So going from one profile to another leaves nothing behind, own
data survives `scratch`, and `default` undoes any profile. Nothing is remembered between calls: the result
follows from the files alone. Lists are replaced whole; comments and order of `params.yaml` are kept.
"""

from __future__ import annotations

import io
import tempfile
from pathlib import Path
from typing import Any

from pipelines.core import artifacts
from pipelines.core.errors import ParamsError, UserError
from pipelines.core.params import whole

DEFAULT = "default"


def names(root: Path) -> list[str]:
    """The profiles there are, `default` first."""
    found = {path.stem for path in (root / "profiles").glob("*.yaml")}
    return [DEFAULT, *sorted(found - {DEFAULT})]


def apply(root: Path, name: str) -> list[str]:
    """Write a profile over `params.yaml`. Returns one line `key: old -> new` for each key that changed.

    Raises:
        UserError: no such profile (the message lists those there are), or it sets a key that
            `default.yaml` lacks.
        ParamsError: the result would not be accepted; `params.yaml` is left as it was.
    """
    if name not in names(root):
        raise UserError(f"no profile {name!r} in profiles/; there are: {', '.join(names(root))}")
    yaml = _round_trip()
    target = root / "params.yaml"
    whole.load(target)
    merged = yaml.load(target.read_text(encoding="utf-8"))
    before = whole.flatten(merged)
    profiles = {each: _read(root, each) for each in names(root)}
    flat = {each: whole.flatten(values) for each, values in profiles.items()}
    _all_have_defaults(flat)
    stale = {key for each in flat.values() for key, value in each.items() if key in before and before[key] == value}
    _merge(merged, profiles[DEFAULT], only=stale)
    _merge(merged, profiles[name])
    after = whole.flatten(merged)
    if after == before:
        return []
    text = io.StringIO()
    yaml.dump(merged, text)
    _check(text.getvalue(), name)
    artifacts.write_text(target, text.getvalue())
    return [
        f"{key}: {_short(before.get(key))} -> {_short(after[key])}" for key in after if before.get(key) != after[key]
    ]


def _round_trip() -> Any:
    from ruamel.yaml import YAML

    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 4096  # never fold a line of the user's
    yaml.representer.add_representer(
        type(None), lambda representer, _: representer.represent_scalar("tag:yaml.org,2002:null", "null")
    )
    return yaml


def _read(root: Path, name: str) -> dict[str, Any]:
    from ruamel.yaml.error import YAMLError

    try:
        values = _round_trip().load((root / "profiles" / f"{name}.yaml").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"profiles/{name}.yaml: no such file") from None
    except (YAMLError, UnicodeDecodeError) as error:
        raise ParamsError(f"profiles/{name}.yaml is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ParamsError(f"profiles/{name}.yaml: expected sections as in params.yaml, found {values!r}")
    return values


def _all_have_defaults(flat: dict[str, dict[str, Any]]) -> None:
    for name, values in flat.items():
        foreign = sorted(set(values) - set(flat[DEFAULT]))
        if foreign:
            raise UserError(
                f"profiles/{name}.yaml sets {foreign[0]}, which profiles/{DEFAULT}.yaml lacks: write its default "
                f"there, so that PROFILE={DEFAULT} can bring it back"
            )


def _merge(target: dict[str, Any], values: dict[str, Any], only: set[str] | None = None, prefix: str = "") -> None:
    """Set every leaf that differs; one that is equal keeps its place, its spelling and its comments."""
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(target.get(key), dict):
            _merge(target[key], value, only, f"{prefix}{key}.")
        elif (only is None or f"{prefix}{key}" in only) and (key not in target or target[key] != value):
            target[key] = value


def _check(text: str, name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / "params.yaml"
        draft.write_text(text, encoding="utf-8")
        try:
            whole.load(draft)
        except ParamsError as error:
            raise ParamsError(f"profile {name} does not fit, params.yaml is unchanged:\n{error}") from None


def _short(value: Any) -> str:
    if isinstance(value, list):
        return f"[{len(value)}: {', '.join(_short(item) for item in value)}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_short(item)}" for key, item in value.items()) + "}"
    return "null" if value is None else str(value)
