"""The data card: what the tables are made of, in words and counts, for whoever opens the directory."""

from __future__ import annotations

from pipelines.core.params.data import DataParams, FileSource, HubSource, PydocsSource, Source
from pipelines.core.tables import SPLITS

ABOUT = {
    "corpus": "plain text for the tokenizer and pre-training",
    "demonstrations": "conversations to imitate: `messages` of role and content, the assistant's last",
    "prompts": "prompts to answer; `reference` is an answer a person wrote, where there is one",
    "comparisons": "responses to one prompt, ranked: 1 is best, ties share a rank",
    "knowledge": "passages to retrieve; an index, not split",
    "queries": "questions for measuring retrieval and answers: `target` is the knowledge row that answers it (null: "
    "none does), `answers` are accepted (null: only retrieval is measured)",
    "tasks": "labelled examples: `label` is the class (or the right choice, from 0), `label_text` its name",
}


def card(
    params: DataParams,
    rows: dict[str, dict[str, int]],
    columns: dict[str, list[str]],
    removed: dict[str, int],
    bad: int,
) -> str:
    """Markdown. `rows` and `columns` are by table key, `removed` says how many rows went and why."""
    lines = ["# Data card", "", "## Sources", ""]
    lines += [f"* {_source(source)}" for source in params.sources]
    lines += ["", "## Tables", "", "| table | train | validation | test | columns | what it is |"]
    lines += ["| --- | ---: | ---: | ---: | --- | --- |"]
    for key in sorted(rows):
        counts = (
            [f"{rows[key][name]:,}" for name in SPLITS] if "all" not in rows[key] else [f"{rows[key]['all']:,}", "", ""]
        )
        own = ", ".join(f"`{name}`" for name in columns[key])
        lines.append(f"| {key} | {' | '.join(counts)} | {own} | {ABOUT[key.split('/')[0]]} |")
    shares = f"{100 * params.validation_share:.4g}% validation, {100 * params.test_share:.4g}% test"
    lines += [
        "",
        "`source` and `row` say where a row came from (the line of a text file, the number of a Parquet row).",
        "",
        "## Split and cleaning",
        "",
        f"* Split by a hash of seed {params.seed} and `group`: {shares} of the groups. A row never changes side when "
        "rows are added. Without a group column the group is the row's own prompt or text.",
        f"* {removed['exact']:,} rows repeated another row of their table (Unicode NFKC, case and white space "
        "ignored): the first stays.",
        f"* {removed['prompt']:,} training rows had a prompt that is held out in one of the prompt tables.",
        f"* {removed['near']:,} training rows nearly repeated a held-out row (Jaccard similarity of word 5-grams at "
        f"least {params.near_duplicate:g}).",
        f"* {bad:,} bad rows were {'set aside in quarantine.parquet' if bad else 'found'}.",
        "* What every row fulfils is in validation.json, judged by Great Expectations.",
        "",
    ]
    return "\n".join(lines)


def _source(source: Source) -> str:
    if isinstance(source, PydocsSource):
        parts = ["the Python standard library"] if source.stdlib else []
        parts += list(source.packages) + [f"the folder {folder}" for folder in source.folders]
        return f"documentation in the source code of {', '.join(parts)}; licence: each package's own (Python: PSF-2.0)"
    name = source.path if isinstance(source, FileSource) else f"hub data set {source.hub}"
    if isinstance(source, HubSource):
        name += "".join(f", {part}" for part in (source.config, source.hub_split, source.revision) if part)
    table = f"{source.table}/{source.task}" if source.task else source.table
    given = f", all {source.split}" if source.split else ""
    given += ", labels are scores (real numbers)" if source.label_type == "score" else ""
    return f"{name} -> {table}{given}; licence: {source.licence or 'not told'}"
