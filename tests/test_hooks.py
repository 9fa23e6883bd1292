"""Hooks after a promotion: told to a command and to a web address; a failure is a warning; no secret gets anywhere."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from rich.console import Console
from stores import SOURCE, repository, run_stage

from flows import compare, lineage_report
from pipelines.core import hooks, promotion, prompt_registry, registry, store, versions
from pipelines.core.ledger import Move, Promotion

__all__ = ["repository"]
NAME = "sluice-base"
SECRETS = ("correct-horse", "battery-staple", "tr0ub4dor", "xkcd-936")


class Receiver(HTTPServer):
    """A web hook's other end on this machine."""

    answer = 200

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.got: list[tuple[str, dict]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/hooks?token={SECRETS[0]}"


class Answer(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        assert self.headers["Content-Type"] == "application/json"
        self.server.got.append((self.path, json.loads(body)))  # type: ignore[attr-defined]
        self.send_response(self.server.answer)  # type: ignore[attr-defined]
        self.send_header("Location", "/login")
        self.end_headers()

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *words: object) -> None:
        pass


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    server = Receiver()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Promotion:
    for name in (hooks.COMMAND, hooks.ADDRESS):
        monkeypatch.delenv(name, raising=False)
    return Promotion.begin(tmp_path, "promote", [Move(NAME, "1", "2", "1")], "ada", "better")


def test_both_get_the_promotion(done, receiver, tmp_path, monkeypatch, capsys):
    kept = tmp_path / "told.json"
    copy = f"import pathlib, sys; pathlib.Path({str(kept)!r}).write_text(sys.stdin.read())"
    monkeypatch.setenv(hooks.COMMAND, shlex.join([sys.executable, "-c", copy]))
    monkeypatch.setenv(hooks.ADDRESS, receiver.url)
    hooks.tell(done)
    ((path, body),) = receiver.got
    assert path == f"/hooks?token={SECRETS[0]}" and body == json.loads(kept.read_text())
    assert body["moves"] == [{"model": NAME, "source": "1", "target": "2", "previous": "1"}]
    assert (body["action"], body["who"], body["why"], body["release"]) == ("promote", "ada", "better", None)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        (hooks.COMMAND, "false --token correct-horse", "HOOK (false) ended with exit code 1"),
        (hooks.COMMAND, "/nowhere/tell correct-horse", "HOOK (tell) could not be started: No such file or directory"),
        (hooks.COMMAND, "tell 'correct-horse", "HOOK is no command: No closing quotation"),
        (hooks.COMMAND, "sleep 5", "HOOK (sleep) did not end within"),
        (hooks.ADDRESS, "http://127.0.0.1:9/correct-horse", "WEBHOOK (127.0.0.1) does not answer: Connection refused"),
        (hooks.ADDRESS, "http://a:correct-horse@127.0.0.1:9/", "WEBHOOK (127.0.0.1) "),
        (hooks.ADDRESS, "file:///etc/correct-horse", "WEBHOOK is no URL of http or https"),
        (hooks.ADDRESS, "http://127.0.0.1/correct horse", "WEBHOOK (127.0.0.1) cannot be told"),
    ],
)
def test_a_failure_is_a_warning_without_the_secret(done, monkeypatch, capsys, name, value, said):
    monkeypatch.setattr(hooks, "SECONDS", 0.3 if "sleep" in value else 10.0)
    monkeypatch.setenv(name, value)
    hooks.tell(done)
    out, err = capsys.readouterr()
    assert err.startswith("warning: the promotion is done, but the ") or "is no " in err
    assert said in err and "correct" not in out + err


@pytest.mark.parametrize("answer", [503, 302, 307])
def test_an_answer_that_refuses_is_told(done, receiver, monkeypatch, capsys, answer):
    """So is one that sends us elsewhere, as to a page to log in: nobody has read the JSON there."""
    receiver.answer = answer
    monkeypatch.setenv(hooks.ADDRESS, receiver.url)
    hooks.tell(done)
    assert f"WEBHOOK (127.0.0.1) answered {answer}" in capsys.readouterr().err


def name_a_login(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `MLFLOW_TRACKING_URI` hold a log-in. Only how the database is dialled is not real: it is the embedded one."""
    from mlflow.tracking._model_registry import utils as models
    from mlflow.tracking._tracking_service import utils as runs

    store.connect(root)  # the experiment, whose files go below the root
    real = store.address(root)
    for built, known in ((runs, runs._tracking_store_registry), (models, models._get_store_registry())):
        monkeypatch.setitem(
            known._registry,
            "postgresql",
            lambda store_uri, built=built, **rest: built._get_sqlalchemy_store(real, **rest),
        )
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"postgresql://team:{SECRETS[3]}@db.example.org/mlflow")


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_secrets_of_the_environment_are_nowhere(repository, receiver, monkeypatch, capfd):
    """Planted in the environment; looked for in tags, params, cards, logs, the journal, every file and every page."""
    root, model = repository
    name_a_login(root, monkeypatch)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRETS[1])
    monkeypatch.setenv(hooks.ADDRESS, receiver.url)
    monkeypatch.setenv(hooks.COMMAND, f"false --key {SECRETS[2]}")
    for bits, champion in ((2.5, None), (2.4, "1")):
        run_stage(root, model, bits)
        with monkeypatch.context() as cut, pytest.raises(KeyboardInterrupt):
            cut.setattr(versions, "_create", interrupted)
            registry.settle(root, "pretrain")
        (begun,) = [path.read_text() for path in (root / ".sluice/registry/intents").iterdir()]
        (registered,) = registry.settle(root, "pretrain")
        promotion.promote(root, NAME, registered.version, why="better", expected_champion=champion)
    promotion.rollback(root, NAME, why="bad", expected_champion="2")
    (root / "mlflow/prompts").mkdir()
    shutil.copy(f"{SOURCE}/mlflow/prompts/choice-plain.yaml", root / "mlflow/prompts")
    assert prompt_registry.sync(root) and prompt_registry.sync(root) == []
    assert len(receiver.got) == 3, "also a rollback is told"
    console = Console(width=200)
    lineage_report.show(root, f"{NAME}@champion", console)
    found = compare.compare(root, f"{NAME}/1", f"{NAME}/2")
    compare.show(found, console)
    said = "".join(capfd.readouterr())
    assert "HOOK (false) ended with exit code 1" in said
    client, _ = store.connect(root)
    run = client.get_run(registered.run_id)
    said += str(run.data) + str(client.get_model_version(NAME, "2")) + compare.markdown(found) + str(receiver.got[0][1])
    said += begun + str(store.unavailable(root, f"API request to {store.address(root)}/x failed"))
    assert versions.alias(client, NAME, "champion") == "1", "a hook that failed undoes nothing"
    files = [path for path in root.rglob("*") if path.is_file()]
    assert root / ".sluice/registry/promotions.jsonl" in files and root / ".sluice/mlflow/mlflow.db" in files
    for secret in SECRETS:
        assert secret not in said
        assert [path for path in files if secret.encode() in path.read_bytes()] == []
