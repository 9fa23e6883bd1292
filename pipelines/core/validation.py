"""Great Expectations' verdicts on every table, chunk by chunk, before anything is published.

Rows are judged in chunks as they pass, so memory does not grow with a table; what needs a whole table (unique
ids, rows a side, leaks) is judged on `facts`, a few numbers a row read back from the files just written, in parts
that hold all rows of the same value. The verdicts of the chunks and parts are added up to one a table: JSON for
machines (the record), Data Docs for people.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.core.errors import DataError
from pipelines.core.faults import shown
from pipelines.core.suites import LONGEST_TEXT, UNREADABLE_SHARE
from pipelines.core.tables import SPLITS

if TYPE_CHECKING:
    import pandas as pd

SHOWN_ROWS = 5
WHOLE_FILES = (
    "A text file is one document, and all of it on one side, unless its source says sample_by: paragraph (or line), or "
    "separator: a regular expression of a document's first line."
)
GROUPS = (
    "Rows of one group are on one side. Groups are what a source's group: names, or else a column named group: where "
    "that means something else, columns: {group: null}."
)
COUNTED = ("element_count", "unexpected_count", "missing_count")
RESULT_FORMAT = {
    "result_format": "SUMMARY",
    "unexpected_index_column_names": ["source", "row"],
    "partial_unexpected_count": SHOWN_ROWS,
    "return_unexpected_index_query": False,
}


@dataclass
class Verdict:
    """One expectation on one table, over all its chunks. `examples` name source, row and value."""

    kind: str
    column: str
    success: bool = True
    observed: dict[str, Any] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)
    last: Any = None  # Great Expectations' own result, from which Data Docs are made

    def add(self, result: Any) -> None:
        """Take in the result of one more chunk."""
        raw = result.result
        if result.exception_info.get("raised_exception", False) or not raw and not result.success:
            raise RuntimeError(f"{self.kind} on {self.column} did not run: {result.exception_info}")
        self.success = self.success and bool(result.success)
        for name in COUNTED:
            if name in raw:
                self.observed[name] = self.observed.get(name, 0) + int(raw[name])
        if "observed_value" in raw:
            value, earlier = raw["observed_value"], self.observed.get("observed_value", 0)
            self.observed["observed_value"] = earlier + value if "absent_from_train" in self.kind else value
        found = [_example(item) for item in raw.get("partial_unexpected_index_list") or []]
        found += [f"{p['held_out']} (held out) is in {p['train']}" for p in raw.get("details", {}).get("pairs", [])]
        self.examples = [*self.examples, *found][:SHOWN_ROWS]
        self.last = result

    def record(self) -> dict[str, Any]:
        """The verdict as JSON: nothing in it varies from run to run."""
        return {
            "expectation": self.kind,
            "column": self.column,
            "success": self.success,
            "observed": dict(self.observed),
            "examples": self.examples,
        }


class Judge:
    """Great Expectations in memory: suites by name, verdicts added up. Making one takes seconds (the import)."""

    def __init__(self) -> None:
        import great_expectations as gx
        from great_expectations.data_context.types.base import DataContextConfig, InMemoryStoreBackendDefaults

        # The default would leave a directory of its own in the system's temporary one.
        stores = InMemoryStoreBackendDefaults(init_temp_docs_sites=False)
        self._gx = gx.get_context(mode="ephemeral", project_config=DataContextConfig(store_backend_defaults=stores))
        self._gx.variables.progress_bars = {"globally": False}
        asset = self._gx.data_sources.add_pandas("rows").add_dataframe_asset("chunk")
        self._batch = asset.add_batch_definition_whole_dataframe("all")
        self._suites: dict[str, Any] = {}
        self._verdicts: dict[str, list[Verdict]] = {}  # of one list of expectations
        self.verdicts: dict[str, list[Verdict]] = {}

    def check(self, suite: str, expectations: Callable[[], list[Any]], frame: pd.DataFrame, about: str = "") -> None:
        """Judge a chunk. The expectations are asked for the first time a suite is named.

        A suite can have several lists of expectations, each for chunks of its own, which `about` tells apart.
        """
        import great_expectations as gx

        name = f"{suite} {about}".strip()
        if name not in self._suites:
            self._suites[name] = self._gx.suites.add(
                gx.ExpectationSuite(name=_file_name(name), expectations=expectations())
            )
        results = self._batch.get_batch({"dataframe": frame}).validate(self._suites[name], result_format=RESULT_FORMAT)
        if name not in self._verdicts:
            configs = [result.expectation_config for result in results.results]
            self._verdicts[name] = [Verdict(config.type, _subject(config.kwargs)) for config in configs]
            self.verdicts.setdefault(suite, []).extend(self._verdicts[name])
        for verdict, result in zip(self._verdicts[name], results.results, strict=True):
            verdict.add(result)

    def record(self) -> dict[str, list[dict[str, Any]]]:
        """All verdicts as JSON, by suite."""
        return {suite: [verdict.record() for verdict in verdicts] for suite, verdicts in sorted(self.verdicts.items())}

    def failed(self) -> list[tuple[str, Verdict]]:
        """Verdicts that are not a success, leaks first: they explain other failures."""
        pairs = [(suite, v) for suite, verdicts in sorted(self.verdicts.items()) for v in verdicts if not v.success]
        return sorted(pairs, key=lambda pair: "absent_from_train" not in pair[1].kind)

    def refuse_failures(self, min_rows: int) -> None:
        """Raise for what failed.

        Raises:
            DataError: one paragraph an expectation, naming table, column, source, row and value.
        """
        failed = self.failed()
        if failed:
            told = [_told(suite, verdict, min_rows) for suite, verdict in failed]
            raise DataError("\n".join(told) + "\nNothing was written.")

    def write_documents(self, place: Path) -> None:
        """Great Expectations' Data Docs: `place/index.html`."""
        from great_expectations.core import ExpectationSuiteValidationResult
        from great_expectations.core.run_identifier import RunIdentifier
        from great_expectations.data_context.types.resource_identifiers import (
            ExpectationSuiteIdentifier,
            ValidationResultIdentifier,
        )

        run = RunIdentifier(run_name="data")
        for suite, verdicts in self.verdicts.items():
            for verdict in verdicts:
                verdict.last.success = verdict.success
                verdict.last.result.update(verdict.observed)
            good = sum(verdict.success for verdict in verdicts)
            name = _file_name(suite)
            result = ExpectationSuiteValidationResult(
                success=good == len(verdicts),
                results=[verdict.last for verdict in verdicts],
                suite_name=name,
                statistics={
                    "evaluated_expectations": len(verdicts),
                    "successful_expectations": good,
                    "unsuccessful_expectations": len(verdicts) - good,
                    "success_percent": 100.0 * good / len(verdicts),
                },
                meta={"run_id": run},
            )
            key = ValidationResultIdentifier(ExpectationSuiteIdentifier(name), run, "rows")
            self._gx.validation_results_store.set(key, result)
        store = {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(place)}
        index = {"class_name": "DefaultSiteIndexBuilder"}
        site = {"class_name": "SiteBuilder", "store_backend": store, "site_index_builder": index}
        self._gx.add_data_docs_site("documents", site)
        self._gx.build_data_docs(["documents"])


def _example(item: dict[str, Any]) -> str:
    """`source, row N: column value` of one unexpected row."""
    values = [f"{name} {shown(_plain(value))}" for name, value in item.items() if name not in ("source", "row")]
    return f"{item['source']}, row {int(item['row'])}: {', '.join(values)}"


def _file_name(suite: str) -> str:
    """A suite's name as Data Docs can use it for a file."""
    return suite.replace("/", ".").replace(" ", "-")


def _plain(value: Any) -> Any:
    """numpy's scalars and arrays as Python's own."""
    return value.tolist() if hasattr(value, "tolist") else value


def _subject(kwargs: dict[str, Any]) -> str:
    """What an expectation is about: a column, two, a key, or one side of the table."""
    pair = [kwargs[name] for name in ("column_A", "column_B") if name in kwargs]
    if pair:
        return ", ".join(pair)
    if "row_condition" in kwargs and kwargs["row_condition"] is not None:
        return SPLITS[int(kwargs["row_condition"]["parameter"])]
    return str(kwargs.get("column") or kwargs.get("key") or "(table)")


def _told(suite: str, verdict: Verdict, min_rows: int) -> str:
    """One failure in words, with its remedy."""
    if verdict.kind == "expect_table_row_count_to_be_between":
        rows = verdict.observed.get("observed_value", 0)
        told = (
            f"{suite}: {verdict.column} has {rows} rows; data.min_rows accepts at least {min_rows}. "
            "Give more data, a larger share, or lower data.min_rows."
        )
        if rows:
            return told
        return f"{told} {GROUPS} {WHOLE_FILES}" if suite.split()[0] == "corpus" else f"{told} {GROUPS}"
    if "absent_from_train" in verdict.kind:
        count = verdict.observed["observed_value"]
        what = "prompt" if verdict.column == "prompt" else "example"
        return f"{suite}: {count} held-out rows have the same {what} as a training row (a leak):\n  " + "\n  ".join(
            [*verdict.examples, "Remove them from one side, or leave out split: so that they are separated for you."]
        )
    count = verdict.observed.get("unexpected_count", "")
    what, remedy = f"{verdict.kind} failed", []
    if verdict.kind.endswith("_be_unique"):
        what, where = "values are not unique", "columns: {id: COLUMN} or {id: null} in data.sources"
        remedy = [f"Mend them, or take ids from another column, or from none: {where}."]
    elif verdict.column == "unreadable":
        what = f"more than {UNREADABLE_SHARE:.0%} of a text is control characters or U+FFFD, which nobody can read"
        remedy = ["Mend or remove them: text in another encoding, ends of pages (form feeds), or no text at all."]
    elif verdict.kind == "expect_column_value_lengths_to_be_between":
        what = f"texts are not of 1 to {LONGEST_TEXT:,} characters"
        remedy = ["Cut or remove them."]
    told = "\n  ".join([*verdict.examples, *remedy])
    return f"{suite}, column {verdict.column}: {what} ({count} rows):\n  {told}"
