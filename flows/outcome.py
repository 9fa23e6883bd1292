"""What a stage's output is worth: its metric, its verdict, and the promotion that follows from it.

The registry judges; this module asks for the verdict on exactly the bytes that stand in the workspace now, and
promotes what `mlflow/registry.yaml` says to promote by itself.
"""

from __future__ import annotations

import getpass
import json
from pathlib import Path

from pipelines.core import artifacts, graph, policy, verdicts
from pipelines.core.gates import Verdict


def judge(root: Path, stage: str) -> Verdict | None:
    """The verdict on the output that stands now; None for a stage without a model.

    DVC may have brought the output back from its cache, or a crash may have come between training and
    registration: then the registry is asked to catch up first.

    Raises:
        StoreUnavailable: the registry has to catch up and its store is away.
        GateError, ArtifactError: as `registry.settle`.
    """
    found = policy.load(root).of_stage(stage)
    output = root / graph.stage(root, stage).output
    if found is None or not output.exists():
        return None
    known = verdicts.stored(root, stage)
    if known is not None and (known.model, known.content_hash) == (found[0], artifacts.content_hash(output)):
        return known
    from pipelines.core import registry, runner

    registered = registry.settle(root, stage, runner.measure_for(root, stage))
    return registered.verdict if registered is not None else None


def promote(root: Path, verdict: Verdict, fresh_output: bool) -> str | None:
    """Make a version that passed the champion if `promote: auto` says so. Returns what was done, in words.

    An output that did not change in this run is promoted only where there is no champion yet: a person may
    have rolled back on purpose.

    Raises:
        StoreUnavailable: the registry's store is away.
        GateError: somebody else moved the champion in between.
    """
    found = policy.load(root).of_stage(verdict.stage)
    if found is None or found[1].promote != "auto":
        return None
    from pipelines.core import promotion, registry

    champion = registry.champions(root).get(verdict.model)
    if champion is not None and (not fresh_output or champion == verdict.version):
        return None
    promotion.promote(
        root,
        verdict.model,
        verdict.version,
        who=getpass.getuser(),
        why=f"passed its gate; {policy.FILE} says promote: auto",
        expected_champion=verdict.champion,  # the one it was compared with: it must still be in office
    )
    return f"{verdict.model} {verdict.version} is the champion now" + (f", after {champion}" if champion else "")


def cell(verdict: Verdict) -> str:
    """A verdict in a table cell."""
    return f"{verdict.model} {verdict.version} {'passed' if verdict.passed else 'FAILED'}"


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
