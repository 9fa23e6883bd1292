"""An assistant's folder that is small enough for any test: a random model, and an index that finds what it is told."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from models import model, tokenizer

from pipelines.core import artifacts, assistant, grounding, indexing, retrieval
from pipelines.tokenizer import CHAT_TEMPLATE

ROOT = Path(__file__).resolve().parents[1]
PASSAGE = retrieval.Passage(
    chunk="numpy.flip#0", document="numpy.flip", title="numpy.flip", text="Reverse the order of elements in an array.",
    url="numpy/lib/function_base.py#L21", score=1.0, relevance=0.8, start=0, end=42, line=1,
)  # fmt: skip
OTHER = PASSAGE._replace(
    chunk="a", document="a", title="Notes\x1b[2J", text="Arrays have\nan order.", url="notes.md", line=7
)
SETTINGS = assistant.Settings(grounding.TEMPLATES["plain"], 2, 400, 0.3, 24, "tiny")


class FakeIndex:
    """Finds its two passages, in a question about arrays."""

    asked: list[str]

    def __init__(self) -> None:
        self.asked = []

    def search(self, query: str, count: int) -> list[Any]:
        self.asked.append(query)
        return [PASSAGE, OTHER][:count] if "array" in query else [PASSAGE._replace(relevance=0.1)]


def make_model(place: Path, length: int = 1024) -> Path:
    """A model whose likeliest answer to any prompt is letters."""
    known = tokenizer()
    known.chat_template = CHAT_TEMPLATE
    lm = model(known, depth=2, length=length)
    others = [token for token in range(len(known)) if not known.decode([token]).strip().isalpha()]
    lm.get_input_embeddings().weight.data[others] = 0  # and so their logits: EOS is never the likeliest
    lm.save_pretrained(place)
    known.save_pretrained(place)
    return place


def make_assistant(place: Path, made: Path) -> Path:
    """An assistant's folder with that model."""
    shutil.copytree(made, place / "model")
    (place / "index").mkdir()
    artifacts.write_json(place / assistant.FILE, assistant.written(SETTINGS))
    return place


def make_root(root: Path) -> Path:
    """A repository in which a command finds its way; nothing has run."""
    root.mkdir(parents=True)
    params = (ROOT / "params.yaml").read_text().replace("precision: auto", "precision: fp32")
    (root / "params.yaml").write_text(params)
    (root / "dvc.yaml").write_text(
        "stages:\n  answers:\n    cmd: python -m pipelines answers\n    outs: [artifacts/answers]\n"
        "    metrics: [{metrics/answers.json: {cache: false}}]\n"
    )
    return root


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's directory. Import it where it is used."""
    return make_model(tmp_path_factory.mktemp("answering") / "model")


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> FakeIndex:
    """What every assistant's index is opened as. Import it where it is used."""
    fake = FakeIndex()
    monkeypatch.setattr(retrieval.Index, "open", lambda place, embedder=None: fake)
    monkeypatch.setattr(indexing, "verify", lambda place: None)
    return fake


@pytest.fixture
def root(tmp_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with an assistant, and no store. Import it where it is used."""
    place = make_root(tmp_path / "root")
    make_assistant(place / "artifacts/answers/assistant", made)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{place}/.sluice/mlflow/mlflow.db")
    return place
