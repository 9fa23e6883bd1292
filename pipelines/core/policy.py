"""`mlflow/registry.yaml` as frozen, typed rules: which stages make registered models, and what their gates ask.

    models:
      sluice-base:
        stage: pretrain
        model: model                     # directory in the stage's output that is the Hugging Face model
        gate:
        - {metric: bits_per_byte, at_most: 4.0}
        - {score: bits, per: bytes, lower_is_better: true, better_than: bits_before}
        - {score: bits, per: bytes, lower_is_better: true, not_worse_than: champion, margin: 0.01}
        promote: auto

A budget bounds a key of `metrics/<stage>.json`. A comparison takes columns of `evaluation.parquet`; its baseline
is another column of the same file, `champion`, or `stage:NAME`: the same examples in the evaluation of a stage that
this one waits for.
An entry with a `*` in its name and its directory (`sluice-transfer-*`, `models/*`) stands for one model a directory;
in its rules `*` stands for the same, and a rule with `only: [NAME]` is asked of those that one of the names fits.
`where_measured: true` waives a rule where data give no such metric, or no example a weight in `per`; one that says
`by_hand_without: TEXT` as well leaves the promotion to a person then. `declared.check` holds all of it against the
graph and the stages before anything is computed.
"""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Discriminator, Field, Tag, ValidationError, model_validator

from pipelines.core import strict_yaml
from pipelines.core.errors import GateError
from pipelines.core.params.section import Location, Section, explain

FILE = "mlflow/registry.yaml"
CHAMPION = "champion"
ANY = "*"
STAGE = "stage:"


class Asked(Section, strict=True):
    """Which models a rule is asked of, and what follows where data do not measure it."""

    where_measured: bool = Field(False, description="true, and only then, for what not all data give")
    by_hand_without: str | None = Field(None, description="what measures the rule: where it was not, a person promotes")
    only: list[str] = Field([], description="what * stands for in the models that are asked; []: all")

    @model_validator(mode="after")
    def _waived_by_hand(self) -> Asked:
        if self.by_hand_without is not None and not (self.where_measured and self.by_hand_without.strip()):
            raise ValueError("by_hand_without: TEXT (what would measure the rule) belongs to where_measured: true")
        return self


class Budget(Asked, strict=True):
    """A bound on a metric of the stage."""

    metric: str
    at_most: float | None = None
    at_least: float | None = None

    @model_validator(mode="after")
    def _one_bound(self) -> Budget:
        if (self.at_most is None) == (self.at_least is None):
            raise ValueError("a budget needs one of at_most: NUMBER or at_least: NUMBER")
        return self


class Comparison(Asked, strict=True):
    """Pair by pair against a baseline, on sum(score) / sum(per), or on the mean score without `per`.

    Examples whose `per` is 0 have no part in it. `better_than` asks that the 95 % interval of the difference excludes
    zero. `not_worse_than` asks that no point of the interval is worse by more than `margin`, a share of the
    baseline's value: 0.01 is one per cent, whatever the unit of the score.
    """

    score: str
    per: str | None = None
    lower_is_better: bool
    better_than: str | None = None
    not_worse_than: str | None = None
    margin: float | None = Field(None, ge=0.0, lt=1.0)

    @model_validator(mode="after")
    def _one_baseline(self) -> Comparison:
        if (self.better_than is None) == (self.not_worse_than is None):
            raise ValueError("a comparison needs one of better_than or not_worse_than: COLUMN, stage:NAME or champion")
        if (self.not_worse_than is None) != (self.margin is None):
            raise ValueError("margin: SHARE belongs to not_worse_than, which needs it")
        return self

    @property
    def baseline(self) -> str:
        """A column, `stage:NAME` or `champion`."""
        return self.better_than or self.not_worse_than or ""


def _kind_of_rule(value: Any) -> str | None:
    keys = value if isinstance(value, dict) else getattr(value, "__dict__", {})
    return next((tag for key, tag in (("metric", "budget"), ("score", "comparison")) if key in keys), None)


Rule = Annotated[
    Annotated[Budget, Tag("budget")] | Annotated[Comparison, Tag("comparison")],
    Discriminator(
        _kind_of_rule,
        custom_error_type="rule",
        custom_error_message="a rule needs metric: NAME (a budget) or score: COLUMN (a comparison)",
    ),
]


class Best(Section, strict=True):
    """Which of the models that an entry with `*` stands for gets an alias: of the champions, the lowest."""

    alias: str = Field(pattern="^[a-z][a-z0-9_-]*$")
    lowest: str = Field(description="a metric of the stage; * stands for the model")
    only: list[str] = Field([], description="what * stands for in those that may get it; []: all")


class ModelPolicy(Section, strict=True):
    """One registered model."""

    stage: str
    model: str = Field(min_length=1, description="directory inside the stage's output")
    gate: list[Rule] = Field(min_length=1)
    promote: Literal["auto", "manual"]
    where_made: bool = Field(False, description="true: data that give the stage nothing to make it of make none")
    best: Best | None = None

    @property
    def comparisons(self) -> list[Comparison]:
        """The rules that need per-example rows."""
        return [rule for rule in self.gate if isinstance(rule, Comparison)]

    def of(self, part: str) -> ModelPolicy:
        """The policy of one of the models that an entry with `*` stands for."""

        def filled(values: dict[str, Any]) -> dict[str, Any]:
            return {key: value.replace(ANY, part) for key, value in values.items() if isinstance(value, str)}

        asked = [rule for rule in self.gate if not rule.only or any(fnmatchcase(part, name) for name in rule.only)]
        gate = [rule.model_copy(update=filled(dict(rule))) for rule in asked]
        return self.model_copy(update={"model": self.model.replace(ANY, part), "gate": gate})


class Policy(Section, strict=True):
    """The whole file."""

    models: dict[str, ModelPolicy]

    @model_validator(mode="after")
    def _one_model_a_stage(self) -> Policy:
        stages = [model.stage for model in self.models.values()]
        twice = sorted({stage for stage in stages if stages.count(stage) > 1})
        if twice:
            raise ValueError(f"one entry a stage, but several name stage {', '.join(twice)}")
        for name, model in self.models.items():
            if name.count(ANY) != model.model.count(ANY) or name.count(ANY) > 1:
                told = f"one {ANY} in both the name and the directory, or none in either"
                raise ValueError(f"{name}: model: {model.model}: {told}")
            if ANY not in name and (model.best or any(rule.only for rule in model.gate)):
                raise ValueError(f"{name}: only: and best: belong to an entry with {ANY} in its name")
            if model.best is not None and model.best.alias in (CHAMPION, "previous"):
                raise ValueError(f"{name}: best.alias: {model.best.alias} is given by promotions alone")
        return self

    def of_stage(self, stage: str, output: Path) -> list[tuple[str, ModelPolicy]]:
        """Names and policies of the models that a stage makes.

        Of an entry with `*`, and of one with `where_made`, those that `output` holds.
        """
        found: list[tuple[str, ModelPolicy]] = []
        for name, model in self.models.items():
            if model.stage != stage:
                continue
            if ANY not in name:
                absent = model.where_made and output.exists() and not (output / model.model).exists()
                return [] if absent else [(name, model)]
            shape = re.compile(re.escape(model.model).replace(re.escape(ANY), "([A-Za-z0-9_.-]+)"))
            for place in sorted(output.glob(model.model)):
                if (matched := shape.fullmatch(place.relative_to(output).as_posix())) is not None:
                    found.append((name.replace(ANY, matched[1]), model.of(matched[1])))
        return found


def load(root: Path) -> Policy:
    """Read `mlflow/registry.yaml`.

    Raises:
        GateError: no such file, no YAML, or a key or value that is not accepted; one line for each mistake.
    """
    try:
        return _policy((root / FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise GateError(f"{FILE}: no such file in {root}. Run from the repository's root.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise GateError(f"{FILE} is not valid YAML: {error}") from None
    except ValidationError as error:
        raise GateError(explain(FILE, error, _KINDS, _known_keys)) from None


@lru_cache
def _policy(text: str) -> Policy:
    """The policy of a text, read once a process."""
    return Policy.model_validate(strict_yaml.read(text))


_KINDS: dict[str | int, type[Section]] = {"budget": Budget, "comparison": Comparison}


def _known_keys(location: Location) -> list[str]:
    """Keys that are accepted at a location of the file."""
    kind = next((_KINDS[part] for part in location if part in _KINDS), None)
    return sorted((kind or (ModelPolicy if len(location) == 2 else Policy)).model_fields)
