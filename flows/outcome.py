"""What a stage's output is worth: its metric, its verdict, and the promotion that follows from it.

The registry judges; this module asks for the verdict on exactly the bytes that stand in the workspace now, and
promotes what `mlflow/registry.yaml` says to promote by itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from pipelines.core import graph, policy, verdicts
from pipelines.core.errors import GateError
from pipelines.core.gates import Verdict
from pipelines.core.verdicts import Measure


def judge(root: Path, stage: str, measure: Measure | None = None, again: bool = False) -> list[Verdict]:
    """The verdicts on the models that stand now; none for a stage without models.

    The registry is asked to catch up first, unless it has judged these very bytes by today's rules.

    Args:
        measure: see `registry.settle`; None: in this process.
        again: ask it in any case, as a champion may have been moved since a verdict was given.

    Raises:
        StoreUnavailable: the registry has to catch up and its store is away.
        GateError, ArtifactError: as `registry.settle`.
    """
    found = verdicts.candidates(root, stage)
    current = [verdict for one in found if (verdict := verdicts.current(one)) is not None]
    if len(current) == len(found) and not again:
        return current
    from pipelines.core import registry, runner

    return [one.verdict for one in registry.settle(root, stage, measure or runner.measure_for(root, stage))]


def promote(root: Path, verdict: Verdict, fresh_output: bool) -> str | None:
    """Make a version that passed the champion if `promote: auto` says so. Returns what was done, in words.

    Not one whose gate has waived a rule that says `by_hand_without`: what a person has to type for it is returned.
    An output that did not change in this run is promoted only if it never was, as when a run was cut off in between:
    a version that was champion has been rolled back on purpose. One that somebody has gone back from stays out of
    office even when a run makes it, or brings it back, again: nothing new gives the same version every night.

    Raises:
        StoreUnavailable: the registry's store is away.
        LedgerHeld: another promotion does not come to its end.
        GateError: somebody else moved the champion in between.
    """
    if not automatic(root, verdict):
        return None
    from pipelines.core import promotion, registry

    champion = registry.champion(root, verdict.model)
    if champion == verdict.version:
        return None
    if not fresh_output and (
        promotion.was_promoted(root, verdict.model, verdict.version) or champion != verdict.champion
    ):
        return None
    if promotion.was_rolled_back(root, verdict.model, verdict.version):
        asked = f"`sluice promote {verdict.model} {verdict.version} --why ...`"
        return f"{verdict.model} {verdict.version} was rolled back, so it is not promoted by itself: {asked}"
    if verdict.by_hand:
        return f"{verdict.model} {verdict.version} is {verdict.by_hand}"
    promotion.promote(
        root,
        verdict.model,
        verdict.version,
        why=f"passed its gate; {policy.FILE} says promote: auto",
        expected_champion=verdict.champion,  # the one it was compared with: it must still be in office
    )
    return f"{verdict.model} {verdict.version} is the champion now" + (f", after {champion}" if champion else "")


def promote_all(
    root: Path,
    judged: list[Verdict],
    fresh_output: bool,
    again: Callable[[], list[Verdict]],
    tell: Callable[[str], None],
) -> list[Verdict]:
    """Promote what passed. Returns the verdicts: new ones where somebody has moved a champion or removed a version.

    Args:
        judged: all verdicts of a stage.
        again: judges anew; asked once.
        tell: is told what was done.

    Raises:
        StoreUnavailable, LedgerHeld, GateError: as `promote`.
    """
    for last in (False, True):
        try:
            for one in judged:
                if one.passed and (done := promote(root, one, fresh_output)):
                    tell(done)
            break
        except GateError:
            if last:
                raise
            judged = again()
    return judged


def automatic(root: Path, verdict: Verdict) -> bool:
    """Whether `mlflow/registry.yaml` says to promote the model of a verdict by itself."""
    output = root / graph.stage(root, verdict.stage).output
    found = dict(policy.load(root).of_stage(verdict.stage, output)).get(verdict.model)
    return found is not None and found.promote == "auto"


def point_best(root: Path, stage: str) -> str | None:
    """Give the alias of the best champion of a stage to the one that has earned it; see `promotion.point_best`."""
    if all(model.best is None for model in policy.load(root).models.values() if model.stage == stage):
        return None
    from pipelines.core import promotion

    return promotion.point_best(root, stage)


def cell(judged: Sequence[Verdict]) -> str:
    """Verdicts of a stage in a table cell; of several models how many passed, and those that did not or wait by name.

    What waits for a person is told with the rules that were not measured (`Verdict.unmeasured`).
    """

    def told(one: Verdict) -> str:
        waived = f", not measured: {one.unmeasured}" if one.by_hand else ""
        return f"{one.model} {one.version} {'passed' if one.passed else 'FAILED'}{waived}"

    if len(judged) < 2:
        return "".join(map(told, judged))
    named = [told(one) for one in judged if one.by_hand or not one.passed]
    return ", ".join([f"{sum(one.passed for one in judged)} of {len(judged)} models passed", *named])


def metrics(root: Path, stage: str) -> dict[str, float]:
    """`metrics/<stage>.json` as it is now; empty when the stage never ran."""
    place = root / graph.stage(root, stage).metrics
    if not place.exists():
        return {}
    found: dict[str, float] = json.loads(place.read_text(encoding="utf-8"))
    return found


def key_metric(root: Path, stage: str, shows: str | None) -> str:
    """The one metric that stands for a stage, with its name, for a table cell."""
    found = metrics(root, stage)
    if shows not in found:
        return ""
    value = found[shows]
    return f"{shows} {value:,}" if isinstance(value, int) else f"{shows} {value:.4g}"
