"""Sequences written by hand, truncation by its rule, rows chosen by hash, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pipelines.core import rows, task_inputs
from pipelines.core.errors import ArtifactError, DataError, ParamsError
from pipelines.core.task_inputs import Limits, Special
from pipelines.core.task_sequences import longest_first, sequences

S, D, X = 26, 27, 28  # start, delimiter, extract: after the 26 letters
SPECIAL = Special(S, D, X)
ALL = Limits(None, None, 32, 0)
Rows = list[dict[str, Any]]


def letters() -> Any:
    """A tokenizer whose words are the letters: a is 0, b is 1, ...; a full stop is no token."""
    vocabulary = {chr(ord("a") + n): n for n in range(26)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="z"))
    backend.normalizer = normalizers.Replace(".", "")
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def write(place: Path, name: str, **splits: Rows) -> None:
    """Tables of one task; splits that are left out are the training rows again."""
    (place / "tasks" / name).mkdir(parents=True)
    for split in task_inputs.SPLITS:
        given = splits.get(split, splits["train"])
        whole = [{"id": f"n{n}", "group": f"g{n}", "source": "mine.csv", "row": n + 2} | r for n, r in enumerate(given)]
        known = pa.Table.from_pylist(whole or [{**splits["train"][0], "id": "", "group": "", "source": "", "row": 0}])
        pq.write_table(known.slice(0, len(whole)), place / "tasks" / name / f"{split}.parquet")


def load(place: Path, name: str, limits: Limits = ALL) -> task_inputs.Task:
    tokenizer = letters()
    return task_inputs.load(place, name, tokenizer, task_inputs.add_special(tokenizer), limits)


def two(**texts: Any) -> Rows:
    """Two rows of the same texts in two classes."""
    return [texts | {"label": n, "label_text": name} for n, name in enumerate(("no", "yes"))]


def pick(context: str, choices: list[str], label: int = 0) -> Rows:
    return [{"context": context, "choices": choices, "label": label, "label_text": choices[label]}]


def test_each_kind_as_in_figure_1(tmp_path: Path) -> None:
    write(tmp_path, "c", train=two(text="a b c"))
    write(tmp_path, "e", train=two(premise="a b", hypothesis="c"))
    write(tmp_path, "s", train=two(first="a b", second="c"))
    write(tmp_path, "k", train=[*pick("a b", ["c", "d e", "f"], 2), *pick("g", ["h", "i"], 1)])
    found = {name: load(tmp_path, name) for name in "cesk"}
    assert found["c"].train[0].sequences == ((S, 0, 1, 2, X),)
    assert found["e"].train[0].sequences == ((S, 0, 1, D, 2, X),)
    assert found["s"].train[0].sequences == ((S, 0, 1, D, 2, X), (S, 2, D, 0, 1, X))
    three, pair = sorted(found["k"].train, key=lambda example: example.id)
    assert three.sequences == ((S, 0, 1, D, 2, X), (S, 0, 1, D, 3, 4, X), (S, 0, 1, D, 5, X))
    assert pair.sequences == ((S, 6, D, 7, X), (S, 6, D, 8, X))
    assert [task.kind for task in found.values()] == ["classification", "entailment", "similarity", "choice"]
    assert [task.columns for task in found.values()] == list(rows.TASK_SHAPES)
    assert (three.label, three.parts, three.choices) == (2.0, ("a b",), ("c", "d e", "f"))
    assert (found["e"].train[0].parts, found["e"].labels, found["k"].labels) == (("a b", "c"), ("no", "yes"), ())
    assert not any(task.truncated or task.regression for task in found.values())


def test_special_tokens_are_added_once_and_their_spelling_is_text(tmp_path: Path) -> None:
    tokenizer = letters()
    assert task_inputs.add_special(tokenizer) == task_inputs.add_special(tokenizer) == SPECIAL
    assert len(tokenizer) == 29
    tokenizer.save_pretrained(tmp_path / "saved")
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path / "saved")
    assert task_inputs.add_special(again) == SPECIAL and len(again) == 29
    write(tmp_path, "c", train=two(text="a <|extract|> b"))
    assert X not in load(tmp_path, "c").train[0].sequences[0][1:-1]


def test_truncation_by_hand() -> None:
    assert sequences("classification", [[1, 2, 3]], [], SPECIAL, 5) == (((S, 1, 2, 3, X),), False)
    assert sequences("classification", [[1, 2, 3, 4]], [], SPECIAL, 5) == (((S, 1, 2, 3, X),), True)
    assert sequences("entailment", [[1, 2, 3, 4], [5, 6]], [], SPECIAL, 8) == (((S, 1, 2, 3, D, 5, 6, X),), True)
    both = ((S, 1, D, 2, 3, X), (S, 2, 3, D, 1, X))  # both orders read the same words
    assert sequences("similarity", [[1], [2, 3, 4]], [], SPECIAL, 6) == (both, True)
    # The context is cut to what the longest candidate leaves, the same for all.
    cut = ((S, 1, D, 5, X), (S, 1, D, 6, 7, X))
    assert sequences("choice", [[1, 2]], [[5], [6, 7]], SPECIAL, 6) == (cut, True)
    # A candidate that does not fit alone is cut too.
    assert sequences("choice", [[1]], [[5], [6, 7, 8]], SPECIAL, 5) == (((S, D, 5, X), (S, D, 6, 7, X)), True)


def test_longest_first_is_token_by_token() -> None:
    for one in range(1, 9):
        for other in range(1, 9):
            for room in range(2, 17):
                first, second = list(range(one)), list(range(other))
                while len(first) + len(second) > room:
                    (first if len(first) > len(second) else second).pop()
                assert longest_first(range(one), range(other), room) == (range(len(first)), range(len(second)))


def test_cut_examples_are_counted_over_all_splits(tmp_path: Path) -> None:
    short, long = two(text="a b"), two(text="a b c d")
    write(tmp_path, "c", train=[short[0], long[1]], validation=short, test=long)
    task = load(tmp_path, "c", Limits(None, None, 5, 0))
    assert task.truncated == 3
    assert {example.sequences for example in task.test} == {((S, 0, 1, 2, X),)}
    with pytest.raises(ParamsError, match="max_length is 4; accepted: at least 5"):
        load(tmp_path, "c", Limits(None, None, 4, 0))


def test_rows_are_chosen_by_their_ids(tmp_path: Path) -> None:
    def row(n: int) -> dict[str, Any]:
        return {"id": f"r{n}", "text": "a", "label": n % 2, "label_text": "ab"[n % 2]}

    write(tmp_path, "c", train=[row(n) for n in range(40)])
    write(tmp_path, "turned", train=[row(n) for n in reversed(range(40))])

    def ids(name: str, count: int | None, seed: int = 0) -> list[str]:
        return [example.id for example in load(tmp_path, name, Limits(count, count, 32, seed)).train]

    assert ids("c", 20) == ids("turned", 20) == ids("c", None)[:20]
    assert set(ids("c", 20)) != set(ids("c", 20, seed=1))
    task = load(tmp_path, "c", Limits(20, 7, 32, 0))
    assert [len(part) for part in (task.train, task.validation, task.test, task.train_all)] == [20, 7, 7, 40]
    assert task.train_all[:20] == task.train
    assert {example.sequences for example in task.train_all[20:]} == {()}
    assert {example.id for example in task.train_all} == {f"r{n}" for n in range(40)}


def test_classes_are_numbered_by_their_labels(tmp_path: Path) -> None:
    labels = {7: "z", 2: "y", 4: "x"}
    write(tmp_path, "c", train=[{"text": "a", "label": n, "label_text": name} for n, name in labels.items()])
    task = load(tmp_path, "c")
    assert task.labels == ("y", "x", "z")
    assert {example.id: example.label for example in task.test} == {"n0": 2.0, "n1": 0.0, "n2": 1.0}


def test_scores_stay_as_they_are(tmp_path: Path) -> None:
    train = [{"first": "a", "second": "b", "label": score, "label_text": None} for score in (2.5, -1.0)]
    write(tmp_path, "s", train=train, test=[train[0] | {"label": 4.25}])
    task = load(tmp_path, "s")
    assert (task.regression, task.labels, task.kind) == (True, (), "similarity")
    assert [example.label for example in task.test] == [4.25]
    write(tmp_path, "flat", train=[train[0]] * 2)
    with pytest.raises(DataError, match="every score is 2.5"):
        load(tmp_path, "flat")
    write(tmp_path, "e", train=[{"premise": "a", "hypothesis": "b", "label": 0.5, "label_text": None}])
    with pytest.raises(DataError, match="only for the columns first and second"):
        load(tmp_path, "e")


@pytest.mark.parametrize(
    ("splits", "told"),
    [
        ({"train": two(text="a"), "test": two(text="a") + [{"text": "b", "label": 2, "label_text": "so"}]},
         r'row n2 \(mine.csv, row 4\): the class "so" is not in train; accepted: "no", "yes". Give rows'),
        ({"train": two(text="a")[:1]}, 'c/train.parquet: every row is of class "no"; accepted: two or more'),
        ({"train": two(text="a"), "validation": []}, "c/validation.parquet has no rows; raise data.validation_share"),
        ({"train": [row | {"label": 1} for row in two(text="a")]}, 'label 1 is "no", "yes"; accepted: one name'),
        ({"train": [row | {"label_text": "no"} for row in two(text="a")]}, '"no" names several labels'),
        ({"train": two(text="a"), "test": two(text=" . ")}, r"c/test.parquet, row n\d .*, column text: .* no token"),
        ({"train": two(premise="a", hypothesis=".")}, "column hypothesis: the tokenizer makes no token"),
        ({"train": pick("a", ["b", "."])}, "column choices: the tokenizer makes no token"),
        ({"train": pick("a", ["b"])}, r"c/train.parquet, row n0 \(mine.csv, row 2\): 1 choices; accepted: at least"),
        ({"train": [pick("a", ["b", "c"])[0] | {"label": 2}]}, "label 2; accepted: 0 to 1"),
    ],
)  # fmt: skip
def test_refused_before_training(tmp_path: Path, splits: dict[str, Rows], told: str) -> None:
    write(tmp_path, "c", **splits)
    with pytest.raises(DataError, match=told):
        load(tmp_path, "c")


def test_a_part_that_loses_a_class_and_a_task_that_is_not_there(tmp_path: Path) -> None:
    write(tmp_path, "c", train=two(text="a"))
    with pytest.raises(DataError, match='none of the 1 rows .* of 2 is of class "(no|yes)"; raise transfer.examples'):
        load(tmp_path, "c", Limits(1, None, 32, 0))
    with pytest.raises(ArtifactError, match="no tasks/d/train.parquet; tasks there are: c"):
        load(tmp_path, "d")
