"""Where a registered version comes from, back to the data, and the commands that make the same bytes again.

In: the tags that `pipelines.core.lineage` gave each run (hashes of what it read, commit, machine) and its params. A
version's ancestors are found by what it read: the run that made an artifact carries the hash of its content. Out:
`Origin`s, parents first, and a list of shell commands for a clean clone. Params are compared with those of the commit;
what differs is written into `params.yaml` by the commands, the machine's settings among it, since the bytes depend on
precision and threads.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipelines.core import graph, lineage, policy, references, release, store
from pipelines.core.errors import ParamsError, UserError
from pipelines.core.params import whole

COMPUTE = ("device", "precision", "threads")


@dataclass(frozen=True)
class Origin:
    """One artifact on the way to a version."""

    name: str  # of the artifact; a model's name for the version itself
    content: str
    versions: tuple[str, ...]  # registered versions of this content, such as `sluice-base 3`
    tags: dict[str, str]
    params: dict[str, str]  # flattened, of its stage; empty where no record of its run was found
    known: bool  # whether the store has the run that made it

    @property
    def stage(self) -> str:
        """The stage that made it."""
        return self.tags.get("sluice.stage", self.name)

    @property
    def inputs(self) -> dict[str, str]:
        """What it was made from: name -> hash of the content."""
        return {
            key.removeprefix(lineage.INPUT): value for key, value in self.tags.items() if key.startswith(lineage.INPUT)
        }


def trace(root: Path, client: Any, experiment: str, entry: Any) -> list[Origin]:
    """A version and everything it was made from, parents first, each once.

    Raises:
        GateError: no stage made the version.
    """
    found: dict[str, Origin] = {}

    def visit(origin: Origin) -> None:
        files = _files(root, origin)
        for name, digest in origin.inputs.items():
            if digest not in found and name not in files:
                visit(_artifact(client, experiment, name, digest))
        found[origin.content] = origin

    content = references.content(entry)  # before its run is looked for: what no stage made may have none
    run = references.run(client, entry)
    params = {} if run is None else dict(run.data.params)
    visit(Origin(entry.name, content, (references.shown(entry),), dict(entry.tags), params, run is not None))
    return list(found.values())


def commands(root: Path, origins: list[Origin]) -> list[str]:
    """Shell commands, one a line or one a here-document, that make the last origin's bytes again in a clean clone.

    Raises:
        UserError: no commit was recorded, so that nothing can be made again.
    """
    last = origins[-1]
    commit = last.tags.get("git.commit", "none")
    if commit == "none":
        raise UserError(f"{last.versions[0]} was made outside a git repository: no commit says what its code was")
    place = shlex.quote(f"rebuilt/{_git(root, 'rev-parse', '--show-prefix')}".rstrip("/"))
    lines = [f"git clone {shlex.quote(_address(root, commit))} rebuilt && cd {place}", f"git checkout {commit}"]
    lines += ["make setup", ". .venv/bin/activate"]
    if changes := changed_params(root, commit, origins):
        lines.append(_script(changes))
    if frozen := _frozen(root, commit):
        lines.append(f"dvc pull {' '.join(frozen)}  # of another commit, as a backfill takes them")
    lines.append(f"dvc repro {last.stage}")
    lines.append(
        "python -c 'import pathlib, sys; from pipelines.core.artifacts import content_hash; "
        f'sys.exit(content_hash(pathlib.Path("{_made(root, last)}")) != "{last.content}")\' && echo the same bytes'
    )
    return lines


def doubts(root: Path, origins: list[Origin]) -> list[str]:
    """Why the commands may not make the same bytes, a line each; none where everything was recorded."""
    lines = []
    last = origins[-1]
    commit = last.tags.get("git.commit", "none")
    specs, there = _graph_at(root, commit), _files_at(root, commit)
    for one in origins:
        if not one.known:
            lines.append(f"{one.name} {one.content[:12]}: the store has no run that made it; params are the commit's")
        elif one.tags.get("git.dirty") != "false":
            lines.append(f"{one.stage}: made with changes that were not committed: params are told below, code is not")
        elif one.tags.get("sluice.restored"):
            lines.append(f"{one.stage}: {one.tags['sluice.restored']}; on which machine it was made is not recorded")
        if any(len(text) >= lineage.VALUE_LIMIT for text in one.params.values()):
            lines.append(f"{one.stage}: a param is longer than what the store keeps")
        lines += _missing(root, one, specs.get(one.stage), there) if there else []
    wanted = {key: last.tags[f"package.{key}"] for key in ("python", "torch") if f"package.{key}" in last.tags}
    here = lineage.package_versions()
    lines += [
        f"{key} {number} made it, and here is {here[key]}" for key, number in wanted.items() if here[key] != number
    ]
    return lines


def changed_params(root: Path, commit: str, origins: list[Origin]) -> dict[str, Any]:
    """Params, `section.key` -> value, in which the runs differ from `params.yaml` at a commit.

    Where the commit is not here, or its params are of another form than today's, all of the runs' params.
    """
    at_commit = _params_at(root, commit)
    changes: dict[str, Any] = {}
    for one in origins:
        committed = lineage.as_texts(at_commit.get(one.stage, {}))
        for key, text in one.params.items():
            if committed.get(key) != text:
                changes[f"{one.stage}.{key}"] = _value(text)
    last = origins[-1].tags
    committed = lineage.as_texts(at_commit.get("compute", {}))
    for key in COMPUTE:
        recorded = last.get(f"sluice.{key}")
        if recorded is not None and committed.get(key) != recorded:
            changes[f"compute.{key}"] = _value(recorded)
    return changes


def _files(root: Path, origin: Origin) -> dict[str, str]:
    """What a stage read that is no artifact, and no part of one, but a file or folder of the repository, or a person's.

    By its name in the tags -> path, as the graph of its commit has it, or today's, which nobody may have committed.
    """
    commit = origin.tags.get("git.commit", "none")
    called: dict[str, str] = {}
    today = root / "dvc.yaml"
    for specs in (_parsed(today.read_text(encoding="utf-8") if today.exists() else ""), _graph_at(root, commit)):
        if origin.stage in specs:
            for name, path in specs[origin.stage].inputs.items():
                called[lineage.tag_name(lineage.INPUT, name).removeprefix(lineage.INPUT)] = path
    # Of a graph that is neither, the name has to do: those of artifacts are plain
    paths = {name: called.get(name, name if {".", "/"} & set(name) else f"artifacts/{name}") for name in origin.inputs}
    return {name: path for name, path in paths.items() if not path.startswith("artifacts/")}


def _missing(root: Path, origin: Origin, spec: graph.StageSpec | None, there: frozenset[str]) -> list[str]:
    """Files that a stage read, or ran though they are the user's own, and a commit has not, a line each.

    Args:
        spec: the stage at the commit, if it has it.
        there: the files and folders of the commit.
    """
    own = [path for path in spec.code if not path.startswith("pipelines/")] if spec else []
    hashes = {path: origin.inputs[name] for name, path in _files(root, origin).items()}
    return [
        f"{origin.stage}: reads {path}, which the commit has not: put it there"
        + (f" (SHA-256 {hashes[path]})" if path in hashes else "")
        for path in (*hashes, *own)
        if path not in there
    ]


def _artifact(client: Any, experiment: str, name: str, digest: str) -> Origin:
    """What the store knows of an artifact by its content."""
    where = f"tags.`{lineage.CONTENT}` = '{digest}'"
    same = sorted(map(references.shown, client.search_model_versions(where)))
    runs = client.search_runs([experiment], where, order_by=["attributes.start_time ASC"])
    if not runs:
        return Origin(name, digest, tuple(same), {}, {}, False)
    data = runs[0].data
    return Origin(name, digest, tuple(same), dict(data.tags), dict(data.params), True)


def _made(root: Path, origin: Origin) -> str:
    """The directory whose content makes the version: the stage's output, or its own one among others in it."""
    output, declared = graph.stage(root, origin.stage).output, policy.load(root)
    found = release.entry_of(declared, origin.name)
    shared = origin.name not in declared.models
    return f"{output}/{found.model}" if found is not None and shared else output


def _git(root: Path, *words: str) -> str:
    """What a git command prints; nothing where it fails, or there is no git."""
    try:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    return "" if done.returncode else done.stdout.strip()


def _at_commit(root: Path, commit: str) -> bool:
    """Whether a commit is in this clone."""
    return _git(root, "cat-file", "-t", commit) == "commit"


def _at(root: Path, commit: str, name: str) -> str:
    """Text of a file at a commit; empty where that cannot be told here."""
    return _git(root, "show", f"{commit}:./{name}")


def _files_at(root: Path, commit: str) -> frozenset[str]:
    """Files and folders of a commit; none where it is not here."""
    return frozenset(filter(None, _git(root, "ls-tree", "-r", "-t", "-z", "--name-only", commit).split("\0")))


def _graph_at(root: Path, commit: str) -> dict[str, graph.StageSpec]:
    """The stages of a commit; none where it is not here, or its graph is of another form than today's."""
    return _parsed(_at(root, commit, "dvc.yaml"))


def _parsed(text: str) -> dict[str, graph.StageSpec]:
    """The stages of a graph; none where it is empty, or of another form than today's."""
    try:
        return graph.parse(text) if text else {}
    except UserError:
        return {}


def _frozen(root: Path, commit: str) -> list[str]:
    """Stages that `dvc.yaml` of a commit freezes: nothing there makes their outputs."""
    text = _at(root, commit, "dvc.yaml")
    return [name for name, stage in yaml.safe_load(text)["stages"].items() if stage.get("frozen")] if text else []


def _params_at(root: Path, commit: str) -> dict[str, Any]:
    """Sections of `params.yaml` at a commit, defaults filled in; empty where that cannot be told here."""
    if not (text := _at(root, commit, "params.yaml")):
        return {}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "params.yaml"
        place.write_text(text, encoding="utf-8")
        try:
            return whole.load(place).model_dump(mode="json")
        except ParamsError:
            return {}


def _value(text: str) -> Any:
    """The value that `lineage.as_texts` has written: JSON, or a text as it is."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _address(root: Path, commit: str) -> str:
    """Where to clone from: `origin`, without a password, or this folder if it alone has the commit (of `runs/<id>`)."""
    origin, here = _git(root, "remote", "get-url", "origin"), _at_commit(root, commit)
    alone = here and not _git(root, "branch", "--remotes", "--contains", commit)
    if origin and not alone:
        return store.without_login(origin)
    return _git(root, "rev-parse", "--show-toplevel") or str(root.resolve())


def _script(changes: dict[str, Any]) -> str:
    """A here-document that writes values into `params.yaml`; DVC compares values, so comments do not matter."""
    told = json.dumps(changes, indent=1).replace("'", "\\u0027")  # no quote ends the text before its end
    return f"""python - <<'END'
import json, pathlib, yaml
place = pathlib.Path("params.yaml")
params = yaml.safe_load(place.read_text(encoding="utf-8"))
for path, value in json.loads(r'''{told}''').items():
    *sections, key = path.split(".")
    node = params
    for section in sections:
        node[section] = node.get(section) or {{}}
        node = node[section]
    node[key] = value
place.write_text(yaml.safe_dump(params, sort_keys=False))
END"""
