"""Who answers `sluice ask` and `sluice chat`: what stage `answers` made, a registered version, or a directory.

What is found is an assistant's folder (`assistant.json`, index and model) or a Hugging Face model. A model without an
index of its own answers from the assistant's, or alone where nothing shall be looked up.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

from pipelines.core import environment, terminal
from pipelines.core.errors import ArtifactError, UserError

STAGE, FOLDER = "answers", "assistant"  # the stage, and the directory in its output
REGISTERED = "sluice-rag"
CACHE = "models"  # in the state folder: registered versions that were fetched from a server
ALONE_NEW_TOKENS = 256  # of an answer, where no assistant's settings say
ESCAPED = {code: f"\\u{code:04x}" for code in terminal.STEERING}


class Found(NamedTuple):
    """What shall answer, not loaded yet."""

    name: str  # for people
    model: Path  # a Hugging Face directory
    knows: Path | None  # an assistant's folder: settings and index; None: the model alone


class Answering(NamedTuple):
    """An assistant, ready to be asked."""

    assistant: Any  # pipelines.core.assistant.Assistant
    name: str
    looks_up: bool
    seconds: float  # to load it


def prepare(root: Path) -> str:
    """Set the threads as `params.yaml` says, spinning between products: before torch is imported, which reads it.

    Returns:
        `fp32` or `bf16`, what this machine is faster in.

    Raises:
        ParamsError: `params.yaml` is not accepted.
    """
    from pipelines.core import hardware
    from pipelines.core.params import whole

    if os.environ.get("GOMP_SPINCOUNT", environment.SPIN) == environment.SPIN:  # ours, for stages
        os.environ["GOMP_SPINCOUNT"] = environment.SPIN_ALONE
    return hardware.choose(whole.load(root / "params.yaml").compute, root).precision


def found(root: Path, here: Path, name: str | None, look_up: bool) -> Found:
    """Find what shall answer.

    Args:
        root: of the repository.
        here: the directory that a relative name starts from.
        name: a directory, or a registered version as `references.resolve` reads it; None: the assistant.
        look_up: False: the model alone needs no index.

    Raises:
        UserError: nothing of that name, or something that cannot answer; the message says what there is or what to run.
        StoreUnavailable: a registered version was asked for, and the registry's store is away.
    """
    from pipelines.core import assistant

    place, shown = _named(root, here, name) if name else _default(root)
    if (place / assistant.FILE).is_file():
        return Found(shown, place / "model", place)
    if not (place / "config.json").is_file():
        raise UserError(f"{shown}: neither {assistant.FILE} (an assistant) nor config.json (a model) in {place}")
    try:
        config = json.loads((place / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArtifactError(f"{shown}: {place / 'config.json'} is damaged: {error}") from None
    kind = str((config.get("architectures") or [""])[0])
    if kind.endswith("Classification"):
        raise UserError(f"{shown} is a {kind}: it judges texts and writes none. Name one such as sluice-policy.")
    return Found(shown, place, _default(root)[0] if look_up else None)


def opened(what: Found, look_up: bool, precision: str) -> Answering:
    """Load it.

    Args:
        look_up: False: without its index.
        precision: of a model whose layers are not packed, see `prepare`.

    Raises:
        UserError: a model that nothing can be asked.
        ArtifactError: a directory is damaged, to the byte of an index, or that was made with another embedder.
    """
    began = time.perf_counter()
    import torch
    from safetensors import SafetensorError
    from transformers import logging

    from pipelines.core import assistant, cpu, grounding, indexing, retrieval

    logging.disable_progress_bar()
    # A model alone gets the question and nothing else.
    settings = assistant.Settings(grounding.TEMPLATES["plain"], 1, 0, None, ALONE_NEW_TOKENS, "")
    index = None
    try:
        if what.knows is not None:
            settings = assistant.read(what.knows)
        if what.knows is not None and look_up:
            index = retrieval.Index.open(what.knows / "index", embedder=settings.embedder)
            indexing.verify(what.knows / "index")  # a changed byte would end a search, or change what it finds
        tokenizer, model = _tokenizer(what.model), assistant.load(what.model)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ArtifactError(f"{what.name} cannot be opened: {str(error).strip() or type(error).__name__}") from None
    if not tokenizer.chat_template:
        raise UserError(f"{what.name}: the tokenizer in {what.model} has no chat template, so nothing can be asked")
    if getattr(model.config, "quantization_config", None) is None:  # packed layers stay as they are
        model = model.to(torch.bfloat16 if cpu.precision(precision) == "bf16" else torch.float32)
    made = assistant.Assistant(index, model, tokenizer, settings)
    return Answering(made, what.name, look_up, time.perf_counter() - began)


def _tokenizer(place: Path) -> Any:
    """The tokenizer of a directory. Raises ValueError: there is none that can be read."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(place)
    except Exception as error:  # what the library for tokenizers raises has no narrower class
        raise ValueError(f"no tokenizer could be loaded from {place}: {type(error).__name__}: {error}") from None


def checked(question: str) -> str:
    """A question that can be asked.

    Raises:
        UserError: it is empty, or no text.
    """
    if not question.strip():
        raise UserError('the question is empty. For example: sluice ask "how do I flip an array upside down?"')
    try:
        question.encode()
    except UnicodeEncodeError:
        raise UserError("the question is not UTF-8 text: check the encoding of your terminal or file") from None
    return question


def as_json(value: Any, spelled: bool) -> str:
    """A value as JSON for a terminal, which it does not steer; `spelled`: in ASCII."""
    return json.dumps(value, ensure_ascii=spelled, indent=2).translate(ESCAPED)


def source_lines(reply: Any) -> list[str]:
    """The numbered sources of a reply, a line each: title, file and line, and whether the answer cites it."""
    lines = []
    for source in reply.sources:
        file, named, line = (source.url or "").rpartition("#L")
        if named and line.isdecimal():  # `#Legacy` is a section
            where = f"{file}, line {line}"
        elif source.url or not source.source:
            where = f"{source.url or 'its text'}, line {source.line}"
        else:  # a file may hold many documents
            where = f"{source.source}, line {source.line} of its text"
        title, where = (" ".join(part.split()) for part in (source.title, where))  # which could write a line of ours
        lines.append(terminal.clean(f"[{source.number}] {title}  ({where}){'' if source.cited else '  not cited'}"))
    if any(source.cited for source in reply.sources) and not reply.own:
        lines.append("The numbers were put in by comparing words with the sources, not by the model.")
    return lines


def numbered(reply: Any, streamed: str) -> list[str]:
    """The text of a reply under a heading, where numbers came or went after it was streamed; else nothing."""
    if streamed.strip() == reply.text:
        return []
    cited = any(source.cited for source in reply.sources)
    heading = "With the numbers of its sources:" if cited else "Without numbers that name no source:"
    return [heading, terminal.clean(reply.text)]


def _named(root: Path, here: Path, name: str) -> tuple[Path, str]:
    """The folder of a directory or of a registered version, and what to call it."""
    if (here / name).is_dir():
        return here / name, name
    from pipelines.core import references, store

    if references.SHAPE.fullmatch(name) is None or name.startswith("."):
        raise UserError(f"{name}: no such directory, and no registered version: MODEL@ALIAS, MODEL/VERSION or MODEL")
    database = store.embedded(root)
    if database is not None and not database.exists():  # asking must not make a store
        raise UserError(f"no model {name!r}: no such directory, and nothing is registered yet. Type `sluice run`.")
    client, _ = store.connect(root)
    with store.answering(root):
        entry = references.resolve(client, name)
        return _fetched(root, client, entry), references.shown(entry)


def _default(root: Path) -> tuple[Path, str]:
    """The assistant of this repository, or else the registered champion."""
    from pipelines.core import graph, policy, store, versions

    spec = graph.load(root).get(STAGE)
    if spec is not None and (root / spec.output / FOLDER).is_dir():
        return root / spec.output / FOLDER, f"{spec.output}/{FOLDER}"
    database = store.embedded(root)
    if database is None or database.exists():
        client, _ = store.connect(root)
        with store.answering(root):
            found = versions.alias(client, REGISTERED, policy.CHAMPION)
        if found is not None:
            return _named(root, root, f"{REGISTERED}@{policy.CHAMPION}")
    raise UserError(
        f"there is no assistant yet: type `sluice run {STAGE}`. Or ask a model alone: --no-rag --model NAME@ALIAS, "
        "or a directory"
    )


def _fetched(root: Path, client: Any, entry: Any) -> Path:
    """The folder of a registered version's model: in a local store its own, else a copy that is fetched once.

    A copy is named after its content too, as another store has another model under the same number.
    """
    import mlflow
    import yaml

    from pipelines.core import artifacts, store, store_files, verdicts
    from pipelines.core.environment import STATE

    uri = client.get_model_version_download_uri(entry.name, entry.version)
    place = store_files.local(uri)
    if place is None or not place.is_dir():
        place = root / STATE / CACHE / verdicts.file_name(entry)
        if not place.is_dir():
            with artifacts.published(place) as draft:
                mlflow.artifacts.download_artifacts(uri, dst_path=str(draft), tracking_uri=store.address(root))
    described = yaml.safe_load((place / "MLmodel").read_text(encoding="utf-8"))
    files = described["flavors"].get("python_function", {}).get("artifacts", {})
    if "model" not in files:
        raise UserError(f"{entry.name} {entry.version} was not registered by this project: it holds no model directory")
    return place / str(files["model"]["path"])
