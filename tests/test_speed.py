"""Speeds in processes of their own: all of them answer, each has loaded its own model, and none is left behind."""

from __future__ import annotations

import importlib.util
import multiprocessing
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from models import model, tokenizer

from pipelines.core import int8, speed, speed_server, variants
from pipelines.core.errors import ArtifactError


def test_each_model_answers_in_turns(tmp_path: Path) -> None:
    known = tokenizer()
    for name in ("plain", "int8"):
        made = model(known, depth=2, length=256)
        (int8.quantize(made) if name == "int8" else made).save_pretrained(tmp_path / name)
    model(known, "gpt2", depth=1, length=64).save_pretrained(tmp_path / "gpt2")  # shorter than a round would be
    asked = {
        "plain": (tmp_path / "plain", variants.PLAIN),
        "int8": (tmp_path / "int8", "int8"),
        "gpt2": (tmp_path / "gpt2", variants.PLAIN),
    }
    rounds: list[tuple[int, int]] = []
    found = speed.measure(asked, 1, lambda done, total: rounds.append((done, total)), rounds=2)
    assert found.keys() == asked.keys() and rounds[-1] == (2, 2)
    for one in found.values():
        assert len(one.rounds) == 2 and 0 < min(one.rounds) <= one.decode <= max(one.rounds)
        assert one.prefill > 0 and one.load_seconds > 0
    assert found["plain"].by_decoder and found["int8"].by_decoder and not found["gpt2"].by_decoder
    assert not multiprocessing.active_children()


def test_two_models_are_compared_round_by_round() -> None:
    """Both become half as fast in the second round: the ratio stays, that of the medians need not."""
    student, teacher = (speed.Speed(rounds, 1.0, 1.0, 1.0, True) for rounds in ((20.0, 10.0, 22.0), (10.0, 5.0, 20.0)))
    assert speed.ratio(student, teacher) == (2.0, 1.1, 2.0)


@pytest.mark.parametrize(("seconds", "tokens"), [(0.0, speed.DECODE_TOKENS), (0.1, 3)])
def test_a_turn_ends_with_its_time(monkeypatch: pytest.MonkeyPatch, seconds: float, tokens: int) -> None:
    """On a clock that only the decoder moves: a slow model's turn has fewer tokens, at the same rate."""

    class Decoder:
        count, now, asked = 0, 0.0, 0

        def step(self, token: int) -> None:
            self.asked, self.now = self.asked + 1, self.now + seconds + 1e-9

    decoder = Decoder()
    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: decoder.now))
    rate, prefill = speed._round(None, decoder, list(range(20)), read=False)  # type: ignore[arg-type]
    assert decoder.asked == tokens and prefill is None and rate == pytest.approx(1 / (seconds + 1e-9))


def test_a_model_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="nothing: the process that measures its speed has died"):
        speed.measure({"nothing": (tmp_path, variants.PLAIN)}, 1, lambda done, total: None)


STARTED = """
import sys
from pathlib import Path
from types import SimpleNamespace
from pipelines import {stage}
from pipelines.core import speed_server

def start(models):
    print(sorted({{"torch", "transformers"}} & {{*sys.modules}}), [str(place / kind) for place, kind in models])
    sys.exit()

speed_server.start = start
params = SimpleNamespace(model=None, teacher=None, variants=["nf4"], student_variants=["int8"])
inputs = {{"ppo": Path("p"), "distill": Path("d")}}
{stage}.run(params, inputs, Path("out"), None)
"""


@pytest.mark.parametrize(
    ("stage", "models"),
    [
        ("quantize", [f"{model}/model/{kind}" for model in "pd" for kind in ("plain", "nf4", "int8")]),
        ("distill", ["p/model/plain"]),
    ],
)
def test_the_server_is_started_before_a_stage_imports_what_takes_seconds(stage: str, models: list[str]) -> None:
    """Its imports and the stage's own go side by side."""
    done = subprocess.run([sys.executable, "-c", STARTED.format(stage=stage)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"[] {models}\n"), done.stderr


def test_the_architecture_is_imported_before_it_is_asked_for(tmp_path: Path) -> None:
    def modules(config: str) -> set[str]:
        (tmp_path / "config.json").write_text(config, encoding="utf-8")
        models = [(tmp_path, variants.PLAIN), (tmp_path / "missing", "int8"), (tmp_path, "nf4")]
        return speed_server._imported(models) - {"transformers.models.auto.modeling_auto"}

    packed = {"pipelines.core.int8", "bitsandbytes"}
    assert modules('{"model_type": "gpt-neox"}') == packed | {"transformers.models.gpt_neox.modeling_gpt_neox"}
    wanted = "transformers.models.gemma3.modeling_gemma3"
    assert wanted in modules('{"model_type": "gemma3_text"}') and importlib.util.find_spec(wanted)
    assert modules('{"model_type": ') == modules("[]") == packed, "whether it is a model is not said here"


def test_memory_is_read_at_a_rate_that_a_machine_can_have() -> None:
    assert 1e8 < speed.bandwidth(1) < 1e13
