"""The Prefect API a flow talks to: the team's when an address is set, else one of our own for as long as it runs.

Prefect can start a temporary server itself, but that one outlives a flow that is killed. Ours runs under the
supervisor, goes when the flow goes, and shows its pages meanwhile.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import os
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from flows.supervise import Crew, child_environment
from pipelines.core import store
from pipelines.core.environment import STATE
from pipelines.core.errors import StoreUnavailable

T = TypeVar("T")
PAGES = "SLUICE_MLFLOW_PAGES"  # variable: where the pages of MLflow are, for links
REQUIRE_SECONDS = 20.0  # a server that was killed is back within that time
START_SECONDS = 240.0  # the first start creates the database: 15 s on two idle cores, minutes on busy ones
# What a server that lives for one run has no use for: schedules, late runs, workers, leases, kinds of blocks. Idle, it
# takes .078 of a core with them and .047 without, and its start a second more.
UNNEEDED = (
    "PREFECT_API_BLOCKS_REGISTER_ON_START",
    *(
        f"PREFECT_SERVER_SERVICES_{service}_ENABLED"
        for service in (
            "CANCELLATION_CLEANUP", "CLEANUP_RECONCILER", "FOREMAN", "LATE_RUNS", "PAUSE_EXPIRATIONS", "REPOSSESSOR",
            "SCHEDULER",
        )
    ),
)  # fmt: skip


@contextlib.contextmanager
def prefect_api(root: Path, meanwhile: Callable[[], T]) -> Iterator[T]:
    """Make sure that Prefect has an API to talk to while the block runs.

    Args:
        meanwhile: what to do while a server of our own comes up, which takes seconds; the block is given what it gives.

    Raises:
        StoreUnavailable: our own server did not come up, and the message names its log; the one that is named does not
            answer, or not to us.
    """
    # The console handler would print every failure as a traceback; people get one message from us instead.
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    from prefect.settings import get_current_settings

    if named := get_current_settings().api.url:
        require(named)
        yield meanwhile()
        return
    from flows import servers

    _log_in()
    if own := servers.state(root):  # of `make server`; a second server would share its database
        require(own["prefect"])
        os.environ.setdefault(PAGES, own["mlflow"])
        with _at(own["prefect"]):
            yield meanwhile()
        return
    crew, port = Crew(grace=5.0), _free_port()
    address = f"http://127.0.0.1:{port}"
    log = root / STATE / "logs" / "prefect-server.log"
    command = [sys.executable, "-m", "uvicorn", "--factory", "prefect.server.api.server:create_app"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--log-level", "warning"]
    pages = {"PREFECT_SERVER_UI_API_URL": f"{address}/api"}  # the pages must ask this server, not the usual port
    idle = dict.fromkeys(UNNEEDED, "false")
    try:
        server = crew.start(command, root, log, child_environment(**pages, **idle))
        done = meanwhile()
        import prefect.flows  # noqa: F401  # seconds, which whoever talks to it needs, too

        deadline = time.monotonic() + START_SECONDS
        while not answers(f"{address}/api/health"):
            if server.poll() is not None or time.monotonic() > deadline:
                raise StoreUnavailable(f"the Prefect server did not start; see {log.relative_to(root)}")
            time.sleep(0.1)
        with _at(f"{address}/api"):
            yield done
    finally:
        crew.stop()


@contextlib.contextmanager
def _at(api: str) -> Iterator[None]:
    """Let this process talk to an API; what Prefect still holds back then is delivered before the block ends."""
    from prefect.context import refresh_global_settings_context

    os.environ["PREFECT_API_URL"] = api
    refresh_global_settings_context()
    try:
        yield
    finally:
        _deliver()
        os.environ.pop("PREFECT_API_URL", None)
        refresh_global_settings_context()


def _log_in() -> None:
    """Whoever has set the guard of our own server in the environment is let in by it."""
    from prefect.context import refresh_global_settings_context

    if (guard := os.environ.get("PREFECT_SERVER_API_AUTH_STRING")) and "PREFECT_API_AUTH_STRING" not in os.environ:
        os.environ["PREFECT_API_AUTH_STRING"] = guard
        refresh_global_settings_context()


def _deliver() -> None:
    """Send what Prefect still holds back in batches, while there is somebody to send it to."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    APILogWorker.drain_all(timeout=5)
    EventsWorker.drain_all(timeout=5)


def require(api: str) -> None:
    """See that an API answers, and to whoever is logged in here; Prefect Cloud is not asked, as its client does not.

    Raises:
        StoreUnavailable: it does not.
    """
    from prefect.settings import get_current_settings

    settings = get_current_settings()
    if api.startswith(settings.cloud.api_url):
        return
    login = settings.api
    headers = {}
    if login.auth_string is not None:
        known = base64.b64encode(login.auth_string.get_secret_value().encode()).decode()
        headers["Authorization"] = f"Basic {known}"
    elif login.key is not None:
        headers["Authorization"] = f"Bearer {login.key.get_secret_value()}"
    deadline = time.monotonic() + REQUIRE_SECONDS
    while True:
        try:
            question = urllib.request.Request(f"{api.rstrip('/')}/admin/version", headers=headers)  # noqa: S310
            with urllib.request.urlopen(question, timeout=REQUIRE_SECONDS):  # noqa: S310
                return
        except urllib.error.HTTPError as error:
            told = f"answers with {error.code}"
            if error.code in (401, 403):
                told = "does not know this log-in: set PREFECT_API_AUTH_STRING or PREFECT_API_KEY (docs/access.md)"
                break
        except (ValueError, http.client.InvalidURL):
            told = "is no address: PREFECT_API_URL is to be one such as http://127.0.0.1:4200/api"
            break
        except (OSError, http.client.HTTPException) as error:  # the last: something answers that speaks no HTTP
            told = f"does not answer ({getattr(error, 'reason', error)}): start it, or unset PREFECT_API_URL"
        if time.monotonic() > deadline:
            break
        time.sleep(0.5)
    raise StoreUnavailable(f"the Prefect server at {store.without_login(api)} {told}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def answers(url: str) -> bool:
    """Whether something at an address answers that all is well."""
    try:
        with urllib.request.urlopen(url, timeout=2.0) as reply:  # noqa: S310
            return bool(reply.status == 200)
    except (OSError, http.client.HTTPException):
        return False
