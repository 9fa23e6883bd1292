"""Stage `transfer`: the pre-trained model fine-tuned on labelled tasks, one model a task, or one for all (`mixing`).

In: `data` (tables `tasks/NAME`), `pretrain` (the model). Out: `models/NAME/` (a Hugging Face classifier, its
tokenizer, `task.json`, a card), `history.csv`, `evaluation.parquet` (one row a held-out example of any task: the score
of the model and of what it is compared with), `confusion/NAME.csv`, `layers.csv` (score by transferred blocks, where
asked for), `zero_shot.csv` (answers of the model along its pre-training, where asked for), `samples.md`.

Paper: Radford et al., "Improving Language Understanding by Generative Pre-Training" (2018), sections 3.2 to 5. As
there: start, delimiter and extract tokens, a linear head without bias on the state of `extract`, both orders of a
similarity added, a softmax over the candidates of a choice; L3 = L2 + lambda x L1; a linear schedule with warm-up;
dropout on the classifier; ablations without auxiliary loss, without pre-training, and by transferred blocks;
zero-shot heuristics along pre-training.
Departures:

1. `special_tokens: known`: the embeddings of the three tokens begin as those of what opens a document and of the
   newline, not drawn at random; `method: last_n` and `head` compute the frozen blocks once, so there they stay so.
2. Rates follow the width from the paper's 6.25e-5 at 768; ten times that for adapters.
3. A sequence that is too long is cut by a rule that keeps the special tokens (`core/task_sequences.py`), and counted.
4. What is trained is `method` and `tuning`, as in the other stages (`core/tuning.py`); adapters are merged, and
   `NAME/merge_delta` is the score of the saved model less that with adapters.
5. Candidates of a choice, and the two orders of a similarity, share the encoding of what they begin with; in the
   auxiliary loss what they share counts once.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.core import artifacts, context_window, hardware, language_models, reading, task_inputs
from pipelines.core.context import StageContext
from pipelines.core.errors import ArtifactError, ParamsError
from pipelines.core.params.transfer import TransferParams

if TYPE_CHECKING:
    from pipelines.core.task_evaluation import Judged
    from pipelines.core.task_inputs import Limits, Task
    from pipelines.core.task_runs import Base, Run, Variant

METRICS = frozenset({"tasks"})
OPTIONAL = frozenset(
    {
        # where there is a task
        "score", "trained_parameters", "trained_share", "parameters",
        "*/score", "*/score_low", "*/score_high", "*/majority", "*/tfidf", "*/tfidf_all", "*/train", "*/test",
        "*/truncated", "*/gain_over_*",
        # by kind of task, by number of seeds, by method (lora, qlora), by ablation
        "*/accuracy", "*/macro_f1", "*/matthews", "*/log_loss", "*/pearson", "*/spearman", "*/score_of_model",
        "*/merge_delta", "*/no_auxiliary", "*/random", "*/layers_*", "*/zero_shot",
    }
)  # fmt: skip
SCORES = frozenset(
    {
        "score", "score_majority", "score_tfidf", "score_tfidf_all", "score_random", "score_zero_shot", "examples_*",
    }
)  # fmt: skip


def run(params: TransferParams, inputs: dict[str, Path], outputs: Path, context: StageContext) -> dict[str, float]:
    """Read and check every task, fine-tune a model on each, and measure them on examples they have not seen.

    Raises:
        ArtifactError: no task of a name asked for, or a base that cannot be fine-tuned.
        DataError: a table that cannot be learned from or measured on; all are read before the first is learned.
        ParamsError: a dial that does not fit the base model.
        Stopped: a signal came; the checkpoint is written.
    """
    import pandas as pd

    from pipelines.core import task_evaluation, task_runs, task_zero_shot

    # 1. Tasks and base, all checked before anything is trained.
    base, tasks, variants = _prepare(params, inputs, context)
    if not tasks:
        context.say("the data have no labelled task (a source with table: tasks and task: NAME): nothing to fine-tune")
        return {"tasks": 0.0}
    _check_adapters(params, tasks, base.place, context)

    # 2. Fine-tune: each task or all in one model, each variant, each seed; what has ended is not made again.
    ended: list[dict[str, list[Run]]] = [{} for _ in tasks]
    numbers = range(len(tasks))
    for together in [list(numbers)] if params.mixing else [[number] for number in numbers]:
        learned = [tasks[number] for number in together]
        asked = (params.of(learned[0].name), base, context)
        for variant in variants[learned[0].name]:
            every = [task_runs.run(learned, variant, n, *asked) for n in range(params.seeds)]
            for number, of_seeds in zip(together, zip(*every, strict=True), strict=True):
                ended[number][variant.name] = list(of_seeds)
    if not context.world.leads:
        return {}
    context.write_history(outputs / "history.csv")

    # 3. Judge on the test side, and publish the models with what is known of them.
    untrained: dict[int, dict[str, list[float]]] = {}
    if "zero_shot" in params.ablations:
        plain = language_models.load_tokenizer(str(base.place))
        untrained = task_zero_shot.along(inputs["pretrain"], plain, tasks, params.heuristics, context)
    final = untrained[max(untrained)] if untrained else {}
    judged = [task_evaluation.judge(task, runs, final.get(task.name)) for task, runs in zip(tasks, ended, strict=True)]
    _publish(params, tasks, judged, ended, outputs, context)
    if rows := task_zero_shot.curve(tasks, untrained, [one.metrics for one in judged]):
        pd.DataFrame(rows).to_csv(outputs / "zero_shot.csv", index=False, lineterminator="\n")
    named = zip((task.name for task in tasks), judged, strict=True)
    metrics = {f"{name}/{key}": value for name, one in named for key, value in one.metrics.items()}
    main = ended[0][task_runs.MAIN][0]
    for task, runs in zip(tasks, ended, strict=True):
        context.measure(**{f"{task.name}/seconds": runs[task_runs.MAIN][0].seconds})
    context.measure(peak_memory_mb=hardware.peak_memory_bytes() / 2**20)
    return {
        **metrics,
        "score": sum(one.metrics["score"] for one in judged) / len(judged),
        "tasks": float(len(tasks)),
        "trained_parameters": float(main.trained),
        "trained_share": main.share,
        "parameters": float(main.parameters),
    }


def measure(
    params: TransferParams, inputs: dict[str, Path], context: StageContext, model: Path, evaluation: Path
) -> None:
    """Ask another model of one task, such as today's champion, the test examples of `run`; writes its column `score`.

    Its classes are compared by their names, since data that gained or lost a class number them otherwise.

    Raises:
        ArtifactError: the directory holds no task model, or one of a task that is no longer learned, or now asks
            something else.
    """
    from pipelines.core import k_way, task_evaluation, task_metrics, task_saved, task_training

    saved = task_saved.load_saved(model, context)
    _, tasks, _ = _prepare(params, inputs, context)
    asked = next((task for task in tasks if task.name == saved.task["task"]), None)
    if asked is None:
        raise ArtifactError(f"{model}: a model of task {saved.task['task']}, which is none of today's")
    if (asked.kind, asked.regression) != (saved.task["kind"], saved.task["regression"]):
        now = f"{asked.kind}{' with scores' * asked.regression}"
        raise ArtifactError(
            f"{model}: a model of task {asked.name} when it was a {saved.task['kind']}; today's rows make it: {now}. "
            "Give the task another name in data.sources"
        )
    # In the champion's own tokens, cut to its own length: rows of the same ids, as it would be asked in use.
    special = task_inputs.add_special(saved.tokenizer)
    limits = _limits(params.of(asked.name))._replace(max_length=saved.task["max_length"])
    own = task_inputs.load(inputs["data"], asked.name, saved.tokenizer, special, limits)
    tell = k_way.teller(context, f"the champion of {own.name}")
    said = task_evaluation.answers(own, task_training.predict(saved.model, own.kind, own.test, context, tell))
    predictions = said.predictions
    if own.labels:
        today = {label: float(number) for number, label in enumerate(own.labels)}
        predictions = [today.get(saved.task["labels"][int(number)], -1.0) for number in predictions]
    none = {task.name: [0.0] * len(task.test) for task in tasks}
    scores = none | {own.name: task_metrics.example_scores(own, predictions)}
    reading.write_evaluation(evaluation, task_evaluation.rows(tasks, [{"score": scores[task.name]} for task in tasks]))


def _prepare(
    params: TransferParams, inputs: dict[str, Path], context: StageContext
) -> tuple[Base, list[Task], dict[str, list[Variant]]]:
    """Base, tasks, and the runs of each; no task where none is asked for by name and the data have none.

    Raises:
        ArtifactError: the data have not the task asked for.
        DataError, ParamsError: see `run`.
    """
    from transformers import AutoConfig

    from pipelines.core import task_card, task_runs, zero_shot

    place = inputs["pretrain"] / "model"
    tokenizer = language_models.load_tokenizer(str(place))
    special = task_inputs.add_special(tokenizer)
    there = sorted(found.name for found in (inputs["data"] / "tasks").glob("*") if found.is_dir())
    names = params.tasks or there
    for one in params.per_task:
        if one["task"] not in names:
            there_are = ", ".join(names) or "none"
            context.say(f"warning: transfer.per_task: the data have no task {one['task']}; there are: {there_are}")
    own = {name: params.of(name) for name in names}
    config = AutoConfig.from_pretrained(place)
    layers, room = config.num_hidden_layers, context_window.length(config)
    for name, dials in own.items():
        for key, asked in (("transferred_layers", dials.transferred_layers), ("tuning.layers", dials.tuning.layers)):
            if asked is not None and asked > layers:
                told = f"{asked}; the base model has {layers} blocks; accepted: 1 to {layers}"
                raise ParamsError(f"transfer.{key} (task {name}): {told}")
        if room and dials.max_length > room:
            told = f"{dials.max_length} tokens; the base model's context is {room}"
            raise ParamsError(f"transfer.max_length (task {name}): {told}")
    tasks = [task_inputs.load(inputs["data"], name, tokenizer, special, _limits(own[name])) for name in names]
    for heuristic in params.heuristics:
        if heuristic.task not in names:
            raise ParamsError(f"transfer.heuristics: no task {heuristic.task}; there are: {', '.join(names) or 'none'}")
        zero_shot.check(next(task for task in tasks if task.name == heuristic.task), heuristic)
    for task in tasks:
        context.say(task_card.example(task, tokenizer))
        if task.truncated:
            limit = f"max_length ({own[task.name].max_length} tokens)"
            context.say(f"warning: {task.truncated} examples of {task.name} were cut to {limit}")
    variants = {name: list(task_runs.variants(dials, layers)) for name, dials in own.items()}
    return task_runs.Base(place, tokenizer, special), tasks, variants


def _check_adapters(params: TransferParams, tasks: list[Task], place: Path, context: StageContext) -> None:
    """Put every task's adapters on a base without weights.

    Raises:
        ParamsError: `tuning.lora_targets` names no layer of the base.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from pipelines.core import tuning
    from pipelines.core.params.tuning import Dials

    for dials in (params.of(task.name) for task in tasks):
        if dials.adapted:
            with torch.device("meta"):
                base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(place))
            targets = Dials(lora_targets=dials.tuning.lora_targets)  # how they begin needs weights
            tuning.prepare(base, dials.model_copy(update={"tuning": targets}), context)


def _limits(params: TransferParams) -> Limits:
    from pipelines.core.task_inputs import Limits

    return Limits(params.examples, params.eval_examples, params.max_length, params.seed)


def _publish(
    params: TransferParams,
    tasks: list[Task],
    judged: list[Judged],
    ended: list[dict[str, list[Run]]],
    outputs: Path,
    context: StageContext,
) -> None:
    """Models with their cards, rows of the evaluation, tables and samples."""
    import pandas as pd

    from pipelines.core import task_card, task_evaluation, task_runs

    layers = []
    for task, one, runs in zip(tasks, judged, ended, strict=True):
        kept = runs[task_runs.MAIN][one.chosen]
        assert kept.model is not None
        shutil.copytree(kept.model, outputs / "models" / task.name)
        page = task_card.card(params.of(task.name), task, one.metrics, kept.parameters)
        artifacts.write_text(outputs / "models" / task.name / "README.md", page)
        if task.labels:
            (outputs / "confusion").mkdir(exist_ok=True)
            head, *rows = task_evaluation.confusion(task, one.answers)
            table = pd.DataFrame(rows, columns=head)  # a class may be called truth, too
            table.to_csv(outputs / "confusion" / f"{task.name}.csv", index=False, lineterminator="\n")
        layers += [
            {"task": task.name, "layers": int(key.removeprefix("layers_")), "score": value}
            for key, value in one.metrics.items()
            if key.startswith("layers_")
        ]
    if layers:
        pd.DataFrame(layers).to_csv(outputs / "layers.csv", index=False, lineterminator="\n")
    reading.write_evaluation(
        outputs / "evaluation.parquet", task_evaluation.rows(tasks, [one.scores for one in judged])
    )
    page = task_card.samples(tasks, [one.answers for one in judged], params.samples)
    context.say(page)
    artifacts.write_text(outputs / "samples.md", page)
