"""`sluice doctor`: one line for each thing a run needs, ok, warn or fail, with what to do about it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.text import Text

from pipelines.core.environment import STATE, WORK

FREE_GB_NEEDED, FREE_GB_COMFORTABLE = 2.0, 10.0
MEMORY_GB_COMFORTABLE = 6.0
NAMES_SHOWN = 6
_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


@dataclass(frozen=True)
class Finding:
    """One line. `remedy` says what to type or change; empty when all is well."""

    verdict: Literal["ok", "warn", "fail"]
    what: str
    found: str
    remedy: str = ""


def examine(root: Path, console: Console) -> bool:
    """Print every finding. True when none is a failure."""
    checks: list[Callable[[Path], Iterator[Finding]]] = [
        _python, _versions, _processor, _memory, _disk, _writable, _stores, _tools, _repository, _params,
    ]  # fmt: skip
    findings = [finding for check in checks for finding in check(root)]
    for one in findings:
        line = Text.assemble((f"{one.verdict:<4}", _STYLES[one.verdict]), f"  {one.what:<12} {one.found}")
        console.print(line, soft_wrap=True)
        if one.remedy:
            console.print(f"      {'':<12} -> {one.remedy}", markup=False, highlight=False, soft_wrap=True)
    return all(one.verdict != "fail" for one in findings)


def pins(text: str) -> dict[str, str]:
    """Name -> version of the lines `name==version` of a constraints file; names in their normal form."""
    found = re.findall(r"^([A-Za-z0-9._-]+)==([^\s;#]+)", text, flags=re.MULTILINE)
    return {_normal(name): version for name, version in found}


def differences(pinned: dict[str, str], installed: dict[str, str]) -> list[str]:
    """`name 1.0 (pinned: 2.0)` for each package that differs; a local part such as `+cpu` does not count."""
    return [
        f"{name} {installed[name]} (pinned: {version})"
        for name, version in sorted(pinned.items())
        if name in installed and installed[name].partition("+")[0] != version.partition("+")[0]
    ]


def _python(root: Path) -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] == (3, 11):
        yield Finding("ok", "python", version)
    else:
        yield Finding("fail", "python", version, "Sluice is pinned to Python 3.11: `make PYTHON=python3.11`")


def _versions(root: Path) -> Iterator[Finding]:
    place = root / "constraints.txt"
    if not place.exists():
        yield Finding("fail", "packages", "no constraints.txt", "`git checkout constraints.txt`")
        return
    pinned = pins(place.read_text(encoding="utf-8"))
    installed = dict(_installed())
    remedy = "`make setup` installs what constraints.txt says"
    if wrong := differences(pinned, installed):
        yield Finding("fail", "packages", ", ".join(wrong[:NAMES_SHOWN]), remedy)
    if missing := sorted(set(pinned) - set(installed)):
        yield Finding("warn", "packages", f"not installed: {', '.join(missing[:NAMES_SHOWN])}", remedy)
    if not (wrong or missing):
        yield Finding("ok", "packages", f"{len(pinned)} as pinned in constraints.txt")


def _installed() -> Iterator[tuple[str, str]]:
    """Names and versions of packages; what an install that was cut off left has none."""
    for one in importlib.metadata.distributions():
        with contextlib.suppress(FileNotFoundError):  # from importlib_metadata, which gives them where it is imported
            if name := one.metadata["Name"]:
                yield _normal(name), one.version


def _processor(root: Path) -> Iterator[Finding]:
    from pipelines.core.hardware import cores, cpu_flags

    flags = cpu_flags()
    fast = [name for flag, name in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX512-BF16")) if flag in flags]
    fast += ["bf16"] if "bf16" in flags else []  # as ARM calls it
    yield Finding("ok", "cores", f"{cores()} usable of {os.cpu_count()}")
    if fast:
        yield Finding("ok", "bf16", f"fast on this processor: {', '.join(fast)}")
    else:
        yield Finding(
            "warn", "bf16", "no AMX, no AVX512-BF16: training runs in fp32", "expect several times the run time"
        )
    limit = os.environ.get("OMP_NUM_THREADS")
    if limit:
        yield Finding("warn", "threads", f"OMP_NUM_THREADS={limit} is set", "unset it: compute.threads decides")


def _memory(root: Path) -> Iterator[Finding]:
    import psutil

    gigabytes = psutil.virtual_memory().available / 1e9
    little = gigabytes < MEMORY_GB_COMFORTABLE
    remedy = "close other programs or take `make run PROFILE=tiny`" if little else ""
    yield Finding("warn" if little else "ok", "memory", f"{gigabytes:.1f} GB available", remedy)


def _disk(root: Path) -> Iterator[Finding]:
    """One line a disk: what takes the room may be linked, or configured, to be on another one."""
    seen: set[int] = set()
    for place in (root, root / STATE, root / WORK, root / "artifacts", _cache(root)):
        if not place.exists() or place.stat().st_dev in seen:
            continue
        seen.add(place.stat().st_dev)
        free = shutil.disk_usage(place).free / 1e9
        verdict: Literal["ok", "warn", "fail"] = "ok"
        if free < FREE_GB_COMFORTABLE:
            verdict = "fail" if free < FREE_GB_NEEDED else "warn"
        remedy = "" if verdict == "ok" else "`sluice gc` shows what nobody needs, `sluice gc --yes` removes it"
        yield Finding(verdict, "disk", f"{free:.1f} GB free" + ("" if place == root else f" for {place}"), remedy)


def _cache(root: Path) -> Path:
    """Where DVC keeps outputs."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo(str(root)) as repo:
            return Path(repo.cache.local_cache_dir)
    except DvcException:  # not initialised, which has a line of its own
        return root


def _writable(root: Path) -> Iterator[Finding]:
    for name in (STATE, WORK, "artifacts", "metrics", "reports"):
        place = root / name
        there = place if place.exists() else root
        if not os.access(there, os.W_OK | os.X_OK):
            yield Finding("fail", "writable", f"{name}/ is not", f"`chmod -R u+rwX {name}` or move the clone")
            return
    yield Finding("ok", "writable", f"{STATE}/, {WORK}/, artifacts/, metrics/, reports/")


def _stores(root: Path) -> Iterator[Finding]:
    from flows import server
    from pipelines.core import store
    from pipelines.core.errors import StoreUnavailable

    try:
        if store.embedded(root) is None:
            store.connect(root)  # seconds, for MLflow's import: nothing less tells whether a log-in is accepted
        else:
            store.probe(root)
    except StoreUnavailable as error:
        yield Finding("fail", "mlflow", str(error), "start the server, log in, or unset MLFLOW_TRACKING_URI")
    else:
        yield Finding("ok", "mlflow", store.place(root))
    if (named := os.environ.get("PREFECT_API_URL")) is None:
        yield Finding("ok", "prefect", "a server of our own for each run")
        return
    try:
        server.require(named)
    except StoreUnavailable as error:
        yield Finding("fail", "prefect", str(error), "start the server, log in, or unset PREFECT_API_URL")
    else:
        yield Finding("ok", "prefect", store.without_login(named))


def _tools(root: Path) -> Iterator[Finding]:
    git = shutil.which("git")
    remedy = "install git: lineage tags name the commit" if git is None else ""
    yield Finding("warn" if git is None else "ok", "git", git or "not found", remedy)
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    remedy = "install gcc or clang: without it nothing is compiled and training is slower" if compiler is None else ""
    yield Finding("warn" if compiler is None else "ok", "compiler", compiler or "no C compiler", remedy)


def _repository(root: Path) -> Iterator[Finding]:
    from flows import workspace
    from pipelines.core.errors import UserError

    if not (root / ".dvc").is_dir():
        yield Finding("fail", "dvc", "not initialised here", "`make setup`")
    else:
        yield Finding("ok", "dvc", "initialised")
    try:
        top = Path(workspace.git(root, "rev-parse", "--show-toplevel")).resolve()
        workspace.resolve(root, "HEAD")
    except UserError as error:
        there = (root / ".git").exists()
        found, remedy = " ".join(str(error).split()), "mend that: until then models name no commit they are from"
        if not there:
            found, remedy = "no git repository", "`git init`: models then name the commit they are from"
        yield Finding("warn", "history", found, remedy)
        return
    if top != root.resolve():
        remedy = "deployments need a clone of their own: each of their runs has a git worktree"
        yield Finding("warn", "history", f"a folder of the git repository in {top}", remedy)


def _params(root: Path) -> Iterator[Finding]:
    from pipelines.core import declared
    from pipelines.core.errors import UserError
    from pipelines.core.params import whole

    try:
        whole.load(root / "params.yaml")
        declared.check(root)
    except UserError as error:
        yield Finding("fail", "settings", str(error), "correct the file that the message names")
    else:
        yield Finding("ok", "settings", "params.yaml and mlflow/registry.yaml are accepted")


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
