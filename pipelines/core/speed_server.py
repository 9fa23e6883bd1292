"""The server that processes which measure speed are forked from: it has imported what loading the models needs, and has
computed nothing.

Its imports take as long as a stage's own, several seconds on one core. A stage that starts it before them has both done
side by side. So nothing here imports torch.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.context import ForkServerContext
from multiprocessing.forkserver import ensure_running
from pathlib import Path

from pipelines.core import environment, variants

MEASURING = "pipelines.core.speed"
SPINNING = "GOMP_SPINCOUNT"


def start(models: Iterable[tuple[Path, str]]) -> ForkServerContext:
    """Start the server where none runs. It imports by itself, and then ends with this process.

    Args:
        models: directory and kind (`variants.load`) of what it is to load; a directory need not be there yet, nor be
            one that can be loaded.
    """
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([MEASURING, *sorted(_imported(models))])
    with _environment():  # a Ctrl-C is this process's to tell of
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    return server


def _imported(models: Iterable[tuple[Path, str]]) -> set[str]:
    """Modules that are imported when these models are loaded: transformers imports an architecture when it is used.

    What cannot be imported is passed over by the server, and a directory that is none of a model tells so when it is
    loaded.
    """
    found = {"transformers.models.auto.modeling_auto"}
    for place, kind in models:
        found.update(variants.modules(kind))
        with suppress(OSError, ValueError, AttributeError):
            config = json.loads((place / "config.json").read_text(encoding="utf-8"))
            name = str(config.get("model_type")).replace("-", "_")
            for folder in (name, name.removesuffix("_text")):  # `gemma3_text` is of gemma3
                found.add(f"transformers.models.{folder}.modeling_{folder}")
    return found


@contextmanager
def _environment() -> Iterator[None]:
    """What the server, and so every process, starts with: OpenMP reads it when it is loaded."""
    before = os.environ.get(SPINNING)
    os.environ[SPINNING] = environment.SPIN_ALONE
    try:
        yield
    finally:
        os.environ.pop(SPINNING)
        if before is not None:
            os.environ[SPINNING] = before
