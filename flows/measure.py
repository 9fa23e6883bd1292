"""A model of a stage on today's held-out examples: `python -m flows.measure STAGE MODEL EVALUATION`.

In: the repository it is called in, and the model's directory. Out: `EVALUATION`, a Parquet file as the stage writes it.
The flow starts it for a champion that was measured on other examples than its challenger.
"""

from __future__ import annotations

import sys
from pathlib import Path

from pipelines.core import environment, runner
from pipelines.core.errors import UserError
from pipelines.core.verdicts import NotMeasurable

NOT_MEASURABLE = 4  # exit code: the stage measures no model but its own


def main(root: Path, stage: str, model: Path, evaluation: Path) -> int:
    """Measure; returns the exit code."""
    environment.prepare(root)
    try:
        runner.measure_for(root, stage)(model, evaluation)
    except NotMeasurable:
        return NOT_MEASURABLE
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(Path.cwd(), sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])))
