"""The MLflow store: one place that connects to it, locks around it and says so when it is away.

The address is MLflow's own variable, `MLFLOW_TRACKING_URI` (`environment.prepare` sets the embedded SQLite
store when nobody did). Locks are files in `.sluice/` and hold in one clone; in a store that several share, one
of them at a time should register and promote (a model is searched by its content before a version is made, so the rest
is safe one after the other).
"""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import logging
import os
import re
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipelines.core import store_files
from pipelines.core.environment import STATE
from pipelines.core.errors import StoreUnavailable

EXPERIMENT = "sluice"
SQLITE = b"SQLite format 3\0"  # how every database file begins that is not empty
AWAY = (429, 502, 503, 504)  # answers of a proxy or server that is there and cannot work now
REFUSED = {401: "does not know this log-in", 403: "does not let this log-in do that"}
UNADDRESSED = re.compile(r"[?#]|%[0-9A-Fa-f]{2}")  # of a path, what ends an address, or is a code in one
LIMIT = "MLFLOW_HTTP_REQUEST_TIMEOUT"
RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
QUESTION, ATTEMPTS = "10", "2"  # seconds that a question may take, and how often it is asked again
LOGIN_VARIABLES = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
ADDRESSES = "a server, http://HOST:PORT, or a database, sqlite:////PATH/mlflow.db"
# What stands before the host: `user:password@`, or, with a slash in the password, what cannot be a host and a port.
LOGIN = re.compile(r"(?<=://)(?:[^/\s]*@|[^/\s:]*:(?!\d+(?:/|\s|$))\S*@)")


@contextlib.contextmanager
def locked(root: Path, name: str) -> Iterator[None]:
    """Hold the lock `.sluice/locks/NAME`; waits for whoever has it. Not re-entrant."""
    place = lock_file(root, name)
    place.parent.mkdir(parents=True, exist_ok=True)
    with place.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def lock_file(root: Path, name: str) -> Path:
    """The file whose lock `locked` holds."""
    return root / STATE / "locks" / name


def address(root: Path) -> str:
    """The tracking URI in use; that of a file without links, so that every worktree of a clone has the same one."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{own(root)}"
    return f"sqlite:///{Path(uri.removeprefix('sqlite:///')).resolve()}" if uri.startswith("sqlite:///") else uri


def own(root: Path) -> Path:
    """The database of the clone's own store, which no other clone writes to."""
    return (root / STATE / "mlflow" / store_files.DATABASE).resolve()


def place(root: Path) -> str:
    """The store in use as files, tags and messages name it: its address may hold a password, and they may not."""
    uri = address(root)
    return uri if embedded(root) else without_login(uri).partition("?")[0]  # a database takes passwords there too


def is_meant(root: Path, name: str) -> bool:
    """Whether a record of this clone means the store in use; that of a clone that was moved has moved with it.

    Another clone's, which stands where it was, is another one.
    """
    ending, recorded = f"/{STATE}/mlflow/{store_files.DATABASE}", Path(name.removeprefix("sqlite:///"))
    moved = name.startswith("sqlite:///") and name.endswith(ending) and embedded(root) == own(root)
    return (moved and not recorded.exists()) or without_login(name) == place(root)


def without_login(text: str) -> str:
    """An address, or a message with addresses in it, with whoever logs in and the password left out."""
    return LOGIN.sub("", text)


def embedded(root: Path) -> Path | None:
    """The database file of an embedded SQLite store, or None when the store is a server."""
    uri = address(root)
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def connect(root: Path) -> tuple[Any, str]:
    """An `MlflowClient` and the id of the experiment, which is created on first use, by one process only.

    Raises:
        StoreUnavailable: the store does not answer, or its database cannot be written.
    """
    probe(root)
    # Training waits for nothing here, so a server that is away shall say so soon. A user's own values win.
    os.environ.setdefault(RETRIES, ATTEMPTS)
    os.environ.setdefault(LIMIT, QUESTION)
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # a log-in in the address would be in the logs
    import mlflow
    from mlflow.exceptions import MlflowException

    for noisy in ("mlflow", "alembic"):  # every table of a new database is a line otherwise
        logging.getLogger(noisy).setLevel(logging.WARNING)
    mlflow.set_tracking_uri(address(root))
    home = (root / STATE / "mlflow").resolve()
    artifacts = store_files.uri(home) if embedded(root) else None
    with answering(root), locked(root, "store"):
        client, found = _dialled(root)
        if found is None:
            try:
                return client, str(client.create_experiment(EXPERIMENT, artifact_location=artifacts))
            except MlflowException as error:  # another machine was quicker
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                found = client.get_experiment_by_name(EXPERIMENT)
        if embedded(root) == home / store_files.DATABASE:
            store_files.follow(home, found.artifact_location)
        if found.lifecycle_stage == "deleted":
            client.restore_experiment(found.experiment_id)
        return client, str(found.experiment_id)


@contextlib.contextmanager
def patient(size: int) -> Iterator[None]:
    """Inside, files of at most `size` bytes are uploaded: a server that keeps them elsewhere answers only when all of
    one is there. It is given a minute and a second for each megabyte, once. A user's own limits stay.
    """
    before = {name: os.environ.get(name) for name in (LIMIT, RETRIES)}
    if before[LIMIT] == QUESTION:
        os.environ[LIMIT] = str(60 + size // 1_000_000)
        if before[RETRIES] == ATTEMPTS:
            os.environ[RETRIES] = "0"
    try:
        yield
    finally:
        os.environ.update({name: value for name, value in before.items() if value is not None})


def probe(root: Path) -> None:
    """One cheap question, without MLflow's long import, before anything is asked of the store.

    Raises:
        StoreUnavailable: no answer within five seconds, or the database file cannot be written or is none, or MLflow
            cannot name the folder of its files.
    """
    uri = address(root)
    database = embedded(root)
    if database is not None:
        files = _files(root, database)
        if files is not None and (found := UNADDRESSED.search(str(files))):
            why = f"MLflow takes no {found[0]!r} in the path of a folder: rename that"
            raise unavailable(root, f"its files are to be in {files}, and {why}")
        home = next(parent for parent in [database, *database.parents] if parent.exists())
        if not os.access(home, os.W_OK):
            raise unavailable(root, f"{home} cannot be written")
        if database.is_file() and not SQLITE.startswith(_head(database)):
            raise unavailable(root, f"{database} is no SQLite database: bring back a copy, or remove it for a new one")
        return
    if _is_folder(uri) and os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() not in ("true", "1"):
        raise unavailable(root, f"MLflow keeps no runs in a folder of files any more: name {ADDRESSES}")
    if urlsplit(uri).scheme not in ("http", "https"):
        return
    try:  # without the log-in, which urllib would take for a part of the host; nobody is asked for one here
        urllib.request.urlopen(f"{without_login(uri).rstrip('/')}/health", timeout=5).close()
    except urllib.error.HTTPError as error:
        if error.code in AWAY:
            raise unavailable(root, f"it answered {error.code}") from None
    except urllib.error.URLError as error:
        if not isinstance(error.reason, ssl.SSLError):  # whether to trust a certificate is MLflow's decision
            raise unavailable(root, str(error.reason)) from None
    except (OSError, ValueError, http.client.HTTPException) as error:  # the last two: it is no address
        raise unavailable(root, str(error)) from None


@contextlib.contextmanager
def answering(root: Path) -> Iterator[None]:
    """Turn what MLflow raises when its store is away or refuses us into `StoreUnavailable`; let other errors pass.

    MLflow's own errors are JSON. What it calls a failed API request is no answer of its own: nobody's, a proxy's, that
    of another program behind a wrong address, or that of its log-in.
    """
    from mlflow.exceptions import MlflowException
    from requests import RequestException
    from sqlalchemy.exc import OperationalError

    try:
        yield
    except (RequestException, OperationalError) as error:
        status = getattr(getattr(error, "response", None), "status_code", 0)
        raise unavailable(root, _first_line(error), status) from None  # its text may hold a log-in, and is logged
    except MlflowException as error:
        status = getattr(error, "get_http_status_code", lambda: 0)()
        text = str(error)
        if not ("API request to" in text or status in (*AWAY, *REFUSED) or "OperationalError" in text):
            raise
        raise unavailable(root, _first_line(error), status) from None


def unavailable(root: Path, why: str, status: int = 0) -> StoreUnavailable:
    """The error that says which store is away, what is kept meanwhile and how it gets there later.

    Args:
        status: of HTTP, where there was an answer.
    """
    told, then = f"does not answer ({without_login(why)})", "is back"
    if status in REFUSED:
        told, then = f"{REFUSED[status]} ({status}): see {LOGIN_VARIABLES}", "lets us in"
    return StoreUnavailable(
        f"the MLflow store {place(root)} {told}. Nothing is lost: records wait in {STATE}/spool, finished models in "
        f"artifacts/; `sluice run` delivers and registers them once it {then}."
    )


def _dialled(root: Path) -> tuple[Any, Any]:
    """A client of the store, and our experiment there, if it has one.

    Raises:
        StoreUnavailable: nothing is dialled by such an address, or not without a package that is not here.
    """
    import mlflow
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import ArgumentError

    try:
        client = mlflow.MlflowClient()
        return client, client.get_experiment_by_name(EXPERIMENT)
    except ModuleNotFoundError as error:
        raise unavailable(root, f"it needs the package {error.name}, which is not installed") from None
    except ArgumentError as error:
        raise unavailable(root, f"{_first_line(error)}: name {ADDRESSES}") from None
    except MlflowException as error:
        if error.error_code != "INVALID_PARAMETER_VALUE":
            raise
        raise unavailable(root, f"MLflow knows no such address: name {ADDRESSES}") from None


def _files(root: Path, database: Path) -> Path | None:
    """Where the files of an embedded store are, or will be: in the clone, unless another one has begun the database.

    None: at an address that is no file's.
    """
    begun = store_files.begun(database, EXPERIMENT) if database != own(root) else None
    return store_files.local(begun or store_files.uri(own(root).parent))


def _is_folder(uri: str) -> bool:
    """Whether an address is one of MLflow's stores of files."""
    return uri.startswith("file:") or not (":" in uri or uri.startswith("databricks"))


def _head(place: Path) -> bytes:
    with place.open("rb") as file:
        return file.read(len(SQLITE))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
