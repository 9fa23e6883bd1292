"""Values for single keys of `params.yaml`, as a deployment gives them: `sft.lr=1e-4`. Comments and order are kept."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from pipelines.core import artifacts
from pipelines.core.errors import ParamsError
from pipelines.core.params import whole


def apply(root: Path, given: list[str]) -> list[str]:
    """Write `KEY=VALUE` pairs into `params.yaml`. Returns one line `key: old -> new` for each key that changed.

    Raises:
        ParamsError: a text without `=`, a key that `params.yaml` lacks, or a value that is no YAML or not accepted
            there; the file is left as it was.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 4096  # never fold a line of the user's
    yaml.representer.add_representer(
        type(None), lambda representer, _: representer.represent_scalar("tag:yaml.org,2002:null", "null")
    )
    target = root / "params.yaml"
    before = target.read_text(encoding="utf-8")
    merged = yaml.load(before)
    changes = []
    for one in given:
        key, equals, text = one.partition("=")
        if not equals:
            raise ParamsError(f"{one!r}: expected KEY=VALUE, such as sft.lr=1e-4")
        section, last = _find(merged, key.strip())
        try:
            value = yaml.load(text)
        except YAMLError as error:
            raise ParamsError(f"{one!r}: the value is not valid YAML: {error}") from None
        if isinstance(value, float):
            value = float(value)  # 1e-4 is a text to some readers of YAML, 0.0001 to none
        if section[last] != value:
            changes.append(f"{key.strip()}: {section[last]} -> {value}")
            section[last] = value
    if not changes:
        return []
    after = io.StringIO()
    yaml.dump(merged, after)
    artifacts.write_text(target, after.getvalue())
    try:
        whole.load(target)
    except ParamsError:
        artifacts.write_text(target, before)
        raise
    return changes


def _find(values: Any, key: str) -> tuple[Any, str]:
    """The mapping that holds a key, and its name there."""
    *above, last = key.split(".")
    place = values
    for name in above:
        place = place.get(name) if isinstance(place, dict) else None
    if not isinstance(place, dict) or last not in place:
        known = place if isinstance(place, dict) else values
        where = "it" if known is values else ".".join(above)
        raise ParamsError(f"params.yaml has no key {key!r}; {where} has: {', '.join(map(str, known))}")
    return place, last
