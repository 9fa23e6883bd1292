"""A gate asked again: of a registered version, wherever its files are, as champion or rules are others now.

A version whose content stands in `artifacts/` is judged as its stage's output is (`registry.settle`). For an older one
every rule is asked of what the store keeps of it: its metrics, its rows, and for `champion` both versions' rows on the
same examples. Where the two were measured on different examples, both are measured again on today's: numbers from
different data are never compared.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipelines.core import gates, moves, policy, references, registry, release, store, verdicts, versions
from pipelines.core.errors import GateError
from pipelines.core.gates import Verdict
from pipelines.core.policy import ModelPolicy
from pipelines.core.verdicts import EVALUATION, Measure, NotMeasurable

STAGE = "sluice.stage"


def stale(root: Path, entry: Any, champion: str | None) -> str | None:
    """Why a version's gate has to be asked again before it may replace this champion; None where it has not.

    Raises:
        GateError: `mlflow/registry.yaml` cannot be read.
    """
    found, rules = release.entry_of(policy.load(root), entry.name), entry.tags.get(versions.GATE_RULES)
    if champion == str(entry.version):
        return None
    if entry.tags.get(versions.GATE_CHAMPION) not in ("any", champion or "none"):
        return "was asked about another champion"
    changed = found is not None and rules not in (None, gates.gate_hash(found))  # None: judged before that was kept
    return "has other rules by now" if changed else None


def ask(root: Path, client: Any, entry: Any, measure: Measure | None) -> Verdict:
    """Ask the gate of a version, with today's champion and today's rules, and keep the verdict with it.

    Args:
        measure: of its stage, see `runner.measure_for`.

    Raises:
        GateError: no stage made it, no gate is declared for it, or a rule cannot be asked any more.
        StoreUnavailable: the store is away.
    """
    found, stage = release.entry_of(policy.load(root), entry.name), entry.tags.get(STAGE)
    if found is None or stage is None:
        raise GateError(f"{references.shown(entry)} has no gate: {policy.FILE} declares no {entry.name}")
    for one in verdicts.candidates(root, stage):
        if one.name == entry.name and one.content == references.content(entry):
            settled = registry.settle(root, stage, measure)
            return next(each.verdict for each in settled if each.name == entry.name)
    with store.locked(root, "registry"), store.answering(root):
        return _ask_kept(root, client, entry, found, measure)


def rows(
    root: Path, entries: tuple[Any, Any], found: ModelPolicy, measure: Measure | None, place: Path
) -> tuple[Path, Path]:
    """Per-example rows of two versions of a model on the same examples, in files below `place`.

    Raises:
        GateError: they were measured on different examples, and cannot be measured again here.
    """
    hashes = {one.tags.get(versions.ROWS) for one in entries}
    same = len(hashes) == 1 and None not in hashes
    made = []
    try:
        for number, one in enumerate(entries):
            folder = place / str(number)
            folder.mkdir(parents=True)
            if same:
                made.append(verdicts.copied(root, one, EVALUATION, folder))
            elif measure is None:
                raise NotMeasurable
            else:
                made.append(folder / EVALUATION)
                measure(verdicts.copied(root, one, Path(found.model).name, folder), made[-1])
    except NotMeasurable:
        told = " and ".join(map(references.shown, entries))
        raise GateError(
            f"{told} were measured on different examples, and stage {found.stage} cannot measure again"
        ) from None
    return made[0], made[1]


def _ask_kept(root: Path, client: Any, entry: Any, found: ModelPolicy, measure: Measure | None) -> Verdict:
    """Every rule in turn, on what it needs."""
    champion = versions.alias(client, entry.name, policy.CHAMPION)
    metrics = _metrics(client, entry, found)
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        own, pair = None, None
        judged: list[gates.Row] = []
        for rule in found.gate:
            baselines, evaluation = {}, None
            if isinstance(rule, policy.Comparison):
                if rule.baseline.startswith(policy.STAGE):
                    raise GateError(
                        f"{references.shown(entry)}: its gate compares with {rule.baseline}, which can only be asked "
                        f"where the output of both stages stands: `sluice run {found.stage}` with its params and data"
                    )
                against = rule.baseline == policy.CHAMPION and champion not in (None, str(entry.version))
                if against and pair is None:
                    entries = (entry, moves.fetch(client, entry.name, str(champion)))
                    pair = rows(root, entries, found, measure, place / "pair")
                if not against and own is None:
                    own = verdicts.copied(root, entry, EVALUATION, place / "own")
                evaluation = pair[0] if against and pair else own
                baselines = {policy.CHAMPION: _champion(entry, champion, pair[1] if against and pair else None)}
            one = found.model_copy(update={"gate": [rule]})
            judged += gates.evaluate(entry.name, one, metrics, evaluation, baselines).rows
    verdict = Verdict(found.stage, entry.name, tuple(judged), gate=gates.gate_hash(found))
    verdict = replace(verdict, content_hash=references.content(entry), version=str(entry.version))
    verdict = replace(verdict, run_id=entry.run_id, champion=champion, store=store.place(root))
    verdicts.record(client, entry, verdict, found, shared=bool(Path(found.model).parts[1:]))
    return verdict


def _metrics(client: Any, entry: Any, found: ModelPolicy) -> dict[str, float]:
    """What a version's budgets are asked of; nothing where it has none."""
    if len(found.comparisons) == len(found.gate):
        return {}
    run = references.run(client, entry)
    if run is None:
        raise GateError(
            f"{references.shown(entry)}: the store no longer has run {entry.run_id}, which made it, nor what that has "
            f"measured (`mlflow gc` removes both). Its gate can be asked where its output stands: `sluice run "
            f"{found.stage}` with its params and data"
        )
    return dict(run.data.metrics)


def _champion(entry: Any, champion: str | None, theirs: Path | None) -> gates.Baseline:
    if champion == str(entry.version):
        return gates.Baseline(policy.CHAMPION, None, "this version is the champion", passed=True)
    return gates.NO_CHAMPION if theirs is None else gates.Baseline(f"champion v{champion}", theirs)
