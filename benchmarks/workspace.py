"""A temporary copy of the repository to measure in: its own stores, nothing shared."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
COPIED = ("pipelines", "mlflow", "dvc.yaml", "params.yaml", "profiles", "constraints.txt")
OWN = ("MLFLOW_", "PREFECT_", "DVC_")


@contextmanager
def workspace(profile: str = "tiny") -> Iterator[Path]:
    """A copy with git, DVC and a profile; gone at the end."""
    from flows import profiles

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "w"
        place.mkdir()
        for name in COPIED:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, place / name)
        profiles.apply(place, profile)
        for command in (["git", "init", "-q"], ["dvc", "init", "-q"]):
            subprocess.run(command, cwd=place, check=True, env=environment())
        yield place


def environment() -> dict[str, str]:
    """This process's environment without the addresses of stores, this virtual environment's commands first."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(OWN)}
    return kept | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "DVC_NO_ANALYTICS": "1"}


def set_params(place: Path, **sections: dict[str, Any]) -> None:
    """Overwrite keys of sections of the copy's params.yaml."""
    raw = yaml.safe_load((place / "params.yaml").read_text(encoding="utf-8"))
    for name, values in sections.items():
        raw[name] |= values
    (place / "params.yaml").write_text(yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")
