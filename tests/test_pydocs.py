"""The `pydocs` builder: small packages written to disk, and a handful of facts about real numpy."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipelines.core.errors import DataError
from pipelines.core.params.data import PydocsSource
from pipelines.core.pydocs import build
from pipelines.core.pydocs.docstrings import parse
from pipelines.core.pydocs.tasks import fold

ROOT = Path(__file__).parents[1]
Tables = dict[str, list[dict[str, Any]]]

CORE = '''
"""Private place of the public functions."""
import os
os.environ["PYDOCS_WAS_EXECUTED"] = "yes"
open(__file__ + ".executed", "w").close()
raise SystemExit("nobody imports this")


def flip(values, axis=0):
    """Reverse the order of values along an axis.

    .. versionadded:: 1.2
        Not worth reading.

    Parameters
    ----------
    values : sequence
        What is to be reversed, of any length.
    axis : int
        The axis to reverse along, counted from zero.

    See Also
    --------
    roll : Shift the values around in a circle.
    scale : What each of the numbers is multiplied with.
    Table.sort : Put the rows into ascending order.
    Table : A table of rows, which is flip ped now and then.
    nothing_known : This one cannot be resolved at all.
    """
    # second
    return values[::-1]


def roll(values, by):
    """Move every value by some places.

    Args:
        values (list): The values that are moved.
        by (int): How many places
            each of them moves.

    Returns:
        list: a new one.
    """
    return values[by:] + values[:by]


def scale(values, factor):
    """Multiply every value with a factor.

    :param values: The numbers that are multiplied.
    :param int factor: What each of the numbers
        is multiplied with.
    :returns: numbers
    """
    return [value * factor for value in values]


def args_only(values):
    """Args:
        values: some values.
    """


def _hidden():
    """Never seen by anybody from the outside."""


class _Base:
    """A base that is nobody's business at all."""

    def sort(self):
        """Sort all rows of :class:`~small._core.Table` in place."""
        return self


class Table(_Base):
    """A table of rows, which is :func:`flip` ped now and then."""

    def __init__(self, rows, width=3):
        """Take the rows as they are given here."""
        self.rows = rows

    def swap(self, first, second):
        """Swap two rows of the table."""
        self.rows[first], self.rows[second] = self.rows[second], self.rows[first]

    @property
    def width(self):
        """The number of columns in this table."""
        return 3

    def _secret(self):
        """Hidden in the class and never to be shown."""
'''


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def source(*folders: Path, **more: Any) -> PydocsSource:
    return PydocsSource(builder="pydocs", stdlib=False, folders=tuple(str(folder) for folder in folders), **more)


def tables(source: PydocsSource, workers: int = 1) -> Tables:
    found: Tables = defaultdict(list)
    for table, row in build(source, workers):
        found[table].append(row)
    return found


def ids(found: Tables, table: str = "knowledge") -> set[str]:
    return {row["id"] for row in found[table]}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    init = '"""A small package for tests of all sorts."""\nfrom ._core import *\nfrom ._core import flip as reverse\n'
    core = CORE.replace("import os", '__all__ = ["flip", "roll", "scale", "args_only", "Table"]\nimport os', 1)
    return write(tmp_path / "project", {"src/small/__init__.py": init, "src/small/_core.py": core})


@pytest.fixture(scope="module")
def numpy_tables() -> Tables:
    return tables(PydocsSource(builder="pydocs", stdlib=False, packages=("numpy",)), workers=2)


def test_names_are_the_public_ones(small: Path) -> None:
    names = ids(tables(source(small)))
    assert {"small", "small.flip", "small.roll", "small.Table", "small.Table.width"} <= names
    assert "small.Table.sort" in names, "a method of a private base belongs to the public class"
    assert "small.Table.__init__" in names
    assert not {name for name in names if "_core" in name or "_hidden" in name or "_secret" in name or "_Base" in name}
    assert "small.reverse" not in names, "an alias is no second object"


def test_nothing_is_executed(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYDOCS_WAS_EXECUTED", raising=False)
    assert tables(source(small))["knowledge"]
    assert not list(small.rglob("*.executed"))


def test_rows_say_what_the_source_says(small: Path) -> None:
    found = tables(source(small))
    flip = next(row for row in found["knowledge"] if row["id"] == "small.flip")
    assert flip["text"].startswith("small.flip(values, axis=0)\n\nReverse the order of values along an axis.\n\nParam")
    assert "See Also" not in flip["text"] and "1.2" not in flip["text"] and "Not worth" not in flip["text"]
    line = CORE.split("\n").index("def flip(values, axis=0):") + 2  # one line was put before it
    assert flip["url"] == f"src/small/_core.py#L{line}"
    texts = {row["id"]: row["text"] for row in found["knowledge"]}
    assert texts["small.Table.sort"] == "small.Table.sort()\n\nSort all rows of Table in place."
    assert texts["small.Table"].startswith("small.Table(rows, width=3)\n\nA table of rows")
    assert "    swap(first, second): Swap two rows of the table." in texts["small.Table"]
    exchanges = {row["id"]: row["messages"] for row in found["demonstrations"]}
    questions = {row["id"]: row["prompt"] for row in found["prompts"]}
    assert exchanges and questions
    assert not {key.split(":")[1] for key in exchanges} & {key.split(":")[1] for key in questions}
    answers = {key: messages[1]["content"] for key, messages in exchanges.items()}
    asked = {**questions, **{key: messages[0]["content"] for key, messages in exchanges.items()}}
    assert {key.split(":")[0] for key in asked} == {"docstring", "what", "which", "parameter"}
    for key, question in asked.items():
        if key.startswith("docstring:"):
            assert '"""' not in question and "def " in question
        if key.startswith("which:"):
            assert answers.get(key, f"`{key[6:]}`") == f"`{key[6:]}`"
    assert not [answer for answer in answers.values() if "Args" in answer or ":class:" in answer]


def test_a_group_holds_all_of_a_class(small: Path) -> None:
    found = tables(source(small))
    for table in ("corpus", "knowledge", "demonstrations", "prompts", "tasks"):
        for row in found[table]:
            if "small.Table" in row["id"] and "->" not in row["id"]:
                assert row["group"] == "small.Table", row
    assert all(row["group"] == "small.Table" for row in found["queries"] if "Table" in row["target"])
    for table in set(found) - {"skipped"}:
        assert len(ids(found, table)) == len(found[table]), f"an id of {table} is there twice"


def test_see_also_becomes_queries_without_leaks(small: Path) -> None:
    found = tables(source(small))
    written = [row for row in found["queries"] if row["kind"] == "see-also"]
    queries = {row["target"]: row for row in written}
    assert set(queries) == {"small.roll", "small.Table.sort"}
    assert queries["small.roll"]["query"] == "Shift the values around in a circle."
    assert queries["small.roll"]["referrer"] == "small.flip"
    texts = {row["id"]: fold(row["text"]) for row in found["knowledge"]}
    for row in written:
        assert fold(row["query"]) not in texts[row["target"]] + texts[row["referrer"]]
        assert row["answers"] is None


def test_questions_that_the_knowledge_answers_are_queries(numpy_tables: Tables) -> None:
    asked = {row["id"]: row for row in numpy_tables["queries"] if row["kind"] != "see-also"}
    prompts = {row["id"]: row for row in numpy_tables["prompts"] if not row["id"].startswith("docstring:")}
    assert asked.keys() == prompts.keys() and {row["kind"] for row in asked.values()} == {"what", "which", "parameter"}
    texts = {row["id"]: row["text"] for row in numpy_tables["knowledge"]}
    for key, row in asked.items():
        assert (row["query"], row["answers"]) == (prompts[key]["prompt"], [prompts[key]["reference"]])
        assert key.split(":")[:2] == [row["kind"], row["target"]] and row["target"] in texts
        if row["kind"] == "which":
            assert row["answers"] == [f"`{row['target']}`"]


def test_no_queries_without_knowledge(small: Path) -> None:
    assert not tables(source(small, tables=("corpus", "prompts"))).get("queries")


@pytest.mark.parametrize(
    "raw",
    [
        "Do it.\n\nParameters\n----------\nx, y : int\n    Not split.\nz : int\n    The third of the numbers.\n",
        "Do it.\n\nArgs:\n    z (int): The third\n        of the numbers.\n    q: short\n",
        "Do it.\n\n:param int z: The third\n    of the numbers.\n:type z: int\n",
    ],
)
def test_parameters_of_three_styles(raw: str) -> None:
    assert parse(raw).parameters == (("z", "The third of the numbers."),)


def test_parameters_in_korean() -> None:
    assert parse("Do it.\n\nArgs:\n    값: 더해지는 값으로서 숫자입니다.\n").parameters == (
        ("값", "더해지는 값으로서 숫자입니다."),
    )


@pytest.mark.parametrize(
    ("raw", "summary"),
    [
        ("Return :class:`~x.Y` of ``z`` here [1]_ now", "Return Y of `z` here now."),
        (".. deprecated:: 1.0\n    Use another.\n\nTake the rows one by one.", "Take the rows one by one."),
        ("array(x, *, y=1) -> Array\n\nMake an array out of things.", "Make an array out of things."),
        ("array(\n    x,\n    y=1,\n)\n--\n\nMake an array out of things.", "Make an array out of things."),
        ("Use the :class:`_orm.Session` of it.\n:param x: nothing", "Use the Session of it."),
        ("Take the first, e.g. A. Then stop the rest of it.", "Take the first, e.g. A."),
        ("Args:\n    x: the first of them all, and the last.", ""),
        ("Parameters\n----------\nx : int\n    The first of them.", ""),
        (">>> first_of_all(1) and more of it\n2", ""),
        ("See base class of this one for more.", ""),
        ("Too short.", ""),
        ("lower case and no sentence at all.", ""),
        ("Word " * 50, ""),
        ("%(klass)s of some other kind.", ""),
        ("Élève le nombre au carré. À utiliser avec soin.", "Élève le nombre au carré."),
        ("Возвращает сумму чисел. Бросает исключение.", "Возвращает сумму чисел."),
        ("두 숫자를 더해서 돌려줍니다. 던지는 예외는 없습니다.", "두 숫자를 더해서 돌려줍니다."),
        ("返回所有给定数字的总和。如果没有数字则抛出异常。", "返回所有给定数字的总和。"),
        ("数字の合計を返す関数です。\n例外は投げません。", "数字の合計を返す関数です。"),
        ("возвращает сумму всех чисел.", ""),
        ("返回总和。", ""),
    ],
)
def test_summaries(raw: str, summary: str) -> None:
    assert parse(raw).summary == summary


def test_leading_signature() -> None:
    assert parse("array(x, *, y=1) -> Array\n\nMake an array of it.").signature == "(x, *, y=1) -> Array"
    assert parse("array(\n    x,\n    y=1,\n)\n--\n\nMake an array of it.").signature == "(x, y=1)"


def test_boilerplate_is_kept_once(tmp_path: Path) -> None:
    functions = "".join(
        f'def f{n}(x):\n    """Say what everybody else says too."""\n    return x + {n}\n\n\n' for n in range(30)
    )
    found = tables(source(write(tmp_path, {"many.py": functions})))
    rows = [json.dumps(row) for row in found["demonstrations"] + found["prompts"]]
    assert not [row for row in rows if "which:" in row]
    assert len([row for row in rows if '"what:' in row]) == 1


def test_tasks_are_labelled_right(numpy_tables: Tables, small: Path) -> None:
    titles = {row["id"]: row["text"] for row in numpy_tables["knowledge"]}
    labels = defaultdict(list)
    for row in numpy_tables["tasks"]:
        labels[row["task"]].append(row["label"])
        name = row["id"].partition(":")[2]
        if row["task"] == "choice":
            assert len(set(row["choices"])) == 4 and row["choices"][row["label"]] == row["label_text"]
        if row["task"] == "entailment":
            assert titles[name].startswith(row["premise"])
            stands = fold(row["hypothesis"]).rstrip(".") in fold(titles[name])
            assert stands or not row["label"], row
    assert set(labels) == {"choice", "entailment", "similarity"}, "one package leaves nothing to classify"
    assert set(labels["choice"]) == {0, 1, 2, 3}
    assert 0.4 < sum(labels["entailment"]) / len(labels["entailment"]) < 0.6
    both = tables(PydocsSource(builder="pydocs", stdlib=False, packages=("numpy",), folders=(str(small),)))
    packages = {row["label"] for row in both["tasks"] if row["task"] == "package"}
    assert "numpy" in packages and len(packages) <= 2


def test_workers_end_with_a_stage_that_is_killed() -> None:
    """They wait for calls on a queue that they hold open themselves: each kill left some behind for good."""
    code = (
        "import time\n"
        "from pipelines.core.params.data import PydocsSource\n"
        "from pipelines.core.pydocs import build\n"
        "if __name__ == '__main__':\n"
        "    rows = build(PydocsSource(builder='pydocs', stdlib=False, packages=('numpy',)), 2)\n"
        "    print(next(rows), flush=True)\n"
        "    time.sleep(600)\n"
    )
    stage = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert stage.stdout is not None and stage.stdout.readline()
        workers = [one for one in psutil.Process(stage.pid).children() if "spawn_main" in " ".join(one.cmdline())]
        assert workers
    finally:
        stage.kill()
        stage.wait()
    _, left = psutil.wait_procs(workers, timeout=20)
    assert not left, "a worker has outlived its stage"


def test_numpy_has_its_public_names(numpy_tables: Tables) -> None:
    names = ids(numpy_tables)
    wanted = {"numpy.flipud", "numpy.array", "numpy.linalg.norm", "numpy.ndarray.sort", "numpy.fft.fft"}
    assert wanted | {"numpy.ma.masked_where", "numpy.strings.upper"} <= names
    assert not [name for name in names if "._" in name.replace(".__init__", "").replace(".__call__", "")]
    answers = [row["messages"][1]["content"] for row in numpy_tables["demonstrations"]]
    assert len(answers) > 1000
    assert not [answer for answer in answers if answer.startswith(("Args", "Parameters", "Example", ".. ", ">>>"))]
    assert len([row for row in numpy_tables["queries"] if row["kind"] == "see-also"]) > 100
    assert {row["target"] for row in numpy_tables["queries"]} <= names


def test_same_rows_whatever_the_workers(numpy_tables: Tables) -> None:
    again = tables(PydocsSource(builder="pydocs", stdlib=False, packages=("numpy",)), workers=1)
    assert json.dumps(again) == json.dumps(numpy_tables)


def test_unreadable_files_are_skipped_and_counted(tmp_path: Path) -> None:
    good = '"""Read me, for there is something to read."""\n'
    write(tmp_path, {"good.py": good, "python2.py": "print 'hello'\n", "empty.py": "", "notes.ipynb": "{}"})
    (tmp_path / "latin.py").write_bytes(b'"""caf\xe9"""\n')
    (tmp_path / "zero.py").write_bytes(b"x = 1\0\n")
    (tmp_path / "codec.py").write_bytes(b"# -*- coding: no-such-codec -*-\n")
    (tmp_path / "deep.py").write_text("x = " + "(" * 5000 + ")" * 5000)
    (tmp_path / "gone.py").symlink_to(tmp_path / "nowhere.py")
    (tmp_path / "loop").symlink_to(tmp_path)
    found = tables(source(tmp_path))
    assert ids(found) == {"good"}
    skipped = {row["path"]: row["reason"] for row in found["skipped"]}
    assert set(skipped) == {"python2.py", "latin.py", "zero.py", "codec.py", "deep.py", "gone.py"}
    assert all(skipped.values()) and "line 1" in skipped["python2.py"]
    assert "no source of Python 3." in skipped["python2.py"], "a later one's is none either"
    assert str(tmp_path) not in json.dumps(found)


def test_text_of_an_unknown_encoding_is_no_documentation(tmp_path: Path) -> None:
    """One such line had the whole folder refused by Great Expectations, which named the number of a row."""
    french = 'def f(x):\n    """Retourne la cl\ufffd primaire de la table."""\n    return x\n\n\n'
    other = 'def g(x):\n    """Return the key that was given to it."""\n    return "\ufffd\ufffd\ufffd" + x\n'
    write(tmp_path, {"m.py": french + other})
    found = tables(source(tmp_path))
    assert ids(found) == {"m.g"}
    assert "\ufffd" not in json.dumps(found, ensure_ascii=False)


def test_layouts(tmp_path: Path) -> None:
    text = '"""A module with something to say for itself."""\n'
    names = {
        "src/first/__init__.py": "first",
        "space/inner/part.py": "space.inner.part",
        "my-project/pyproject.toml": "",
        "my-project/second/__init__.py": "second",
        "third-1.0/third.py": "third",
        "first/tests/helper.py": "",
        "_vendor/copied.py": "",
        ".hidden/secret.py": "",
        "test_all.py": "",
    }
    write(tmp_path / "code", dict.fromkeys(names, text))
    assert ids(tables(source(tmp_path / "code"))) == {name for name in names.values() if name}
    assert ids(tables(source(tmp_path / "code/src/first"))) == {"first"}, "a folder may be a package itself"


def test_two_modules_of_one_name_are_told(tmp_path: Path) -> None:
    """Of a folder with several projects; apart, each is read."""
    function = 'def {0}(x):\n    """Do what the module of project {0} is there for."""\n    return x\n'
    for project in ("one", "two"):
        files = {"setup.py": "", "tools.py": function.format(project), "tools.pyi": "", f"{project}.py": ""}
        write(tmp_path / project, files)
    found = tables(source(tmp_path))
    assert ids(found) == {"tools.one"}
    told = {row["path"]: row["reason"] for row in found["skipped"]}
    assert (
        set(told) == {"two/tools.py", "two/tools.pyi"} and "is module tools, as one/tools.py is" in told["two/tools.py"]
    )
    folders = tuple(str(tmp_path / project) for project in ("one", "two"))
    assert ids(tables(PydocsSource(builder="pydocs", stdlib=False, folders=folders))) == {"tools.one", "tools.two"}


def test_names_for_type_checkers_only_and_sole_instances(tmp_path: Path) -> None:
    part = (
        'class Seen:\n    """A class that is imported for annotations."""\n\n'
        'class norm_gen:\n    """A distribution with a bell-shaped density."""\n\nnorm = norm_gen(name="norm")\n'
    )
    init = "from typing import TYPE_CHECKING\nfrom .part import norm\nif TYPE_CHECKING:\n    from .part import Seen\n"
    folder = write(tmp_path, {"pkg/__init__.py": init, "pkg/part.py": part})
    assert ids(tables(source(folder))) == {"pkg.norm", "pkg.part.Seen"}


def test_docstrings_in_calls(tmp_path: Path) -> None:
    docs = (
        "def add_newdoc_for(name, doc):\n    add_newdoc('pkg', 'Array', (name, doc))\n\n"
        "add_newdoc('pkg', 'make', 'make(x)\\n\\nMake an array out of something.')\n"
        "add_newdoc_for('sort', 'sort(axis)\\n\\nSort the array along an axis.')\n"
        "add_newdoc('pkg', 'Array', ('shape', 'The lengths of all of the axes.'))\n"
        "add_newdoc('pkg', 'computed', str(1))\n"
    )
    init = "from ._compiled import make, Array\n__all__ = ['make', 'Array']\n"
    found = tables(source(write(tmp_path, {"pkg/__init__.py": init, "pkg/_docs.py": docs})))
    texts = {row["id"]: row["text"] for row in found["knowledge"]}
    assert set(texts) == {"pkg.make", "pkg.Array.sort", "pkg.Array.shape"}
    assert texts["pkg.Array.sort"].startswith("pkg.Array.sort(axis)\n")


def test_tables_and_max_files(small: Path) -> None:
    found = tables(source(small, tables=("corpus",)))
    assert set(found) == {"corpus"}
    assert ids(tables(source(small, max_files=1))) == {"small"}


def test_user_mistakes(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no package 'no_such_package' is installed.*pip install"):
        build(PydocsSource(builder="pydocs", stdlib=False, packages=("no_such_package",)), 1)
    with pytest.raises(DataError, match="does not exist"):
        build(source(tmp_path / "nowhere"), 1)
    with pytest.raises(DataError, match="is a file"):
        build(source(write(tmp_path, {"a.py": ""}) / "a.py"), 1)
    write(tmp_path, {"none/tests/a.py": "", "none/b.txt": ""})
    with pytest.raises(DataError, match="folders: .*none' has no Python source"):
        build(source(tmp_path / "none"), 1)


def test_a_file_name_that_utf8_cannot_write_is_spelled_out(tmp_path: Path) -> None:
    name = b"caf\xe9.py".decode(errors="surrogateescape")
    write(tmp_path, {name: '"""Make coffee of beans and of water, as slowly as it takes."""\n'})
    (row,) = tables(source(tmp_path))["knowledge"]
    assert row["url"] == "caf\\udce9.py#L1"
