"""Plots of fine-tuned task models: what they show of a stage's metrics and tables."""

from __future__ import annotations

from pathlib import Path
from xml.dom.minidom import parseString

import pandas as pd

from pipelines.core import report_tasks, task_evaluation
from pipelines.core.report_inputs import Stage
from pipelines.core.task_inputs import Example, Task

METRICS = {
    "kind/score": 0.75, "kind/score_low": 0.5, "kind/score_high": 0.9, "kind/tfidf": 0.6, "kind/majority": 0.5,
    "pick/score": 0.4, "pick/score_low": 0.3, "pick/score_high": 0.5, "pick/majority": 0.25, "tasks": 2.0,
}  # fmt: skip


def test_scores_confusion_and_layers(tmp_path: Path) -> None:
    (tmp_path / "confusion").mkdir()
    (tmp_path / "confusion/kind.csv").write_text("truth,yes,no\nyes,3,1\nno,0,4\n")
    (tmp_path / "layers.csv").write_text("task,layers,score\nkind,2,0.7\nkind,1,0.5\npick,1,0.3\n")
    (tmp_path / "zero_shot.csv").write_text(
        "task,step,score,low,high,relative\nkind,9,0.6,0.4,0.8,0.4\nkind,0,0.5,0.3,0.7,0.0\npick,9,0.2,0.1,0.3,\n"
    )
    plots = {plot.name: plot for plot in report_tasks.of_stage(Stage("transfer", tmp_path, METRICS))}
    assert list(plots) == ["transfer-scores", "transfer-confusion-kind", "transfer-layers", "transfer-zero-shot"]
    for plot in plots.values():
        parseString(plot.svg)
    assert "kind 0.75" in plots["transfer-scores"].caption and "pick 0.4" in plots["transfer-scores"].caption
    assert "without pre-training" not in plots["transfer-scores"].svg
    assert "7 of 8 held-out examples on the diagonal" in plots["transfer-confusion-kind"].caption
    assert "kind 0.5000 to 0.7000" in plots["transfer-layers"].caption
    assert "kind 0.6000 to 0.5000" not in plots["transfer-zero-shot"].caption  # by step, not as written
    assert "kind 0.5000 to 0.6000; pick 0.2000" in plots["transfer-zero-shot"].caption
    again = {plot.name: plot for plot in report_tasks.of_stage(Stage("transfer", tmp_path, METRICS))}
    assert again == plots, "the same bytes twice"


def test_classes_of_any_name(tmp_path: Path) -> None:
    """One called as the column of the truth, one of two lines, one with what Python takes for a line end."""
    test = [Example(f"{n}", "g", ((),), label, ("x",), ()) for n, label in enumerate((0.0, 0.0, 1.0, 2.0))]
    names = ("lie", "truth", 'odd "\n\u2028')
    task = Task("kind", "classification", names, False, [], [], test, [], 0, ("text",))
    table = task_evaluation.confusion(task, task_evaluation.Answers([0.0, 1.0, 1.0, 2.0], None))
    (tmp_path / "confusion").mkdir()
    pd.DataFrame(table[1:], columns=table[0]).to_csv(tmp_path / "confusion/kind.csv", index=False, lineterminator="\n")
    plot = report_tasks.of_stage(Stage("transfer", tmp_path, METRICS))[1]
    assert "3 of 4 held-out examples on the diagonal" in plot.caption
    parseString(plot.svg)
    assert all(f">{name}<" in plot.svg for name in ("lie", "truth", 'odd "'))


def test_a_thousand_classes_are_drawn_where_there_is_something(tmp_path: Path) -> None:
    """A square of each of a million pairs would take minutes and hundreds of megabytes."""
    names = [f"class {n}" for n in range(1000)]
    lines = ["truth," + ",".join(names)]
    lines += [f"{name}," + ",".join("1" if n == m else "0" for m in range(1000)) for n, name in enumerate(names[:3])]
    lines += [f"{name}," + ",".join("0" * 1000) for name in names[3:]]
    (tmp_path / "confusion").mkdir()
    (tmp_path / "confusion/kind.csv").write_text("\n".join(lines) + "\n")
    plot = report_tasks.of_stage(Stage("transfer", tmp_path, METRICS))[1]
    assert "3 of 3 held-out examples on the diagonal" in plot.caption and len(plot.svg) < 50_000


def test_a_stage_without_tasks_has_none(tmp_path: Path) -> None:
    assert report_tasks.of_stage(Stage("sft", tmp_path, {"rouge_l": 0.5, "score": 1.0})) == []
