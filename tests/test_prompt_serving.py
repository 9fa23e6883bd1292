"""A chosen prompt behind MLflow, in another process and folder, renders what stage `prompts` asked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from prompt_toys import PARAMS, cell

from pipelines.core import prompt_cells, prompt_files, prompt_rendering, prompts_card, serving
from pipelines.core.prompt_choice import Entry, Judged
from pipelines.core.prompt_tasks import Question, Task

FILES = prompt_files.load(Path(__file__).parents[1] / "mlflow/prompts")
CODE = """
import json, sys
there = set(sys.modules)
import mlflow, pandas as pd
model = mlflow.pyfunc.load_model(sys.argv[1])
found = model.predict(pd.DataFrame(json.load(open(sys.argv[2]))))
assert not [name for name in set(sys.modules) - there if name.partition(".")[0] == "pipelines"], "not self-contained"
try:
    model.unwrap_python_model().predict(None, pd.DataFrame({"else": ["x"]}))
except ValueError as error:
    print(json.dumps({"messages": found["messages"].tolist(), "told": str(error)}, default=list))
"""


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
    import mlflow

    toy = task(kind)
    prompt = prompt_files.of(FILES, kind, "toy", strategy)
    assert prompt is not None
    use = prompt_cells.use_of(PARAMS, toy, strategy, prompt)
    one = cell([1.0] * 6)
    judged = Judged(Entry("sft", use, one), 1, one, one, [0.0] * 6)
    prompts_card.publish(tmp_path / "toy", toy, judged, "# a card")
    assert prompts_card.read(tmp_path / "toy")[2] == use
    assert serving.known(tmp_path / "toy")
    served = serving.of(tmp_path / "toy")
    mlflow.pyfunc.save_model(
        tmp_path / "m", python_model=served.code, code_paths=served.beside, signature=served.signature,
        artifacts={"model": str(tmp_path / "toy")}, pip_requirements=["mlflow"],
    )  # fmt: skip
    passages = ["one", "two"] if strategy == "retrieval" else []
    asked = [
        {**q.columns} | ({"choices": list(q.options)} if kind == "choice" else {})
        | ({"passages": passages} if passages else {}) for q in toy.test
    ]  # fmt: skip
    (tmp_path / "rows.json").write_text(json.dumps(asked))
    command = [sys.executable, "-W", "ignore", "-c", CODE, str(tmp_path / "m"), str(tmp_path / "rows.json")]
    keep = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=keep, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert f"prompt {prompt.name} needs the columns" in said["told"]
    choose = prompt_rendering.chooser(use.pool, use.how, use.shots, use.seed)
    wanted = [
        prompt_rendering.messages(use._asdict(), q.columns, q.options, choose(q.columns), passages) for q in toy.test
    ]
    assert said["messages"] == wanted
    assert len(wanted[0]) == (5 if strategy == "few_shot_similar" else 1)
