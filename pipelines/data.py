"""Stage `data`: named sources in, validated tables out.

In: the sources of `params.yaml` (built-in documentation, local files, hub data sets); no artifact. Out: one
directory with `TABLE/{train,validation,test}.parquet` (knowledge: `all.parquet`, tasks: one folder each) for every
table that has rows, `validation.json` (Great Expectations' verdicts), `quarantine.parquet` (where rows were set
aside), `README.md` (data card) and `manifest.json` (rows and SHA-256 of each Parquet file).

Rows stream through: on disk between the steps, three bytes each in memory. The order of rows is the order of the
sources. Methods: MinHash LSH for near duplicates across splits (`pipelines.core.near_duplicates`).
"""

from __future__ import annotations

import importlib
import shutil
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.core import artifacts, repeated_documents
from pipelines.core.context import StageContext
from pipelines.core.faults import Ledger
from pipelines.core.intake import Labels, Taken, take_in
from pipelines.core.params.data import DataParams
from pipelines.core.selection import choose, rare_classes, too_small
from pipelines.core.split import numbers
from pipelines.core.tables import PROMPT_TABLES, SPLITS, UNSPLIT, Published, Staged, flat, row_groups

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    import pyarrow as pa
    from numpy.typing import NDArray

    from pipelines.core.validation import Judge

CHUNK_BYTES = 4 << 20  # judged together, or so many rows
CHUNK_ROWS = 16_384
SPLIT_TABLES = ("corpus", "demonstrations", "prompts", "comparisons", "tasks", "queries")
METRICS = frozenset(
    {f"rows_{table}_{name}" for table in SPLIT_TABLES for name in SPLITS}
    | {f"bytes_corpus_{name}" for name in SPLITS}
    | {"rows_knowledge", "duplicates_exact", "duplicates_prompt", "duplicates_near", "skipped_files"}
    | {"bad_rows", "bad_row_share", "expectations", "expectations_failed", "leaks"}
)


def run(params: DataParams, inputs: dict[str, Path], outputs: Path, context: StageContext) -> dict[str, float]:
    """Fill `outputs`; returns the figures named in `METRICS`.

    Raises:
        DataError: a source, row or table is not what it must be; nothing is published then.
        StoreUnavailable: the hub did not answer.
    """
    began = time.perf_counter()
    work = context.work / "rows"
    shutil.rmtree(work, ignore_errors=True)  # of a run that was killed: reading again is safer than going on

    judging = prepare_judge()

    # 1. Read, map and check every row; bad rows stop here.
    ledger = Ledger(params.on_bad_row, params.quarantine_budget, work / "quarantine.parquet")
    taken = take_in(params, work, ledger, context)
    quarantined = ledger.finish()
    read = time.perf_counter()

    # 2. Decide which rows stay.
    repeated_documents.retarget(params, taken, work, context)
    keep, removed = choose(params, taken, context)
    for key, names in rare_classes(params, taken, keep).items():
        few = f"fewer than data.min_rows ({params.min_rows}) rows in train"
        context.say(f"{key}: {len(names):,} classes are left out, such as {', '.join(names[:5])}: {few}")
    for key, found in too_small(params, taken, keep).items():
        context.say(f"{key} is left out: {found}, and data.min_rows is {params.min_rows}")
        del taken.staged[key]
    chosen = time.perf_counter()

    # 3. Write what stays, judging each chunk on the way; then judge whole tables from the files.
    judging.join()
    from pipelines.core.validation import Judge

    judge = Judge()
    counts = {key: write_table(key, taken, keep[key], outputs, judge, context) for key in sorted(taken.staged)}
    judge_tables(judge, sorted(counts), outputs, work, params.min_rows)
    artifacts.write_json(outputs / "validation.json", judge.record())
    write_documents(judge, context.documents / "validation")
    judge.refuse_failures(params.min_rows)

    # 4. Say what it is.
    if quarantined:
        shutil.copyfile(quarantined, outputs / "quarantine.parquet")
    describe(params, taken, counts, removed, ledger.bad, outputs)
    shutil.rmtree(work)
    done = time.perf_counter()
    context.measure(seconds_read=read - began, seconds_choose=chosen - read, seconds_write=done - chosen)
    return figures(counts, removed, ledger, taken, judge, outputs)


def prepare_judge() -> threading.Thread:
    """Begin to import Great Expectations, which takes seconds, while the sources are read."""
    # Imported here first: two threads that import pandas at once can see it half made.
    importlib.import_module("pandas")
    importlib.import_module("pyarrow.parquet")
    thread = threading.Thread(target=_import_expectations, daemon=True)
    thread.start()
    return thread


def _import_expectations() -> None:
    from pipelines.core import expectations  # noqa: F401


def write_table(
    key: str, taken: Taken, keep: NDArray[np.bool_], outputs: Path, judge: Judge, context: StageContext
) -> dict[str, int]:
    """Write one table's files, judging each chunk; returns rows by split (knowledge: `all`)."""
    from pipelines.core.suites import row_expectations

    staged, labels = taken.staged[key], taken.labels.get(key)
    scores = labels is not None and labels.scores
    names = ("all",) if key == UNSPLIT else SPLITS
    files = [Published(outputs / key / f"{name}.parquet", staged.schema) for name in names]
    for kept, sides in chunks(staged, keep, numbers(taken.marks[key].sides)):
        rows = named_labels(kept, labels)
        frame = flat_frame(key, rows)
        judge.check(key, partial(row_expectations, key, list(frame.columns), scores), frame)
        for side, file in enumerate(files):
            file.write(rows if key == UNSPLIT else rows.filter(sides == side))
        del kept, rows, frame  # before the next chunk is read
        context.stop_if_asked()
    for file in files:
        file.close()
    return {name: file.rows for name, file in zip(names, files, strict=True)}


def chunks(
    staged: Staged, keep: NDArray[np.bool_], sides: NDArray[np.uint8]
) -> Iterator[tuple[pa.Table, NDArray[np.uint8]]]:
    """Rows that stay and their sides, several batches at a time: to ask Great Expectations at all takes 0.1 s."""
    import numpy as np
    import pyarrow as pa

    waiting: list[pa.Table] = []
    places: list[NDArray[np.int64]] = []

    def joined() -> tuple[pa.Table, NDArray[np.uint8]]:
        found = pa.concat_tables(waiting).combine_chunks(), sides[np.concatenate(places)]
        waiting.clear()  # while a chunk is judged, nothing else of the table is in memory
        places.clear()
        return found

    for first, batch in staged.batches():
        own = np.flatnonzero(keep[first : first + batch.num_rows])
        if len(own):
            waiting.append(batch.take(own))
            places.append(own + first)
        if sum(t.nbytes for t in waiting) >= CHUNK_BYTES or sum(t.num_rows for t in waiting) >= CHUNK_ROWS:
            yield joined()
    if waiting:
        yield joined()


def named_labels(rows: pa.Table, labels: Labels | None) -> pa.Table:
    """Number the classes of a task whose labels are text: by their place in sorted order."""
    import pyarrow as pa

    if labels is None or not labels.named:
        return rows
    place = {name: number for number, name in enumerate(sorted(labels.classes))}
    column = pa.array([place[name] for name in rows["label_text"].to_pylist()], pa.int64())
    return rows.set_column(rows.column_names.index("label"), "label", column)


def flat_frame(key: str, rows: pa.Table) -> pd.DataFrame:
    """A table's rows as Great Expectations sees them: flat columns, and the share of unreadable characters."""
    import pyarrow as pa
    import pyarrow.compute as pc

    table = flat(key, rows)
    unreadable = pc.count_substring_regex(table["text"], "[\\x00-\\x08\\x0b\\x0c\\x0e-\\x1f\\x7f\\x{fffd}]")
    share = pc.divide(unreadable.cast(pa.float64()), pc.max_element_wise(pc.utf8_length(table["text"]), 1))
    frame: pd.DataFrame = table.append_column("unreadable", share).to_pandas()
    return frame


def judge_tables(judge: Judge, keys: list[str], outputs: Path, work: Path, min_rows: int) -> None:
    """Whole tables, read back: ids, rows a side, nothing held out in train; prompts and targets across tables."""
    from pipelines.core.facts import Facts, together
    from pipelines.core.suites import fact_expectations, prompt_expectations, target_expectations
    from pipelines.core.validation import SHOWN_ROWS

    prompts = []
    for key in keys:
        facts = Facts(outputs / key, key, work / f"{key.replace('/', '.')}.facts")
        suite = f"{key} (whole)"
        for about, frame in facts.frames():
            judge.check(suite, partial(fact_expectations, key, min_rows, about), frame, about)
        for verdict in judge.verdicts[suite]:
            if not verdict.success and verdict.column == "id":  # Great Expectations saw hashes; name the ids
                verdict.examples = facts.repeated_ids(SHOWN_ROWS)
        if key in PROMPT_TABLES:
            prompts.append(facts)
    for frame in together(prompts, "prompt") if prompts else ():
        judge.check("prompts of all tables", prompt_expectations, frame)
    if "queries" in keys:
        judge.check("targets that are no id in knowledge", target_expectations, lost_targets(outputs))


def lost_targets(outputs: Path) -> pd.DataFrame:
    """`source`, `row` and `target` of every query; `target` only where no row of knowledge has it as its id."""
    import numpy as np
    import pandas as pd

    def hashed(texts: pa.ChunkedArray) -> NDArray[np.uint64]:
        return pd.util.hash_array(texts.to_numpy(), categorize=False)

    place = outputs / UNSPLIT / "all.parquet"
    known = [hashed(rows["id"]) for rows in row_groups(place, ["id"])] if place.exists() else []
    ids = np.concatenate(known) if known else np.zeros(0, np.uint64)  # 8 bytes a document
    parts = []
    for name in SPLITS:
        for rows in row_groups(outputs / "queries" / f"{name}.parquet", ["source", "row", "target"]):
            frame = rows.to_pandas()
            lost = frame["target"].notna().to_numpy() & ~np.isin(hashed(rows["target"]), ids)
            parts.append(frame.assign(target=frame["target"].where(lost, None)))
    lost_or_null: pd.DataFrame = pd.concat(parts, ignore_index=True)
    return lost_or_null


def write_documents(judge: Judge, place: Path) -> None:
    """Data Docs, whole or not at all."""
    with artifacts.published(place) as draft:
        judge.write_documents(draft)


def describe(
    params: DataParams,
    taken: Taken,
    counts: dict[str, dict[str, int]],
    removed: dict[str, int],
    bad: int,
    outputs: Path,
) -> None:
    """The data card and the manifest."""
    from pipelines.core.data_card import card

    columns = {key: staged.schema.names for key, staged in taken.staged.items()}
    artifacts.write_text(outputs / "README.md", card(params, counts, columns, removed, bad))
    files = {f"{key}/{name}.parquet": rows for key, own in counts.items() for name, rows in own.items()}
    if bad:
        files["quarantine.parquet"] = bad
    manifest = {n: {"rows": rows, "sha256": artifacts.content_hash(outputs / n)} for n, rows in files.items()}
    artifacts.write_json(outputs / "manifest.json", manifest)


def figures(
    counts: dict[str, dict[str, int]],
    removed: dict[str, int],
    ledger: Ledger,
    taken: Taken,
    judge: Judge,
    outputs: Path,
) -> dict[str, float]:
    """The stage's metrics, all of `METRICS` (0 for a table without rows; tasks are added up)."""
    found: dict[str, float] = dict.fromkeys(METRICS, 0.0)
    for key, own in counts.items():
        for name, rows in own.items():
            table = key.split("/")[0]
            found["rows_knowledge" if table == UNSPLIT else f"rows_{table}_{name}"] += rows
    for name in SPLITS:
        found[f"bytes_corpus_{name}"] = text_bytes(outputs / "corpus" / f"{name}.parquet")
    verdicts = [verdict for verdicts in judge.verdicts.values() for verdict in verdicts]
    leaks = (v.observed["observed_value"] for v in verdicts if "absent_from_train" in v.kind)
    return found | {
        "duplicates_exact": float(removed["exact"]),
        "duplicates_prompt": float(removed["prompt"]),
        "duplicates_near": float(removed["near"]),
        "skipped_files": float(taken.skipped_files),
        "bad_rows": float(ledger.bad),
        "bad_row_share": ledger.share,
        "expectations": float(len(verdicts)),
        "expectations_failed": float(len(judge.failed())),
        "leaks": float(sum(leaks)),
    }


def text_bytes(file: Path) -> float:
    """UTF-8 bytes of the column `text`; 0 where there is no file."""
    import pyarrow.compute as pc

    if not file.exists():
        return 0.0
    return float(sum(pc.sum(pc.binary_length(rows["text"])).as_py() for rows in row_groups(file, ["text"])))
