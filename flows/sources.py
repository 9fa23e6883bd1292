"""Keeps deps in `dvc.yaml` in step with the files and directories that `params.yaml` names, such as data.sources.

DVC runs a stage again when a dep changes, but deps cannot be written in `params.yaml`. So the lines below a
marker comment in `dvc.yaml` belong to `sluice run`; every other line of the file is left as it is.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml

from pipelines.core import artifacts, graph
from pipelines.core.errors import ParamsError, UserError
from pipelines.core.params import whole

MARKERS = {
    "data": "# files named in params.yaml data.sources, kept by sluice run",
    "tokenizer": "# directory or file named in params.yaml tokenizer.base, kept by sluice run",
    "pretrain": "# directory or file named in params.yaml pretrain.base, kept by sluice run",
    "feedback": "# file named in params.yaml feedback.rankings, kept by sluice run",
    "ppo": "# files named in params.yaml ppo.rewards, kept by sluice run",
    "distill": "# directories named in params.yaml distill.teacher and distill.student, kept by sluice run",
    "quantize": "# directory named in params.yaml quantize.model, kept by sluice run",
    "rag": "# directories named in params.yaml rag.embedder and rag.reranker, kept by sluice run",
}
_PLAIN = re.compile(r"[A-Za-z_./][A-Za-z0-9_./+@-]*")


def keep(root: Path) -> list[str]:
    """Bring `dvc.yaml` in step. Returns one line for each dep that was added or removed.

    Raises:
        UserError: `dvc.yaml` lacks a marker although there are files to list.
        DataError: a source names a file that does not exist.
        ParamsError: a reward or a model does; or a stage is to read what it makes.
    """
    from pipelines.core import language_models, reward_functions
    from pipelines.core.sources import local_paths

    params = whole.load(root / "params.yaml")
    # Rankings need not be there yet: the first run of the stage writes what is to be ranked.
    people = params.feedback.rankings_in(root)
    rankings = [people] if people and people.exists() else []
    # What a stage makes need not be there yet either: the graph runs that stage first.
    made = {name: path for name in params.ppo.rewards for path in graph.made(root, name)}
    rest = [name for name in params.ppo.rewards if name not in made]
    rewards = [*made.values(), *reward_functions.local_paths(rest, root)]
    named = {"data": local_paths(params.data, root), "feedback": rankings, "ppo": rewards}
    for stage in whole.NAME_MODELS:
        models = whole.models(params, stage)
        made = {dial: path for dial, model in models.items() for path in graph.made(root, model)}
        others = {dial: model for dial, model in models.items() if dial not in made}
        named[stage] = [*made.values(), *language_models.local_paths(others, root)]
    wanted = {stage: sorted({_name(path, root) for path in paths}) for stage, paths in named.items()}
    place = root / "dvc.yaml"
    _refuse_own(_read(place), wanted)
    changes = []
    for stage, names in wanted.items():
        changes += write(place, stage, names)
    return changes


def write(place: Path, stage: str, wanted: list[str]) -> list[str]:
    """Make the entries below a stage's marker in `place` exactly `wanted`. Returns what changed, a line each.

    Raises:
        UserError: no `place`, or no marker in it although there is something to list.
    """
    text, changes = _edited(_read(place), stage, wanted)
    if changes:
        artifacts.write_text(place, text)
    return changes


def _read(place: Path) -> str:
    if not place.exists():
        raise UserError(f"{place.name}: no such file in {place.parent}. Run from the repository's root.")
    return place.read_text(encoding="utf-8")


def _edited(text: str, stage: str, wanted: list[str]) -> tuple[str, list[str]]:
    """Text of `dvc.yaml` with exactly these entries below a stage's marker, and what changed, a line each."""
    lines = text.splitlines(keepends=True)
    start = next((n for n, line in enumerate(lines) if line.strip() == MARKERS[stage]), None)
    if start is None:
        if wanted:
            raise UserError(
                f"dvc.yaml: the deps of stage {stage} need the line `{MARKERS[stage]}` below their last entry"
            )
        return text, []
    indent = lines[start][: len(lines[start]) - len(lines[start].lstrip())]
    end = start + 1
    while end < len(lines) and lines[end].startswith(f"{indent}- "):
        end += 1
    there = [_unquote(line.strip().removeprefix("- ")) for line in lines[start + 1 : end]]
    if there == wanted:
        return text, []
    lines[start + 1 : end] = [f"{indent}- {_quote(path)}\n" for path in wanted]
    added = [f"dvc.yaml: stage {stage} now depends on {path}" for path in wanted if path not in there]
    removed = [f"dvc.yaml: stage {stage} no longer depends on {path}" for path in there if path not in wanted]
    return "".join(lines), added + removed


def _refuse_own(text: str, wanted: dict[str, list[str]]) -> None:
    """Raises ParamsError where a stage is to read what it makes, or what is made of that: nothing could come first.

    Held against the graph that is to be, one stage's entries after the other's: those that `text`, `dvc.yaml` as it is,
    has below the markers were of other params.
    """
    for stage in wanted:
        text, _ = _edited(text, stage, [])
    for stage, names in wanted.items():
        if not names:
            continue
        try:
            stages = graph.parse(text)
        except UserError:  # told by whoever needs the graph
            return
        after = {stage}
        for name, spec in stages.items():  # parents before children
            if after.intersection(spec.parents):
                after.add(name)
        for name in names:
            maker = next((one for one in after & set(stages) if Path(name).is_relative_to(stages[one].output)), None)
            if maker is not None:
                what = "makes it itself" if maker == stage else f"comes before stage {maker}, which makes it"
                raise ParamsError(
                    f"params.yaml: stage {stage} is to read {name}, and {what}. Copy it to a place of its own (for "
                    f"example `cp -rL {name} models/mine`) and name that in section {stage}."
                )
        text, _ = _edited(text, stage, names)


def _name(path: Path, root: Path) -> str:
    from pipelines.core.sources import within

    inside = within(path, root)
    return (root / path).resolve().as_posix() if inside is None else inside.as_posix()


def _quote(path: str) -> str:
    """A YAML scalar on one line; JSON's strings are YAML's double-quoted ones. A folder `2024` or `null` is a text."""
    plain = _PLAIN.fullmatch(path) and yaml.safe_load(path) == path
    return path if plain else json.dumps(path, ensure_ascii=False)


def _unquote(scalar: str) -> str:
    return str(json.loads(scalar)) if scalar.startswith('"') else scalar
