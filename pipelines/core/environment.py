"""The process environment every entry point shares: state in `.sluice/`, telemetry off, hubs only when named.

Only standard-library imports: the virtual environment runs `prepare` at every start of its Python, so that
`dvc`, `mlflow ui` and `prefect server start` typed by hand find the same stores. Variables that are set
already win: the address of a shared server is the tool's own variable (`MLFLOW_TRACKING_URI`, `PREFECT_API_URL`).
"""

import os
from pathlib import Path

STATE = ".sluice"
WORK = ".work"
PREPARED = "SLUICE_STATE"  # the state folder that the variables below were last set for

# How long OpenMP's threads look for work before they sleep (GOMP_SPINCOUNT; 100,000 are about a millisecond): waking
# one takes as long as many a product. A stage's look for a moment: threads that spin starve whoever shares the cores.
SPIN = "3000"
SPIN_ALONE = "100000"  # where one token at a time is answered

TELEMETRY_OFF = {
    "DO_NOT_TRACK": "true",  # MLflow takes only this spelling
    "DVC_NO_ANALYTICS": "1",
    "GX_ANALYTICS_ENABLED": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_CLOUD_ENABLE_ORCHESTRATION_TELEMETRY": "false",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
}


def prepare(root: Path) -> None:
    """Set what is not set yet, for this process and its children. `root` is the repository."""
    state = root.resolve() / STATE
    defaults = {
        **TELEMETRY_OFF,
        "DVC_GLOBAL_CONFIG_DIR": f"{state}/dvc/config",
        "DVC_SITE_CACHE_DIR": f"{state}/dvc/site",
        "HF_HOME": f"{state}/huggingface",
        "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{state}/mlflow/mlflow.db",  # what `mlflow ui` shows
        "MLFLOW_TRACKING_URI": f"sqlite:///{state}/mlflow/mlflow.db",
        "MLFLOW_ENABLE_ASYNC_LOGGING": "false",
        "MPLCONFIGDIR": f"{state}/matplotlib",
        # Large tensors come and go at each step: keep their pages, in huge ones (a step is 10 % faster).
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=8589934592:"
        "glibc.malloc.trim_threshold=17179869184",
        "GOMP_SPINCOUNT": SPIN,
        "PREFECT_HOME": f"{state}/prefect",
        "PREFECT_LOGGING_LEVEL": "WARNING",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
        "TOKENIZERS_PARALLELISM": "true",
        "TORCHINDUCTOR_CACHE_DIR": f"{state}/inductor",
    }
    # Values that another folder's `prepare` has set, as that of the virtual environment's own, are not the user's.
    before = os.environ.get(PREPARED)
    for name, value in defaults.items():
        if name not in os.environ or (before and os.environ[name] == value.replace(str(state), before)):
            os.environ[name] = value
    os.environ[PREPARED] = str(state)


def allow_hub(named: bool) -> None:
    """Let Hugging Face libraries reach the hub only when `params.yaml` names something there."""
    offline = "0" if named else "1"
    os.environ.setdefault("HF_HUB_OFFLINE", offline)
    os.environ.setdefault("HF_DATASETS_OFFLINE", offline)
