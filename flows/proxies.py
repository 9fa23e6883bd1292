"""Proxies that the environment names are for what is far: servers on this machine are asked directly.

Prefect's client, MLflow's and our own checks of servers all read `http_proxy` and its like. Where `no_proxy` says
nothing of the loopback address, as on many a machine of a company, they would ask the proxy for a server that only this
machine has.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

PROXIES = ("http_proxy", "https_proxy", "all_proxy")
NEAR = ("localhost", "127.0.0.1", "::1")


def leave_out_this_machine() -> None:
    """Add the loopback address to `no_proxy`, for this process and its children, where there is a proxy at all.

    A proxy that speaks SOCKS is left out where the package for it is missing: httpx, which Prefect talks through, would
    refuse to be made, whatever it is to ask.
    """
    for name in [name for name in os.environ if name.lower() in PROXIES]:
        if os.environ[name].lower().startswith("socks") and find_spec("socksio") is None:
            del os.environ[name]
    if not any(os.environ.get(name) for name in os.environ if name.lower() in PROXIES):
        return
    names = ("no_proxy", "NO_PROXY")
    said = [os.environ.get(name, "") for name in names]
    for name, own, other in zip(names, said, reversed(said), strict=True):  # which of two counts, programs disagree
        hosts = [host for each in (own or other).split(",") if (host := each.strip())]
        os.environ[name] = ",".join(hosts if "*" in hosts else dict.fromkeys([*hosts, *NEAR]))
