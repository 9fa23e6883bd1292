"""A release: the models that belong to one version, whose champions move together or not at all.

What belongs to a version follows from the graph and from lineage, not from a list:

1. Models: of the stages it descends from (base, sft, reward), of those that descend from it (student, quantized,
   answers) and of those that descend from no model at all (rag). What only shares an ancestor with it is beside it
   (transfer, dpo).
2. Versions: of each of them the newest that passed its gate and read the same artifacts as the others. "Same" is the
   hash of the content: whatever artifact two of them read, or one made and another read, has one hash.

A model of which no version fits is a refusal: there is no whole release yet. One that was not made this time (a variant
that was dropped, an index of data without knowledge) has no champion afterwards. A rollback puts back what the last
release has replaced.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.core import contents, graph, lineage, moves, policy, promotion, references, store, versions
from pipelines.core.errors import GateError, UserError
from pipelines.core.ledger import Ledger, Move, Promotion

HEAD = "sluice-policy"  # what a release is named after where nobody says


@dataclass(frozen=True)
class Member:
    """A version of a release, and who was champion of its model when the release was put together."""

    entry: Any
    champion: str | None

    @property
    def model(self) -> str:
        """Its model."""
        return str(self.entry.name)

    @property
    def version(self) -> str:
        """Its number, as text."""
        return str(self.entry.version)


@dataclass(frozen=True)
class Release:
    """Versions that belong together."""

    name: str  # such as `sluice-policy 5`
    members: tuple[Member, ...]  # parents before children
    retired: dict[str, str]  # models that were dropped -> their champion


def plan(root: Path, client: Any, model: str | None = None, version: str | None = None) -> Release:
    """Put together the release of a version (the newest of `sluice-policy` where none is named).

    Gates are not looked at where only one version fits; `promote` does that.

    Raises:
        UserError: no such model or version, or a model that no stage makes.
        GateError: a model has no version that fits; all of them are listed.
    """
    specs, declared = graph.load(root), policy.load(root)
    name = model or HEAD
    entry = references.resolve(client, f"{name}/{version}") if version else references.newest(client, name)
    stage_of = {each: its.stage for each in versions.models(client) if (its := entry_of(declared, each))}
    if name not in stage_of:
        raise UserError(f"{policy.FILE} declares no {name}; it has: {', '.join(declared.models)}")
    made = {Path(spec.output).name: stage for stage, spec in specs.items()}
    shared = {each.stage for key, each in declared.models.items() if policy.ANY in key}
    known = dict(_read(entry, made))
    chosen: list[Any] = []
    missing: list[str] = []
    retired: dict[str, str] = {}
    for stage in _family(specs, stage_of[name], {each.stage for each in declared.models.values()}):
        here = sorted(each for each, its in stage_of.items() if its == stage)
        fitting = {each: _fitting(client, each, stage, known, made, shared) for each in here}
        if stage == stage_of[name]:
            fitting = {name: [entry]}  # of several models of its stage it is the one that was named
        if not any(fitting.values()) and not _made_none(root, specs[stage], declared, known):
            patterns = [key for key, each in declared.models.items() if each.stage == stage]
            missing.append(_lacks(", ".join(here or patterns), stage, references.shown(entry)))
        for each, found in fitting.items():
            if found:
                best = next((one for one in found if one.tags.get(versions.GATE) == "passed"), found[0])
                chosen.append(best)
                known.update(_read(best, made))
                if stage not in shared:
                    known[Path(specs[stage].output).name] = references.content(best)
            elif (champion := versions.alias(client, each, policy.CHAMPION)) is not None:
                retired[each] = champion
    if missing:
        raise GateError(f"no whole release of {references.shown(entry)} yet:\n" + "\n".join(missing))
    order = {stage: number for number, stage in enumerate(specs)}
    chosen.sort(key=lambda one: (order[stage_of[one.name]], one.name))
    members = tuple(Member(one, versions.alias(client, one.name, policy.CHAMPION)) for one in chosen)
    return Release(references.shown(entry), members, retired)


def promote(root: Path, release: Release, *, who: str = "", why: str, ledger: Ledger | None = None) -> Promotion | None:
    """Make every version of a release the champion of its model; None when each is already.

    Raises:
        GateError: one of them did not pass its gate, or a champion is not the one that `plan` saw. No alias is moved.
        LedgerHeld: another promotion does not come to its end.
        StoreUnavailable: the store is away.
    """
    with moves.desk(root, ledger) as desk:
        steps = []
        refused = []
        for member in release.members:
            now = desk.champion(member.model)
            if now == member.version:
                continue
            moves.compare(member.model, now, member.champion)
            steps.append(Move(member.model, now, member.version, previous=now))
            refused.append(moves.refusal(moves.fetch(desk.client, member.model, member.version), now))
        for model, champion in release.retired.items():
            moves.compare(model, desk.champion(model), champion)
            steps.append(Move(model, champion, None, previous=champion))
        if lines := list(filter(None, refused)):
            raise GateError(f"release {release.name} moves together or not at all:\n" + "\n".join(lines))
        if not steps:
            return None
        step = Promotion.begin(root, "promote", steps, who, why, release.name)
        desk.carry_out(step)
        return step


def last(root: Path, ledger: Ledger) -> Promotion:
    """The release in office: the last that was promoted and not rolled back.

    Raises:
        GateError: there is none.
    """
    if not (found := standing(root, ledger)):
        raise GateError("no release was promoted here, or all were rolled back: there is none to go back from")
    return found[-1]


def standing(root: Path, ledger: Ledger) -> list[Promotion]:
    """Every release that was promoted and not rolled back, oldest first: each may be gone back from in turn."""
    found: list[Promotion] = []
    for state, entry in ledger.entries():
        if state == "done" and entry.release is not None and store.is_meant(root, entry.store):
            found = found[:-1] if entry.action == "rollback" else [*found, entry]
    return found


def rollback(root: Path, expected: Promotion, *, who: str = "", why: str, ledger: Ledger | None = None) -> Promotion:
    """Put back what a release has replaced; done again, what the one before it has.

    Args:
        expected: the release the caller saw in office, see `last`.

    Raises:
        GateError: it is not in office any more, or a champion was moved since. No alias is moved.
        LedgerHeld, StoreUnavailable: as `promote`.
    """
    with moves.desk(root, ledger) as desk:
        found = last(root, desk.ledger)
        if found.id != expected.id:
            raise GateError(
                f"the release in office is {found.release} of {found.when}, not {expected.release} of {expected.when}: "
                "somebody was quicker. Nothing was changed; look at it and ask again."
            )
        steps = []
        for move in found.moves:
            now = desk.champion(move.model)
            if now == move.source:  # gone back on its own already
                continue
            if now != move.target:
                raise GateError(
                    f"{move.model}: release {found.release} has made {move.target or 'nobody'} its champion, and now "
                    f"it is {now or 'nobody'}: it was moved since. Nothing was changed; `sluice history {move.model}` "
                    f"says by whom, `sluice rollback {move.model}` goes back one step."
                )
            if move.source is not None and not moves.exists(desk.client, move.model, move.source):
                raise GateError(
                    f"{move.model}: version {move.source}, which release {found.release} has replaced, is not in the "
                    "store any more. Nothing was changed; `sluice rollback MODEL` takes the others back, one by one."
                )
            steps.append(Move(move.model, now, move.source, promotion.behind(desk, move.model, now, move.source)))
        step = Promotion.begin(root, "rollback", steps, who, why, found.release)
        desk.carry_out(step)
        return step


def entry_of(declared: policy.Policy, model: str) -> policy.ModelPolicy | None:
    """The policy of a model by its name, whether or not its files stand; None where none is declared."""
    for name, found in declared.models.items():
        matched = re.fullmatch(re.escape(name).replace(re.escape(policy.ANY), "(.+)"), model)
        if matched is not None:
            return found.of(matched[1]) if policy.ANY in name else found
    return None


def _family(specs: dict[str, graph.StageSpec], head: str, with_models: set[str]) -> list[str]:
    """Stages with models of a release: the head; what it descends from, nearest first; the others, parents first."""

    above: dict[str, set[str]] = {}
    for stage, spec in specs.items():
        above[stage] = set(spec.parents).union(*(above[parent] for parent in spec.parents))
    ancestors = [stage for stage in reversed(specs) if stage in above[head]]
    others = [stage for stage in specs if head in above[stage] or not above[stage] & with_models]
    everything = dict.fromkeys([head, *ancestors, *others])
    return [stage for stage in everything if stage in with_models]


def _read(entry: Any, made: Iterable[str]) -> list[tuple[str, str]]:
    """Artifacts of stages that a version was made from: name, content hash."""
    return [(name, entry.tags[lineage.INPUT + name]) for name in made if lineage.INPUT + name in entry.tags]


def _fitting(
    client: Any, model: str, stage: str, known: dict[str, str], made: dict[str, str], shared: set[str]
) -> list[Any]:
    """Versions of a model that agree with all that is known of the release, newest first."""
    own = next((name for name, its in made.items() if its == stage), "")
    return [
        entry
        for entry in references.every(client, model)
        if all(known.get(name, digest) == digest for name, digest in _read(entry, made))
        # What others read of a stage with several models is the hash of all; a version has that of its own directory
        and (stage in shared or known.get(own) in (None, entry.tags.get(lineage.CONTENT)))
    ]


def _made_none(root: Path, spec: graph.StageSpec, declared: policy.Policy, known: dict[str, str]) -> bool:
    """Whether a stage has made no model of what the release was made from, as data without knowledge make no index.

    Its output stands here, holds none, and what it read is what the others have read.
    """
    output = root / spec.output
    if not output.exists() or declared.of_stage(spec.name, output):
        return False
    read = {name: root / path for name, path in spec.inputs.items() if name in known}
    return all(place.exists() and contents.content_hash(root, place) == known[name] for name, place in read.items())


def _lacks(models: str, stage: str, head: str) -> str:
    return f"{models}: no version was made from the same artifacts as {head}; `sluice run {stage}` makes one"
