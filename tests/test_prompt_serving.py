"""A chosen prompt behind MLflow, in another process and folder, renders what stage `prompts` asked."""

from __future__ import annotations

from pathlib import Path

import elsewhere
import pandas as pd
import pytest
from prompt_toys import PARAMS, cell

from pipelines.core import (
    prompt_cells,
    prompt_files,
    prompt_rendering,
    prompts_card,
    serving,
    serving_cells,
    serving_prompt,
)
from pipelines.core.prompt_choice import Entry, Judged
from pipelines.core.prompt_tasks import Question, Task

FILES = prompt_files.load(Path(__file__).parents[1] / "mlflow/prompts")


def task(kind: str) -> Task:
    columns = prompt_rendering.COLUMNS[kind]

    def question(number: int) -> Question:
        texts = {name: f"{name} of\u2028area_{number % 5}" for name in columns}
        options = ("no", "yes") if kind != "choice" else (f"a {number}", f"b {number}", "c")
        return Question(f"q{number}", f"q{number}", texts, options, number % 2, options[number % 2])

    rows = [question(number) for number in range(20)]
    return Task("toy", kind, ("no", "yes") if kind != "choice" else (), rows[:12], rows[12:14], rows[14:])


@pytest.mark.parametrize(("kind", "strategy"), [("entailment", "few_shot_similar"), ("choice", "retrieval")])
def test_served_messages_are_the_stages(kind: str, strategy: str, tmp_path: Path) -> None:
    toy = task(kind)
    prompt = prompt_files.of(FILES, kind, "toy", strategy)
    assert prompt is not None
    use = prompt_cells.use_of(PARAMS, toy, strategy, prompt)
    one = cell([1.0] * 6)
    judged = Judged(Entry("sft", use, one), 1, one, one, [0.0] * 6)
    prompts_card.publish(tmp_path / "toy", toy, judged, "# a card")
    assert prompts_card.read(tmp_path / "toy")[2] == use
    assert serving.known(tmp_path / "toy")
    passages = ["one", "two"] if strategy == "retrieval" else []
    asked = [
        {**q.columns} | ({"choices": list(q.options)} if kind == "choice" else {})
        | ({"passages": passages} if passages else {}) for q in toy.test
    ]  # fmt: skip
    said = elsewhere.ask(tmp_path / "toy", tmp_path, asked, [{"else": "x"}])
    assert f"prompt {prompt.name} needs the columns" in said.told
    choose = prompt_rendering.chooser(use.pool, use.how, use.shots, use.seed)
    wanted = [
        prompt_rendering.messages(use._asdict(), q.columns, q.options, choose(q.columns), passages) for q in toy.test
    ]
    assert [row["messages"] for row in said.rows] == wanted
    assert len(wanted[0]) == (5 if strategy == "few_shot_similar" else 1)


def test_an_empty_cell_is_no_text() -> None:
    """MLflow lets one through; it must not be put as "None" or "nan"."""
    asking = serving_prompt.PromptModel()
    asking.cells = serving_cells
    asking.prompt = {"name": "toy", "labels": [], "columns": ["context", "choices", "passages"]}
    good = {"context": "w", "choices": ["a", "b"], "passages": ["one"]}
    for change, told in (
        ({"context": None}, "column context holds None; accepted: a text"),
        ({"context": float("nan")}, "column context holds nan; accepted: a text"),
        ({"choices": ["a", None]}, "column choices holds None; accepted: a text"),
        ({"passages": None}, "column passages holds None; accepted: a list of texts"),
    ):
        made = {name: pd.Series([cell], dtype=object) for name, cell in (good | change).items()}
        with pytest.raises(ValueError, match=f"row 0: {told}"):
            asking.predict(None, pd.DataFrame(made))
