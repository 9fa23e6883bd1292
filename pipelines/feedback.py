"""Stage `feedback`: the human in RLHF. Samples K answers a prompt from the SFT policy and gets them ranked.

In: `data` (prompts, or comparisons), `sft` (the policy). Out: `comparisons/{train,validation,test}.parquet` (one
row a ranking), `samples/test.parquet` (K answers to held-out prompts with their gold scores, for best-of-n; where
gold is defined), `tasks.jsonl` (what was ranked, to be ranked again), `evaluation.parquet` (one row a held-out
ranking: pairs, and those the longer answer wins), `samples.md`.

Paper: Ouyang et al., "Training language models to follow instructions with human feedback" (2022), sections 3.2 to
3.4. Who ranks is `labeler`:

* `file`: people, who rank the tasks this stage exports (`pipelines.core.ranking_tasks`);
* `reference`: simulated labelers with a gold judge behind them (`pipelines.core.labelers`, `judges`);
* `data`: comparisons that came in through the stage `data` are taken as they are.

Departures:

1. Prompts are those of the table `prompts`, not customers'; each is ranked by one labeler, a share by all.
2. Held-out prompts are ranked too: the reward model is measured on prompts, not only on pairs, it has not seen.
3. All completions of a prompt come from the policy at hand; the paper mixes in other models' answers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipelines.core import (
    artifacts,
    chats,
    completions,
    judged,
    judges,
    labelers,
    ranking_tasks,
    rankings,
    reading,
    slots,
)
from pipelines.core.context import StageContext
from pipelines.core.errors import DataError
from pipelines.core.judged import Sampled
from pipelines.core.params.feedback import FeedbackParams
from pipelines.core.rankings import Comparison, Tally

METRICS = frozenset(
    {
        "comparisons_train", "comparisons_test", "pairs_train", "pairs_test", "ties_share", "completions_per_prompt",
        "distinct_share", "longer_wins", "length_only_accuracy", "labelers", "dropped_too_long",
    }
)  # fmt: skip
OPTIONAL = frozenset(
    {
        "response_tokens", "eos_share",  # where answers are sampled
        "gold_mean",  # where they have gold scores
        "agreement", "agreement_low", "agreement_high", "kendall_tau",  # where two labelers ranked the same answers
    }
)  # fmt: skip
SCORES = frozenset({"pairs", "longer_wins"})
RESUMES = True  # answers are kept batch by batch

SPLITS = ("train", "validation", "test")


def run(params: FeedbackParams, inputs: dict[str, Path], outputs: Path, context: StageContext) -> dict[str, float]:
    """Sample, have it ranked, write and measure the rankings.

    Raises:
        ArtifactError: the data have no prompts (or, for `labeler: data`, no comparisons); a tokenizer that cannot chat.
        DataError: prompts that the judge cannot judge; rankings that are missing, not whole, or of other answers;
            rankings with nothing to learn.
        Stopped: a signal came; the answers so far are kept.
    """
    if params.labeler != "data" and (inputs["data"] / "comparisons").is_dir():
        told = f"feedback.labeler: {params.labeler} has answers of the model ranked; labeler: data takes them instead"
        context.say(f"warning: the comparisons that data.sources give are not read: {told}")

    # 1. What is to be ranked: K answers a prompt. Only held-out ones where comparisons are given.
    sampled, dropped = _sample(params, inputs, context)

    # 2. Who ranks it; written side by side, and counted.
    if params.labeler == "data":
        sides = {split: _given(params, inputs["data"], split) for split in SPLITS}
    else:
        ranked = list(
            _simulated(params, sampled) if params.labeler == "reference" else _people(params, sampled, context)
        )
        sides = {split: iter([row for at, row in ranked if at == split]) for split in SPLITS}
    tallies = {
        split: rankings.write(outputs / "comparisons" / f"{split}.parquet", rows) for split, rows in sides.items()
    }
    _refuse_nothing_to_learn(tallies)

    # 3. What else later stages and people need.
    judged.write(outputs / "samples" / "test.parquet", sampled)
    if params.labeler != "data":
        artifacts.write_text(outputs / "tasks.jsonl", ranking_tasks.export(_tasks(sampled), "jsonl"))
    page = rankings.page(outputs / "comparisons" / "test.parquet", params.samples)
    context.say(page)
    artifacts.write_text(outputs / "samples.md", page)

    # 4. What the rankings say about themselves.
    measured = [one for one in tallies["test"].measured if one.longer.pairs]  # a ranking of ties alone has no pair
    columns: dict[str, list[Any]] = {
        "id": [one.id for one in measured],
        "group": [one.group for one in measured],
        "pairs": [float(one.longer.pairs) for one in measured],
        "longer_wins": [one.longer.right for one in measured],
    }
    reading.write_evaluation(outputs / "evaluation.parquet", columns)
    return rankings.figures(tallies) | judged.figures(sampled) | {"dropped_too_long": float(dropped)}


def _sample(params: FeedbackParams, inputs: dict[str, Path], context: StageContext) -> tuple[list[Sampled], int]:
    """Answers to the prompts of this run, train first, and how many prompts were too long."""
    given = params.labeler == "data"
    if given and not (inputs["data"] / "prompts" / "test.parquet").exists():
        return [], 0
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(inputs["sft"] / "model")
    chats.check_tokenizer(tokenizer)
    needed = params.judge == "overlap" and params.labeler != "file"
    wanted = {"test": params.test_prompts} if given else {"train": params.prompts, "test": params.test_prompts}
    limits = completions.Limits("feedback", params.seed, params.max_prompt_tokens, params.too_long)
    prompts: list[completions.Prompt] = []
    dropped = 0
    for split, count in wanted.items():
        found, too_long = completions.choose(limits, inputs["data"], split, count, tokenizer, needed)
        if not (found or given):
            raise DataError(
                f"prompts/{split} has no prompt with a reference, which judge: overlap needs: give data.sources with "
                "table: prompts a column reference, or set feedback.labeler: file"
            )
        for prompt in found if params.judge == "slots" else ():
            judges.gold(params.judge, prompt.text, "", None)  # now, not after the sampling
        completions.tell_dropped(too_long, len(found), limits, split, context)
        prompts, dropped = prompts + found, dropped + too_long
    sample = _once if params.labeler == "file" else completions.complete
    answers = sample(params, prompts, inputs["sft"] / "model", context)
    return [judged.of(completed, params.judge) for completed in answers], dropped


def _once(
    params: FeedbackParams, prompts: list[completions.Prompt], place: Path, context: StageContext
) -> list[completions.Completed]:
    """As `completions.complete`, and kept for good: people rank these answers, and what was sampled again with other
    code, on another machine or with other threads could be others.
    """
    dials = (params.completions, params.max_new_tokens, params.temperature, params.seed)
    asked = [artifacts.content_hash(place), dials, [(prompt.id, prompt.text) for prompt in prompts]]
    key = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]
    kept = context.documents / f"answers-{key}.json"
    if kept.exists():
        context.say(f"{len(prompts)} prompts: the answers that were sampled for the tasks")
        answers = json.loads(kept.read_text(encoding="utf-8"))
        return [completions.Completed(prompt, **one) for prompt, one in zip(prompts, answers, strict=True)]
    found = completions.complete(params, prompts, place, context)
    artifacts.write_json(kept, [{"responses": o.responses, "tokens": o.tokens, "ended": o.ended} for o in found])
    return found


def _simulated(params: FeedbackParams, sampled: list[Sampled]) -> Iterator[tuple[str, Comparison]]:
    """Rankings by the simulated labelers, with the side of each."""
    people = {name: labelers.labeler(name, params.judge) for name in params.labelers}
    for one in sampled:
        prompt = one.completed.prompt
        for name in labelers.assigned(params.labelers, prompt.id, params.shared_share, params.seed):
            ranks = labelers.rank(people[name], params.judge, prompt.id, one.completed.responses, one.seen or [])
            yield prompt.split, _comparison(one, name, ranks)


def _people(params: FeedbackParams, sampled: list[Sampled], context: StageContext) -> Iterator[tuple[str, Comparison]]:
    """Rankings out of the file that people made, with the side of each.

    Raises:
        DataError: there is no file yet: the tasks are written for people, and the message says where and what next;
            or the file is not UTF-8, or its rankings are not of these answers, or not whole; or a side has none.
    """
    place = params.rankings_in(context.root)
    assert place is not None, "labeler: file has rankings"
    tasks = {one.task.id: one for one in sampled}
    if not place.is_file():
        _export(_tasks(sampled), params.completions, context.documents)
        raise DataError(
            f"{place}: no such file yet (feedback.rankings). {len(tasks)} tasks to rank are in {context.documents}: "
            "tasks.jsonl, label-studio.json (interface: label-studio.xml), argilla.json (a data set with text "
            f"fields prompt and response_1 to response_{params.completions}, and a ranking question with the latter"
            " as values). Have them ranked, save the rankings as that file and run the stage again: the same "
            "model and params sample the same answers."
        )
    try:
        text = place.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        found_byte = f"byte 0x{error.object[error.start]:02x}"
        raise DataError(f"{place}, line {line}: found {found_byte}; accepted: UTF-8. Save the file as UTF-8.") from None
    found = ranking_tasks.read(text, {key: one.task for key, one in tasks.items()}, str(place))
    counts = {
        split: sum(tasks[one.task].completed.prompt.split == split for one in found) for split in ("train", "test")
    }
    if not all(counts.values()):
        raise DataError(
            f"{place}: {counts['train']} rankings of training prompts and {counts['test']} of held-out ones; "
            "accepted: at least one of each. The tasks' order mixes them: rank them from the top."
        )
    context.say(f"{len(found)} rankings of {len({one.task for one in found})} of {len(tasks)} tasks")
    for ranking in found:
        one = tasks[ranking.task]
        yield one.completed.prompt.split, _comparison(one, ranking.labeler, ranking.ranks)


def _given(params: FeedbackParams, data: Path, split: str) -> Iterator[Comparison]:
    """Comparisons of the data, as they are; gold where the prompt alone gives it."""
    columns = ["id", "group", "prompt", "responses", "ranks", "labeler", "votes"]
    for row in reading.rows(data, "comparisons", split, columns):
        gold = None
        if params.judge == "slots" and slots.asked(row["prompt"]):
            gold = [judges.gold(params.judge, row["prompt"], response, None) for response in row["responses"]]
        yield Comparison(**row, gold=gold)


def _comparison(one: Sampled, labeler: str, ranks: list[int]) -> Comparison:
    prompt = one.completed.prompt
    return Comparison(
        id=f"{prompt.id}#{labeler}",
        group=prompt.group,
        prompt=prompt.text,
        responses=one.completed.responses,
        ranks=ranks,
        labeler=labeler,
        votes=None,
        gold=one.gold,
    )


def _tasks(sampled: list[Sampled]) -> list[ranking_tasks.Task]:
    """The tasks in an order that mixes train and held-out: people who stop half-way have ranked some of both."""
    return sorted((one.task for one in sampled), key=lambda task: task.id)


def _export(tasks: list[ranking_tasks.Task], responses: int, place: Path) -> None:
    """The tasks in every format, for people."""
    artifacts.write_text(place / "tasks.jsonl", ranking_tasks.export(tasks, "jsonl"))
    artifacts.write_text(place / "label-studio.json", ranking_tasks.export(tasks, "label-studio"))
    artifacts.write_text(place / "label-studio.xml", ranking_tasks.label_studio_config(responses))
    artifacts.write_text(place / "argilla.json", ranking_tasks.export(tasks, "argilla"))


def _refuse_nothing_to_learn(tallies: dict[str, Tally]) -> None:
    """Raise where a side that later stages need has no ranking, or ties alone."""
    for split in ("train", "test"):
        tally = tallies[split]
        if not tally.pairs:
            found = f"{tally.rows} rankings, all of them ties" if tally.rows else "no ranking"
            raise DataError(
                f"comparisons/{split}: {found}; accepted: at least one pair of answers that is not tied, or there is "
                "nothing to learn or to measure. Rank finer, raise temperature or max_new_tokens, or give more prompts."
            )
