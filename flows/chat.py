"""`sluice chat`: questions and answers on the terminal, or from a pipe, a line each.

What was said before is part of the next prompt, as far as the model's context reaches: the oldest turns are left out
first. With retrieval, the last question alone is looked up.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from flows import assistants
from flows.ask import times
from pipelines.core import terminal
from pipelines.core.errors import UserError

HELP = """/sources       what the last answer was made from, in full
/model [NAME]  another model (MODEL@ALIAS, MODEL/VERSION, MODEL, a directory); without a name: which one it is
/reset         forget what was said
/help          this
/exit          end; so does Ctrl-D. Ctrl-C stops an answer."""
Message = dict[str, str]


def chat(root: Path, here: Path, model: str | None, look_up: bool, console: Console) -> None:
    """Talk until the input ends.

    Raises:
        UserError, ArtifactError, StoreUnavailable: as `assistants.found` and `assistants.opened`, of the first model.
    """
    precision = assistants.prepare(root)

    def open_(name: str | None) -> assistants.Answering:
        return assistants.opened(assistants.found(root, here, name, look_up), look_up, precision)

    talk = Chat(open_, model, console)
    talk.tell(f"{talk.answering.name}, loaded in {talk.answering.seconds:.1f} s. /help says what else can be typed.")
    for line in _lines(sys.stdin.isatty(), talk.tell):
        if not talk.hear(line):
            break


class Chat:
    """A conversation: who answers, and what was said.

    Args:
        open_: loads what is found under a name.
        model: name of the first one.
    """

    def __init__(
        self, open_: Callable[[str | None], assistants.Answering], model: str | None, console: Console
    ) -> None:
        self.open, self.console = open_, console
        self.answering = open_(model)
        self.history: list[Message] = []
        self.reply: Any = None  # the last one: pipelines.core.assistant.Reply
        self.cut = False  # whether it was told that turns are left out

    def hear(self, line: str) -> bool:
        """A line that was typed; whether the conversation goes on. A mistake is told, and it goes on."""
        command, _, rest = line.strip().partition(" ")
        if command in ("/exit", "/quit"):
            return False
        try:
            if not command.startswith("/"):
                if line.strip():
                    self.answer(line)
            elif command == "/sources":
                self.sources()
            elif command == "/model":
                self.model(rest.strip())
            elif command == "/reset":
                self.history, self.reply, self.cut = [], None, False
                self.tell("Forgotten.")
            elif command == "/help":
                self.tell(HELP)
            else:
                raise UserError(f"{command}: no such command; /help lists them")
        except UserError as error:
            self.tell(f"error: {error}")
        except KeyboardInterrupt:
            self.tell("stopped")
        return True

    def answer(self, question: str) -> None:
        """Answer a question, as it comes; what is stopped by Ctrl-C counts as said."""
        assistant, looks_up = self.answering.assistant, self.answering.looks_up
        assistants.checked(question)
        pieces: list[str] = []

        def say(piece: str) -> None:
            pieces.append(piece)
            if self.console.is_terminal:
                print(terminal.clean(piece), end="", flush=True, file=self.console.file)

        from pipelines.core.citing import unmarked  # numbers of sources mean nothing in the next prompt

        said: Message = {"role": "user", "content": question.strip()}
        try:
            self.fit(question)
            reply = assistant.answer(question, history=self.history, look_up=looks_up, say=say)
        except ValueError as error:
            raise UserError(str(error)) from None
        except KeyboardInterrupt:
            self.reply = None
            if stopped := unmarked("".join(pieces)):
                self.history += [said, {"role": "assistant", "content": stopped}]
            print(file=self.console.file)
            raise
        self.reply = reply
        self.history += [said, {"role": "assistant", "content": unmarked(reply.text)}]
        shown = [terminal.clean(reply.text)]
        if self.console.is_terminal:
            shown = ["", *assistants.numbered(reply, "".join(pieces))]
        self.tell("\n".join([*shown, *assistants.source_lines(reply), times(reply.seconds), ""]))

    def fit(self, question: str) -> None:
        """Leave out the oldest turns until question, passages and answer fit the context behind the others.

        Raises:
            ValueError: the question fits not even alone; then nothing is forgotten.
        """
        from pipelines.core import grounding
        from pipelines.core.assistant import put
        from pipelines.core.assistant import room as left_for

        assistant, settings = self.answering.assistant, self.answering.assistant.settings
        if assistant.context is None:
            return
        whose = (settings, assistant.tokenizer, assistant.context)
        left_for(question, *whose) if self.answering.looks_up else put(question, [], *whose)
        room = assistant.context - settings.max_new_tokens
        if self.answering.looks_up:
            empty = grounding.build("", [], settings.template, 0, len).messages
            room -= settings.budget + len(grounding.encode(assistant.tokenizer, empty))
        asked = {"role": "user", "content": question}
        while self.history and len(grounding.encode(assistant.tokenizer, [*self.history, asked])) > room:
            self.history = self.history[2:]
            if not self.cut:
                self.cut = True
                self.tell(f"(The chat is longer than the model's context of {assistant.context} tokens: from here on "
                          "the oldest turns are left out.)")  # fmt: skip

    def sources(self) -> None:
        """Print the passages behind the last answer."""
        if self.reply is None or not self.reply.sources:
            why = "nothing was looked up."
            if self.reply is None:
                why = "no answer yet."
            elif self.answering.looks_up:
                why = "the question was looked up, and nothing relevant was found."
            self.tell(f"There are no sources: {why}")
            return
        for source, line in zip(self.reply.sources, assistants.source_lines(self.reply), strict=False):
            quoted = "\n".join(f"    {text}" for text in terminal.clean(source.text).splitlines())
            self.tell(f"{line}\n{quoted}\n")

    def model(self, name: str) -> None:
        """Let another model answer; what was said stays."""
        if name:
            self.answering = self.open(name)
        self.tell(self.answering.name)

    def tell(self, text: str) -> None:
        """Print a text as it is: a console would make an emoji of `[:key:]`, and blanks of a tab."""
        print(text, file=self.console.file, flush=True)


def _lines(typed: bool, tell: Callable[[str], None]) -> Iterator[str]:
    """Lines of the standard input; on a terminal with a prompt, and with the keys of `readline`."""
    sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]  # what is no UTF-8 is told, not fatal
    if not typed:
        yield from sys.stdin
        return
    import readline  # noqa: F401  # `input` uses it where it is imported

    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            tell("\nCtrl-D or /exit ends it")
