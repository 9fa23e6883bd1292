"""`sluice chat`: what is typed is answered or obeyed, what was said is remembered as far as there is room."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from answering import PASSAGE, FakeIndex, index, made, make_assistant, make_model, root
from models import NO_SYSTEM
from rich.console import Console

from flows import assistants
from flows.chat import Chat, _lines, chat
from pipelines.core import generate, grounding, terminal
from pipelines.core.errors import ArtifactError, UserError

__all__ = ["index", "made", "root"]


def talk(root: Path, look_up: bool = True, terminal: bool = False) -> tuple[Chat, io.StringIO]:
    """A conversation, and what it prints."""

    def open_(name: str | None) -> assistants.Answering:
        return assistants.opened(assistants.found(root, root, name, look_up), look_up, "fp32")

    file = io.StringIO()
    return Chat(open_, None, Console(file=file, width=80, force_terminal=terminal, color_system=None)), file


def heard(one: Chat, file: io.StringIO, line: str) -> str:
    """What is printed for a line that does not end the conversation."""
    file.seek(0)
    file.truncate()
    assert one.hear(line)
    return file.getvalue()


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[list[dict[str, str]]]:
    """The messages of every prompt that is put, in order."""
    put: list[list[dict[str, str]]] = []
    build = grounding.build

    def noting(question: str, passages: Any, *others: Any) -> Any:
        made = build(question, passages, *others)
        if passages:
            put.append(made.messages)
        return made

    monkeypatch.setattr(grounding, "build", noting)
    return put


def test_the_last_question_is_looked_up_and_what_was_said_is_remembered(
    root: Path, index: FakeIndex, prompts: list[list[dict[str, str]]]
) -> None:
    one, file = talk(root)
    first = heard(one, file, "how do I flip an array?")
    assert "[1] numpy.flip  (numpy/lib/function_base.py, line 21)" in first and "all after" in first
    heard(one, file, "and an array of arrays?\n")
    assert index.asked == ["how do I flip an array?", "and an array of arrays?\n"]
    told = [message for message in prompts[1] if message["role"] != "system"]
    assert [message["role"] for message in told] == ["user", "assistant", "user"]
    assert told[0]["content"] == "how do I flip an array?"  # without the passages that were found for it
    assert told[1]["content"] and PASSAGE.text in told[2]["content"]
    assert terminal.clean(told[1]["content"]).splitlines()[0] in first
    assert heard(one, file, "/reset") == "Forgotten.\n"
    heard(one, file, "an array")
    assert [message["role"] for message in prompts[2] if message["role"] != "system"] == ["user"]
    assert heard(one, file, " \n") == "" and len(index.asked) == 3


def test_commands(root: Path, made: Path, index: FakeIndex) -> None:
    one, file = talk(root)
    assert heard(one, file, "/sources") == "There are no sources: no answer yet.\n"
    heard(one, file, "an array")
    shown = heard(one, file, "/sources")
    assert "[1] numpy.flip" in shown and "    Reverse the order of elements in an array." in shown
    assert "    Arrays have\n    an order." in shown and "\x1b" not in shown
    assert heard(one, file, "/model") == "artifacts/answers/assistant\n"
    assert heard(one, file, f"/model {made}") == f"{made}\n" and one.history
    heard(one, file, "an array")  # another model, the same index
    assert one.reply.sources
    assert heard(one, file, "/model nothing").startswith("error: no model 'nothing'")
    assert heard(one, file, "/model") == f"{made}\n"  # the one that stands goes on answering
    assert heard(one, file, "/help").count("/") >= 5
    assert heard(one, file, "/halp") == "error: /halp: no such command; /help lists them\n"
    assert heard(one, file, "a\udcff").startswith("error: the question is not UTF-8 text: check the encoding")
    assert "error: the question takes" in heard(one, file, "array " * 2000)
    assert not one.hear("/exit")


def test_without_retrieval_nothing_is_looked_up(root: Path, index: FakeIndex) -> None:
    one, file = talk(root, look_up=False)
    assert "[1]" not in heard(one, file, "an array") and index.asked == []
    assert heard(one, file, "/sources") == "There are no sources: nothing was looked up.\n"


def test_numbers_that_come_behind_the_stream_are_shown(
    root: Path, index: FakeIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, file = talk(root, terminal=True)
    monkeypatch.setattr(generate, "stream", lambda *arguments: iter(["Reverse the order", " of elements."]))
    whole, heading = "Reverse the order of elements.", "With the numbers of its sources:"
    assert heard(one, file, "an array").startswith(f"{whole}\n{heading}\n{whole} [1]\n[1] numpy.flip  (")
    monkeypatch.setattr(generate, "stream", lambda *arguments: iter(["Flip it [1]."]))
    assert heard(one, file, "an array").startswith("Flip it [1].\n[1] numpy.flip  (")


def test_sources_of_a_refusal_were_looked_up(root: Path, index: FakeIndex) -> None:
    one, file = talk(root)
    heard(one, file, "who won the cup?")
    assert one.reply.refused and heard(one, file, "/sources") == (
        "There are no sources: the question was looked up, and nothing relevant was found.\n"
    )


def test_the_oldest_turns_are_left_out_where_there_is_no_room_and_it_is_told_once(
    tmp_path: Path, root: Path, index: FakeIndex, prompts: list[list[dict[str, str]]]
) -> None:
    one, file = talk(root)
    told = [heard(one, file, f"{n} array " * 12) for n in range(8)]
    assert [("the oldest turns are left out" in each) for each in told].count(True) == 1
    assert "context of 1024 tokens" in next(each for each in told if "left out" in each)
    assert "error" not in "".join(told)
    last = [message["content"] for message in prompts[-1] if message["role"] == "user"]
    # The latest turns, in order, and the passages whole: history does not push them out.
    assert last[:-1] == [(f"{n} array " * 12).strip() for n in range(8 - len(last), 7)] and 1 < len(last) < 8
    assert PASSAGE.text in last[-1] and "an order." in last[-1]
    small = make_assistant(tmp_path / "small", make_model(tmp_path / "model", length=80))
    heard(one, file, f"/model {small}")
    before = one.history
    assert "error: the question takes" in heard(one, file, "array " * 12)
    assert one.history == before and before, "nothing is forgotten for a question that fits nowhere"


def test_a_template_that_refuses_the_chat_is_told_and_the_chat_goes_on(
    root: Path, made: Path, index: FakeIndex
) -> None:
    own = Path(shutil.copytree(made, root / "own"))
    (own / "chat_template.jinja").write_text(NO_SYSTEM + (own / "chat_template.jinja").read_text())
    one, file = talk(root)
    heard(one, file, f"/model {own}")
    told = heard(one, file, "flip an array")
    assert told.startswith("error: the tokenizer's chat template refuses this chat: System role not supported")
    assert one.history == []


def test_a_stopped_answer_counts_as_said_and_the_chat_goes_on(
    root: Path, index: FakeIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, file = talk(root, terminal=True)
    stream = generate.stream

    def stopped(*arguments: Any) -> Iterator[str]:
        yield "Half an "
        yield "answer [1]"
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(generate, "stream", stopped)
        assert heard(one, file, "an array") == "Half an answer [1]\nstopped\n"
    assert one.history[-1] == {"role": "assistant", "content": "Half an answer"}
    assert heard(one, file, "/sources") == "There are no sources: no answer yet.\n"
    assert generate.stream is stream
    assert "[1] numpy.flip" in heard(one, file, "an array") and len(one.history) == 4


def test_what_a_model_says_cannot_steer_the_terminal(
    root: Path, index: FakeIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, file = talk(root, terminal=True)
    monkeypatch.setattr(generate, "stream", lambda *arguments: iter(["a\x1b]0;title\x07", "b\x9bc\r"]))
    shown = heard(one, file, "an array")
    assert shown.startswith("a]0;titlebc\n") and not set(shown) & {"\x1b", "\x07", "\x9b", "\r"}


def test_what_a_document_spells_is_no_emoji_and_a_tab_stays(root: Path, index: FakeIndex) -> None:
    one, file = talk(root)
    heard(one, file, "an array")
    one.reply = one.reply._replace(sources=[one.reply.sources[0]._replace(text="all:\n\td[:key:]")])
    assert "    all:\n    \td[:key:]\n" in heard(one, file, "/sources")


def test_lines_of_a_pipe_are_answered_until_it_ends(
    root: Path, index: FakeIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = "an array\n\n/sources\n한국어 array?\n".encode() + b"array \xff\n/exit\nnever asked array\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given), encoding="utf-8"))
    file = io.StringIO()
    chat(root, root, None, True, Console(file=file, width=80))
    assert file.getvalue().startswith("artifacts/answers/assistant, loaded in ")
    assert file.getvalue().count("all after") == 2 and "error: the question is not UTF-8 text" in file.getvalue()
    assert index.asked == ["an array\n", "한국어 array?\n"]


def test_what_is_typed_and_no_text_does_not_end_the_chat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\nan array\n"), encoding="utf-8"))
    assert list(_lines(True, print)) == ["caf\udce9", "an array"]


def test_a_first_model_that_is_not_there_ends_it(root: Path) -> None:
    with pytest.raises(UserError, match="no model 'nothing'"):
        chat(root, root, "nothing", False, Console(file=io.StringIO()))
    (root / "artifacts/answers/assistant/assistant.json").unlink()
    (root / "artifacts/answers/assistant/model/config.json").rename(root / "artifacts/answers/assistant/config.json")
    with pytest.raises(ArtifactError, match="cannot be opened"):
        chat(root, root, None, False, Console(file=io.StringIO()))
