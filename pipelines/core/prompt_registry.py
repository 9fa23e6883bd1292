"""The files of `mlflow/prompts` in MLflow's prompt registry: one version for each content, and aliases that are moved.

`sync` is called where `registry.settle` is, after stage `prompts` and before a pipeline; the stage itself never touches
MLflow. A version is searched by its content hash before it is made, under the same lock as models, so that doing it
again, or after a crash, changes nothing. Aliases: `current` is what the file says now; `chosen-TASK` is what the stage
chose for a task, where it is a prompt of a file and used as the file says (a search makes another one, which is a file
once somebody copies it). MLflow is not imported when nothing has changed since the last time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from pipelines.core import artifacts, graph, prompt_files, store
from pipelines.core.environment import STATE
from pipelines.core.lineage import CONTENT
from pipelines.core.prompt_files import FOLDER, PromptFile
from pipelines.core.prompt_strategies import SEARCH

STAGE = "prompts"
CURRENT, CHOSEN = "current", "chosen-"


def sync(root: Path) -> list[str]:
    """Register what is not there and move the aliases; what was done, one line each.

    Raises:
        UserError: a prompt's file holds a mistake.
        StoreUnavailable: the store is away; the files wait for the next call.
    """
    if not (root / FOLDER).is_dir():
        return []
    files = prompt_files.load(root / FOLDER)
    chosen = _chosen(root)
    versions = {name: file.version for name, file in files.items()}
    wanted = {"store": store.place(root), "files": versions, "chosen": chosen}
    known, database = root / STATE / "registry" / "prompts.json", store.embedded(root)
    there = known.exists() and (database is None or database.exists())
    before = json.loads(known.read_text(encoding="utf-8")) if there else None
    if before == wanted:
        return []
    gone = sorted(set(before["files"]) - set(files)) if before and before["store"] == wanted["store"] else []
    store.probe(root)
    done: list[str] = []
    with store.locked(root, "registry"):
        client, experiment = store.connect(root)
        import mlflow

        with store.answering(root):
            mlflow.set_experiment(experiment_id=experiment)  # where the prompts are listed
            for name, file in files.items():
                done += _synced(client, name, file, chosen)
            for name in gone:
                done += _taken_back(client, name, _pointed(_versions(client, name)), ())
    artifacts.write_json(known, wanted)
    return done


def _synced(client: Any, name: str, file: PromptFile, chosen: Mapping[str, list[str]]) -> list[str]:
    """One file: its version, and the aliases of all its versions."""
    every = _versions(client, name)
    held = {str(one.tags.get(CONTENT)): int(one.version) for one in reversed(every)}
    done = []
    if file.version not in held:
        made = client.register_prompt(
            name,
            _template(file),
            commit_message=file.notes.strip(),
            tags={CONTENT: file.version, "sluice.kind": file.kind, "sluice.strategies": ",".join(file.strategies)},
        )
        held[file.version] = int(made.version)
        done.append(f"prompt {name}: version {made.version}")
    wanted = {CURRENT: held[file.version]}
    for task, (prompt, content) in chosen.items():
        if prompt == name and content in held:
            wanted[CHOSEN + re.sub("[^A-Za-z0-9_-]", "-", task)] = held[content]
    pointed = _pointed(every)
    for alias, version in wanted.items():
        if pointed.get(alias) != version:
            client.set_prompt_alias(name, alias, version)
            done.append(f"prompt {name}: {alias} is version {version}")
    return done + _taken_back(client, name, pointed, wanted)


def _pointed(every: list[Any]) -> dict[str, int]:
    """Of each alias of a prompt the version."""
    return {alias: int(one.version) for one in every for alias in one.aliases}


def _taken_back(client: Any, name: str, pointed: Mapping[str, int], wanted: Collection[str]) -> list[str]:
    """The aliases of choices that are others now, also of a prompt whose file is gone."""
    done = []
    for alias in sorted(pointed):
        if alias.startswith(CHOSEN) and alias not in wanted:
            client.delete_prompt_alias(name, alias)
            done.append(f"prompt {name}: no longer {alias}")
    return done


def _versions(client: Any, name: str) -> list[Any]:
    """Every version of a prompt with its aliases, newest first; none where there is no such prompt."""
    if client.get_prompt(name) is None:
        return []
    found: list[Any] = []
    token = None
    while True:
        page = client.search_prompt_versions(name, page_token=token)
        found += page
        token = page.token
        if not token:
            break
    # A search gives no aliases, a look at one version does.
    return [
        client.get_prompt_version(name, number) for number in sorted((int(one.version) for one in found), reverse=True)
    ]


def _template(file: PromptFile) -> list[dict[str, str]]:
    """The prompt as MLflow's chat template; `instruction` is a variable there too, its texts lie in the file."""
    system = [{"role": "system", "content": file.system.strip()}] if file.system else []
    return [*system, {"role": "user", "content": file.template.strip()}]


def _chosen(root: Path) -> dict[str, list[str]]:
    """Of each task the name and version of the prompt that the stage chose as its file says it."""
    spec = graph.load(root).get(STAGE)
    if spec is None:
        return {}
    found = {}
    for place in sorted((root / spec.output / "models").glob("*/prompt.yaml")):
        told = yaml.safe_load(place.read_text(encoding="utf-8"))
        if told["strategy"] != SEARCH:
            found[str(told["task"])] = [str(told["name"]), str(told["version"])]
    return found
