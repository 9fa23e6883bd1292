"""From a stage's output to a gated version of a registered model: exactly one for each content.

`settle` is called after a stage, `reconcile` before and after a pipeline: they register what stands in
`artifacts/`, whoever put it there (a run, a run that was killed behind its last step, DVC's cache), ask its gate
and leave the verdict in `.sluice/verdicts/<stage>.json`, with the version and with its run.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.core import (
    artifacts,
    courier,
    declared,
    gates,
    graph,
    lineage,
    moves,
    policy,
    prompt_registry,
    serving,
    store,
    tracking,
    verdicts,
    versions,
)
from pipelines.core.errors import ArtifactError
from pipelines.core.gates import Verdict
from pipelines.core.verdicts import Candidate, Measure


@dataclass(frozen=True)
class Registered:
    """A version and what its gate says."""

    name: str
    version: str
    run_id: str
    verdict: Verdict

    def summary(self) -> str:
        """What a person wants to see when a stage ends: the version and the table of its gate."""
        return self.verdict.table()


def settle(root: Path, stage: str, measure: Measure | None = None) -> list[Registered]:
    """Register the models of a stage's output and ask their gates; none when no model is declared for the stage.

    Delivers whatever is spooled first. Doing it again for the same content changes nothing.

    Args:
        measure: evaluates a model directory on today's held-out rows; needed when the champion was measured on
            other rows. Without it such a rule does not pass, and says why.

    Raises:
        StoreUnavailable: the store is away; everything waits for the next call.
        ArtifactError: the output holds no model.
        GateError: a rule cannot be asked, see `gates.evaluate`.
    """
    found = verdicts.candidates(root, stage)
    for candidate in found:
        if not serving.known(candidate.output / candidate.policy.model):
            raise ArtifactError(
                f"{candidate.spec.output}/{candidate.policy.model} is nothing that can be served (it has none of "
                f"{', '.join(serving.SERVED)}); {policy.FILE} expects a model there"
            )
    if not found:
        return []
    store.probe(root)
    courier.deliver(root)
    registered = []
    with store.locked(root, "registry"):
        client, experiment = store.connect(root)
        with store.answering(root):
            versions.recover(root, client, experiment)
            for candidate in found:
                entry = versions.find(client, candidate.name, candidate.content)
                if entry is None:
                    entry = _register(candidate, client, experiment)
                asked = moves.settled(root, f"{candidate.name}.asked")
                artifacts.write_json(asked, _settled(candidate))
                verdict = verdicts.judge(candidate, client, entry, measure)
                with contextlib.suppress(FileNotFoundError):  # a champion moved meanwhile, see `moves`: asked again
                    asked.replace(moves.settled(root, candidate.name))
                registered.append(Registered(candidate.name, str(entry.version), entry.run_id, verdict))
    if stage == prompt_registry.STAGE:
        prompt_registry.sync(root)
    return registered


def reconcile(root: Path, measures: Callable[[str], Measure | None] | None = None) -> list[Registered]:
    """Deliver what is spooled and settle every output that stands and is not registered.

    Imports no MLflow when there is nothing to do.

    Args:
        measures: gives the `measure` of a stage, see `settle`.

    Raises:
        StoreUnavailable, GateError: as `settle`.
    """
    if tracking.backlog(root):
        courier.deliver(root)
    done = []
    for stage in graph.load(root):
        if all(map(_is_settled, verdicts.candidates(root, stage))):
            continue
        done += settle(root, stage, measures(stage) if measures else None)
    prompt_registry.sync(root)  # files that were edited since
    return done


def champions(root: Path) -> dict[str, str | None]:
    """The champion's version of every declared model, None where there is none.

    Raises:
        StoreUnavailable: the store is away.
    """
    rules, stages = policy.load(root), graph.load(root)
    models = (name for stage, spec in stages.items() for name, _ in rules.of_stage(stage, root / spec.output))
    return _champions(root, sorted(models))


def champion(root: Path, model: str) -> str | None:
    """The champion's version of one model.

    Raises:
        StoreUnavailable: the store is away.
    """
    return _champions(root, [model])[model]


def _champions(root: Path, models: Sequence[str]) -> dict[str, str | None]:
    database = store.embedded(root)
    if database is not None and not database.exists():
        return dict.fromkeys(models)
    client, _ = store.connect(root)
    with store.answering(root):
        return {model: versions.alias(client, model, policy.CHAMPION) for model in models}


def _register(candidate: Candidate, client: Any, experiment: str) -> Any:
    """Make the version, with the run that made the output, or with a run that says where it came from."""
    root, stage = candidate.root, candidate.stage
    spool = tracking.finished_spool(root, stage, candidate.whole)
    if spool is None:
        recorder = tracking.Recorder(root, stage, candidate.whole, courier=False)
        recorder.finish("FINISHED", lineage.restored(root, stage))
        spool = recorder.spool
    run_id = courier.run_of(root, client, spool)
    end = spool.finished()
    record = end["record"] if end else {"tags": {}, "inputs": {}}
    tags = {**record["tags"], **_parents(candidate, client, record["inputs"])}
    if candidate.evaluation is not None:
        scores = declared.scores(stage)
        tags[versions.ROWS] = gates.rows_hash(candidate.evaluation, candidate.policy, scores)
    card = candidate.output / candidate.policy.model / "README.md"
    intent = versions.Intent(
        store=store.place(root),
        model=candidate.name,
        content_hash=candidate.content,
        run_id=run_id,
        step=spool.last_step(),
        folder=str(candidate.output / candidate.policy.model),
        output=str(candidate.registered),
        evaluation=str(candidate.evaluation) if candidate.evaluation else None,
        description=_prose(card.read_text(encoding="utf-8")) if card.exists() else "",
        tags=tags,
    )
    return versions.ensure(root, client, experiment, intent)


def _prose(card: str) -> str:
    """A model card without the front matter, which only hubs read."""
    return card.split("\n---\n", 1)[-1].lstrip() if card.startswith("---\n") else card


def _parents(candidate: Candidate, client: Any, inputs: dict[str, str]) -> dict[str, str]:
    """Versions of the registered models that the stage read, by the content it read."""
    models = policy.load(candidate.root)
    stages = graph.load(candidate.root)
    tags = {}
    for parent in candidate.spec.parents:
        found = models.of_stage(parent, candidate.root / stages[parent].output)
        name = Path(stages[parent].output).name
        if len(found) == 1 and name in inputs:  # no stage reads one of several models
            entry = versions.find(client, found[0][0], inputs[name])
            tags[f"sluice.parent.{found[0][0]}"] = str(entry.version) if entry else "not registered"
    return tags


def _settled(candidate: Candidate) -> dict[str, str]:
    gate = gates.gate_hash(candidate.policy)
    return {"store": store.place(candidate.root), "content_hash": candidate.content, "gate": gate}


def _is_settled(candidate: Candidate) -> bool:
    """Whether this content was registered and judged before, in the store in use."""
    database = store.embedded(candidate.root)
    if database is not None and not database.exists():
        return False
    try:
        known = json.loads(moves.settled(candidate.root, candidate.name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    return bool(known == _settled(candidate))
