"""How a model directory is served by MLflow: which file of ours answers, and what goes in and comes out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
CELLS = str(HERE / "serving_cells.py")  # what every one of them needs
READY = str(HERE / "cpu.py")  # what every one with weights needs
SPEAKING = [str(HERE / f"{name}.py") for name in ("decoding", "generate")]  # what makes a text
TURNS = str(HERE / "transcripts.py")  # what a prompt is that holds a conversation
ASKING = [str(HERE / f"{name}.py") for name in ("citing", "grounding")]  # what makes tokens of a chat
SERVED = "config.json", "assistant.json", "manifest.json", "prompt.yaml"  # which of them says what a directory is
_, ASSISTANT, INDEX, PROMPT = SERVED
RETRIEVING = [  # what opens an index
    READY,
    *(str(HERE / f"{name}.py") for name in ("embedding", "fusion", "lexical", "nearest", "reranking", "retrieval")),
]
SEARCH = ("faiss-cpu", "pyarrow")  # packages that it needs


class Served(NamedTuple):
    """What `mlflow.pyfunc` is told of a model."""

    code: str  # the file with the model's class
    beside: list[str]  # files that it imports
    signature: Any  # mlflow.models.ModelSignature
    needs: tuple[str, ...] = ()  # packages, beyond those that every model needs


def known(folder: Path) -> bool:
    """Whether a directory is something that `of` can serve."""
    return any((folder / name).is_file() for name in SERVED)


def of(folder: Path) -> Served:
    """A task model (`task.json`) takes its task's columns, a reward model prompts and responses, others prompts.

    An assistant (`assistant.json`) takes questions, an index (`manifest.json`) queries, a prompt (`prompt.yaml`) its
    task's columns, and gives messages.
    """
    if (folder / PROMPT).is_file():
        return _prompt(folder)
    if (folder / ASSISTANT).is_file():
        return _assistant(folder)
    if (folder / INDEX).is_file():
        return _index()
    from mlflow.models import ModelSignature
    from mlflow.types.schema import Array, ColSpec, DataType, ParamSchema, ParamSpec, Schema

    if "reward_mean" in json.loads((folder / "config.json").read_text(encoding="utf-8")):
        asked, reward = (
            Schema([ColSpec(kind, name) for name in names])
            for kind, names in ((DataType.string, ("prompt", "response")), (DataType.double, ("reward",)))
        )
        return Served(
            str(HERE / "serving_reward.py"),
            [*_packed(folder), *ASKING, TURNS, READY, CELLS],
            ModelSignature(asked, reward),
        )
    if not (folder / "task.json").is_file():
        params = ParamSchema(
            [
                ParamSpec("max_new_tokens", DataType.long, 64),
                ParamSpec("temperature", DataType.double, 0.0),
                ParamSpec("top_k", DataType.long, 0),
                ParamSpec("top_p", DataType.double, 1.0),
                ParamSpec("repetition_penalty", DataType.double, 1.0),
                ParamSpec("stop", DataType.string, [], shape=(-1,)),
                ParamSpec("seed", DataType.long, 0),
                ParamSpec("chat", DataType.boolean, False),
            ]
        )
        prompts, texts = (Schema([ColSpec(DataType.string, name)]) for name in ("prompt", "text"))
        beside = [name for name in _packed(folder) if name not in SPEAKING] + [*SPEAKING, *ASKING, TURNS, READY, CELLS]
        return Served(str(HERE / "serving_model.py"), beside, ModelSignature(prompts, texts, params))
    task = json.loads((folder / "task.json").read_text(encoding="utf-8"))
    columns = [
        ColSpec(Array(DataType.string) if name == "choices" else DataType.string, name) for name in task["columns"]
    ]
    answers = [ColSpec(DataType.double, "label")]
    if not task["regression"]:
        answers = [ColSpec(DataType.string, "label"), ColSpec(DataType.long, "label_id")]
        answers += [ColSpec(Array(DataType.double), "probabilities")]
    beside = [str(HERE / "task_sequences.py"), READY, CELLS]
    return Served(str(HERE / "serving_task.py"), beside, ModelSignature(Schema(columns), Schema(answers)))


def _prompt(folder: Path) -> Served:
    """A prompt that was chosen: a task's columns in, the rendered messages out."""
    import yaml
    from mlflow.models import ModelSignature
    from mlflow.types.schema import Array, ColSpec, DataType, Object, Property, Schema

    columns = yaml.safe_load((folder / PROMPT).read_text(encoding="utf-8"))["columns"]
    lists = ("choices", "passages")
    asked = Schema([ColSpec(Array(DataType.string) if name in lists else DataType.string, name) for name in columns])
    message = Object([Property(name, DataType.string) for name in ("role", "content")])
    made = Schema([ColSpec(Array(message), "messages")])
    return Served(
        str(HERE / "serving_prompt.py"),
        [*(str(HERE / f"{name}.py") for name in ("prompt_rendering", "transcripts")), CELLS],
        ModelSignature(asked, made),
    )


def _packed(folder: Path) -> list[str]:
    """The files that a directory with packed layers of ours needs, to be loaded and to answer quickly."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    method = (config.get("quantization_config") or {}).get("quant_method", "")
    if not method.startswith("sluice-"):
        return []
    kinds = {method.removeprefix("sluice-"), "int8"}  # int4 keeps embedding and head in int8
    return [str(HERE / f"{name}.py") for name in (*sorted(kinds), "decoding")]


def _assistant(folder: Path) -> Served:
    """Questions in; answers, sources and refusals out."""
    from mlflow.models import ModelSignature
    from mlflow.types.schema import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    length = json.loads((folder / ASSISTANT).read_text(encoding="utf-8"))["max_new_tokens"]
    params = ParamSchema(
        [
            ParamSpec("max_new_tokens", DataType.long, length),
            ParamSpec("temperature", DataType.double, 0.0),
            ParamSpec("seed", DataType.long, 0),
        ]
    )
    columns = [ColSpec(DataType.string, "answer"), ColSpec(DataType.string, "sources")]
    answers = Schema([*columns, ColSpec(DataType.boolean, "refused")])
    beside = [
        str(HERE / "assistant.py"),
        *ASKING,
        *RETRIEVING,
        *SPEAKING,
        *(name for name in _packed(folder / "model") if name not in SPEAKING),
        CELLS,
    ]
    signature = ModelSignature(Schema([ColSpec(DataType.string, "question")]), answers, params)
    return Served(str(HERE / "serving_rag.py"), beside, signature, SEARCH)


def _index() -> Served:
    """Queries in, passages out."""
    from mlflow.models import ModelSignature
    from mlflow.types.schema import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    params = ParamSchema([ParamSpec("count", DataType.long, 10), ParamSpec("method", DataType.string, "hybrid")])
    queries, passages = (Schema([ColSpec(DataType.string, name)]) for name in ("query", "passages"))
    signature = ModelSignature(queries, passages, params)
    return Served(str(HERE / "serving_retriever.py"), [*RETRIEVING, CELLS], signature, SEARCH)
