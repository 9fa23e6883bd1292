"""What the report reads of the stages before it: their metrics, whether a model got better, samples, cards, checks.

In: the inputs of stage `report` by name, as `pipelines.core.graph` gives them. Nothing here knows which stages
there are: a stage is whatever has an artifact directory or a metrics file among the inputs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from pipelines.core.errors import ArtifactError

# What of a stage's metrics goes into the table of stages; a stage that is not named here shows all of them.
KEY_METRICS: Mapping[str, tuple[str, ...]] = {
    "data": ("rows_corpus_train", "rows_corpus_test", "rows_demonstrations_train", "expectations_failed", "leaks"),
    "tokenizer": ("vocabulary", "bytes_per_token", "round_trip"),
    "pretrain": ("bits_per_byte", "bits_per_byte_before", "bits_per_byte_classical", "training_tokens", "parameters"),
    "sft": ("rouge_l", "rouge_l_zero_shot", "rouge_l_few_shot", "response_bits_per_byte", "eos_share"),
    "feedback": ("comparisons_train", "pairs_train", "agreement", "longer_wins", "gold_mean"),
    "reward": ("accuracy", "accuracy_length_only", "accuracy_log_probability", "accuracy_held_out_labelers", "ece"),
    "ppo": (
        "gold_win_rate", "gold_win_rate_low", "gold_greedy", "gold_greedy_sft", "best_of_n_gold_at_equal_kl", "kl",
        "alignment_tax_bits", "alignment_tax_bits_without_ptx", "without_ptx_stopped_after",
    ),
    "dpo": (
        "accuracy", "accuracy_length_only", "gold_win_rate", "gold_win_rate_low", "gold_greedy", "gold_greedy_sft",
        "best_of_n_gold_at_equal_kl", "kl", "alignment_tax_bits",
    ),
    "distill": (
        "bits_per_byte", "bits_per_byte_no_teacher", "bits_per_byte_teacher", "gain_over_no_teacher", "retention",
        "retention_gold", "size_ratio", "decode_speedup",
    ),
    "quantize": ("*/size_ratio", "*/loss", "*/agreement", "*/rank_agreement", "*/decode_tokens_per_second"),
    "rag": (
        "documents", "chunks", "vectors", "mrr", "recall_at_10", "ndcg_at_10", "bm25_mrr", "bm25_recall_at_10",
        "dense_mrr", "dense_recall_at_10", "query_ms_p50", "query_ms_p95", "index_seconds",
    ),
    "answers": (
        "answer_score", "answer_score_closed_book", "answer_score_oracle", "gain_over_closed_book",
        "citation_precision", "citation_recall", "groundedness", "false_answer_rate", "false_refusal_rate",
    ),
    "prompts": ("score", "score_zero_shot", "*/chosen", "*/chosen_zero_shot", "questions"),
    "transfer": ("score", "*/score", "*/tfidf", "*/majority", "*/random"),
}  # fmt: skip
_SAMPLE = re.compile(r"^(?=\*\*Prompt:\*\*)", re.MULTILINE)


class Stage(NamedTuple):
    """One stage before the report. `artifact` is None where only its metrics are known."""

    name: str
    artifact: Path | None
    metrics: dict[str, float]

    def file(self, name: str) -> Path | None:
        """A file of the artifact, if it is there."""
        place = self.artifact / name if self.artifact is not None else None
        return place if place is not None and place.is_file() else None

    @property
    def key_metrics(self) -> list[tuple[str, float]]:
        """Those that tell most; all of them, time aside, for a stage of which that is not known."""
        keys = KEY_METRICS.get(self.name) or [key for key in sorted(self.metrics) if key != "seconds"]
        found = [key for pattern in keys for key in self.metrics if fnmatchcase(key, pattern)]
        return [(key, self.metrics[key]) for key in found]


class Change(NamedTuple):
    """A metric before and after a stage, with the 95 % interval of the gain; a positive gain is an improvement."""

    stage: str
    metric: str
    before: float
    after: float
    after_low: float | None  # where only the gain has an interval
    after_high: float | None
    gain: float
    gain_low: float
    gain_high: float
    classical: float | None

    @property
    def answer(self) -> str:
        """`yes`, `no`, or `not shown` when the interval holds zero."""
        return "yes" if self.gain_low > 0 else "no" if self.gain_high < 0 else "not shown"


class Check(NamedTuple):
    """One Great Expectations suite: how many expectations, and those that were not met."""

    suite: str
    expectations: int
    failed: list[dict[str, Any]]


def stages(inputs: Mapping[str, Path]) -> list[Stage]:
    """The stages behind the inputs, in the order in which dvc.yaml lists their artifacts.

    Raises:
        ArtifactError: a metrics file is not a JSON object of numbers.
    """
    metrics = {_metrics_of(name): path for name, path in inputs.items() if _metrics_of(name)}
    artifacts = {name: path for name, path in inputs.items() if "/" not in name and path.is_dir()}
    names = [*artifacts, *(name for name in metrics if name not in artifacts)]
    return [Stage(name, artifacts.get(name), _read_metrics(metrics[name]) if name in metrics else {}) for name in names]


def changes(found: Sequence[Stage]) -> list[Change]:
    """Every metric of which a stage tells the value before, or the SFT model's, and the gain with its interval."""
    every: list[Change] = []
    for stage in found:
        for key in sorted(stage.metrics):
            for before, gain in ((f"{key}_before", f"gain_{key}"), (f"{key}_sft", f"{key}_gain")):
                names = {"before": before, "after": key, "gain": gain, "gain_low": f"{gain}_low"}
                names |= {"gain_high": f"{gain}_high"}
                if all(name in stage.metrics for name in names.values()):
                    values: dict[str, Any] = {field: stage.metrics[name] for field, name in names.items()}
                    ends = {"after_low": f"{key}_low", "after_high": f"{key}_high", "classical": f"{key}_classical"}
                    values |= {field: stage.metrics.get(name) for field, name in ends.items()}
                    every.append(Change(stage.name, key, **values))
    return every


def params(inputs: Mapping[str, Path], found: Sequence[Stage]) -> dict[str, list[tuple[str, str]]]:
    """Of each stage its section of `params.yaml` as dials and values, where that file is an input.

    Raises:
        ArtifactError: it is no mapping of sections.
    """
    place = inputs.get("params.yaml")
    if place is None:
        return {}
    import yaml

    try:
        raw = yaml.safe_load(text_of(place))
        sections = {stage.name: dict(raw[stage.name]) for stage in found if stage.name in raw}
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise ArtifactError(f"params.yaml is no mapping of sections: {error}") from None
    return {
        name: [(key, json.dumps(value, ensure_ascii=False)) for key, value in section.items()]
        for name, section in sections.items()
    }


def samples(stage: Stage, most: int) -> list[str]:
    """The first samples of a stage's `samples.md`, each a piece of Markdown."""
    place = stage.file("samples.md")
    return [] if place is None else [part.strip() for part in _SAMPLE.split(text_of(place))[1:]][:most]


def cards(stage: Stage) -> list[tuple[str, str]]:
    """Name and Markdown of the cards (`README.md`) of an artifact and of what lies directly in it."""
    if stage.artifact is None:
        return []
    places = [*stage.artifact.glob("README.md"), *sorted(stage.artifact.glob("*/README.md"))]
    return [(place.parent.relative_to(stage.artifact.parent).as_posix(), text_of(place)) for place in places]


def checks(stage: Stage) -> list[Check]:
    """The verdicts of Great Expectations in a stage's `validation.json`, suite by suite."""
    place = stage.file("validation.json")
    if place is None:
        return []
    suites: dict[str, list[dict[str, Any]]] = json.loads(text_of(place))
    return [
        Check(name, len(rows), [row for row in rows if not row["success"]]) for name, rows in sorted(suites.items())
    ]


def history(stage: Stage) -> dict[str, list[tuple[float, float]]]:
    """The curves of a stage's `history.csv`: (step, value) of each column, where it has a value.

    Raises:
        ArtifactError: the file has no column step, or holds what is no number.
    """
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in numbers(stage, "history.csv"):
        if "step" not in row:
            raise ArtifactError(f"{stage.name}/history.csv has no column step; found: {', '.join(row)}")
        for column, value in row.items():
            if column != "step":
                curves.setdefault(column, []).append((row["step"], value))
    return curves


def numbers(stage: Stage, name: str) -> list[dict[str, float]]:
    """The rows of a CSV file of numbers, each without its empty cells; none where the stage has no such file.

    Raises:
        ArtifactError: a cell is no number.
    """
    rows: list[dict[str, float]] = []
    for line, row in enumerate(table(stage, name), 2):
        rows.append({})
        for column, value in row.items():
            try:
                if value:
                    rows[-1][column] = float(value)
            except (ValueError, TypeError):
                raise ArtifactError(f"{stage.name}/{name}:{line}: {column}: no number: {value!r}") from None
    return rows


def table(stage: Stage, name: str) -> list[dict[str, str]]:
    """The rows of a CSV file by column; none where the stage has no such file."""
    import csv

    place = stage.file(name)
    return [] if place is None else list(csv.DictReader(_lines(place)))


def cells(stage: Stage, name: str) -> list[list[str]]:
    """The rows of a CSV file, its head first, where columns may share a name; none without such a file."""
    import csv

    place = stage.file(name)
    return [] if place is None else [row for row in csv.reader(_lines(place)) if row]


def _lines(place: Path) -> Iterable[str]:
    """Lines as CSV has them: a quoted cell may hold their ends, and any cell what `splitlines` alone takes for one."""
    import io

    return io.StringIO(text_of(place), newline="")


def text_of(place: Path) -> str:
    """A text file as it is: a carriage return in a sample must not become a line of its own."""
    return place.read_bytes().decode("utf-8", errors="replace")


def _metrics_of(name: str) -> str:
    """`pretrain` for `metrics/pretrain.json`, else nothing."""
    return name.removeprefix("metrics/").removesuffix(".json") if name.startswith("metrics/") else ""


def _read_metrics(place: Path) -> dict[str, float]:
    try:
        raw = json.loads(text_of(place))
        return {str(key): float(value) for key, value in raw.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"metrics/{place.name} is no JSON object of numbers: {error}. Run its stage again."
        ) from None
