"""The page: same bytes twice, nothing from outside, hostile text shown as text, gates as the registry judges them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from markdown_it import MarkdownIt

from pipelines import report
from pipelines.core import artifacts, report_html, report_plots, report_text
from pipelines.core.context import StageContext
from pipelines.core.errors import ArtifactError
from pipelines.core.params.report import ReportParams
from pipelines.core.report_html import Section
from pipelines.core.report_inputs import Stage

HOSTILE = "<script>alert(1)</script> | `a` **b** [x](http://evil.example) \x07 한국어 🙂 &amp; <img src=x onerror=y>"
METRICS = {
    "bits_per_byte": 1.0, "bits_per_byte_low": 0.9, "bits_per_byte_high": 1.1, "bits_per_byte_before": 1.2,
    "bits_per_byte_classical": 2.5, "gain_bits_per_byte": 0.2, "gain_bits_per_byte_low": 0.1,
    "gain_bits_per_byte_high": 0.3, "tokens_per_second": 200.0, "matmul_share": 0.6,
}  # fmt: skip


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Path]:
    place = tmp_path / "pretrain"
    (place / "model").mkdir(parents=True)
    (place / "history.csv").write_text("step,loss,lr\n1,3.0,0.1\n2,2.0,0.05\n")
    (place / "samples.md").write_text(f"# Samples\n\n**Prompt:** {HOSTILE}\n\n- *after:* {HOSTILE}\n")
    (place / "model/README.md").write_text(f"---\nlicense: x\n---\n\n# Card\n\n{HOSTILE}\n")
    rows = {"id": list("abcde"), "group": list("abcde"), "bytes": [100] * 5}
    bits = {
        "bits": [90.0, 95.0, 100.0, 105.0, 110.0],
        "bits_before": [110.0, 114.0, 121.0, 126.0, 130.0],
        "bits_classical": [250.0, 240.0, 260.0, 245.0, 255.0],
    }
    pq.write_table(pa.table(rows | bits), place / "evaluation.parquet")
    (tmp_path / "pretrain.json").write_text(json.dumps(METRICS))
    registry = Path(__file__).parents[1] / "mlflow/registry.yaml"
    return {"pretrain": place, "metrics/pretrain.json": tmp_path / "pretrain.json", "mlflow/registry.yaml": registry}


def make(inputs: dict[str, Path], place: Path, context: StageContext) -> tuple[dict[str, float], str]:
    place.mkdir()
    metrics = report.run(ReportParams(title="Sluice", samples=4), inputs, place, context)
    return metrics, (place / "report.html").read_text()


def test_answer_gates_and_file_set(inputs: dict[str, Path], tmp_path: Path, context: StageContext) -> None:
    metrics, page = make(inputs, tmp_path / "out", context)
    assert set(metrics) == report.METRICS
    assert (metrics["gate_rules"], metrics["gate_rules_judged"], metrics["gate_rules_passed"]) == (3.0, 2.0, 2.0)
    assert "Yes." in page and "1.2" in page and "sluice-base" in page
    files = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert {"report.html", "report.md"} < files
    assert all(name.startswith("plots/") and name.endswith(".svg") for name in files - {"report.html", "report.md"})
    assert metrics["plots"] == len(files) - 2 > 0


def test_a_model_that_got_worse_fails_its_rule(inputs: dict[str, Path], tmp_path: Path, context: StageContext) -> None:
    rows = pq.read_table(inputs["pretrain"] / "evaluation.parquet").to_pydict()
    rows["bits"], rows["bits_before"] = rows["bits_before"], rows["bits"]
    pq.write_table(pa.table(rows), inputs["pretrain"] / "evaluation.parquet")
    metrics, page = make(inputs, tmp_path / "out", context)
    assert metrics["gate_rules_passed"] == 1.0 and "FAILED" in page


def test_intervals_of_a_plot_draw_groups_whole(inputs: dict[str, Path], tmp_path: Path, context: StageContext) -> None:
    """As those of the metrics beside it: of one group nothing is shown, so the range of its examples is."""
    rows = pq.read_table(inputs["pretrain"] / "evaluation.parquet").to_pydict()
    pq.write_table(pa.table(rows | {"group": list("aaaaa")}), inputs["pretrain"] / "evaluation.parquet")
    assert "after training 1 (0.9000 to 1.100)" in make(inputs, tmp_path / "out", context)[1]


def test_same_bytes_twice(inputs: dict[str, Path], tmp_path: Path, context: StageContext) -> None:
    for name in "ab":
        make(inputs, tmp_path / name, context)
    assert artifacts.content_hash(tmp_path / "a") == artifacts.content_hash(tmp_path / "b")


def test_nothing_comes_from_outside_and_hostile_text_is_text(
    inputs: dict[str, Path], tmp_path: Path, context: StageContext
) -> None:
    _, page = make(inputs, tmp_path / "out", context)
    assert not re.findall(r"<(?:script|link|iframe|object|img)\b[^>]*", page)
    assert not re.findall(r"(?:src|href)\s*=\s*[\"']?(?:https?:)?//", page)
    assert "@import" not in page and "onerror=y>" not in page.replace("&gt;", "")
    assert "&lt;script&gt;alert(1)" in page and "한국어 🙂" in page and "\x07" not in page


def test_works_with_what_there_is(inputs: dict[str, Path], tmp_path: Path, context: StageContext) -> None:
    metrics, page = make({}, tmp_path / "none", context)
    assert metrics["stages"] == 0.0 and "No stage has run" in page
    later = tmp_path / "later.json"
    later.write_text('{"rouge_l": 0.25}')
    _, page = make({**inputs, "metrics/later.json": later}, tmp_path / "more", context)
    assert "rouge_l" in page, "a stage that the report has never heard of appears in it"
    later.write_text('{"tasks": 0}')
    (tmp_path / "transfer").mkdir()
    empty = {"transfer": tmp_path / "transfer", "metrics/transfer.json": later}
    _, page = make({**inputs, **empty}, tmp_path / "no-task", context)
    assert "made no such model" in page


def test_a_damaged_metrics_file_is_named(inputs: dict[str, Path], tmp_path: Path, context: StageContext) -> None:
    inputs["metrics/pretrain.json"].write_text("[1, 2")
    with pytest.raises(ArtifactError, match=r"metrics/pretrain\.json is no JSON object"):
        make(inputs, tmp_path / "out", context)


def test_each_layer_of_escaping_holds_alone() -> None:
    page = report_html.html(HOSTILE, [Section("Data", HOSTILE)])
    assert not re.findall(r"<(?:script|a|img)\b", page), "Markdown that nobody escaped, and a title, bring no tags"
    for text in (report_text.words(HOSTILE), report_text.code(HOSTILE), report_text.embedded(HOSTILE, 0)):
        shown = MarkdownIt("commonmark", {"html": True}).enable("table").render(text)
        assert not re.findall(r"<(?:script|a|img)\b", shown), "report.md is safe with any reader of Markdown"
    assert report_text.table(["a", "b"], [["x|y", "z"]]).splitlines()[-1] == r"| x\|y | z |"


POLICY = {
    "kl": 1.2, "proxy": 2.0, "proxy_sft": 1.0, "gold": 0.6, "gold_sft": 0.5, "gold_gain": 0.1, "gold_gain_low": 0.05,
    "gold_gain_high": 0.15, "alignment_tax_bits": 0.01, "alignment_tax_bits_low": -0.01,
    "alignment_tax_bits_high": 0.03, "alignment_tax_bits_without_ptx": 0.2,
    "alignment_tax_bits_without_ptx_low": 0.1, "alignment_tax_bits_without_ptx_high": 0.3,
}  # fmt: skip


@pytest.fixture
def with_policy(inputs: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    place = tmp_path / "ppo"
    place.mkdir()
    history = [  # two arms, one after the other, and an estimate of KL below 0
        "step,score,kl,gold,only,plain_score,plain_kl", "1,0.5,-0.01,0.4,,,", "2,0.9,0.8,0.5,,,", "3,1.5,1.1,,7,,",
        "1,,,,,0.5,0.0", "2,,,,,0.8,2.5",
    ]  # fmt: skip
    curve = ["n,kl,proxy,gold,gold_low,gold_high", "1,0.0,1.0,0.5,0.4,0.6", "2,0.2,1.4,0.55,0.5,0.6"]
    (place / "history.csv").write_text("\n".join(history))
    (place / "best_of_n.csv").write_text("\n".join(curve))
    (tmp_path / "ppo.json").write_text(json.dumps(POLICY))
    dials = "compute: {device: cuda}\nppo: {lr: null, rewards: ['a|b']}\nsft: {lr: 0.123}\n"
    (tmp_path / "params.yaml").write_text(dials)
    more = {"ppo": place, "metrics/ppo.json": tmp_path / "ppo.json", "params.yaml": tmp_path / "params.yaml"}
    return {"pretrain": inputs["pretrain"]} | more


def names(place: Path) -> set[str]:
    return {path.stem for path in (place / "plots").glob("ppo-*.svg")}


def test_a_policy_against_its_distance_and_its_tax(
    with_policy: dict[str, Path], tmp_path: Path, context: StageContext
) -> None:
    for folder in ("out", "again"):
        make(with_policy, tmp_path / folder, context)
    assert artifacts.content_hash(tmp_path / "out") == artifacts.content_hash(tmp_path / "again")
    curves = {"ppo-score", "ppo-kl", "ppo-gold", "ppo-only"}
    assert names(tmp_path / "out") == curves | {"ppo-against-kl", "ppo-alignment-tax"}
    told = (tmp_path / "out/report.md").read_text().replace("\\", "")
    assert "**Yes.** ppo went from 0.5000 to 0.6000 gold score of answers to held-out prompts" in told
    assert (
        "this policy 0.01000 (-0.01000 to 0.03000); without pre-training gradients 0.2000 (0.1000 to 0.3000)." in told
    )
    assert "kl of ppo: -0.01000 at step 1, 1.100 at step 3 (without pre-training gradients 2.500)." in told


def test_a_run_to_compare_with_that_was_stopped_says_where(
    with_policy: dict[str, Path], tmp_path: Path, context: StageContext
) -> None:
    with_policy["metrics/ppo.json"].write_text(json.dumps(POLICY | {"without_ptx_stopped_after": 3.0}))
    make(with_policy, tmp_path / "out", context)
    told = (tmp_path / "out/report.md").read_text().replace("\\", "")
    assert "without pre-training gradients, stopped after iteration 3 0.2000 (0.1000 to 0.3000)." in told


def test_a_policy_that_nobody_judged(with_policy: dict[str, Path], tmp_path: Path, context: StageContext) -> None:
    metrics = {key: value for key, value in POLICY.items() if "gold" not in key and "without" not in key}
    with_policy["metrics/ppo.json"].write_text(json.dumps(metrics))
    (with_policy["ppo"] / "best_of_n.csv").write_text("n,kl,proxy\n1,0.0,1.0\n2,0.2,1.4\n")
    (with_policy["ppo"] / "history.csv").unlink()
    make(with_policy, tmp_path / "out", context)
    assert names(tmp_path / "out") == {"ppo-against-kl", "ppo-alignment-tax"}
    (with_policy["ppo"] / "best_of_n.csv").write_text("n,kl,proxy\n1,0.0,many\n")
    with pytest.raises(ArtifactError, match=r"ppo/best_of_n\.csv:2: proxy: no number: 'many'"):
        make(with_policy, tmp_path / "bad", context)


def test_a_task_whose_name_begins_as_the_second_run_of_ppo_has_its_own_curves(tmp_path: Path) -> None:
    (tmp_path / "history.csv").write_text("step,nli_loss,plain_nli_loss\n1,1.0,\n1,,2.0\n")
    plots = report_plots.of_stage(Stage("transfer", tmp_path, {}))
    assert [plot.name for plot in plots] == ["transfer-nli_loss", "transfer-plain_nli_loss"]
    assert not any("gradients" in plot.caption for plot in plots)


def test_params_of_the_stages_it_reports(with_policy: dict[str, Path], tmp_path: Path, context: StageContext) -> None:
    make(with_policy, tmp_path / "out", context)
    told = (tmp_path / "out/report.md").read_text()
    assert r'| ppo | `rewards` | `["a\|b"]` |' in told and "| ppo | `lr` | `null` |" in told
    assert "cuda" not in told and "0.123" not in told, "of no stage that is not part of it"
    with_policy["params.yaml"].write_text("- ppo")
    with pytest.raises(ArtifactError, match=r"params\.yaml is no mapping of sections"):
        make(with_policy, tmp_path / "bad", context)
