"""One registered version for one content, whatever is killed in between.

A version is made in three steps that MLflow does not join: log the model's files, create the version, forget
the intent. The intent (`.sluice/registry/intents/<model>-<content hash>.json`) is written first and holds everything
the later steps need, so whoever comes next finishes them: a version is searched by its content hash before it
is made, its tags are part of its creation, a logged model that is whole is used, and half of one is removed.
All of it runs under the lock `registry`, held by the caller.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipelines.core import artifacts, contents, serving, store, store_files
from pipelines.core.environment import STATE
from pipelines.core.lineage import CONTENT

REQUIREMENTS = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "pandas", "mlflow")
DESCRIPTION_LIMIT = 5000  # characters of MLflow's column
PAGE = 1000  # models that MLflow tells of in one answer, at the most
ROWS = "sluice.rows_hash"
GATE = "gate"  # passed | failed
GATE_CHAMPION = "gate_champion"  # version the gate compared with; "none" yet; "any" when no rule asks for it
GATE_RULES = "gate_rules"  # hash of the rules that were asked
GATE_UNMEASURED = "gate_unmeasured"  # rules for whose evidence a person has to stand in; empty or absent: none


@dataclass(frozen=True)
class Intent:
    """A version that shall exist."""

    store: str  # see `store.place`
    model: str
    content_hash: str
    run_id: str
    step: int  # whose metrics are the final ones of the run
    folder: str  # of the Hugging Face model
    output: str  # of the stage, whose content hash it is
    evaluation: str | None
    description: str
    tags: dict[str, str]


def find(client: Any, model: str, content_hash: str) -> Any | None:
    """The version of a model that carries a content hash, or None."""
    found = client.search_model_versions(f"name = '{model}' and tags.`{CONTENT}` = '{content_hash}'")
    return min(found, key=lambda entry: int(entry.version), default=None)


def ensure(root: Path, client: Any, experiment: str, intent: Intent) -> Any:
    """The one version of this content, made if it is not there."""
    artifacts.write_json(_journal(root, f"{intent.model}-{intent.content_hash}"), asdict(intent))
    entry = _complete(root, client, experiment, intent)
    if entry is None:
        raise RuntimeError(f"{intent.output} changed while it was registered")
    return entry


def recover(root: Path, client: Any, experiment: str) -> None:
    """Finish what was begun and cut off, and remove what cannot be finished."""
    for path in sorted(_journal(root, "").parent.glob("*.json")):
        intent = Intent(**json.loads(path.read_text(encoding="utf-8")))
        if store.is_meant(root, intent.store):
            _complete(root, client, experiment, intent)
            path.unlink(missing_ok=True)


def models(client: Any) -> list[str]:
    """Names of all registered models, sorted. A shared server may have more than it tells at once."""
    found: list[str] = []
    token = None
    while True:
        page = client.search_registered_models(max_results=PAGE, page_token=token)
        found += [model.name for model in page]
        if not (token := page.token):
            return sorted(found)


def alias(client: Any, model: str, name: str) -> str | None:
    """The version an alias points to, as text, whatever type the store gives it."""
    from mlflow.exceptions import MlflowException

    try:
        found = client.get_registered_model(model).aliases.get(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return None if found is None else str(found)


def requirements(needs: Sequence[str] = ()) -> list[str]:
    """What a model needs to be served, with the versions it was made with; `needs`: beyond what every one needs."""
    return [f"{name}=={version(name).partition('+')[0]}" for name in (*REQUIREMENTS, *needs)]


def _complete(root: Path, client: Any, experiment: str, intent: Intent) -> Any | None:
    entry = find(client, intent.model, intent.content_hash)
    if entry is None:
        model_id = _logged(root, client, experiment, intent) or _log(root, client, experiment, intent)
        if model_id is not None:
            entry = _create(client, model_id, intent)
    _journal(root, f"{intent.model}-{intent.content_hash}").unlink(missing_ok=True)
    return entry


def _logged(root: Path, client: Any, experiment: str, intent: Intent) -> str | None:
    """A logged model of this name and content that is whole; halves are swept."""
    whole = None
    query = f"tags.`{CONTENT}` = '{intent.content_hash}'"
    for logged in client.search_logged_models([experiment], filter_string=query):
        if logged.name != intent.model:  # another stage has made the same
            continue
        if str(logged.status).endswith("READY"):
            whole = str(logged.model_id)
            continue
        client.delete_logged_model(logged.model_id)
        place = store_files.local(str(logged.artifact_location))
        if place is not None and store.embedded(root) and place.is_relative_to((root / STATE / "mlflow").resolve()):
            shutil.rmtree(place, ignore_errors=True)
    return whole


def _log(root: Path, client: Any, experiment: str, intent: Intent) -> str | None:
    """Log the model's files; None when the output is no longer the one that was meant."""
    if not _stands(root, intent):
        return None
    # Left to itself, MLflow puts a model into the experiment `Default`, whose files lie in the current directory
    made = client.create_logged_model(
        experiment,
        intent.model,
        intent.run_id,
        tags={CONTENT: intent.content_hash},
        params=client.get_run(intent.run_id).data.params,
    )
    place = store_files.local(str(made.artifact_location)) if store.embedded(root) else None
    try:
        if place is not None:
            _save(made, intent, place)
        else:
            with tempfile.TemporaryDirectory() as folder:
                draft = Path(folder) / "model"
                _save(made, intent, draft)
                with store.patient(max(path.stat().st_size for path in draft.rglob("*"))):
                    client.log_model_artifacts(made.model_id, str(draft))
        if not _stands(root, intent):
            raise RuntimeError(f"{intent.output} changed while it was copied")
        _measure(client, made.model_id, intent)
    except Exception:  # a full disk, a store that goes away: half of it is of no use, and looks as if it still came
        if place is not None:
            shutil.rmtree(place, ignore_errors=True)
        with contextlib.suppress(Exception):
            client.finalize_logged_model(made.model_id, "FAILED")
        raise
    client.finalize_logged_model(made.model_id, "READY")
    return str(made.model_id)


def _stands(root: Path, intent: Intent) -> bool:
    """Whether the output is the one that is meant."""
    output = Path(intent.output)
    return output.exists() and contents.content_hash(root, output) == intent.content_hash


def _save(made: Any, intent: Intent, place: Path) -> None:
    """Write a logged model's files.

    `Model.log` would make them in a temporary folder and copy them from there, gigabytes in a run. MLflow still takes
    them through one, from which they are moved: no copy where that is on the same disk.
    """
    import mlflow
    from mlflow.models import Model

    served = serving.of(Path(intent.folder))
    files = {"model": intent.folder}
    if intent.evaluation is not None:
        files["evaluation"] = intent.evaluation
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # advice to guess what is given here: the signature
        mlflow.pyfunc.save_model(
            path=str(place),
            mlflow_model=Model(
                artifact_path=made.artifact_location,
                model_uuid=made.model_id,
                run_id=intent.run_id,
                model_id=made.model_id,
            ),
            python_model=served.code,
            code_paths=served.beside,
            artifacts=files,
            pip_requirements=requirements(served.needs),
            signature=served.signature,
        )


def _measure(client: Any, model_id: str, intent: Intent) -> None:
    """Name a model as its run's output, with the run's final metrics."""
    from mlflow.entities import LoggedModelOutput, Metric

    client.log_outputs(intent.run_id, [LoggedModelOutput(model_id, intent.step)])
    last = client.get_run(intent.run_id).data.to_proto().metrics  # with their steps, which `metrics` leaves out
    final = [
        Metric(one.key, one.value, one.timestamp, one.step, model_id=model_id, run_id=intent.run_id)
        for one in last
        if one.step == intent.step
    ]
    client.log_batch(intent.run_id, metrics=final)


def _create(client: Any, model_id: str, intent: Intent) -> Any:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(intent.model)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    return client.create_model_version(
        intent.model,
        source=f"models:/{model_id}",
        run_id=intent.run_id,
        tags={**intent.tags, CONTENT: intent.content_hash},
        description=intent.description[:DESCRIPTION_LIMIT],
        model_id=model_id,
    )


def _journal(root: Path, name: str) -> Path:
    return root / STATE / "registry" / "intents" / f"{name}.json"
