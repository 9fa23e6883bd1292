"""`params.yaml` as frozen, typed sections: one a stage, plus `compute`, which belongs to no stage.

`load` is the only reader of the file. Every value is checked here, before any compute, and a mistake is
reported as one line per key: where, what was found, what is accepted. Nothing is written back at run time.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from pipelines.core.errors import ParamsError

Share = Annotated[float, Field(ge=0.0, lt=1.0)]
TableName = Literal["corpus", "demonstrations", "prompts", "comparisons", "knowledge", "tasks"]
SECTIONS = ("compute", "data", "tokenizer", "pretrain", "report")


class Section(BaseModel):
    """A frozen section in which an unknown key is an error and a string is not a number."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ComputeParams(Section):
    """Where and how to compute. No DVC parameter: moving to another machine re-trains nothing."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="auto: time both once on this machine, take the faster"
    )
    threads: int = Field(0, ge=0, description="0: as many as the cores this process may use")


class PydocsSource(Section):
    """The built-in builder: documentation of Python code, parsed with `ast`, never imported."""

    builder: Literal["pydocs"]
    stdlib: bool = True
    packages: tuple[str, ...] = Field((), description="installed packages, by import name")
    folders: tuple[str, ...] = Field((), description="folders of Python source of your own")
    tables: tuple[TableName, ...] = ("corpus", "demonstrations", "prompts", "knowledge", "tasks")
    max_files: int | None = Field(None, ge=1, description="read at most this many files, in sorted order")

    @model_validator(mode="after")
    def _something_to_read(self) -> PydocsSource:
        if not (self.stdlib or self.packages or self.folders):
            raise ValueError("nothing to read: set stdlib: true, packages: [...] or folders: [...]")
        return self


FIELDS: dict[TableName, tuple[str, ...]] = {
    "corpus": ("id", "text"),
    "demonstrations": ("id", "kind", "messages", "prompt", "completion"),
    "prompts": ("id", "prompt"),
    "comparisons": (
        *("id", "prompt", "responses", "ranks", "scores", "labeler"),
        *("chosen", "rejected", "votes"),
    ),
    "knowledge": ("id", "title", "text", "url"),
    "tasks": (
        *("id", "text", "premise", "hypothesis", "first", "second", "context", "choices"),
        *("label", "label_text"),
    ),
}


class RowsSource(Section):
    """What files and hub data sets have in common: how their columns become rows of one table."""

    table: TableName
    task: str | None = Field(None, pattern=r"^[a-z0-9_-]+$", description="the task's name, for table: tasks")
    columns: dict[str, str | None] = Field(
        {}, description="our field: the file's column; same name if left out; prompt: null where pairs have none"
    )
    group: str | None = Field(
        None, description="column whose rows stay on one side of the split; a column named group if left out"
    )
    split: Literal["train", "validation", "test"] | None = Field(
        None, description="put every row on this side instead of splitting by hash of the group"
    )
    licence: str | None = Field(None, description="named on the data card")

    @model_validator(mode="after")
    def _fits_its_table(self) -> RowsSource:
        if (self.table == "tasks") != (self.task is not None):
            raise ValueError("table: tasks needs task: NAME, and no other table has one")
        if self.table == "knowledge" and self.split is not None:
            raise ValueError("table: knowledge is an index and is not split: leave out split")
        fields = FIELDS[self.table]
        for field, column in self.columns.items():
            if field not in fields:
                raise ValueError(f"columns: {self.table} has no field {field!r}; it has {', '.join(fields)}")
            if column is None and (self.table, field) != ("comparisons", "prompt"):
                raise ValueError(f"columns: {field}: null is only for the prompt of comparisons without prompts")
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


class TokenizerParams(Section):
    """Stage `tokenizer`."""

    base: str | None = Field(description="smollm2-135m, a directory, a .gguf file, a hub id; null: train one")
    vocab_size: int = Field(ge=300, le=262_144, description="of the trained one (base: null)")


class PretrainParams(Section):
    """Stage `pretrain`."""

    seed: int = Field(ge=0)
    base: str | None = Field(description="as in tokenizer.base; null: random weights")
    architecture: str = Field(description="base: null: a decoder-only model type of transformers")
    depth: int = Field(ge=1, le=96, description="base: null: layers; width, heads, lr and steps follow from it")
    tokens_per_parameter: float = Field(gt=0.0, description="base: null and tokens: null: length of the run")
    method: Literal["full", "lora"]
    lora_rank: int = Field(ge=1, le=1024)
    tokens: int | None = Field(ge=1, description="training tokens; null: tokens_per_parameter x parameters")
    sequence_length: int = Field(ge=16)
    batch_tokens: int = Field(ge=16, description="tokens an optimizer step")
    micro_batch: int = Field(ge=1, description="sequences a forward pass; the rest is accumulated")
    lr: float | None = Field(gt=0.0, lt=1.0, description="peak; null: from the width")
    warmup_share: Share
    weight_decay: float = Field(ge=0.0, lt=1.0)
    clip_norm: float = Field(gt=0.0)
    eval_bytes: int = Field(ge=1024, description="held-out UTF-8 bytes scored before and after training")
    checkpoint_steps: int = Field(ge=1)
    checkpoint_seconds: float = Field(gt=0.0)
    samples: int = Field(ge=0, le=32)

    @model_validator(mode="after")
    def _arithmetic(self) -> PretrainParams:
        step = self.sequence_length * self.micro_batch
        if self.batch_tokens % step:
            raise ValueError(
                f"batch_tokens ({self.batch_tokens}) must be a multiple of sequence_length * micro_batch ({step})"
            )
        if self.base is None and self.method == "lora":
            raise ValueError("method: lora needs a base model; random weights (base: null) are trained in full")
        if self.base is not None and self.tokens is None:
            raise ValueError("tokens: null derives the run's length from depth, which needs base: null")
        return self


class ReportParams(Section):
    """Stage `report`."""

    title: str
    samples: int = Field(ge=0, le=32)


class Params(Section):
    """The whole file."""

    compute: ComputeParams
    data: DataParams
    tokenizer: TokenizerParams
    pretrain: PretrainParams
    report: ReportParams

    @model_validator(mode="after")
    def _one_vocabulary(self) -> Params:
        if self.pretrain.base is not None and self.pretrain.base != self.tokenizer.base:
            raise ValueError(
                f"pretrain.base ({self.pretrain.base}) and tokenizer.base ({self.tokenizer.base}) differ: "
                "a model keeps the vocabulary it was trained with"
            )
        return self


def load(path: Path) -> Params:
    """Read and check `params.yaml`.

    Raises:
        ParamsError: the file is missing, is not YAML, or holds a key or value that is not accepted; one line
            for each mistake.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ParamsError(f"{path.name}: no such file in {path.parent}. Run from the repository's root.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ParamsError(f"{path.name} is not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise ParamsError(f"{path.name}: expected sections {', '.join(SECTIONS)}, found {type(raw).__name__}")
    try:
        return Params.model_validate(raw)
    except ValidationError as error:
        raise ParamsError(_explain(path.name, error)) from None


def _explain(name: str, error: ValidationError) -> str:
    """One line a mistake: the key as one would type it, what was found, what is accepted."""
    lines = []
    for item in error.errors(include_url=False):
        key = ".".join(str(part) for part in item["loc"] if part not in _SOURCES) or "(top level)"
        accepted = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            accepted = f"no such key; accepted here: {', '.join(_known_keys(item['loc'][:-1]))}"
        found = "" if isinstance(item["input"], dict) else f" (found {item['input']!r})"
        lines.append(f"{name}: {key}: {accepted}{found}")
    return "\n".join(dict.fromkeys(lines))


_SOURCES: dict[str | int, type[Section]] = {"pydocs": PydocsSource, "file": FileSource, "hub": HubSource}


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    """Keys that are accepted at a location of the file."""
    model: Any = Params
    for part in location:
        if part in _SOURCES:
            model = _SOURCES[part]
        elif isinstance(part, str) and part in getattr(model, "model_fields", {}):
            model = model.model_fields[part].annotation
    return sorted(getattr(model, "model_fields", {}))
