"""Telling others of a promotion, once it is done: a command, a web address, or both.

    SLUICE_PROMOTION_HOOK      a command; gets the promotion as JSON on its standard input
    SLUICE_PROMOTION_WEBHOOK   a URL of http or https; gets the same JSON as the body of a POST

Both come from the environment, since either may hold a secret; so what is told of a failure names the program or the
host and nothing else of them. The JSON is `ledger.Promotion`: action, moves (model, source, target, previous), release,
who, why, when, store. A failure is a warning: the promotion stands. What fails is not told again.
"""

from __future__ import annotations

import http.client
import json
import os
import shlex
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipelines.core.ledger import Promotion

COMMAND = "SLUICE_PROMOTION_HOOK"
ADDRESS = "SLUICE_PROMOTION_WEBHOOK"
SECONDS = 30.0


def tell(promotion: Promotion) -> None:
    """Tell everyone who is named in the environment; what goes wrong is said on standard error."""
    body = json.dumps(promotion.to_json()).encode()
    found = [_command(body), _address(body)]
    for failure in filter(None, found):
        print(f"warning: the promotion is done, but {failure}", file=sys.stderr, flush=True)


def _command(body: bytes) -> str | None:
    """Run the command, without a shell. Returns what went wrong."""
    text = os.environ.get(COMMAND)
    if not text:
        return None
    try:
        words = shlex.split(text)
    except ValueError as error:
        return f"{COMMAND} is no command: {error}"
    if not words:
        return f"{COMMAND} is no command: it is blank"
    name = Path(words[0]).name
    try:
        done = subprocess.run(words, input=body, timeout=SECONDS, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return f"the command of {COMMAND} ({name}) did not end within {SECONDS:g} seconds and was stopped"
    except OSError as error:
        return f"the command of {COMMAND} ({name}) could not be started: {error.strerror}"
    return f"the command of {COMMAND} ({name}) ended with exit code {done.returncode}" if done.returncode else None


def _address(body: bytes) -> str | None:
    """POST to the URL. Returns what went wrong."""
    url = os.environ.get(ADDRESS)
    if not url:
        return None
    try:
        parts = urlsplit(url)
        host, scheme = parts.hostname, parts.scheme
    except ValueError:
        host, scheme = None, ""
    if scheme not in ("http", "https") or not host:
        return f"{ADDRESS} is no URL of http or https"
    try:
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        urllib.request.build_opener(_NoRedirect).open(request, timeout=SECONDS).close()
    except urllib.error.HTTPError as error:
        return f"the receiver of {ADDRESS} ({host}) answered {error.code}"
    except urllib.error.URLError as error:
        why = getattr(error.reason, "strerror", None) or type(error.reason).__name__
        return f"the receiver of {ADDRESS} ({host}) does not answer: {why}"
    except (OSError, ValueError, http.client.HTTPException) as error:  # too slow an answer; a blank in the URL
        return f"the receiver of {ADDRESS} ({host}) cannot be told: {type(error).__name__}"
    return None


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an answer that refuses: followed, it is a GET without the JSON, and a log-in page says OK."""

    def redirect_request(self, *_: Any) -> None:
        """Go nowhere."""
