"""Two expectations of our own for Great Expectations: ranks order responses, and nothing held out is in train.

Importing this module imports Great Expectations and registers both, which takes seconds: only
`pipelines.core.validation` does, when it starts.
"""

from __future__ import annotations

from typing import Any, ClassVar

import pandas as pd
from great_expectations.core import ExpectationValidationResult
from great_expectations.execution_engine import ExecutionEngine, PandasExecutionEngine
from great_expectations.expectations.expectation import BatchExpectation, ColumnPairMapExpectation
from great_expectations.expectations.metrics.map_metric_provider import (
    ColumnPairMapMetricProvider,
    column_pair_condition_partial,
)
from great_expectations.expectations.metrics.metric_provider import metric_value
from great_expectations.expectations.metrics.table_metric_provider import TableMetricProvider

TRAIN = 0
SHOWN = 5


def ranks_order(responses: Any, ranks: Any) -> bool:
    """Whether ranks are dense (1, 2, ... with ties) and one for each of at least two responses."""
    if responses is None or ranks is None or len(responses) < 2 or len(responses) != len(ranks):
        return False
    return set(ranks) == set(range(1, len(set(ranks)) + 1))


class _RanksOrderResponses(ColumnPairMapMetricProvider):  # type: ignore[misc]
    """Row by row: `ranks_order`."""

    condition_metric_name = "column_pair_values.ranks_order_responses"
    condition_domain_keys = ("batch_id", "table", "column_A", "column_B", "row_condition", "condition_parser")
    condition_value_keys = ()

    @column_pair_condition_partial(engine=PandasExecutionEngine)  # type: ignore[untyped-decorator]
    def _pandas(cls, column_A: Any, column_B: Any, **kwargs: Any) -> Any:  # noqa: N805
        pairs = zip(column_A, column_B, strict=True)
        return pd.Series([ranks_order(*pair) for pair in pairs], index=column_A.index, dtype=bool)


class ExpectRanksToOrderResponses(ColumnPairMapExpectation):  # type: ignore[misc]
    """Ranks (column_B) order the responses (column_A): as many, at least two, 1 is best, ties share a rank."""

    map_metric = "column_pair_values.ranks_order_responses"
    success_keys = ("column_A", "column_B", "mostly")
    library_metadata: ClassVar[dict[str, Any]] = {"maturity": "production"}


class _HeldOutInTrain(TableMetricProvider):  # type: ignore[misc]
    """How many held-out rows have a key that a training row has, and the first few of both."""

    metric_name = "table.held_out_rows_in_train"
    value_keys = ("key", "side")

    @metric_value(engine=PandasExecutionEngine)  # type: ignore[untyped-decorator]
    def _pandas(  # noqa: N805
        cls,
        execution_engine: PandasExecutionEngine,
        metric_domain_kwargs: dict[str, Any],
        metric_value_kwargs: dict[str, Any],
        metrics: dict[str, Any],
        runtime_configuration: dict[str, Any],
    ) -> dict[str, Any]:
        frame, _, _ = execution_engine.get_compute_domain(metric_domain_kwargs, domain_type="table")
        key, side = metric_value_kwargs["key"], metric_value_kwargs["side"]
        present = frame[key] != 0
        train = frame[(frame[side] == TRAIN) & present]
        held = frame[(frame[side] != TRAIN) & present]
        leaks = held[held[key].isin(train[key])]
        first = train[train[key].isin(leaks[key].head(SHOWN))].drop_duplicates(key).set_index(key)
        shown = [
            {
                "held_out": f"{row['source']}, row {row['row']}",
                "train": f"{first.loc[row[key], 'source']}, row {first.loc[row[key], 'row']}",
            }
            for _, row in leaks.head(SHOWN).iterrows()
        ]
        return {"count": len(leaks), "shown": shown}


class ExpectHeldOutRowsToBeAbsentFromTrain(BatchExpectation):  # type: ignore[misc]
    """No row of another side has a key (not 0) that a row of side 0 has; the rows carry `source` and `row`."""

    key: str
    side: str = "side"
    metric_dependencies = ("table.held_out_rows_in_train",)
    success_keys = ("key", "side")
    domain_keys = ("batch_id", "table", "row_condition", "condition_parser")
    args_keys = ("key", "side")
    library_metadata: ClassVar[dict[str, Any]] = {"maturity": "production"}

    def _validate(
        self,
        metrics: dict[str, Any],
        runtime_configuration: dict[str, Any] | None = None,
        execution_engine: ExecutionEngine | None = None,
    ) -> ExpectationValidationResult | dict[str, Any]:
        found = metrics["table.held_out_rows_in_train"]
        return {
            "success": found["count"] == 0,
            "result": {"observed_value": found["count"], "details": {"pairs": found["shown"]}},
        }
