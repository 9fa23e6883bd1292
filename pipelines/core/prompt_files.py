"""`mlflow/prompts/NAME.yaml`: the source of every prompt, checked key by key. Its content hash is its version.

name: entailment-plain             # the file's name
kind: entailment                   # of the tasks: classification, entailment, similarity, choice, generation
task: null                         # of one task only: its name; such a file wins over one of the kind
strategies: [zero_shot, few_shot]  # what it is used for (core/prompt_strategies.py)
system: null                       # the chat's system message: role and rules
instructions: [Does it describe the signature?]   # the first is used, the search tries all; [] without the variable
template: |
  {{ premise }} ...
variables: [instruction, premise, hypothesis]     # all that the template has, and no other
answer: null                       # strategies that reason: a regular expression, group 1 of its last match answers
examples: []                       # strategy tuned: ids of training rows that are shown; []: none
notes: why it is as it is          # no part of the version
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from pipelines.core import strict_yaml
from pipelines.core.errors import UserError
from pipelines.core.params.section import Section, explain
from pipelines.core.prompt_rendering import COLUMNS, VARIABLE
from pipelines.core.prompt_strategies import STRATEGIES, Name

FOLDER = "mlflow/prompts"
NAME = r"^[a-z0-9][a-z0-9-]*$"


class PromptFile(Section, strict=True):
    """One prompt."""

    name: str = Field(pattern=NAME)
    kind: Literal["classification", "entailment", "similarity", "choice", "generation"]
    task: str | None = None
    strategies: list[Name] = Field(min_length=1)
    system: str | None = None
    instructions: list[str] = []
    template: str
    variables: list[str]
    answer: str | None = None
    examples: list[str] = []
    notes: str = Field(min_length=1)

    @model_validator(mode="after")
    def _whole(self) -> PromptFile:
        used = list(dict.fromkeys(VARIABLE.findall(self.template)))
        known = (*COLUMNS[self.kind], *(() if self.kind == "generation" else ("options",)), "instruction", "passages")
        self._variables(used, known)
        for name, wanted in (("instruction", bool(self.instructions)), ("passages", "retrieval" in self.strategies)):
            if (name in used) != wanted:
                key = "instructions" if name == "instruction" else "strategies: [retrieval]"
                raise ValueError(f"template: {_braced([name])} and {key} belong together: both or neither")
        if any(not one.strip() for one in (*self.instructions, self.system or "-")):
            raise ValueError("instructions, system: a text is blank")
        if braced := [one for one in (*self.instructions, self.system or "") if "{{" in one or "}}" in one]:
            raise ValueError(f"instructions, system: {{{{ or }}}} in {braced[0]!r}; the template alone has variables")
        self._strategies()
        return self

    def _variables(self, used: list[str], known: tuple[str, ...]) -> None:
        rest = VARIABLE.sub("", self.template)
        if "{{" in rest or "}}" in rest:
            raise ValueError("template: {{ or }} that is no variable; accepted: {{ name }}, letters, digits and _")
        if odd := [name for name in used if name not in known]:
            raise ValueError(f"template: unknown variable {_braced(odd)}; a {self.kind} has: {_braced(known)}")
        if lacks := [name for name in COLUMNS[self.kind] if name not in used]:
            raise ValueError(f"template: the question is not in it: no {_braced(lacks)}, which every {self.kind} has")
        if undeclared := [name for name in used if name not in self.variables]:
            raise ValueError(f"variables: the template has {_braced(undeclared)}, which is not declared")
        if unused := [name for name in self.variables if name not in used]:
            raise ValueError(f"variables: {', '.join(unused)} is declared, and the template does not use it")

    def _strategies(self) -> None:
        if len(set(self.strategies)) < len(self.strategies):
            raise ValueError(f"strategies: one is named twice in {self.strategies}")
        if "role" in self.strategies and self.system is None:
            raise ValueError("system: strategy role needs a text here")
        if "retrieval" in self.strategies and len(self.strategies) > 1:
            raise ValueError("strategies: retrieval stands alone, since no other strategy has passages")
        if self.examples and self.strategies != ["tuned"]:
            raise ValueError("examples: only with strategies: [tuned]; the others choose theirs")
        reasons = [name for name in self.strategies if STRATEGIES[name].reasons]
        if reasons and (self.kind == "generation" or len(reasons) < len(self.strategies)):
            raise ValueError(f"strategies: {', '.join(reasons)} ask for an option in a text of its own template")
        if bool(reasons) != (self.answer is not None):
            raise ValueError("answer: strategies that reason need a regular expression here, others have none")
        if self.answer is not None:
            try:
                groups = re.compile(self.answer).groups
            except re.error as error:
                raise ValueError(f"answer: not a regular expression: {error}") from None
            if groups != 1:
                raise ValueError(f"answer: {groups} groups; accepted: one, which holds the answer")

    @property
    def version(self) -> str:
        """Hash of what is asked; `notes` say why, and are no part of it."""
        told = json.dumps(self.model_dump(exclude={"notes"}), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(told.encode()).hexdigest()


def parse(name: str, text: str) -> PromptFile:
    """A prompt out of the text of a file that is called `name`.

    Raises:
        UserError: no YAML, or a key or value that is not accepted; one line for each mistake.
    """
    try:
        raw = strict_yaml.read(text)
    except yaml.YAMLError as error:
        raise UserError(f"{name} is not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{name}: expected keys {', '.join(PromptFile.model_fields)}, found {type(raw).__name__}")
    try:
        found = PromptFile.model_validate(raw)
    except ValidationError as error:
        raise UserError(explain(name, error, (), lambda location: sorted(PromptFile.model_fields))) from None
    if found.name != Path(name).stem:
        raise UserError(f"{name}: name: {found.name}; accepted: the file's own name, {Path(name).stem}")
    return found


def load(folder: Path) -> dict[str, PromptFile]:
    """Every prompt of a folder, by name.

    Raises:
        UserError: see `parse`; no prompt; or two that are used for the same: one line for each mistake.
    """
    places = sorted(folder.glob("*.yaml"))
    if not places:
        raise UserError(f"{FOLDER}: no prompt (NAME.yaml) in it")
    found: dict[str, PromptFile] = {}
    mistakes = [f"{FOLDER}/{other.name}: accepted: NAME.yaml" for other in sorted(folder.glob("*.yml"))]
    for place in places:
        try:
            found[place.stem] = parse(f"{FOLDER}/{place.name}", place.read_text(encoding="utf-8"))
        except (UserError, UnicodeDecodeError) as error:
            mistakes.append(str(error) if isinstance(error, UserError) else f"{FOLDER}/{place.name}: no UTF-8: {error}")
    uses: dict[tuple[str, str | None, str], str] = {}
    for name, prompt in found.items():
        for strategy in prompt.strategies:
            first = uses.setdefault((prompt.kind, prompt.task, strategy), name)
            if first != name:
                whose = f"task {prompt.task}" if prompt.task else f"kind {prompt.kind}"
                told = f"strategies: {strategy} of {whose} is {first}.yaml's already; accepted: one prompt for each"
                mistakes.append(f"{FOLDER}/{name}.yaml: {told}")
    if mistakes:
        raise UserError("\n".join(mistakes))
    return found


def of(prompts: Mapping[str, PromptFile], kind: str, task: str, strategy: str) -> PromptFile | None:
    """The prompt of a strategy for a task: its own before that of its kind; None where there is neither."""
    fits = [one for one in prompts.values() if one.kind == kind and strategy in one.strategies]
    own = [one for one in fits if one.task == task] or [one for one in fits if one.task is None]
    return own[0] if own else None


def unused(prompts: Mapping[str, PromptFile], kinds: Mapping[str, str], tasks: Collection[str]) -> list[str]:
    """Why a prompt of one task is used for none: a line for each such.

    Args:
        kinds: of the tasks that are asked.
        tasks: all that the data may have.
    """
    found = []
    for name, one in prompts.items():
        if one.task is None or kinds.get(one.task) == one.kind:
            continue
        if one.task in kinds:
            found.append(f"{FOLDER}/{name}.yaml is not used: task {one.task} is of kind {kinds[one.task]}")
        elif one.task not in tasks:
            found.append(f"{FOLDER}/{name}.yaml is not used: the data have no task {one.task}")
    return found


def write(prompt: PromptFile) -> str:
    """The prompt as a file that `parse` reads."""
    told: str = yaml.safe_dump(prompt.model_dump(), sort_keys=False, allow_unicode=True, width=110)
    return told


def _braced(names: list[str] | tuple[str, ...]) -> str:
    return ", ".join("{{ " + name + " }}" for name in names)
