"""Stage `report`: one page that says what the other stages made and whether it is any better.

In: the artifacts and metrics of every stage before, `params.yaml`, `mlflow/registry.yaml`, `constraints.txt`. Out:
`report.html` (one file that works offline), `report.md`, and their `plots/` as SVG.

The page is made from what the inputs hold, so a stage that is added to the graph appears in it; what is missing
is left out. Verdicts are computed here by the registry's own code, as far as they follow from the inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pipelines.core import (
    artifacts,
    policy,
    report_compression,
    report_gates,
    report_html,
    report_inputs,
    report_knowledge,
    report_plots,
    report_policy,
    report_prompts,
    report_tasks,
)
from pipelines.core.context import StageContext
from pipelines.core.gates import Row
from pipelines.core.params.report import ReportParams
from pipelines.core.report_html import Section
from pipelines.core.report_inputs import Change, Stage
from pipelines.core.report_text import code, embedded, figure, interval, number, table, visible, words

METRICS = frozenset({"stages", "plots", "samples", "gate_rules", "gate_rules_judged", "gate_rules_passed"})
SCORES: frozenset[str] = frozenset()

PLOTS = "plots"
NAMES = {
    "bits_per_byte": "bits per byte of held-out text",
    "response_bits_per_byte": "bits per byte of people's answers to held-out prompts",
    "gold": "gold score of answers to held-out prompts",
}
SPEEDS = {
    "tokens_per_second": "tokens a second",
    "episodes_per_second": "episodes a second",
    "matmul_share": "share of this machine's own matrix-product rate",
}


def run(params: ReportParams, inputs: dict[str, Path], outputs: Path, context: StageContext) -> dict[str, float]:
    """Read, judge, draw, write.

    Raises:
        ArtifactError: a metrics file or a history is not what its stage writes.
        GateError: a gate asks for what its stage did not write.
    """
    # 1. What there is.
    stages = report_inputs.stages(inputs)
    changes = report_inputs.changes(stages)
    samples = {stage.name: report_inputs.samples(stage, params.samples) for stage in stages}
    registry = inputs.get(policy.FILE)
    gates = report_gates.judge(stages, registry) if registry is not None else []
    kinds = (report_tasks, report_policy, report_compression, report_prompts, report_plots)
    plots = [plot for stage in stages for kind in kinds for plot in kind.of_stage(stage)]
    tables = (
        ("Retrieval", report_knowledge.retrieval),
        ("Answers", report_knowledge.answers),
        ("Prompts", report_prompts.text),
    )

    # 2. What it says, the answer first.
    sections = [
        Section("Is the model better?", _answer(stages, changes)),
        Section("Stages", _stages(stages)),
        Section("Curves and scores", "" if plots else "No stage wrote a history or scores.", tuple(plots)),
        *(Section(title, text) for title, tell in tables for stage in stages if (text := tell(stage))),
        Section("Gates", _gates(gates)),
        Section("Samples", _samples(samples)),
        *(
            Section(f"Card of {name}", embedded(page, 1))
            for stage in stages
            for name, page in report_inputs.cards(stage)
        ),
        *(Section(f"Checks of {stage.name}", text) for stage in stages if (text := _checks(stage))),
        Section("All metrics", _metrics(stages), folded=True),
        *_params(report_inputs.params(inputs, stages)),
        *_environment(inputs),
    ]

    # 3. The same sections twice: a page to read anywhere, and one for whoever reads Markdown.
    title = visible(params.title)
    (outputs / PLOTS).mkdir()
    for plot in plots:
        report_plots.write(plot, outputs / PLOTS / f"{plot.name}.svg")
    artifacts.write_text(outputs / "report.md", report_html.markdown(title, sections, PLOTS))
    artifacts.write_text(outputs / "report.html", report_html.html(title, sections))
    judged = [row for gate in gates for row in gate.judged]
    return {
        "stages": float(len(stages)),
        "plots": float(len(plots)),
        "samples": float(sum(len(texts) for texts in samples.values())),
        "gate_rules": float(sum(len(gate.rows) for gate in gates)),
        "gate_rules_judged": float(len(judged)),
        "gate_rules_passed": float(sum(row.passed for row in judged)),
    }


def _answer(stages: Sequence[Stage], changes: Sequence[Change]) -> str:
    """A sentence and a table for each metric that has a before, then the speeds."""
    parts = []
    rows: list[list[str]] = []
    for change in changes:
        parts.append("> " + _sentence(change))
        name = f"{words(change.stage)}: {NAMES.get(change.metric, code(change.metric))}"
        rows.append([f"{name}, before", number(change.before), ""])
        low, high = change.after_low, change.after_high
        ends = "" if low is None or high is None else interval(low, high)
        rows.append([f"{name}, **after**", f"**{number(change.after)}**", ends])
        rows.append([f"{name}, gain", number(change.gain), interval(change.gain_low, change.gain_high)])
        if change.classical is not None:
            rows.append([f"{name}, classical compressor", number(change.classical), ""])
    for stage in stages:
        rows += [
            [f"{words(stage.name)}: {told}", figure(key, stage.metrics[key]), ""]
            for key, told in SPEEDS.items()
            if key in stage.metrics
        ]
    if not changes:
        parts.append("> No stage of this report measured a model before and after.")
    if rows:
        parts.append(table(["", "value", "95 % interval"], rows, right=(1, 2)))
    return "\n\n".join(parts)


def _sentence(change: Change) -> str:
    """The answer in words, with the numbers it rests on."""
    what = f"{words(change.stage)} went from {number(change.before)} to {number(change.after)} "
    what += NAMES.get(change.metric, code(change.metric))
    ends = f"(95 % interval of the gain: {interval(change.gain_low, change.gain_high)})"
    share = f", a gain of {change.gain / change.before:.1%} " if change.before else " "
    return {
        "yes": f"**Yes.** {what}{share}{ends}.",
        "no": f"**No, it is worse.** {what} {ends}.",
        "not shown": f"**Not shown.** {what}, but the interval of the gain holds zero {ends}.",
    }[change.answer]


def _stages(stages: Sequence[Stage]) -> str:
    rows = []
    for stage in stages:
        seconds = stage.metrics.get("seconds")
        told = ", ".join(f"{code(key)} {figure(key, value)}" for key, value in stage.key_metrics)
        rows.append([words(stage.name), "" if seconds is None else f"{seconds:,.1f}", told])
    return table(["stage", "seconds", "metrics"], rows, right=(1,)) if rows else "No stage has run."


def _gates(gates: Sequence[report_gates.ModelGate]) -> str:
    """One table a registered model, rule by rule."""
    if not gates:
        return "No gate is declared."
    parts = []
    for gate in gates:
        title = f"### {words(gate.model)} (stage {words(gate.stage)})"
        if gate.rows:
            passed, judged = sum(row.passed for row in gate.judged), len(gate.judged)
            head = ["rule", "verdict", "value", "baseline", "difference, 95 %", "bound"]
            grid = table(head, [_rule(row) for row in gate.rows], right=(2, 4, 5))
            parts.append(f"{title}\n\n{passed} of the {judged} rules that are judged here passed.\n\n{grid}")
        else:
            parts.append(f"{title}\n\nIts stage is not part of this report, or made no such model.")
    parts.append(
        "Comparisons with the champion are judged when a version is registered, since the champion changes without "
        "any file changing: `sluice status` and the version's page in MLflow tell that verdict."
    )
    return "\n\n".join(parts)


def _rule(row: Row) -> list[str]:
    difference = "" if row.low is None or row.high is None else f"{row.low:+.4g} to {row.high:+.4g}"
    verdict = ("passed" if row.passed else "**FAILED**") if report_gates.is_judged(row) else row.note
    value, bound = ("" if number_ is None else number(number_) for number_ in (row.value, row.bound))
    return [code(row.rule), verdict, value, words(row.baseline or ""), difference, bound]


def _samples(samples: Mapping[str, list[str]]) -> str:
    """Samples as their stages wrote them, raw HTML and links in them shown as text."""
    parts = [
        f"### {words(name)}\n\n" + "\n\n".join(embedded(text, 0) for text in texts)
        for name, texts in samples.items()
        if texts
    ]
    return "\n\n".join(parts) or "No stage wrote samples."


def _checks(stage: Stage) -> str:
    """What Great Expectations found, suite by suite, and every expectation that was not met."""
    checks = report_inputs.checks(stage)
    if not checks:
        return ""
    rows = [[words(each.suite), str(each.expectations), str(len(each.failed))] for each in checks]
    asked, failed = sum(each.expectations for each in checks), sum(len(each.failed) for each in checks)
    lines = [f"Great Expectations: {asked - failed:,} of {asked:,} expectations are met."]
    for each in checks:
        for row in each.failed:
            examples = ", ".join(code(str(example)) for example in row.get("examples", []))
            name = f"{words(each.suite)}, {code(str(row.get('column')))}: {code(str(row.get('expectation')))}"
            lines.append(f"* {name} is not met{f', e.g. {examples}' if examples else ''}")
    return "\n\n".join([*lines, table(["suite", "expectations", "not met"], rows, right=(1, 2))])


def _metrics(stages: Sequence[Stage]) -> str:
    rows = [
        [words(stage.name), code(key), figure(key, value)]
        for stage in stages
        for key, value in sorted(stage.metrics.items())
    ]
    return table(["stage", "metric", "value"], rows, right=(2,)) if rows else "No stage wrote metrics."


def _params(sections: Mapping[str, list[tuple[str, str]]]) -> list[Section]:
    """Every dial of the stages and where it stood."""
    rows = [[words(stage), code(key), code(value)] for stage, dials in sections.items() for key, value in dials]
    return [Section("Params", table(["stage", "dial", "value"], rows), folded=True)] if rows else []


def _environment(inputs: Mapping[str, Path]) -> list[Section]:
    """Every package version that is pinned."""
    sections = []
    if "constraints.txt" in inputs:
        lines = report_inputs.text_of(inputs["constraints.txt"]).splitlines()
        pins = [line for line in lines if "==" in line and not line.startswith("#")]
        listed = ", ".join(code(pin) for pin in pins)
        sections.append(Section("Environment", f"{len(pins)} pinned packages: {listed}", folded=True))
    return sections
