"""YAML in which a key that stands twice is a mistake."""

from __future__ import annotations

from typing import Any

import yaml


def read(text: str) -> Any:
    """The values of a text.

    Raises:
        yaml.YAMLError: no YAML, or a key that stands twice in a section, of which PyYAML would take the last without a
            word.
    """
    return yaml.load(text, _EachKeyOnce)


class _EachKeyOnce(yaml.SafeLoader):
    """Refuses a key that stands twice in a section."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        known: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in known:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands twice", key.start_mark)
            known.add(str(key.value))
        return super().construct_mapping(node, deep)
