"""Several models of one stage: rules for some of them, the alias of the best, and packed ones served from anywhere."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from stores import drain, fill, make_model, repository, run_stage
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipelines.core import (
    best,
    declared,
    int4,
    int8,
    moves,
    policy,
    promotion,
    references,
    registry,
    release,
    store,
    versions,
)
from pipelines.core.errors import GateError
from pipelines.core.ledger import FileLedger

__all__ = ["repository"]
ENTRY = {
    "stage": "pretrain", "model": "models/*", "promote": "auto",
    "gate": [
        {"metric": "task/*", "at_most": 10.0},
        {"metric": "bits_per_byte", "at_most": 1.0, "only": ["bad*"]},
    ],
    "best": {"alias": "compressed", "lowest": "task/*", "only": ["s*", "bad"]},
}  # fmt: skip


def several(root: Path, model: Path, **sizes: float) -> None:
    """`pretrain` with a model a name, whose metric `task/NAME` is given."""
    (root / "mlflow/registry.yaml").write_text(yaml.safe_dump({"models": {"sluice-of-*": ENTRY}}))
    run_stage(root, model, 2.5, mark=str(sizes))
    fill(root, model, 2.5)
    for name, size in sizes.items():
        place = root / "artifacts/pretrain/models" / name
        shutil.copytree(model, place)
        (place / "README.md").write_text(f"{name} {size}")
    metrics = {"bits_per_byte": 2.5, **{f"task/{name}": size for name, size in sizes.items()}}
    (root / "metrics/pretrain.json").write_text(json.dumps(metrics))


def holders(root: Path, *names: str) -> dict[str, str]:
    client, _ = store.connect(root)
    found = {name: versions.alias(client, f"sluice-of-{name}", "compressed") for name in names}
    return {name: version for name, version in found.items() if version is not None}


def in_office(root: Path, *names: str) -> None:
    """Promote the newest version of each."""
    client, _ = store.connect(root)
    for name in names:
        model = f"sluice-of-{name}"
        newest = references.newest(client, model).version
        promotion.promote(root, model, newest, why="x", expected_champion=versions.alias(client, model, "champion"))


EVERY = ("small", "same", "bad", "tiny", "slarge")


def test_the_smallest_champion_that_may_has_the_alias_and_it_follows_them(repository):
    root, model = repository
    several(root, model, small=2.0, same=3.0, bad=1.0, tiny=0.5, slarge=20.0)
    judged = {one.name: one.verdict.passed for one in registry.settle(root, "pretrain")}
    assert not judged["sluice-of-bad"] and not judged["sluice-of-slarge"] and judged["sluice-of-tiny"]
    assert promotion.point_best(root, "pretrain") is None and holders(root, *EVERY) == {}, "nobody promoted anything"
    in_office(root, "tiny")
    assert holders(root, *EVERY) == {}, "it may not have it"
    in_office(root, "same")
    assert holders(root, *EVERY) == {"same": "1"}
    in_office(root, "small")
    assert holders(root, *EVERY) == {"small": "1"}

    several(root, model, small=2.5, same=1.5, bad=1.0)
    registry.settle(root, "pretrain")
    assert promotion.point_best(root, "pretrain") is None and holders(root, *EVERY) == {"small": "1"}, "no promotion"
    in_office(root, "same")
    assert holders(root, *EVERY) == {"same": "2"}
    in_office(root, "small")
    promotion.rollback(root, "sluice-of-same", why="bad", expected_champion=2)
    assert holders(root, *EVERY) == {"small": "2"}, "2.5 and 3.0 are in office"
    promotion.rollback(root, "sluice-of-small", why="bad", expected_champion=2)
    assert holders(root, *EVERY) == {"small": "1"}


def test_a_release_and_its_rollback_take_the_alias_along(repository):
    root, model = repository
    several(root, model, small=2.0, same=3.0)
    registry.settle(root, "pretrain")
    client, _ = store.connect(root)
    members = [release.Member(references.newest(client, f"sluice-of-{name}"), None) for name in ("small", "same")]
    release.promote(root, release.Release("first", tuple(members), {}), why="x")
    assert holders(root, *EVERY) == {"small": "1"}
    several(root, model, same=3.5)
    registry.settle(root, "pretrain")
    member = release.Member(references.newest(client, "sluice-of-same"), "1")
    release.promote(root, release.Release("second", (member,), {"sluice-of-small": "1"}), why="dropped")
    assert holders(root, *EVERY) == {"same": "2"}, "what was dropped has no champion"
    release.rollback(root, release.last(root, FileLedger(root)), why="back")
    assert holders(root, *EVERY) == {"small": "1"}
    release.rollback(root, release.last(root, FileLedger(root)), why="back")
    assert holders(root, *EVERY) == {}


def test_a_crash_before_the_alias_follows_is_mended_and_so_is_a_change_of_policy(repository, monkeypatch):
    root, model = repository
    several(root, model, small=2.0, same=3.0, tiny=0.5)
    registry.settle(root, "pretrain")
    in_office(root, "same", "tiny")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(best, "point", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        in_office(root, "small")
    assert holders(root, *EVERY) == {"same": "1"}
    with moves.desk(root, None):
        pass
    assert holders(root, *EVERY) == {"small": "1"}
    entry = ENTRY | {"best": {"alias": "compressed", "lowest": "task/*"}}
    (root / "mlflow/registry.yaml").write_text("models: [")
    client, _ = store.connect(root)
    client.delete_registered_model_alias("sluice-of-tiny", "champion")
    in_office(root, "tiny")  # a file holds nothing up
    assert holders(root, *EVERY) == {"small": "1"}
    (root / "mlflow/registry.yaml").write_text(yaml.safe_dump({"models": {"sluice-of-*": entry}}))
    assert promotion.point_best(root, "pretrain") == "sluice-of-tiny 1 is compressed now"
    assert promotion.point_best(root, "pretrain") is None and holders(root, *EVERY) == {"tiny": "1"}


def test_rules_for_some_are_not_asked_of_others():
    rules = policy.ModelPolicy.model_validate(ENTRY)
    assert len(rules.of("bad1").gate) == 2 and len(rules.of("good").gate) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "models"}, "one . in both the name and the directory"),
        ({"best": {"alias": "champion", "lowest": "task/*"}}, "champion is given by promotions alone"),
        ({"best": {"alias": "compressed", "lowest": "nothing/*"}}, "pretrain has no metric 'nothing/*'"),
    ],
)
def test_mistakes_are_told(repository, change, message):
    root, _ = repository
    (root / "mlflow/registry.yaml").write_text(yaml.safe_dump({"models": {"sluice-of-*": ENTRY | change}}))
    with pytest.raises(GateError, match=message.replace("*", r"\*")):
        declared.check(root)
    plain = {"sluice-one": ENTRY | {"model": "model", "gate": [{"metric": "bits_per_byte", "at_most": 1.0}]}}
    (root / "mlflow/registry.yaml").write_text(yaml.safe_dump({"models": plain}))
    with pytest.raises(GateError, match=r"sluice-one: only: and best: belong to an entry with \*"):
        declared.check(root)
    once = yaml.safe_dump({"models": plain})
    (root / "mlflow/registry.yaml").write_text(once + once.removeprefix("models:\n"))  # a gate that would be lost
    with pytest.raises(GateError, match=r"registry\.yaml is not valid YAML: 'sluice-one' stands twice"):
        declared.check(root)


@pytest.mark.slow
def test_packed_models_answer_from_any_folder(repository, tmp_path):
    root, _ = repository
    make_model(tmp_path / "plain")
    several(root, tmp_path / "plain", s8=1.0, s4=2.0)
    for name, pack in (("s8", int8.quantize), ("s4", lambda model: int4.quantize(model, 16))):
        place = root / "artifacts/pretrain/models" / name
        pack(AutoModelForCausalLM.from_pretrained(tmp_path / "plain")).save_pretrained(place)
        AutoTokenizer.from_pretrained(tmp_path / "plain").save_pretrained(place)
    registry.settle(root, "pretrain")
    in_office(root, "s8", "s4")
    drain(root)
    code = """
import sys
there = set(sys.modules)
import mlflow
for name in ("models:/sluice-of-s4/1", "models:/sluice-of-s8@compressed"):
    model = mlflow.pyfunc.load_model(name)
    ask = [{"prompt": "def f("}, {"prompt": ""}, {"prompt": "x" * 500}]
    greedy = model.predict(ask, params={"max_new_tokens": 8})
    assert list(greedy.columns) == ["text"] and len(greedy) == 3, greedy
    assert greedy.equals(model.predict(ask, params={"max_new_tokens": 8, "seed": 5})), "greedy is greedy"
    warm = {"max_new_tokens": 8, "temperature": 1.5}
    assert model.predict(ask, params={**warm, "seed": 1}).equals(model.predict(ask, params={**warm, "seed": 1}))
    assert not model.predict(ask, params={**warm, "seed": 1}).equals(model.predict(ask, params={**warm, "seed": 2}))
assert not [name for name in set(sys.modules) - there if name.partition(".")[0] == "pipelines"], "not self-contained"
"""
    keep = {key: os.environ[key] for key in ("PATH", "MLFLOW_TRACKING_URI")}
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = subprocess.run([sys.executable, "-c", code], cwd=elsewhere, env=keep, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
