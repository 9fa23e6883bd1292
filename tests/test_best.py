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

from pipelines.core import int4, int8, policy, promotion, registry, store, versions
from pipelines.core.errors import GateError

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


def test_the_smallest_that_passed_and_may_has_the_alias(repository):
    root, model = repository
    several(root, model, small=2.0, same=3.0, bad=1.0, tiny=0.5, slarge=20.0)
    judged = {one.name: one.verdict.passed for one in registry.settle(root, "pretrain")}
    assert not judged["sluice-of-bad"] and not judged["sluice-of-slarge"] and judged["sluice-of-tiny"]
    every = ("small", "same", "bad", "tiny", "slarge")
    assert promotion.point_best(root, "pretrain") == "sluice-of-small 1 is compressed now"
    assert holders(root, *every) == {"small": "1"}
    assert promotion.point_best(root, "pretrain") is None

    several(root, model, small=2.0, same=1.5, bad=1.0)
    registry.settle(root, "pretrain")
    assert promotion.point_best(root, "pretrain") == "sluice-of-same 2 is compressed now"
    assert holders(root, *every) == {"same": "2"}

    several(root, model, bad=1.0)
    registry.settle(root, "pretrain")
    assert promotion.point_best(root, "pretrain") is None
    assert holders(root, *every) == {"same": "2"}, "where none passed it stays"


def test_rules_for_some_are_not_asked_of_others():
    declared = policy.ModelPolicy.model_validate(ENTRY)
    assert len(declared.of("bad1").gate) == 2 and len(declared.of("good").gate) == 1


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
        registry.check(root)
    plain = {"sluice-one": ENTRY | {"model": "model", "gate": [{"metric": "bits_per_byte", "at_most": 1.0}]}}
    (root / "mlflow/registry.yaml").write_text(yaml.safe_dump({"models": plain}))
    with pytest.raises(GateError, match=r"sluice-one: only: and best: belong to an entry with \*"):
        registry.check(root)


def test_packed_models_answer_from_any_folder(repository, tmp_path):
    root, _ = repository
    make_model(tmp_path / "plain")
    several(root, tmp_path / "plain", s8=1.0, s4=2.0)
    for name, pack in (("s8", int8.quantize), ("s4", lambda model: int4.quantize(model, 16))):
        place = root / "artifacts/pretrain/models" / name
        pack(AutoModelForCausalLM.from_pretrained(tmp_path / "plain")).save_pretrained(place)
        AutoTokenizer.from_pretrained(tmp_path / "plain").save_pretrained(place)
    registry.settle(root, "pretrain")
    promotion.point_best(root, "pretrain")
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
