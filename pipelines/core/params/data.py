"""Section `data`: the sources and how they are checked and split."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from pipelines.core.params.section import Section, Share

TableName = Literal["corpus", "demonstrations", "prompts", "comparisons", "knowledge", "tasks", "queries"]
BuiltTable = Literal["corpus", "demonstrations", "prompts", "knowledge", "tasks"]


class PydocsSource(Section):
    """The built-in builder: documentation of Python code, parsed with `ast`, never imported."""

    builder: Literal["pydocs"]
    stdlib: bool = True
    packages: tuple[str, ...] = Field((), description="installed packages, by import name")
    folders: tuple[str, ...] = Field((), description="folders of Python source of your own")
    tables: tuple[BuiltTable, ...] = Field(
        ("corpus", "demonstrations", "prompts", "knowledge", "tasks"), description="knowledge comes with its queries"
    )
    max_files: int | None = Field(None, ge=1, description="read at most this many files, in sorted order")

    @model_validator(mode="after")
    def _something_to_read(self) -> PydocsSource:
        if not (self.stdlib or self.packages or self.folders):
            raise ValueError("nothing to read: set stdlib: true, packages: [...] or folders: [...]")
        return self


FIELDS: dict[TableName, tuple[str, ...]] = {
    "corpus": ("id", "text"),
    "demonstrations": ("id", "kind", "messages", "prompt", "completion"),
    "prompts": ("id", "prompt", "reference"),
    "comparisons": (
        *("id", "prompt", "responses", "ranks", "scores", "labeler"),
        *("chosen", "rejected", "votes"),
    ),
    "knowledge": ("id", "title", "text", "url"),
    "tasks": (
        *("id", "text", "premise", "hypothesis", "first", "second", "context", "choices"),
        *("label", "label_text"),
    ),
    "queries": ("id", "kind", "query", "target", "answers", "referrer"),
}
OPTIONAL = ("id", "kind", "reference", "labeler", "votes", "url", "answers", "referrer", "label_text")
SCORE_FIELDS = ("id", "first", "second", "label")


class RowsSource(Section):
    """What files and hub data sets have in common: how their columns become rows of one table."""

    table: TableName
    task: str | None = Field(None, pattern=r"^[a-z0-9_-]+$", description="the task's name, for table: tasks")
    columns: dict[str, str | None] = Field(
        {}, description="our field: the file's column; same name if left out; a.b: b of the object in a; null: none"
    )
    group: str | None = Field(
        None,
        description="column whose rows stay on one side of the split; a column named group if left out, but for "
        "columns: {group: null}",
    )
    split: Literal["train", "validation", "test"] | None = Field(
        None, description="put every row on this side instead of splitting by hash of the group"
    )
    licence: str | None = Field(None, description="named on the data card")
    label_type: Literal["class", "score"] = Field(
        "class", description="table: tasks with first and second: score means that labels are real numbers"
    )

    @model_validator(mode="after")
    def _fits_its_table(self) -> RowsSource:
        if (self.table == "tasks") != (self.task is not None):
            raise ValueError("table: tasks needs task: NAME, and no other table has one")
        if self.label_type == "score" and self.table != "tasks":
            raise ValueError("label_type: score is only for table: tasks with the columns first and second")
        if self.table == "knowledge" and self.split is not None:
            raise ValueError("table: knowledge is an index and is not split: leave out split")
        fields = FIELDS[self.table] if self.label_type == "class" else SCORE_FIELDS
        for field, column in self.columns.items():
            if field == "group":
                if column is not None:
                    raise ValueError(f"columns: the column of groups is named by the source itself: group: {column}")
                continue  # a column of this name that means something else
            if field not in fields:
                table = self.table if self.label_type == "class" else "tasks with label_type: score"
                raise ValueError(f"columns: {table} has no field {field!r}; it has {', '.join(fields)}")
            if column is None and field not in OPTIONAL and (self.table, field) != ("comparisons", "prompt"):
                raise ValueError(
                    f"columns: {field}: null is only for the prompt of comparisons without prompts, and for what need "
                    f"not be there: {', '.join(OPTIONAL)}"
                )
        return self


class FileSource(RowsSource):
    """Local files: JSONL, JSON, CSV, TSV, Parquet or plain text, each optionally gzipped; a folder or a glob too."""

    path: str
    sample_by: Literal["document", "paragraph", "line"] = Field(
        "document", description="text files: what one row is (names as in Hugging Face's text loader)"
    )
    separator: str | None = Field(
        None, description="text files, sample_by: document: regular expression of a document's first line"
    )
    delimiter: str | None = Field(
        None, pattern=r'^[^\r\n"]$', description="CSV and TSV: what stands between cells; a comma, a tab if left out"
    )
    quotes: bool = Field(
        True, description="CSV and TSV: whether cells may be quoted (RFC 4180); false: a quotation mark is text (GLUE)"
    )

    @model_validator(mode="after")
    def _separator_compiles(self) -> FileSource:
        if self.separator is not None:
            if self.sample_by != "document":
                raise ValueError("separator: only with sample_by: document")
            try:
                re.compile(self.separator)
            except re.error as error:
                raise ValueError(f"separator: not a regular expression: {error}") from None
        return self


class HubSource(RowsSource):
    """A data set of the Hugging Face hub, read through `datasets`, streamed."""

    hub: str
    config: str | None = None
    revision: str | None = None
    hub_split: str = "train"


def _kind_of_source(value: Any) -> str | None:
    """A source is told by the one key that names where it comes from."""
    keys = value if isinstance(value, dict) else getattr(value, "__dict__", {})
    return next((tag for key, tag in _SOURCE_TAGS.items() if key in keys), None)


_SOURCE_TAGS = {"builder": "pydocs", "path": "file", "hub": "hub"}
Source = Annotated[
    Annotated[PydocsSource, Tag("pydocs")] | Annotated[FileSource, Tag("file")] | Annotated[HubSource, Tag("hub")],
    Discriminator(
        _kind_of_source,
        custom_error_type="source",
        custom_error_message="a source needs one of the keys builder: pydocs, path: FILE or hub: OWNER/NAME",
    ),
]


class DataParams(Section):
    """Stage `data`."""

    seed: int = Field(ge=0)
    sources: tuple[Source, ...] = Field(min_length=1)
    validation_share: Share
    test_share: Share
    near_duplicate: float = Field(gt=0.0, le=1.0, description="Jaccard similarity of word 5-grams")
    on_bad_row: Literal["refuse", "quarantine"]
    quarantine_budget: Share = Field(description="largest share of bad rows under on_bad_row: quarantine")
    min_rows: int = Field(ge=1, description="a table with fewer rows in train or test is refused")

    @model_validator(mode="after")
    def _shares(self) -> DataParams:
        if self.validation_share + self.test_share >= 1.0:
            raise ValueError("validation_share + test_share must leave something to train on (< 1)")
        if self.test_share == 0.0:
            raise ValueError("test_share must be > 0: every stage ends with an evaluation on held-out data")
        return self
