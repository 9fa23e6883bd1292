"""`sluice ask`: the answer, its sources and the time; one message and an exit code for what cannot be answered."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import stores
import yaml
from answering import ROOT, FakeIndex, index, made, make_root, root
from assistants import folder
from conftest import own_environment
from models import NO_SYSTEM
from rich.console import Console

from flows import assistants
from flows.ask import Options, ask
from pipelines.core import assistant, environment, generate, retrieval, store, terminal
from pipelines.core.errors import ArtifactError, ParamsError, StoreUnavailable, UserError
from pipelines.core.generate import Sampling
from pipelines.core.lineage import CONTENT

__all__ = ["index", "made", "root"]
QUESTION = "how do I flip an array?"
PLAIN = Options(None, True, False, None, 0.0, 1.0, 0)


def said(root: Path, options: Options = PLAIN, question: str = QUESTION, terminal: bool = False) -> str:
    file = io.StringIO()
    ask(root, root, question, options, Console(file=file, width=80, force_terminal=terminal, color_system=None))
    return file.getvalue()


def test_answer_sources_and_times(root: Path, index: FakeIndex) -> None:
    told = json.loads(said(root, PLAIN._replace(json=True)))
    assert told["question"] == QUESTION and told["answer"].strip() and told["refused"] is False
    assert [(one["number"], one["url"], one["line"]) for one in told["sources"]] == [
        (1, "numpy/lib/function_base.py#L21", 21),
        (2, "notes.md", 7),
    ]
    seconds = told["seconds"]
    assert 0 < seconds["search"] <= seconds["first"] <= seconds["all"] and seconds["load"] > 0
    lines = said(root).splitlines()
    # What a tokenizer cannot decode and what steers a terminal apart, the text is the answer.
    assert lines[0] == terminal.clean(told["answer"]).splitlines()[0]
    assert any(line.startswith("[1] numpy.flip  (numpy/lib/function_base.py, line 21)") for line in lines)
    assert any(line.startswith("[2] Notes[2J  (notes.md, line 7)") for line in lines), "a title cannot clear the screen"
    assert lines[-1].startswith("artifacts/answers/assistant: loaded in ") and "first word after " in lines[-1]
    live = said(root, terminal=True).splitlines()
    assert [line for line in live if line.startswith("[1]")] == [line for line in lines if line.startswith("[1]")]
    assert index.asked == [QUESTION] * 3


@pytest.mark.parametrize(
    ("pieces", "again"),
    [
        (["Reverse the", " order."], ["With the numbers of its sources:", "Reverse the order. [1]"]),
        (["Flip [1] it [7]."], ["With the numbers of its sources:", "Flip [1] it."]),
        (["Turn it over [7]."], ["Without numbers that name no source:", "Turn it over."]),
        ([" Flip it [1].\n"], []),
    ],
)  # fmt: skip
def test_numbers_that_come_or_go_behind_the_stream_are_shown(
    root: Path, index: FakeIndex, monkeypatch: pytest.MonkeyPatch, pieces: list[str], again: list[str]
) -> None:
    monkeypatch.setattr(generate, "stream", lambda *arguments: iter(pieces))
    live, streamed = said(root, terminal=True), "".join(pieces)
    assert live.startswith("\n".join([streamed, "", *again, *[""] * bool(again), "[1] numpy.flip  ("])), live
    assert "of its sources:" not in said(root) and "no source:" not in said(root)  # what is not streamed is told once


def test_what_an_answer_spells_is_no_emoji_and_a_tab_stays(
    root: Path, index: FakeIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "stream", lambda *arguments: iter(["all:\n\tgcc d[:key:] :x:"]))
    assert said(root).startswith("all:\n\tgcc d[:key:] :x:\n")


def test_what_steers_a_terminal_is_left_out_or_in_json_spelled_out() -> None:
    text = "a\x1b[2J\x9b\u202eb\u2066\tc\n"
    assert terminal.clean(text) == "a[2Jb\tc\n"
    for spelled in (False, True):
        told = assistants.as_json({"한": text}, spelled)
        assert json.loads(told) == {"한": text} and told.isascii() is spelled
        assert not set(told) & set("\x1b\x9b\u202e\u2066")


def test_a_document_writes_no_line_among_the_sources() -> None:
    title, url = "Notes\n[2] numpy.flip  (numpy.py, line 1)", "a.md\n\x85The numbers were put in\u2028by us#L3"
    source = assistant.Source(1, title, url, 3, "text", 0.5, True)
    (line,) = assistants.source_lines(assistant.Reply("Yes [1].", [source], False, True, 0, {}))
    assert line == "[1] Notes [2] numpy.flip (numpy.py, line 1)  (a.md The numbers were put in by us, line 3)"


@pytest.mark.parametrize(
    ("url", "line", "where"),
    [
        ("shapes/areas.py#L12", 12, "shapes/areas.py, line 12"),
        ("https://example.org/wiki/Seoul#Legacy", 3, "https://example.org/wiki/Seoul#Legacy, line 3"),
        ("https://example.org/a.py#L10-L20", 3, "https://example.org/a.py#L10-L20, line 3"),
        (None, 3, "its text, line 3"),
    ],
)
def test_only_a_number_behind_a_url_is_a_line(url: str | None, line: int, where: str) -> None:
    source = assistant.Source(1, "Seoul", url, line, "text", 0.5, True)
    (told,) = assistants.source_lines(assistant.Reply("Yes [1].", [source], False, True, 0, {}))
    assert told == f"[1] Seoul  ({where})"


def test_a_document_without_a_url_is_told_by_its_file() -> None:
    source = assistant.Source(1, "XSS", None, 3, "text", 0.5, True, "sheets/xss.md")
    (line,) = assistants.source_lines(assistant.Reply("Yes [1].", [source], False, True, 0, {}))
    assert line == "[1] XSS  (sheets/xss.md, line 3 of its text)"


def test_options_change_the_answer(root: Path, index: FakeIndex) -> None:
    def answer(**changes: object) -> str:
        return str(json.loads(said(root, PLAIN._replace(json=True, **changes)))["answer"])

    greedy, warm = answer(), answer(temperature=2.0)
    assert greedy == answer(seed=3) and warm == answer(temperature=2.0)
    assert len({greedy, warm, answer(temperature=2.0, seed=3), answer(temperature=2.0, top_p=0.5)}) == 4
    assert len(answer(max_new_tokens=2)) < len(greedy)
    before = len(index.asked)
    alone = json.loads(said(root, PLAIN._replace(json=True, look_up=False)))
    assert alone["sources"] == [] and alone["answer"] != greedy and len(index.asked) == before


def test_what_nothing_answers_is_not_answered(root: Path, index: FakeIndex) -> None:
    told = json.loads(said(root, PLAIN._replace(json=True), "who won the cup?"))
    assert told["refused"] is True and told["sources"] == [] and told["answer"].startswith("I don't know")


def test_korean_is_asked_as_it_is(root: Path, index: FakeIndex) -> None:
    assert json.loads(said(root, PLAIN._replace(json=True), "배열(array)을 뒤집으려면? 🙂"))["question"].startswith(
        "배열"
    )
    assert index.asked == ["배열(array)을 뒤집으려면? 🙂"]


@pytest.mark.parametrize(
    ("question", "options", "kind", "message"),
    [
        (" \n", PLAIN, UserError, "the question is empty. For example: sluice ask"),
        ("a\udcff", PLAIN, UserError, "the question is not UTF-8 text"),
        ("array " * 20_000, PLAIN, UserError, r"the question takes \d{5,} tokens.*context of 1024"),
        ("x", PLAIN._replace(top_p=2.0), ParamsError, r"^--top-p: 2.0; accepted: above 0"),
        ("x", PLAIN._replace(max_new_tokens=0), ParamsError, r"^--max-new-tokens: 0; accepted: 1 or more"),
        ("x", PLAIN._replace(model="nothing"), UserError, "no model 'nothing': no such directory, and nothing is reg"),
        ("x", PLAIN._replace(model="./nothing"), UserError, "./nothing: no such directory, and no registered version"),
        ("x", PLAIN._replace(model="artifacts"), UserError, r"artifacts: neither assistant.json .* nor config.json"),
    ],
)  # fmt: skip
def test_mistakes_are_told(
    root: Path, index: FakeIndex, question: str, options: Options, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        said(root, options, question)
    assert not (root / ".sluice/mlflow").exists(), "asking makes no store"


def test_an_index_of_another_embedder_and_damaged_folders(
    root: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(place: Path, embedder: str | None = None) -> None:
        raise retrieval.IndexDamaged(f"{place.name}: made with embedder big, not {embedder}")

    monkeypatch.setattr(retrieval.Index, "open", refuse)
    with pytest.raises(
        ArtifactError, match="answers/assistant cannot be opened: index: made with embedder big, not tiny"
    ):
        said(root)
    alone = PLAIN._replace(look_up=False)
    said(root, alone)  # needs no index
    folder = root / "artifacts/answers/assistant"
    (folder / "assistant.json").write_text("{")
    with pytest.raises(ArtifactError, match="assistant.json is damaged"):
        said(root, alone)
    place = folder / "model"
    whole = (place / "tokenizer.json").read_bytes()
    (place / "tokenizer.json").write_bytes(whole.replace(b'"merges"', b'"fusions"'))  # as of a later library
    with pytest.raises(ArtifactError, match="answers/assistant/model cannot be opened: no tokenizer could be loaded"):
        said(root, alone._replace(model=str(place)))
    (place / "tokenizer.json").write_bytes(whole)
    (place / "model.safetensors").write_bytes((place / "model.safetensors").read_bytes()[:2000])
    with pytest.raises(ArtifactError, match="answers/assistant/model cannot be opened: "):
        said(root, alone._replace(model=str(place)))
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForSequenceClassification"]}))
    with pytest.raises(UserError, match="is a LlamaForSequenceClassification: it judges texts and writes none"):
        said(root, alone._replace(model=str(place)))
    (place / "config.json").write_text("{")
    with pytest.raises(ArtifactError, match="config.json is damaged"):
        said(root, alone._replace(model=str(place)))


@pytest.mark.parametrize(
    "name", ["chunks.parquet", "vectors.npy", "bm25/indices.csc.index.npy", "embedder/model.safetensors"]
)
def test_a_changed_byte_of_the_index_is_told(name: str, tmp_path: Path) -> None:
    root = make_root(tmp_path / "root")
    folder(root / "artifacts/answers/assistant")
    assert "shapes" in said(root)
    place = root / "artifacts/answers/assistant/index" / name
    held = bytearray(place.read_bytes())
    at = held.find(b"area of shape")  # in the text that is read when it is shown; elsewhere among the values
    held[at if at >= 0 else 200] ^= 255
    place.write_bytes(held)
    told = rf"answers/assistant cannot be opened: .*{name}: its SHA-256 is \w+, the manifest says \w+; build the index"
    with pytest.raises(ArtifactError, match=told):
        said(root)


def test_another_model_answers_from_the_assistant_s_index(root: Path, made: Path, index: FakeIndex) -> None:
    told = json.loads(said(root, PLAIN._replace(json=True, model=str(made))))
    assert len(told["sources"]) == 2 and told["model"] == str(made) and index.asked == [QUESTION]
    (made / "tokenizer_config.json").rename(made / "kept")
    template = (made / "chat_template.jinja").rename(made / "kept.jinja")
    try:
        with pytest.raises(UserError, match="has no chat template, so nothing can be asked"):
            said(root, PLAIN._replace(model=str(made)))
    finally:
        (made / "kept").rename(made / "tokenizer_config.json")
        template.rename(made / "chat_template.jinja")


def test_a_template_without_a_place_for_a_system_text_is_told(root: Path, made: Path, index: FakeIndex) -> None:
    own = Path(shutil.copytree(made, root / "own"))
    template = (own / "chat_template.jinja").read_text()
    (own / "chat_template.jinja").write_text(NO_SYSTEM + template)
    asked = PLAIN._replace(json=True, model=str(own))
    with pytest.raises(UserError, match="chat template refuses this chat: System role not supported"):
        said(root, asked)
    assert json.loads(said(root, asked._replace(look_up=False)))["answer"]


def test_registered_versions_answer(root: Path, made: Path, index: FakeIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model and an assistant as MLflow keeps them; the champion answers where no assistant's folder stands."""
    stores.make_database(root / ".sluice/mlflow/mlflow.db")
    client, _ = store.connect(root)
    folder = root / "artifacts/answers/assistant"
    for name, path, files in (("sluice-sft", "artifacts/model", made), ("sluice-rag", "artifacts/assistant", folder)):
        logged = root / ".sluice/logged" / name
        shutil.copytree(files, logged / path)
        described = {"flavors": {"python_function": {"artifacts": {"model": {"path": path, "uri": "x"}}}}}
        (logged / "MLmodel").write_text(yaml.safe_dump(described))
        client.create_registered_model(name)
        client.create_model_version(name, source=f"file://{logged}")
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="there is no assistant yet: type `sluice run answers`"):
        said(root)
    client.set_registered_model_alias("sluice-rag", "champion", "1")
    told = json.loads(said(root, PLAIN._replace(json=True)))
    assert told["model"] == "sluice-rag 1" and len(told["sources"]) == 2
    told = json.loads(said(root, PLAIN._replace(json=True, model="sluice-sft/1")))
    assert told["model"] == "sluice-sft 1" and len(told["sources"]) == 2
    with pytest.raises(UserError, match="sluice-sft has no alias 'champion'; there are: none"):
        said(root, PLAIN._replace(model="sluice-sft"))
    with pytest.raises(UserError, match="no model 'sluice-x' in the registry; there are: sluice-rag, sluice-sft"):
        said(root, PLAIN._replace(model="sluice-x"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(StoreUnavailable):
        said(root)


def test_a_version_on_a_server_is_fetched_once(root: Path, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    fetched: list[str] = []

    def download(uri: str, dst_path: str, tracking_uri: str) -> None:
        fetched.append(uri)
        (Path(dst_path) / "MLmodel").write_text("flavors: {python_function: {artifacts: {model: {path: artifacts/m}}}}")
        if len(fetched) == 1:
            raise OSError("the line is cut")

    monkeypatch.setattr(mlflow.artifacts, "download_artifacts", download)
    client = SimpleNamespace(get_model_version_download_uri=lambda name, version: "mlflow-artifacts:/1/models/m-1")
    entry = SimpleNamespace(name="sluice-sft", version="3", tags={CONTENT: "ab" * 32}, creation_timestamp=7)
    with pytest.raises(OSError, match="the line is cut"):
        assistants._fetched(root, client, entry)
    for _ in range(2):  # half of it is never taken for the whole
        place = assistants._fetched(root, client, entry)
    assert place == root / f".sluice/models/sluice-sft-3-{'ab' * 8}/artifacts/m" and len(fetched) == 2
    entry.tags = {CONTENT: "cd" * 32}  # of another server, or of a new one behind the same address
    assert assistants._fetched(root, client, entry) != place and len(fetched) == 3


def test_threads_spin_unless_the_user_says_otherwise(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
        monkeypatch.delenv(name)
    assert assistants.prepare(root) == "fp32"
    assert os.environ["GOMP_SPINCOUNT"] == environment.SPIN_ALONE  # what the figures of speed are measured with
    monkeypatch.setenv("GOMP_SPINCOUNT", environment.SPIN)  # set by `environment.prepare`
    assistants.prepare(root)
    assert os.environ["GOMP_SPINCOUNT"] == environment.SPIN_ALONE
    monkeypatch.setenv("GOMP_SPINCOUNT", "5")
    assistants.prepare(root)
    assert os.environ["GOMP_SPINCOUNT"] == "5"


def test_stop_strings_of_a_sampling_end_the_answer(root: Path, index: FakeIndex) -> None:
    what = assistants.found(root, root, None, True)
    assistant = assistants.opened(what, True, "fp32").assistant
    whole = assistant.answer(QUESTION, sampling=Sampling(20), look_up=False).text
    letter = whole[len(whole) // 2]
    assert (
        assistant.answer(QUESTION, sampling=Sampling(20, stop=(letter,)), look_up=False).text
        == whole[: whole.index(letter)].strip()
    )


@pytest.mark.slow
def test_the_command_answers_and_exits(tmp_path: Path, made: Path) -> None:
    place = make_root(tmp_path / "root")

    def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "flows.cli", "ask", *arguments]
        env = own_environment() | {"PYTHONPATH": str(ROOT)} | variables
        return subprocess.run(command, cwd=place, env=env, capture_output=True, text=True, timeout=120)

    done = run("what is w?", "--no-rag", "--json", "--max-new-tokens", "3", "--model", str(made))
    assert done.returncode == 0 and json.loads(done.stdout)["sources"] == [], done.stderr
    done = run("what is w?")
    assert done.returncode == 2 and done.stderr.startswith(
        "error: there is no assistant yet: type `sluice run answers`"
    )
    own = Path(shutil.copytree(made, place / "modèle"))
    asked = ("quel modèle…?", "--no-rag", "--max-new-tokens", "3", "--model", own.name)
    done = run(*asked, PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and r"mod\xe8le: loaded in" in done.stdout, done.stderr
    told = json.loads(run(*asked, "--json", PYTHONIOENCODING="ascii").stdout)
    assert (told["question"], told["model"]) == (asked[0], own.name), "JSON stays JSON"
    done = run("what is w?", MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    assert done.returncode == 75 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr


def test_a_pipe_that_nobody_reads_ends_it_without_a_word(tmp_path: Path, made: Path) -> None:
    place = make_root(tmp_path / "root")
    command = [sys.executable, "-m", "flows.cli", "ask", "w?", "--no-rag", "--json", "--model", str(made)]
    env = own_environment() | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}
    with subprocess.Popen(command, cwd=place, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as asking:
        assert asking.stdout is not None and asking.stderr is not None
        asking.stdout.close()  # `| head` that has read enough
        assert asking.stderr.read() == b"" and asking.wait(120) == 1
