"""A run's own place: a git worktree at one commit, with the clone's DVC cache and stores and nothing else of it.

A run that nobody watches must not touch the working copy, where a person may be in the middle of something, and
two runs must not see each other's files. So a run gets `.sluice/worktrees/<id>`, on a branch `runs/<id>` that starts
at the commit. What it shares with the clone, by links, is made to be shared: DVC's cache (addressed by content),
the MLflow store, the registry's journal, the locks, the spool, caches of libraries. Everything else (params, outputs,
what a stage says of itself, logs) is the run's own. What it made is committed on its branch; then the worktree goes.

Checkpoints of a stage that did not end outlive the worktree, in `.sluice/checkpoints/`: the next run takes them with
it, those of a run that was killed included, and the stage goes on where it was.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from flows import run_locks
from flows.supervise import detached_environment, printed, run_within
from pipelines.core import artifacts, store
from pipelines.core.environment import STATE, WORK
from pipelines.core.errors import StoreUnavailable, UserError

BRANCH = "runs/"
PAUSES = (5.0, 30.0)  # seconds, before a remote that gave nothing is asked again
DVC_HOURS = 3.0  # for one command: 13 GB at 10 Mbit/s; what it has moved so far, the next try need not
CHECKPOINTS = "checkpoints"
OWN_DATA = "data"  # where a person keeps files of their own; git ignores it, so a worktree does not bring it
SHARED = ("mlflow", "registry", "locks", "spool", "measured", "huggingface", "inductor", "matplotlib", "prefect")
_NAME = re.compile(r"[a-z0-9][a-z0-9-]*")
_GIT_VARIABLES = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")  # a hook that calls us has set them


@dataclass(frozen=True)
class Workspace:
    """The place of one run."""

    root: Path  # the clone it belongs to
    name: str
    place: Path
    base: str  # the commit it started at
    remote: str  # DVC's default remote; empty when there is none

    @property
    def branch(self) -> str:
        """Where the run's commits go."""
        return f"{BRANCH}{self.name}"

    @property
    def log(self) -> Path:
        """What the run's children print, in the clone: the worktree goes."""
        return self.root / STATE / "logs" / "runs" / f"{self.name}.log"

    def commit(self, message: str) -> str | None:
        """Commit what changed of the files that git knows, `dvc.lock` and metrics. Returns the commit, None if none."""
        git(self.place, "add", "--update")
        for path in ("dvc.lock", "metrics"):
            if (self.place / path).exists():
                git(self.place, "add", path)
        if not git(self.place, "diff", "--cached", "--name-only"):
            return None
        words = ("commit", "--quiet", "--no-gpg-sign", "--message", message)
        git(self.place, *_author(self.place), *words)
        return git(self.place, "rev-parse", "HEAD")

    def dvc(self, *words: str) -> None:
        """Run a `dvc` command here; it waits for DVC's lock. Never with `--quiet`, which hides why it failed.

        Raises:
            StoreUnavailable: it failed, and the message is DVC's; or it took longer than `DVC_HOURS` and was stopped.
        """
        command = [sys.executable, "-m", "dvc", "--wait-for-lock", *words]
        raw = self.place / STATE / "dvc.log"  # goes with the worktree: an address of a remote may hold a log-in
        raw.touch(mode=0o600)
        begun, unbuffered = raw.stat().st_size, {"PYTHONUNBUFFERED": "1"}  # why it failed is what it printed last
        try:
            code = run_within(DVC_HOURS * 3600, command, self.place, raw, detached_environment() | unbuffered)
        finally:  # of a run that is cancelled, too, whose worktree goes with `raw`
            lines = [store.without_login(line) for line in printed(raw, begun) if "Having any troubles?" not in line]
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with self.log.open("a", encoding="utf-8") as log:
                log.writelines(f"{line}\n" for line in lines)
        if code != 0:
            why = "\n".join(lines[-5:]) or f"exit code {code}"
            why = why if code is not None else f"took longer than {DVC_HOURS:g} hours and was stopped; see {self.log}"
            raise StoreUnavailable(store.without_login(f"dvc {' '.join(words)} in {self.name}: {why}"))

    def fetch(self, *outputs: str) -> None:
        """Get from DVC's remote what the cache lacks of outputs (all, if none is named); it is asked more than once.

        What the remote has not is no error.

        Raises:
            StoreUnavailable: the remote does not answer.
        """
        for pause in PAUSES:
            try:
                self.dvc("fetch", *outputs)
                return
            except StoreUnavailable:
                time.sleep(pause)
        self.dvc("fetch", *outputs)

    def push(self) -> None:
        """Send outputs and the history of runs to DVC's remote.

        Raises:
            StoreUnavailable: the remote does not take them; they stay in the cache.
        """
        self.dvc("push", "--run-cache")


@contextlib.contextmanager
def opened(root: Path, name: str, revision: str = "HEAD") -> Iterator[Workspace]:
    """A workspace at a commit, with every output that the cache has; it is gone when the block ends.

    The branch goes too where nothing was committed. With a DVC remote, what the cache lacks is fetched.

    Args:
        name: of the run: small letters, digits, dashes.
        revision: anything git can resolve: a commit, a branch, a tag.

    Raises:
        UserError: a name or revision that is none, no git repository or a folder of one, or a run of this name goes on.
        StoreUnavailable: the remote does not answer.
    """
    root = root.resolve()
    if not _NAME.fullmatch(name):
        raise UserError(f"{name!r} is no name of a run: small letters, digits and dashes")
    if (top := Path(git(root, "rev-parse", "--show-toplevel")).resolve()) != root:
        raise UserError(f"{root} is a folder of the git repository in {top}: a run of its own needs a clone of its own")
    base = resolve(root, revision)
    with run_locks.present(root), run_locks.owned(root, name):
        try:
            yield _make(root, name, base)
        finally:
            _deliver(root, name)
            remove(root, name)


def remove(root: Path, name: str) -> None:
    """Remove a worktree, and its branch where nothing was committed on it; what is checkpointed is kept."""
    place, started = run_locks.folder(root) / name, run_locks.folder(root) / f"{name}.base"
    _move_checkpoints(place / WORK, root / STATE / CHECKPOINTS)
    shutil.rmtree(place, ignore_errors=True)
    # Not `prune`, which would forget a person's on a disk that is not mounted now
    with contextlib.suppress(UserError):  # where git knows of none
        git(root, "worktree", "remove", "--force", "--force", str(place))
    _forget_moved(root, name)
    tip = git(root, "branch", "--list", "--format=%(objectname)", f"{BRANCH}{name}")
    if tip and started.exists() and tip == started.read_text(encoding="utf-8"):
        git(root, "branch", "--quiet", "-D", f"{BRANCH}{name}")
    started.unlink(missing_ok=True)


def _forget_moved(root: Path, name: str) -> None:
    """Let git forget a run's worktree where the clone was before it was moved, or of the clone that it is a copy of."""
    ours = (*run_locks.folder(root).parts[-2:], name, ".git")
    for known in (root / git(root, "rev-parse", "--git-common-dir") / "worktrees").glob("*/gitdir"):
        with contextlib.suppress(FileNotFoundError):  # another run's, which has just ended
            link = Path(known.read_text(encoding="utf-8").strip())
            back = link.read_text(encoding="utf-8").strip() if link.is_file() else ""
            if link.parts[-4:] == ours and back != f"gitdir: {known.parent.resolve()}":
                shutil.rmtree(known.parent)


def git(place: Path, *words: str) -> str:
    """What a git command prints. Hooks are for people: that of `dvc install` would fail every new worktree.

    Raises:
        UserError: it failed; the message is git's.
    """
    kept = {key: value for key, value in os.environ.items() if key not in _GIT_VARIABLES}
    whole = ["git", "-C", str(place), "-c", "core.hooksPath=/dev/null", *words]
    try:
        done = subprocess.run(whole, env=kept, capture_output=True, encoding="utf-8", errors="surrogateescape")
    except FileNotFoundError:
        raise UserError("git is not installed, or not found in PATH") from None
    if done.returncode:
        command = next((word for word in words if not word.startswith("-") and "=" not in word), "")
        raise UserError(f"git {command}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout.strip()


def resolve(root: Path, revision: str) -> str:
    """The commit that a revision names.

    Raises:
        UserError: it names none.
    """
    try:
        return git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    except UserError:
        raise UserError(f"{revision!r} names no commit of the git repository in {root}") from None


def locked(root: Path, commit: str) -> dict[str, Any]:
    """The stages of `dvc.lock` at a commit; empty where there is none."""
    if not git(root, "ls-tree", "--name-only", commit, "dvc.lock"):
        return {}
    found: dict[str, Any] = yaml.safe_load(git(root, "show", f"{commit}:dvc.lock")).get("stages") or {}
    return found


def _make(root: Path, name: str, base: str) -> Workspace:
    """Fill the worktree: files of the commit, links to what is shared, outputs from the cache."""
    place, branch = run_locks.folder(root) / name, f"{BRANCH}{name}"
    for dead in run_locks.abandoned(root):
        with contextlib.suppress(UserError), run_locks.owned(root, dead):  # or somebody has just taken it up
            remove(root, dead)
    remove(root, name)  # of the same name: its second try
    git(root, "worktree", "add", "--quiet", "-B", branch, str(place), base)
    artifacts.write_text(run_locks.folder(root) / f"{name}.base", base)
    _move_checkpoints(root / STATE / CHECKPOINTS, place / WORK)
    (place / STATE).mkdir()
    for shared in SHARED:
        (root / STATE / shared).mkdir(parents=True, exist_ok=True)
        (place / STATE / shared).symlink_to(root / STATE / shared)
    if (root / STATE / "verdicts").exists():  # of the same content, they need not be asked for again
        shutil.copytree(root / STATE / "verdicts", place / STATE / "verdicts")
    if (root / OWN_DATA).exists() and not (place / OWN_DATA).exists():
        (place / OWN_DATA).symlink_to(root / OWN_DATA)
    made = Workspace(root, name, place, base, _share_dvc(root, place))
    if made.remote:
        made.fetch()
    made.dvc("checkout", "--force", "--allow-missing")
    return made


def _share_dvc(root: Path, place: Path) -> str:
    """Write `.dvc/config.local` of a worktree: cache and remotes of the clone as it is now, committed or not.

    Returns the default remote's name.
    """
    from configobj import ConfigObj  # type: ignore[import-untyped]
    from dvc.config_schema import RelPath
    from dvc.repo import Repo

    with Repo(str(root)) as repo:
        cache, remote = repo.cache.local_cache_dir, str(repo.config["core"].get("remote", ""))
        remotes = {name: dict(values) for name, values in repo.config["remote"].items()}
    config = ConfigObj()
    for own in (root / ".dvc" / "config", root / ".dvc" / "config.local"):
        config.merge(ConfigObj(str(own)) if own.exists() else {})
    config.setdefault("cache", {})["dir"] = cache
    for name, values in remotes.items():
        for key, value in values.items():
            if isinstance(value, RelPath):  # a folder, a key file: another one, seen from the worktree
                config.setdefault(f'remote "{name}"', {})[key] = str(Path(value).resolve())
    config.filename = str(place / ".dvc" / "config.local")
    Path(config.filename).touch(mode=0o600)  # it may hold a password
    config.write()
    return remote


def _move_checkpoints(source: Path, target: Path) -> None:
    """Move `<stage>/<fingerprint>`: named by all that they depend on, they fit wherever they are."""
    for checkpoint in source.glob("*/*"):
        place = target / checkpoint.parent.name / checkpoint.name
        if any(checkpoint.iterdir()) and not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            checkpoint.replace(place)


def _deliver(root: Path, name: str) -> None:
    """Send what the run recorded, as far as the store answers; the rest stays in the clone's spool."""
    import psutil

    from pipelines.core import courier

    with contextlib.suppress(StoreUnavailable):
        courier.deliver(root)
    # A courier that still waits for its turn would find its code gone
    mine = ["pipelines.core.courier", str(run_locks.folder(root) / name)]
    for process in psutil.process_iter(["cmdline"]):
        if (process.info["cmdline"] or [])[-2:] == mine:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()


def _author(place: Path) -> list[str]:
    """An author for a machine on which nobody has set one, or only half of one."""
    words: list[str] = []
    for key, value in (("user.name", "sluice"), ("user.email", "sluice@localhost")):
        try:
            git(place, "config", key)
        except UserError:
            words += ["-c", f"{key}={value}"]
    return words
