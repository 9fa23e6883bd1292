"""Moves that belong together: killed before any of their steps, the next call finishes or undoes them."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST

from pipelines.core import moves
from pipelines.core.ledger import Move, Promotion, State


class Crash(BaseException):
    """What a kill is to the code that runs: nothing after it happens."""


class Memory:
    """As much of an MlflowClient as moves need, in memory; and a ledger. Dies before write number `dies_at`."""

    def __init__(self, *names: str) -> None:
        self.models = {name: SimpleNamespace(aliases={}) for name in names}
        self.tags: dict[tuple[str, str], dict[str, str]] = {(name, v): {} for name in names for v in ("1", "2")}
        self.lines: list[tuple[State, Promotion]] = []
        self.written, self.dies_at = 0, 10**6

    def _count(self) -> None:
        if self.written == self.dies_at:
            raise Crash
        self.written += 1

    def get_registered_model(self, name: str) -> Any:
        return self.models[name]

    def get_model_version(self, name: str, version: str) -> Any:
        if (name, version) not in self.tags:
            raise MlflowException("no such version", RESOURCE_DOES_NOT_EXIST)
        return SimpleNamespace(tags=self.tags[name, version])

    def set_registered_model_alias(self, name: str, alias: str, version: str) -> None:
        self._count()
        self.models[name].aliases[alias] = version

    def delete_registered_model_alias(self, name: str, alias: str) -> None:
        self._count()
        del self.models[name].aliases[alias]

    def set_model_version_tag(self, name: str, version: str, key: str, value: str) -> None:
        self._count()
        self.tags[name, version][key] = value

    held = staticmethod(contextlib.nullcontext)

    def entries(self) -> list[tuple[State, Promotion]]:
        return self.lines

    def write(self, state: State, promotion: Promotion) -> None:
        self._count()
        self.lines.append((state, promotion))

    def champions(self) -> dict[str, str]:
        return {name: one.aliases["champion"] for name, one in self.models.items() if "champion" in one.aliases}


@pytest.mark.parametrize("again", [False, True], ids=["one crash", "and one while it is put right"])
def test_a_crash_before_any_step_is_finished_or_undone_by_the_next_call(tmp_path, again):
    old = {"a": "1", "b": "1", "dropped": "1"}
    new = {"a": "2", "b": "2", "first": "1"}
    steps = [Move(name, old.get(name), new.get(name), old.get(name)) for name in ("a", "b", "dropped", "first")]
    ends, step, whole = [], 0, False
    while not whole:
        memory = Memory("a", "b", "dropped", "first")
        for name in old:
            memory.models[name].aliases["champion"] = "1"
        desk = moves.Desk(tmp_path, memory, memory)
        memory.dies_at = step
        try:
            desk.carry_out(Promotion.begin(tmp_path, "promote", steps, "ada", "better", "all of them"))
            whole = True
        except Crash:
            pass
        if again and not whole:
            memory.dies_at = memory.written + 2
            with contextlib.suppress(Crash):
                desk.recover()
        memory.dies_at = 10**6
        desk.recover()
        now = memory.champions()
        assert now in (old, new), f"step {step} left a mixture"
        if step:
            assert memory.lines[-1][0] == ("done" if now == new else "aborted"), step
            assert [state for state, _ in memory.lines].count("done") == (now == new)
        if now == new:
            assert memory.tags["a", "2"]["promotion.why"] == memory.tags["first", "1"]["promotion.why"] == "better"
            previous = {name: one.aliases.get("previous") for name, one in memory.models.items()}
            assert previous == {"a": "1", "b": "1", "dropped": "1", "first": None}
        ends.append(now == new)
        step += 1
    # An intent alone is undone; an alias that has moved takes the others with it
    assert ends == [False, False] + [True] * (step - 2) and step > 20


def test_where_one_cannot_follow_those_that_moved_go_back(tmp_path):
    for trouble in ("deleted", "moved by another hand"):
        memory = Memory("a", "b", "c")
        for one in memory.models.values():
            one.aliases["champion"] = "1"
        memory.dies_at = 3  # the intent and two aliases
        steps = [Move(name, "1", "2", "1") for name in "abc"]
        with pytest.raises(Crash):
            moves.Desk(tmp_path, memory, memory).carry_out(Promotion.begin(tmp_path, "promote", steps, "ada", "better"))
        assert memory.champions() == {"a": "2", "b": "2", "c": "1"}
        memory.dies_at = 10**6
        if trouble == "deleted":
            del memory.tags["c", "2"]
        else:
            memory.tags["c", "7"] = {}
            memory.models["c"].aliases["champion"] = "7"
        judged = moves.settled(tmp_path, "a")  # against one that was champion between
        judged.parent.mkdir(parents=True, exist_ok=True)
        judged.touch()
        moves.Desk(tmp_path, memory, memory).recover()
        assert not judged.exists()
        assert memory.champions() == {"a": "1", "b": "1", "c": "1" if trouble == "deleted" else "7"}
        assert [state for state, _ in memory.lines] == ["intent", "aborted"]
