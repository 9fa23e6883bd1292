"""Runs one stage as `dvc.yaml` declares it: params and paths in, one directory and one metrics file out.

The order is what makes a crash harmless: the output is filled beside its place and moved in whole, then come
the metrics, then the registry, and only then are the checkpoints dropped. A flow, which has MLflow at hand, does the
registry's part itself, and promotes when DVC has taken the output.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import os
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from types import ModuleType

from pipelines.core import (
    artifacts,
    contents,
    context,
    declared,
    distributed,
    environment,
    errors,
    graph,
    hardware,
    language_models,
    single_writer,
)
from pipelines.core.errors import ArtifactError, DataError, ParamsError, StoreUnavailable, UserError
from pipelines.core.params import whole
from pipelines.core.params.compute import ComputeParams
from pipelines.core.params.section import Section

UNEXPECTED = 70  # EX_SOFTWARE: our mistake, not the user's


def main(name: str, root: Path) -> int:
    """Run a stage; print one clear message if it fails. Returns the exit code, which the flow reads."""
    environment.prepare(root)
    _quiet_libraries()
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # samples in a terminal without UTF-8
    live = context.StageContext(stage=name, root=root, fingerprint="")
    try:
        if os.environ.get("RANK", "0") == "0":  # of several processes, the first one tells
            live.live("running")
        if (processes := _processes(name, root)) is not None:
            return distributed.launch(name, processes)
        with single_writer.of_stage(root, name):
            execute(name, root)
    except context.Stopped as stopped:
        return _failed(live, "stopped", f"{name}: {stopped}; {_what_next(name, root)}", stopped.exit_code)
    except UserError as error:
        return _failed(live, "failed", str(error), error.exit_code)
    except Exception as error:  # the last line of defence: say whose mistake it is, keep the traceback
        remedy = errors.of_machine(error)
        if remedy is not None:
            return _failed(live, "failed", f"{name}: {remedy}", UserError.exit_code)
        traceback.print_exc()
        return _failed(live, "failed", f"{name}: unexpected {type(error).__name__}: {error}", UNEXPECTED)
    return 0


def execute(name: str, root: Path) -> dict[str, float]:
    """Run a stage and return its metrics.

    Raises:
        UserError: something the user can put right; nothing was written or registered.
        Stopped: SIGTERM or SIGINT; the checkpoint is written.
    """
    from pipelines.core import lineage, tracking

    spec = graph.stage(root, name)
    every = whole.load(root / "params.yaml")
    attended = tracking.ATTENDED in os.environ
    if not attended:  # a flow has checked for all its stages
        declared.check(root)
    section: Section = getattr(every, name)
    inputs = _inputs(root, spec)
    _check_files(root, spec, every)
    environment.allow_hub(_names_hub(root, every))
    with _thin_imports():
        module = importlib.import_module(f"pipelines.{name}")
    machine = hardware.choose(every.compute, root, every.compute.processes if _shared(section) else 1)
    world = distributed.join(every.compute) if _shared(section) else distributed.World()
    fingerprint = _fingerprint(root, spec, section, machine, world)
    run = context.StageContext(
        stage=name, root=root, fingerprint=fingerprint, world=world,
        device=machine.device, precision=machine.precision, threads=machine.threads,
    )  # fmt: skip
    run.catch_signals()
    if not world.leads:
        return _follow(module, section, inputs, run)
    recorder = tracking.Recorder(root, name, fingerprint, courier=not attended)
    run.curve = recorder.log
    start = time.perf_counter()
    try:
        with artifacts.published(root / spec.output) as outputs:
            metrics: dict[str, float] = module.run(section, inputs, outputs, run)
            run.stop_if_asked()  # a signal that came after the stage's last look: what exits with 0 was not stopped
            _check_metrics(name, metrics, module.METRICS, getattr(module, "OPTIONAL", frozenset()))
    except BaseException as error:
        recorder.finish("KILLED" if isinstance(error, context.Stopped) else "FAILED", None)
        raise
    run.measure(seconds=round(time.perf_counter() - start, 3))
    distributed.leave(world)
    figures = context.remember_measured(root, name, fingerprint, run.measured)
    artifacts.write_json(root / spec.metrics, metrics | figures)
    recorder.finish("FINISHED", lineage.record(root, spec, section, metrics | figures, run))
    if not attended:
        _settle(root, name)
    shutil.rmtree(run.work, ignore_errors=True)
    run.live("done")
    return metrics | figures


def _trains(section: Section) -> bool:
    """Whether a stage trains: it keeps checkpoints."""
    return hasattr(section, "checkpoint_steps")


def _shared(section: Section) -> bool:
    """Whether several processes can share a stage's work: it trains, and does not say that it does so alone."""
    return _trains(section) and not getattr(section, "ALONE", False)


def _processes(name: str, root: Path) -> ComputeParams | None:
    """The `compute` section where it asks for several processes and nobody has started them yet."""
    graph.stage(root, name)
    every = whole.load(root / "params.yaml")
    return every.compute if _shared(getattr(every, name)) and distributed.must_launch(every.compute) else None


def _what_next(name: str, root: Path) -> str:
    """What a run after a stopped one does."""
    if _trains(getattr(whole.load(root / "params.yaml"), name)):
        return "the next run resumes from its checkpoint"
    if getattr(importlib.import_module(f"pipelines.{name}"), "RESUMES", False):
        return "the next run goes on with what this one has finished"
    return "nothing was published; the next run starts over"


def _follow(
    module: ModuleType, section: Section, inputs: dict[str, Path], run: context.StageContext
) -> dict[str, float]:
    """What a process does that does not lead: its share of the training. What it writes is thrown away."""
    with tempfile.TemporaryDirectory(dir=run.work) as scratch:
        module.run(section, inputs, Path(scratch), run)
    distributed.leave(run.world)
    return {}


def measure_for(root: Path, name: str) -> Callable[[Path, Path], None]:
    """How to score another model of this stage on today's held-out examples, in this process.

    The stage is imported when it is asked to: torch takes seconds.
    """
    from pipelines.core.verdicts import NotMeasurable

    def measure(model: Path, evaluation: Path) -> None:
        module = importlib.import_module(f"pipelines.{name}")
        if not hasattr(module, "measure"):
            raise NotMeasurable(name)
        spec, every = graph.stage(root, name), whole.load(root / "params.yaml")
        machine = hardware.choose(every.compute, root)
        run = context.StageContext(name, root, "champion", machine.device, machine.precision, machine.threads)
        module.measure(getattr(every, name), _inputs(root, spec), run, model, evaluation)

    return measure


def _settle(root: Path, name: str) -> None:
    """Register what the stage made and judge it; with the store away, the record waits in the spool."""
    from pipelines.core import registry

    try:
        registered = registry.settle(root, name, measure_for(root, name))
    except StoreUnavailable as error:
        print(f"warning: {error}", file=sys.stderr, flush=True)
        return
    for one in registered:
        print(one.summary(), flush=True)


def _check_files(root: Path, spec: graph.StageSpec, every: whole.Params) -> None:
    """DVC must know every local file that the params name, or it would not notice that one has changed."""
    from pipelines.core import reward_functions, sources

    named: dict[str, list[Path]] = {}
    if spec.name == "data":
        named["data.sources"] = sources.local_paths(every.data, root)
    if spec.name == "feedback":  # rankings need not be there yet: the stage writes what is to be ranked
        rankings = every.feedback.rankings_in(root)
        named["feedback.rankings"] = [rankings] if rankings and rankings.exists() else []
    if spec.name == "ppo":
        named["ppo.rewards"] = reward_functions.local_paths(every.ppo.rewards, root)
    if spec.name in whole.NAME_MODELS:
        for dial, model in whole.models(every, spec.name).items():
            named[dial] = graph.made(root, model) or language_models.local_paths({dial: model}, root)
    deps = [(root / path).resolve() for path in (*spec.inputs.values(), *spec.code)]
    for key, paths in named.items():
        for path in paths:
            if not any(path.resolve().is_relative_to(dep) for dep in deps):
                told = os.path.relpath(path, root)
                raise ParamsError(
                    f"{key} reads {told}, which is not among the deps of stage {spec.name} in dvc.yaml: DVC would not "
                    f"notice a change of it. Type `sluice run` (or `make run`), which adds it, or add `- {told}`."
                )


def _names_hub(root: Path, every: whole.Params) -> bool:
    """Whether anything in the file is to come from a hub; nothing else may reach for one."""
    from pipelines.core import sources

    named = {dial: model for stage in whole.NAME_MODELS for dial, model in whole.models(every, stage).items()}
    return sources.names_hub(every.data) or any(
        model not in (None, *language_models.PACKAGES)
        and not (graph.made(root, model) or language_models.local_paths({dial: model}, root))
        for dial, model in named.items()
    )


def _inputs(root: Path, spec: graph.StageSpec) -> dict[str, Path]:
    """The deps that are data, by name, all of them there."""
    inputs = {name: root / path for name, path in spec.inputs.items()}
    for name, path in inputs.items():
        if not path.exists():
            raise ArtifactError(
                f"{spec.name}: its input {name} is missing ({path}). Make it with: dvc repro {spec.name}"
            )
    return inputs


def _fingerprint(
    root: Path, spec: graph.StageSpec, section: Section, machine: hardware.Hardware, world: distributed.World
) -> str:
    """Hash of everything the output depends on: params, inputs, code, kind of machine, threads and processes."""
    kind = (machine.device, machine.precision, machine.threads, hardware.processor())
    parts = {
        "stage": spec.name,
        "params": section.model_dump(mode="json"),
        "inputs": {name: contents.content_hash(root, root / path) for name, path in spec.inputs.items()},
        "code": {path: artifacts.content_hash(root / path) for path in spec.code},
        "machine": [*kind, world.size, world.sharding],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _check_metrics(name: str, metrics: dict[str, float], required: frozenset[str], optional: frozenset[str]) -> None:
    """A stage returns the keys, or patterns of keys, it declares, each finite: gates and the report rely on them."""
    known = required | optional
    missing = sorted(required - set(metrics))
    extra = sorted(key for key in metrics if not any(fnmatchcase(key, pattern) for pattern in known))
    if missing or extra:
        raise AssertionError(f"{name}: metrics differ from METRICS (missing {missing}, not declared {extra})")
    wrong = {key: value for key, value in metrics.items() if value != value or value in (float("inf"), -float("inf"))}
    if wrong:
        raise DataError(f"{name}: these metrics are not finite numbers: {wrong}. Nothing was published.")


def _failed(live: context.StageContext, state: str, message: str, code: int) -> int:
    rank = os.environ.get("RANK", "0")
    print(f"error: {message}" if rank == "0" else f"process {rank}: {message}", file=sys.stderr, flush=True)
    try:
        if rank == "0":
            live.live(state, message, code)
    except OSError as error:  # a full disk must not hide the message above
        print(f"warning: {context.live_file(live.root, live.stage)} could not be written: {error}", file=sys.stderr)
    return code


def _quiet_libraries() -> None:
    """Leave the terminal to what a stage says: no progress bars of others, no advice that is not for the user."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch")


@contextmanager
def _thin_imports() -> Iterator[None]:
    """A missing dependency is a set-up mistake, told as one."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise UserError(
            f"{sys.executable} has no module {error.name!r}. Use the repository's virtual environment "
            "(`make run`, or `. .venv/bin/activate`)."
        ) from None
