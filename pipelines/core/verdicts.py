"""The verdict of a registered version: which rows its gate compares, and what becomes of the answer.

A champion that has rows of the candidate's own examples is compared by them; one that was measured on other
rows (the held-out data changed) is measured again on today's, once, and the rows are kept in
`.sluice/registry/measured/`. Numbers from different data are never compared.
"""

from __future__ import annotations

import errno
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pipelines.core import artifacts, contents, declared, gates, graph, lineage, policy, references, store, versions
from pipelines.core.environment import STATE
from pipelines.core.errors import GateError
from pipelines.core.gates import Verdict

Measure = Callable[[Path, Path], None]  # (directory of a model, Parquet file to write its evaluation to)


class NotMeasurable(Exception):
    """What a `Measure` raises when the stage cannot measure a model again."""


EVALUATION = "evaluation.parquet"
NOT_MEASURED = "measured on other rows, and it cannot be measured again here: run the stage again"


@dataclass(frozen=True)
class Candidate:
    """A stage's output as it stands, and what the registry asks of it."""

    root: Path
    stage: str
    name: str
    policy: policy.ModelPolicy
    spec: graph.StageSpec
    whole: str  # hash of the stage's output
    shared: bool  # whether the stage makes other models too

    @cached_property
    def content(self) -> str:
        """What a version is known by: hash of the stage's output, or of the model's directory where it has others."""
        return contents.content_hash(self.root, self.registered) if self.shared else self.whole

    @property
    def registered(self) -> Path:
        """The directory whose content makes a version."""
        return self.output / self.policy.model if self.shared else self.output

    @property
    def output(self) -> Path:
        """The stage's output directory."""
        return self.root / self.spec.output

    @property
    def evaluation(self) -> Path | None:
        """Its per-example rows, if the stage wrote any."""
        path = self.output / EVALUATION
        return path if path.exists() else None


def candidates(root: Path, stage: str) -> list[Candidate]:
    """The models that the stage's output holds now; none for a stage without models, or before it ran."""
    spec = graph.stage(root, stage)
    output = root / spec.output
    found = policy.load(root).of_stage(stage, output)
    if not found or not output.exists():
        return []
    whole = contents.content_hash(root, output)
    shared = any(policy.ANY in name for name, model in policy.load(root).models.items() if model.stage == stage)
    return [Candidate(root, stage, name, model, spec, whole, shared) for name, model in found]


def stored(root: Path, model: str) -> Verdict | None:
    """The verdict of a model's last registered content."""
    path = root / STATE / "verdicts" / f"{model}.json"
    return Verdict.from_json(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def current(candidate: Candidate) -> Verdict | None:
    """The verdict on these very bytes, by today's rules, of a version of the store in use; None where there is none."""
    known = stored(candidate.root, candidate.name)
    facts = (candidate.content, gates.gate_hash(candidate.policy), store.place(candidate.root))
    return known if known is not None and (known.content_hash, known.gate, known.store) == facts else None


def judge(candidate: Candidate, client: Any, entry: Any, measure: Measure | None) -> Verdict:
    """The verdict of a version: the one that was given, as long as it is about the same rules and champion."""
    root = candidate.root
    champion = versions.alias(client, candidate.name, policy.CHAMPION)
    known = current(candidate)
    version, run_id = str(entry.version), entry.run_id
    if (
        known is not None
        and entry.tags.get(versions.GATE_RULES) in (None, known.gate)  # else another clone, with other rules, has asked
        and (known.version, known.run_id) == (version, run_id)
        and champion in (known.champion, str(entry.version))
        and not any(row.note == NOT_MEASURED for row in known.rows)
    ):
        return known
    named = {rule.baseline for rule in candidate.policy.comparisons}
    stages = graph.load(root)
    baselines = {
        name: gates.Baseline(name, root / stages[name.removeprefix(policy.STAGE)].output / EVALUATION)
        for name in named
        if name.startswith(policy.STAGE)
    }
    if policy.CHAMPION in named:
        baselines[policy.CHAMPION] = _champion(candidate, client, entry, champion, measure)
    metrics = lineage.read_metrics(root, candidate.spec)
    verdict = gates.evaluate(candidate.name, candidate.policy, metrics, candidate.evaluation, baselines)
    verdict = replace(verdict, content_hash=candidate.content, version=version, run_id=run_id)
    verdict = replace(verdict, champion=champion, store=store.place(root))
    record(client, entry, verdict, candidate.policy, candidate.shared)
    artifacts.write_json(root / STATE / "verdicts" / f"{candidate.name}.json", verdict.to_json())
    return verdict


def record(client: Any, entry: Any, verdict: Verdict, rules: policy.ModelPolicy, shared: bool) -> None:
    """Keep a verdict with the version, and with the run that made it as long as the store has that.

    Args:
        shared: whether the run made other models too.
    """
    outcome = "passed" if verdict.passed else "failed"
    if (run := references.run(client, entry)) is not None:
        folder = f"{entry.name}/" if shared else ""
        client.log_text(entry.run_id, json.dumps(verdict.to_json(), indent=2), f"{folder}verdict.json")
        client.log_text(entry.run_id, verdict.table() + "\n", f"{folder}verdict.txt")
        if run.info.lifecycle_stage == "active":  # in the bin it takes no tags
            client.set_tag(entry.run_id, versions.GATE, outcome)
    named = policy.CHAMPION in {rule.baseline for rule in rules.comparisons}
    compared = (verdict.champion or "none") if named else "any"
    client.set_model_version_tag(entry.name, str(entry.version), versions.GATE_CHAMPION, compared)
    client.set_model_version_tag(entry.name, str(entry.version), versions.GATE_RULES, verdict.gate)
    if verdict.unmeasured or versions.GATE_UNMEASURED in entry.tags:
        client.set_model_version_tag(entry.name, str(entry.version), versions.GATE_UNMEASURED, verdict.unmeasured)
    client.set_model_version_tag(entry.name, str(entry.version), versions.GATE, outcome)


def _champion(
    candidate: Candidate, client: Any, entry: Any, champion: str | None, measure: Measure | None
) -> gates.Baseline:
    """The champion's rows on the candidate's examples; measured now when it only has rows of other examples.

    They are kept by its content too, as another store has another model under the same number.
    """
    if champion is None:
        return gates.NO_CHAMPION
    if champion == str(entry.version):
        return gates.Baseline(policy.CHAMPION, None, "this version is the champion", passed=True)
    if candidate.evaluation is None:
        raise GateError(f"stage {candidate.stage} wrote no {EVALUATION}, which its gate compares")
    name = f"champion v{champion}"
    scores = declared.scores(candidate.stage)
    today = gates.rows_hash(candidate.evaluation, candidate.policy, scores)
    theirs = client.get_model_version(candidate.name, champion)
    kept = measured(candidate.root) / f"{file_name(theirs)}-{today[:16]}.parquet"
    if kept.exists():
        return gates.Baseline(name, kept)
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as temporary:
        draft = Path(temporary) / EVALUATION
        had = Path(temporary) / "had"
        if theirs.tags.get(versions.ROWS) == today:
            _of_champion(candidate.root, theirs, EVALUATION, had).replace(draft)
        elif measure is None:
            return gates.Baseline(name, None, NOT_MEASURED)
        else:
            folder = _of_champion(candidate.root, theirs, Path(candidate.policy.model).name, had)
            try:
                measure(folder, draft)
            except NotMeasurable:
                return gates.Baseline(name, None, NOT_MEASURED)
        if gates.rows_hash(draft, candidate.policy, scores) != today:
            raise GateError(f"{name} was measured on other examples than the candidate: nothing to compare")
        draft.replace(kept)
    return gates.Baseline(name, kept)


def measured(root: Path) -> Path:
    """Where rows of champions are kept, and what is measured lies meanwhile; whoever measures holds `registry`."""
    return root / STATE / "registry" / "measured"


def file_name(entry: Any) -> str:
    """What files about a version are named after, in whatever store it is; one that no stage made has no content."""
    return f"{entry.name}-{entry.version}-{entry.tags.get(lineage.CONTENT, str(entry.creation_timestamp))[:16]}"


def _of_champion(root: Path, entry: Any, part: str, place: Path) -> Path:
    """See `copied`; the error says how to come by a champion that can be compared with."""
    try:
        return copied(root, entry, part, place)
    except GateError as error:
        raise GateError(
            f"{error}\nIt is the champion, which the gate compares with. Go back to the one before it "
            f"(`sluice rollback {entry.name} --why ...`), or to a version that passed against it "
            f"(`sluice promote {entry.name} VERSION --why ...`)."
        ) from None


def copied(root: Path, entry: Any, part: str, place: Path) -> Path:
    """A copy, below `place`, of a part of a registered version: its rows, or the directory of its model.

    Raises:
        GateError: the store has it no more.
    """
    import mlflow
    from requests import RequestException

    place.mkdir(parents=True, exist_ok=True)
    uri = f"models:/{entry.name}/{entry.version}/artifacts/{part}"
    try:
        found = mlflow.artifacts.download_artifacts(uri, dst_path=str(place), tracking_uri=store.address(root))
    except (mlflow.exceptions.MlflowException, OSError) as error:
        # The store is away, which `store.answering` tells, or it is this disk that fails
        away = isinstance(error, RequestException) and getattr(error.response, "status_code", 0) != 404
        here = getattr(error, "errno", None) not in (None, errno.ENOENT)
        if away or here or "API request to" in str(error):
            raise
        last = (store.without_login(str(error)).splitlines() or [type(error).__name__])[-1][:200]  # what, not where
        raise GateError(f"{references.shown(entry)} has no {part} in the store: {last}") from None
    return Path(found)
