"""The alignment tax: what learning from preferences costs a model of its grasp of ordinary text.

Ouyang et al. (2022), section 4.2: PPO loses on public data sets, and pre-training gradients (PPO-ptx) win part of it
back. Here it is the held-out text of the corpus, which no task was made of: bits per byte of the policy less those of
the SFT model that it started from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from pipelines.core import statistics
from pipelines.core.context import StageContext
from pipelines.core.held_out import HeldOut
from pipelines.core.policy_answers import kept

SFT, POLICY, PLAIN = "bits_sft", "bits", "bits_without_ptx"  # columns of the table


def evaluate(
    data: Path, budget: int, models: Mapping[str, Path], outputs: Path, context: StageContext
) -> dict[str, float]:
    """Score about `budget` bytes of held-out text, write `tax.parquet` (one row a text), and give the metrics.

    Scores are kept in the stage's scratch, for a run that goes on after a kill.

    Args:
        models: directories by column: `SFT`, `POLICY`, and `PLAIN` where there is a policy without pre-training
            gradients to compare with.

    Raises:
        ArtifactError: the data have no held-out corpus.
        Stopped: a signal came; what was finished is kept.
    """
    held_out = HeldOut.of(data, budget)
    scores = {
        column: kept(context, column, partial(held_out.bits_of_directory, place, context, f"held-out text, {column}"))
        for column, place in models.items()
    }
    if not np.isfinite(scores.get(PLAIN, [])).all():  # a run that diverged: what it costs is no number
        del scores[PLAIN]
    held_out.write(outputs / "tax.parquet", scores)
    return metrics(scores, held_out.sizes, held_out.groups)


def metrics(scores: Mapping[str, Sequence[float]], sizes: Sequence[int], groups: Sequence[str]) -> dict[str, float]:
    """Differences in bits per byte with 95 % intervals, paired: over groups of the same texts.

    `ptx_repairs` is what the policy's tax is less than that of the policy without pre-training gradients.
    """
    differences = {"alignment_tax_bits": (POLICY, SFT)}
    if PLAIN in scores:
        differences |= {"alignment_tax_bits_without_ptx": (PLAIN, SFT), "ptx_repairs": (PLAIN, POLICY)}
    bits = {column: np.array(values, dtype=float) for column, values in scores.items()}
    weight = np.array(sizes, dtype=float)
    found: dict[str, float] = {}
    for key, (more, less) in differences.items():
        estimate, low, high = statistics.paired_bootstrap(bits[more], bits[less], weight, group=groups)
        found |= {key: estimate, f"{key}_low": low, f"{key}_high": high}
    return found


def of_stopped(metrics: Mapping[str, float], iterations: int) -> dict[str, float]:
    """Metrics where the run without pre-training gradients was stopped after `iterations`: its tax is told with their
    number, and compared with nothing, since the other run is longer.
    """
    kept = {key: value for key, value in metrics.items() if not key.startswith("ptx_repairs")}
    return kept | {"without_ptx_stopped_after": float(iterations)}
