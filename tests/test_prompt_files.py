"""Prompt files: every mistake is told with file and key; what is asked is what the version is about."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.core import prompt_files, prompt_rendering
from pipelines.core.errors import UserError
from pipelines.core.prompt_strategies import NAMES, STRATEGIES

FOLDER = Path(__file__).parents[1] / "mlflow/prompts"
GOOD: dict[str, Any] = {
    "name": "a", "kind": "entailment", "strategies": ["zero_shot"], "instructions": ["Is it so?"], "notes": "a test",
    "template": "{{ instruction }} {{premise}} / {{ hypothesis }}",
    "variables": ["instruction", "premise", "hypothesis"],
}  # fmt: skip


def parse(**changed: Any) -> prompt_files.PromptFile:
    return prompt_files.parse("mlflow/prompts/a.yaml", yaml.safe_dump({**GOOD, **changed}))


def test_the_project_has_a_prompt_for_every_strategy_that_needs_none_of_its_own_kind() -> None:
    files = prompt_files.load(FOLDER)
    for kind in ("classification", "entailment", "similarity", "choice"):
        for strategy in set(NAMES) - {"tuned"}:
            assert prompt_files.of(files, kind, "any", strategy) is not None, (kind, strategy)
    assert prompt_files.of(files, "generation", "generation", "zero_shot") is not None
    assert set(STRATEGIES) - set(NAMES) == {"search"}
    for name, one in files.items():
        assert prompt_files.parse(f"{name}.yaml", prompt_files.write(one)) == one


def test_mlflow_finds_the_variables_that_are_declared() -> None:
    from mlflow.prompt.constants import PROMPT_TEMPLATE_VARIABLE_PATTERN as MLFLOWS

    for one in prompt_files.load(FOLDER).values():
        assert (
            set(MLFLOWS.findall(one.template))
            == set(one.variables)
            == set(prompt_rendering.VARIABLE.findall(one.template))
        )


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (
            {"template": "{{ premise }} {{ hypothesis }} {{ instruction }} {{ colour }}"},
            r"unknown variable {{ colour }}",
        ),
        ({"template": "{{ instruction }} {{ premise }}"}, r"the question is not in it: no {{ hypothesis }}"),
        ({"variables": ["instruction", "premise"]}, r"{{ hypothesis }}, which is not declared"),
        ({"variables": ["instruction", "premise", "hypothesis", "options"]}, r"options is declared, and the template"),
        ({"template": "{{ instruction }} {{ premise }} {{ hypothesis }} {{ a | b }}"}, r"that is no variable"),
        ({"instructions": []}, r"{{ instruction }} and instructions belong together"),
        ({"instructions": [" "]}, r"a text is blank"),
        ({"instructions": ["Does {{ hypothesis }} fit?"]}, r"in 'Does {{ hypothesis }} fit\?'; the template alone has"),
        ({"system": "You know {{ premise }}."}, r"in 'You know {{ premise }}\.'; the template alone has variables"),
        ({"strategies": ["retrieval"]}, r"{{ passages }} and strategies: \[retrieval\] belong together"),
        ({"strategies": ["role"]}, r"system: strategy role needs a text"),
        ({"strategies": ["zero_shot", "zero_shot"]}, r"named twice"),
        ({"strategies": ["zero_shots"]}, r"strategies.0: Input should be 'zero_shot'"),
        ({"strategies": ["chain_of_thought"]}, r"answer: strategies that reason need"),
        ({"strategies": ["chain_of_thought"], "answer": "("}, r"answer: not a regular expression"),
        ({"strategies": ["chain_of_thought"], "answer": "is .*"}, r"answer: 0 groups; accepted: one"),
        ({"strategies": ["zero_shot"], "answer": "(a)"}, r"answer: strategies that reason need"),
        ({"strategies": ["zero_shot", "chain_of_thought"], "answer": "(a)"}, r"a text of its own template"),
        ({"examples": ["x"]}, r"examples: only with strategies: \[tuned\]"),
        ({"colour": "red"}, r"a.yaml: colour: no such key; accepted here: answer, examples"),
        ({"kind": "poem"}, r"kind: Input should be 'classification'"),
        ({"name": "b"}, r"name: b; accepted: the file's own name, a"),
        ({"notes": ""}, r"notes: String should have at least 1"),
    ],
)
def test_mistakes(changed: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told) as error:
        parse(**changed)
    assert str(error.value).startswith("mlflow/prompts/a.yaml: ")


def test_files_that_are_none_and_files_that_claim_the_same(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no prompt"):
        prompt_files.load(tmp_path)
    for text, told in (
        ("a: [", "not valid YAML"),
        ("- a", "found list"),
        (yaml.safe_dump(GOOD) + "template: another\n", "a.yaml is not valid YAML: 'template' stands twice"),
    ):
        with pytest.raises(UserError, match=told):
            prompt_files.parse("mlflow/prompts/a.yaml", text)
    for name in "ab":
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({**GOOD, "name": name}))
    (tmp_path / "c.yaml").write_bytes(b"\xff")
    (tmp_path / "d.yml").write_text(yaml.safe_dump({**GOOD, "name": "d"}))
    with pytest.raises(UserError) as error:
        prompt_files.load(tmp_path)
    assert "c.yaml: no UTF-8" in str(error.value) and "d.yml: accepted: NAME.yaml" in str(error.value)
    assert "b.yaml: strategies: zero_shot of kind entailment is a.yaml's already" in str(error.value)


def test_a_tasks_own_prompt_wins_and_the_version_is_of_what_is_asked(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(GOOD))
    (tmp_path / "b.yaml").write_text(yaml.safe_dump({**GOOD, "name": "b", "task": "fits"}))
    files = prompt_files.load(tmp_path)
    assert prompt_files.of(files, "entailment", "fits", "zero_shot") is files["b"]
    assert prompt_files.of(files, "entailment", "else", "zero_shot") is files["a"]
    assert prompt_files.of(files, "entailment", "fits", "few_shot") is None
    assert prompt_files.of(files, "similarity", "fits", "zero_shot") is None
    assert parse(notes="other").version == parse().version != parse(instructions=["Is it?"]).version
