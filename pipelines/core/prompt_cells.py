"""One cell of the matrix: a prompt, used one way, asked of one model about questions of a task.

An option is chosen by its mean log-probability, the robust way for a small model, or taken out of a text that reasons.
Where all questions have the same options, each option's mean over the validation questions is taken off first: what is
likely whatever is asked says nothing (Zhou et al., "Batch Calibration", 2024). It looks at no label; what the
validation side gave is kept with the prompt and used on the test side as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from pipelines.core import prompt_calls, prompt_rendering, text_scores
from pipelines.core.errors import DataError
from pipelines.core.prompt_files import PromptFile
from pipelines.core.prompt_rendering import Example, How
from pipelines.core.prompt_strategies import STRATEGIES
from pipelines.core.prompt_tasks import Question, Task

if TYPE_CHECKING:
    from pipelines.core.params.prompts import PromptsParams

Find = Callable[[str], list[str]]  # passages for a text, best first
Pool = tuple[Example, ...]


class Use(NamedTuple):
    """A prompt, ready to be asked."""

    strategy: str
    name: str  # of its file
    version: str
    kind: str
    system: str | None
    instruction: str | None
    template: str
    answer: str | None  # what takes an option out of a text
    how: How
    pool: Pool  # what examples are chosen from
    shots: int  # examples before a question
    seed: int  # of the choice


class Cell(NamedTuple):
    """What came of it, question by question."""

    scores: list[float]  # right 1 and wrong 0; chrF of a generation
    answers: list[int | None]  # number of the option; None: none could be taken out, or there are none
    texts: list[str]  # the option's name, or what was written
    prompt_tokens: list[int]
    answer_tokens: list[int]  # of all samples of a vote
    shown: list[int]  # examples before the question
    written: int  # texts that an option was to be taken out of
    unparsed: int  # those without one
    ties: int  # votes that two options won
    prior: list[float]  # what calibrates; [] where nothing does
    left_out: list[int]  # passages that there was no room for

    @property
    def tokens(self) -> float:
        """Of prompt and answer, a question."""
        return (sum(self.prompt_tokens) + sum(self.answer_tokens)) / len(self.scores)

    @property
    def score(self) -> float:
        """Mean over the questions."""
        return sum(self.scores) / len(self.scores)


class _Asked(NamedTuple):
    """Prompts as they fit."""

    ids: list[list[int]]
    shown: list[int]
    left_out: list[int]  # passages


def use(prompt: PromptFile, strategy: str, instruction: str | None, how: How, pool: Pool, shots: int, seed: int) -> Use:
    """A prompt's file, used one way."""
    told = (prompt.kind, prompt.system, instruction, prompt.template, prompt.answer)
    return Use(strategy, prompt.name, prompt.version, *told, how, pool, shots, seed)


def use_of(params: PromptsParams, task: Task, strategy: str, prompt: PromptFile) -> Use:
    """A strategy's prompt with the examples that belong to it.

    Raises:
        DataError: a strategy that shows examples, and a task without training rows; an example that is not there.
    """
    how = STRATEGIES[strategy].examples
    first = prompt.instructions[0] if prompt.instructions else None
    pool = [one.example() for one in task.pool] if how != "none" else []
    if how == "given":
        known = {one.id: one for one in pool}
        if lost := [one for one in prompt.examples if one not in known]:
            told = f"mlflow/prompts/{prompt.name}.yaml: examples: {lost[0]} is none of the {len(pool)} training rows"
            raise DataError(f"{told} of task {task.name} that prompts.pool takes")
        return use(prompt, strategy, first, how, tuple(known[one] for one in prompt.examples), 0, params.seed)
    if how != "none" and not pool:
        raise DataError(f"prompts.strategies: {strategy} shows training rows; task {task.name} has none: add some")
    return use(prompt, strategy, first, how, tuple(pool), params.examples if pool else 0, params.seed)


def ask(
    params: PromptsParams,
    asks: Use,
    task: Task,
    questions: Sequence[Question],
    speaker: prompt_calls.Speaker,
    *,
    prior: Sequence[float] | None = None,
    find: Find | None = None,
) -> Cell:
    """Ask every question.

    Args:
        prior: what calibrated the same use on the validation side; None: these questions are that side.
        find: gives passages; needed by a strategy that has them.

    Raises:
        DataError: a question that does not fit the model's context, even alone.
        Stopped: a signal came; what was said so far is kept.
    """
    strategy, what = STRATEGIES[asks.strategy], f"{task.name}, {asks.strategy}, {speaker.name}"
    writes = strategy.reasons or not questions[0].options
    longest = max((len(speaker.response(one)) for question in questions for one in question.options), default=0)
    room = speaker.room(params.max_new_tokens if writes else longest)
    asked = _fitted(asks, questions, speaker, room, find if strategy.passages else None)
    sizes = [len(ids) for ids in asked.ids]
    if not writes:
        scored = speaker.options(asked.ids, [one.options for one in questions], what)
        rows = [one.log_probabilities for one in scored]
        calibrates = _means(rows) if prior is None and task.classes else list(prior or [])
        answers: list[int | None] = [likeliest(row, calibrates) for row in rows]
        texts = [one.options[number or 0] for one, number in zip(questions, answers, strict=True)]
        spent = [one.tokens[number or 0] for one, number in zip(scored, answers, strict=True)]
        scores = [float(one.label == number) for one, number in zip(questions, answers, strict=True)]
        return Cell(scores, answers, texts, sizes, spent, asked.shown, 0, 0, 0, calibrates, asked.left_out)
    count, temperature = (params.votes, params.temperature) if strategy.votes else (1, 0.0)
    seed = int(prompt_rendering.hashed(params.seed, task.name, asks.strategy), 16) % 2**31
    said = speaker.texts(asked.ids, count, params.max_new_tokens, temperature, seed, what)
    spent = [sum(one.tokens) for one in said]
    if not questions[0].options:
        written = [one.texts[0] for one in said]
        scores = [text_scores.chrf(text, one.answer) for text, one in zip(written, questions, strict=True)]
        return Cell(scores, [None] * len(said), written, sizes, spent, asked.shown, 0, 0, 0, [], asked.left_out)
    return _voted(asks, questions, [one.texts for one in said], (sizes, spent, asked.shown))


def likeliest(log_probabilities: Sequence[float], prior: Sequence[float]) -> int:
    """Number of the option that is likeliest, less its prior where there is one; of equal ones the first."""
    known = prior or [0.0] * len(log_probabilities)
    gain = [value - usual for value, usual in zip(log_probabilities, known, strict=True)]
    return max(range(len(gain)), key=gain.__getitem__)


def _voted(
    asks: Use, questions: Sequence[Question], texts: Sequence[list[str]], sizes: tuple[list[int], list[int], list[int]]
) -> Cell:
    """Options taken out of texts, several a question or one."""
    assert asks.answer is not None
    answers: list[int | None] = []
    kept, unparsed, ties = [], 0, 0
    for question, written in zip(questions, texts, strict=True):
        found = [prompt_rendering.extract(asks.answer, one, asks.kind, question.options) for one in written]
        answer, tied = prompt_rendering.vote(found)
        answers.append(answer)
        kept.append(written[found.index(answer)])
        unparsed += found.count(None)
        ties += tied
    scores = [float(one.label == answer) for one, answer in zip(questions, answers, strict=True)]
    return Cell(scores, answers, kept, *sizes, sum(map(len, texts)), unparsed, ties, [], [])


def _fitted(
    asks: Use, questions: Sequence[Question], speaker: prompt_calls.Speaker, room: int, find: Find | None
) -> _Asked:
    """Prompts of at most the tokens there is room for: examples go first, the farthest before the nearest."""
    choose = prompt_rendering.chooser(asks.pool, asks.how, asks.shots, asks.seed)
    chat = asks._asdict()
    made = _Asked([], [], [])
    for question in questions:
        shown = choose(question.columns)
        found = passages = find("\n".join(question.columns.values())) if find is not None else []
        while True:
            turns = prompt_rendering.messages(chat, question.columns, question.options, shown, passages)
            ids = speaker.prompt(turns)
            if len(ids) <= room:
                break
            if shown:
                shown = shown[1:]
            elif len(passages) > 1:  # the best one stays: a template with passages says something about them
                passages = passages[:-1]
            else:
                raise DataError(
                    f"{asks.name}, row {question.id}: {len(ids)} tokens without an example, and there is room "
                    f"for {room}: raise prompts.max_prompt_tokens, as far as the model's context goes"
                )
        for column, value in zip(made, (ids, len(shown), len(found) - len(passages)), strict=True):
            column.append(value)  # type: ignore[attr-defined]  # three lists, each of its own type
    return made


def _means(rows: Sequence[Sequence[float]]) -> list[float]:
    """Mean of each column."""
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]
