"""`python -m pipelines STAGE`: what `dvc.yaml` calls. Paths and dependencies come from `dvc.yaml` alone."""

import io
import sys
from pathlib import Path


def main() -> int:
    """Run the stage named on the command line; returns the exit code."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print("usage: python -m pipelines STAGE   (from the repository's root; stages as in dvc.yaml)", file=sys.stderr)
        return 64
    try:
        from pipelines.core import runner, terminal
    except ModuleNotFoundError as error:
        remedy = "use the repository's virtual environment: `make run`, or `. .venv/bin/activate`"
        print(f"error: {sys.executable} has no module {error.name!r}; {remedy}", file=sys.stderr)
        return 2
    if isinstance(sys.stdout, io.TextIOWrapper):  # a stage shows samples of its data, and what models made of them
        sys.stdout = terminal.harmless(sys.stdout)
    return runner.main(sys.argv[1], Path.cwd())


if __name__ == "__main__":
    sys.exit(main())
