"""Champions on today's data: `python -m flows.remeasure FILE`, in a worktree whose outputs stand.

In: the store, and `artifacts/` of the directory it is called in. Every champion is measured on the held-out examples
there, and its scores are compared with those it was accepted with; the data are compared with those that the newest
champion was made from (`pipelines.core.drift`). Out: a JSON file with `rows`, a question each, and `notes`, what could
not be asked and why.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.core import artifacts, drift, environment, policy
from pipelines.core.errors import ArtifactError, StoreUnavailable, UserError

if TYPE_CHECKING:
    from pipelines.core.verdicts import Measure

REVISIONS = 10  # data of `dvc.lock` that may be brought back, in search of a champion's
DATA_HASH = "sluice.data_hash"


@dataclass
class Found:
    """What was asked, and why something could not be."""

    changes: list[drift.Change] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def rows(self) -> list[dict[str, Any]]:
        """A table: one row a question, `drifted` among its columns."""
        judged = drift.judge(self.changes)
        return [{**one._asdict(), "drifted": yes} for one, yes in zip(self.changes, judged, strict=True)]


def measure(root: Path) -> Found:
    """Ask everything of the champions of the store and of the data in `root/artifacts`.

    A champion that cannot be measured, such as one of a task that is none of today's, is a note.

    Raises:
        StoreUnavailable: the store is away.
        ArtifactError: there are no data to measure on.
    """
    from requests import RequestException

    from pipelines.core import graph, references, runner, store, verdicts, versions
    from pipelines.core.release import entry_of

    found, declared = Found(), policy.load(root)
    today = next(root / spec.output for spec in graph.load(root).values() if not spec.parents)
    client, _ = store.connect(root)
    with store.answering(root):
        champions = []
        for name in versions.models(client):
            number, rules = versions.alias(client, name, policy.CHAMPION), entry_of(declared, name)
            if number is not None and rules is not None:
                champions.append((references.resolve(client, f"{name}/{number}"), rules))
        if champions and not today.exists():
            raise ArtifactError(
                f"no data to measure on: there is no {today.relative_to(root)} in {root}; `sluice run` makes it"
            )
        for entry, rules in champions:
            if not any(rule.score for rule in rules.comparisons):
                found.notes.append(f"{references.shown(entry)}: its gate compares no scores")
                continue
            try:
                found.changes += list(_scores(root, entry, rules, runner.measure_for(root, rules.stage)))
            except verdicts.NotMeasurable:
                found.notes.append(f"{references.shown(entry)}: stage {rules.stage} cannot measure a model again")
            except StoreUnavailable:
                raise
            except (UserError, OSError, KeyError, ValueError) as error:  # the last two: see `drift.score`
                if isinstance(error, RequestException):  # the store is away
                    raise
                told = f"{type(error).__name__}: {store.without_login(str(error))}"
                found.notes.append(f"{references.shown(entry)} could not be measured: {told}")
        newest = max((entry for entry, _ in champions), key=lambda one: int(one.creation_timestamp), default=None)
        if newest is None:
            found.notes.append("there is no champion yet: nothing to compare with")
        else:
            _data(root, newest, today, found)
    return found


def _scores(root: Path, entry: Any, rules: policy.ModelPolicy, how: Measure) -> Iterator[drift.Change]:
    """Every score that the gate of a version compares, as accepted and as of now."""
    import pandas as pd

    from pipelines.core import references, verdicts

    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        kept = verdicts.copied(root, entry, verdicts.EVALUATION, place)
        how(verdicts.copied(root, entry, Path(rules.model).name, place), place / "now.parquet")
        before, now = pd.read_parquet(kept), pd.read_parquet(place / "now.parquet")
    asked: dict[tuple[str, str | None, bool], float] = {}
    for rule in rules.comparisons:
        key = (rule.score, rule.per, rule.lower_is_better)
        asked[key] = max(asked.get(key, 0.0), rule.margin or 0.0 if rule.baseline == policy.CHAMPION else 0.0)
    for (name, per, lower), margin in asked.items():
        if per is None or (bool(before[per].any()) and bool(now[per].any())):
            yield drift.score(f"{references.shown(entry)} {name}", before, now, name, per, lower, margin)


def _data(root: Path, entry: Any, today: Path, found: Found) -> None:
    """Every held-out table, against the data that a version was made from."""
    wanted = entry.tags.get(DATA_HASH)
    if wanted == artifacts.content_hash(today):
        found.notes.append(f"the data are those that {entry.name} {entry.version} was made from")
        return
    with tempfile.TemporaryDirectory() as temporary:
        made = int(entry.creation_timestamp) / 1000
        before = _accepted(root, wanted, made, today.relative_to(root), Path(temporary))
        if before is None:
            found.notes.append(
                f"the data that {entry.name} {entry.version} was made from were not found: DVC's cache has them no "
                f"more, or they are not among the {REVISIONS} that commits nearest in time recorded"
            )
            return
        for name, old, new in drift.tables(before, today):
            found.changes += [drift.lengths(f"{name} lengths", old, new), drift.texts(f"{name} texts", old, new)]


def _accepted(root: Path, wanted: str | None, made: float, output: Path, place: Path) -> Path | None:
    """The data directory of a content hash, brought back from a revision of `dvc.lock` that has it.

    Those nearest in time to `made`, when the version was, come first: that of its run is among them, however many there
    have been since.
    """
    from dvc.api import DVCFileSystem
    from dvc.exceptions import DvcException

    from flows.workspace import git, locked

    seen: set[str] = set()
    told = git(root, "rev-list", "--all", "--timestamp", "--", "dvc.lock").splitlines()
    dated = sorted((line.split() for line in told), key=lambda one: abs(int(one[0]) - made))
    for _, commit in dated:
        outs = [out for stage in locked(root, commit).values() for out in stage.get("outs", [])]
        known = next((str(out["md5"]) for out in outs if out["path"] == output.as_posix()), None)
        if known is None or known in seen:
            continue
        seen.add(known)
        if len(seen) > REVISIONS:
            return None
        target = place / commit
        try:
            DVCFileSystem(str(root), rev=commit).get(output.as_posix(), str(target), recursive=True)
        except (DvcException, OSError):  # not in the cache any more
            continue
        if artifacts.content_hash(target) == wanted:
            return target
    return None


def main(root: Path, answers: Path) -> int:
    """Measure; returns the exit code."""
    environment.prepare(root)
    try:
        found = measure(root)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    artifacts.write_json(answers, {"rows": found.rows(), "notes": found.notes})
    return 0


if __name__ == "__main__":
    sys.exit(main(Path.cwd(), Path(sys.argv[1])))
