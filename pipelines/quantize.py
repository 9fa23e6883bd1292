"""Stage `quantize`: models made smaller, a directory a variant, each measured beside the model it was made from.

In: `data` (held-out text, prompts, calibration rows), `ppo` (the policy), `distill` (the student), `reward` (the reward
model). Out: `models/NAME/` (a Hugging Face directory, its tokenizer, a card), `gguf/NAME/model.gguf` (for llama.cpp and
Ollama), `evaluation.parquet` (one row a held-out text: bits of every variant), `layers.csv` (how far each layer's
outputs are off), `pareto.csv` (bytes and bits of every variant and of what it was made from), `samples.md`.

Variants, and where they come from:

* `int8`: weight-only, symmetric per output channel, embedding and head too (`core/int8.py`); the default on a CPU.
* `int4`: 4-bit, asymmetric in groups (`core/int4.py`), its codes chosen by GPTQ (Frantar et al., 2023) on calibration
  rows: rounding to the nearest costs a model of this size a tenth of its bits.
* `nf4`: 4-bit NormalFloat with double quantization (Dettmers et al., "QLoRA", 2023) through bitsandbytes, its codes
  likewise chosen by GPTQ.
* `llm-int8`: LLM.int8 (Dettmers et al., 2022) through bitsandbytes.
* `gguf-f16`, `gguf-q8_0`, `gguf-q4_0`: llama.cpp's file (`core/gguf_export.py`).
* `dynamic-int8`: torch's dynamic quantization, the CPU baseline; it cannot be saved as a Hugging Face directory, so it
  is measured and not kept.

`aware` fine-tunes before rounding (straight-through: Bengio et al., 2013; Jacob et al., 2018).
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.core import artifacts, hardware, language_models, speed_server, variants
from pipelines.core.context import StageContext
from pipelines.core.params.quantize import QuantizeParams

if TYPE_CHECKING:
    from pipelines.core.completions import Prompt
    from pipelines.core.held_out import HeldOut
    from pipelines.core.quantization import Subject
    from pipelines.core.quantize_evaluation import Told

RESUMES = True  # variants and what was measured of them are kept
LAYER_ROWS = 1  # calibration rows on which the layers' errors are measured
METRICS = frozenset({"prompts_test"})
OPTIONAL = frozenset(
    {
        "*/bytes", "*/size_ratio", "*/linear_ratio", "*/bits_per_weight", "*/bits_per_byte",
        "*/bits_per_byte_delta", "*/loss", "*/loss_high", "*/kl", "*/agreement", "*/gold", "*/rank_agreement",
    }
)  # fmt: skip
SCORES = frozenset({"bytes", "original", "student", "int8", "int4", "nf4", "llm-int8", "dynamic-int8", "gguf-*",
                    "student-*"})  # fmt: skip


def run(params: QuantizeParams, inputs: dict[str, Path], outputs: Path, context: StageContext) -> dict[str, float]:
    """Make every variant, measure it, and publish it with its card.

    Raises:
        ParamsError: a dial that does not fit the model.
        ArtifactError: a model that cannot be made smaller, or does not fit into memory.
        Stopped: a signal came; the variants that are finished are kept.
    """
    place = inputs["ppo"] / "model" if params.model is None else language_models.fetched(params.model, "quantize.model")
    student = inputs["distill"] / "model"
    kinds = dict.fromkeys([variants.PLAIN, *params.variants, *params.student_variants])
    speed_server.start((model, kind) for model in (place, student) for kind in kinds)  # beside these imports
    from pipelines.core import packing, policy_answers, quantization, quantization_checks, quantize_evaluation
    from pipelines.core.held_out import HeldOut

    # 1. What is made smaller, checked before anything is written.
    subjects = [
        quantization.Subject("", place, params.variants, classifier=False),
        quantization.Subject("student", student, params.student_variants, classifier=False),
        quantization.Subject("reward", inputs["reward"] / "model", params.reward_variants, classifier=True),
    ]
    every = dict.fromkeys(variant for subject in subjects for variant in subject.variants)
    skipped = {variant: reason for variant in every if (reason := variants.cannot_run(variant)) is not None}
    for variant, reason in skipped.items():
        context.say(f"{variant}: skipped, since this machine cannot run it ({reason})")
    subjects = [one._replace(variants=[kind for kind in one.variants if kind not in skipped]) for one in subjects]
    subjects = [subject for subject in subjects if subject.variants or not subject.name]
    tokenizer = language_models.load_tokenizer(str(place))
    prompts = policy_answers.held_out(params, inputs["data"], tokenizer, context)
    held_out = HeldOut.of(inputs["data"], params.eval_bytes)
    aware = any(kind not in skipped for kind in params.aware.variants)
    quantization_checks.check_memory(subjects, hardware.available_memory_bytes(), aware)
    for subject in subjects:
        model = quantization.load(subject, context)
        quantization_checks.check(subject, model, params)
        known = language_models.load_tokenizer(str(subject.place))
        packing.check_rows(known, model.get_input_embeddings().weight.shape[0])
        del model

    # 2. Make and measure, one model after another: one of them is in memory at a time.
    metrics: dict[str, float] = {"prompts_test": float(len(prompts))}
    told: dict[str, quantize_evaluation.Told] = {}
    made: dict[str, tuple[quantization.Subject, str, Path]] = {}
    for subject in subjects:
        original = quantization.load(subject, context)
        tokenizer = language_models.load_tokenizer(str(subject.place))  # a model of one's own may have another
        rows = [] if subject.classifier else quantization.calibration_rows(params, inputs["data"], tokenizer)
        own: dict[str, Path] = {}
        for variant in subject.variants:
            context.progress(0, None, making=quantization.full_name(subject, variant))
            own[variant] = quantization.make(subject, variant, rows, params, context)
            made[quantization.full_name(subject, variant)] = subject, variant, own[variant]
            context.stop_if_asked()
        if subject.classifier:
            del original
            metrics |= quantize_evaluation.reward(subject, own, prompts, place, params, context)
            continue
        asked = (subject, own, original, tokenizer, held_out, prompts, rows[:LAYER_ROWS], params, context)
        told[subject.name] = quantize_evaluation.language_model(*asked)
        metrics |= told[subject.name].metrics
        del original

    # 3. Files that leave this project's registry, and so its gate, are judged here.
    absent = {}
    for name, why in skipped.items():  # of an error its class alone: what follows has paths of a machine in it
        absent[name] = f"was not made: this machine cannot run it ({why.partition(':')[0]})"
    for name, why in [missed for one in told.values() for missed in one.missed.items()]:
        del made[name]
        absent[name] = f"was withheld: {why}"
        context.say(f"{name} {absent[name]}")

    # 4. Speeds, in turns; then everything with its card.
    quantize_evaluation.speeds(quantization.timed(subjects, made), context)
    _publish(params, subjects, made, told, held_out, prompts, metrics, absent, outputs, context)
    return metrics


def _publish(
    params: QuantizeParams,
    subjects: list[Subject],
    made: dict[str, tuple[Subject, str, Path]],
    told: dict[str, Told],
    held_out: HeldOut,
    prompts: list[Prompt],
    metrics: dict[str, float],
    absent: dict[str, str],
    outputs: Path,
    context: StageContext,
) -> None:
    """Directories with their cards, rows of the evaluation, tables and samples."""
    import pandas as pd

    from pipelines.core import quantize_card

    for name, (subject, variant, place) in made.items():
        if variant == variants.DYNAMIC:
            continue
        target = outputs / ("gguf" if variant in variants.GGUF else "models") / name
        shutil.copytree(place, target)
        layers = [row for one in told.values() for row in one.layers if row["variant"] == name]
        page = quantize_card.card(name, subject, variant, params, metrics, layers, absent)
        artifacts.write_text(target / "README.md", page)
    every = {column: bits for one in told.values() for column, bits in one.bits.items()}
    held_out.write(outputs / "evaluation.parquet", every)
    layers = [row for one in told.values() for row in one.layers]
    pd.DataFrame(layers, columns=["variant", "layer", "error"]).to_csv(
        outputs / "layers.csv", index=False, lineterminator="\n"
    )
    pareto = quantize_card.pareto(subjects, made, metrics)
    pd.DataFrame(pareto).to_csv(outputs / "pareto.csv", index=False, lineterminator="\n")
    page = quantize_card.samples(prompts, {name: said for one in told.values() for name, said in one.said.items()},
                                 params.samples, absent)  # fmt: skip
    context.say(page)
    artifacts.write_text(outputs / "samples.md", page)
