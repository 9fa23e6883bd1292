"""Profiles and the deps of user files: what is written into params.yaml and dvc.yaml, and what is left alone."""

import shutil
from pathlib import Path

import pytest
import yaml
from fake_repository import ROOT
from ruamel.yaml import YAML

from flows import profiles, sources
from pipelines.core import graph, runner
from pipelines.core.errors import ParamsError, UserError
from pipelines.core.params import whole


@pytest.fixture
def root(tmp_path: Path) -> Path:
    shutil.copy(ROOT / "params.yaml", tmp_path)
    shutil.copytree(ROOT / "profiles", tmp_path / "profiles")
    return tmp_path


def text(root: Path) -> str:
    return (root / "params.yaml").read_text()


def edit(root: Path, old: str, new: str) -> None:
    assert old in text(root)
    (root / "params.yaml").write_text(text(root).replace(old, new))


def test_default_holds_the_committed_value_of_every_key_that_a_profile_sets() -> None:
    flat = {p.stem: whole.flatten(yaml.safe_load(p.read_text())) for p in (ROOT / "profiles").glob("*.yaml")}
    default = flat.pop("default")
    others = {key for values in flat.values() for key in values}
    committed = whole.flatten(yaml.safe_load((ROOT / "params.yaml").read_text()))
    assert set(default) == others
    assert default == {key: committed[key] for key in default}


@pytest.mark.parametrize("name", ["tiny", "scratch"])
def test_a_profile_is_valid_and_default_brings_back_the_same_bytes(root: Path, name: str) -> None:
    before = text(root)
    changed = profiles.apply(root, name)
    whole.load(root / "params.yaml")
    assert any(line.startswith("pretrain.base: smollm2-135m -> null") for line in changed)
    assert profiles.apply(root, name) == []
    profiles.apply(root, "default")
    assert text(root) == before


def test_going_from_one_profile_to_another_leaves_nothing_behind(root: Path) -> None:
    profiles.apply(root, "scratch")
    direct = text(root)
    profiles.apply(root, "tiny")
    profiles.apply(root, "scratch")
    assert text(root) == direct


def test_own_edits_of_other_keys_and_comments_survive(root: Path) -> None:
    edit(root, "weight_decay: 0.01", "weight_decay: 0.02   # mine")
    profiles.apply(root, "tiny")
    assert "weight_decay: 0.02   # mine" in text(root)
    profiles.apply(root, "default")
    assert "weight_decay: 0.02   # mine" in text(root)


def test_own_data_survives_a_profile_that_does_not_name_data(root: Path) -> None:
    edit(root, "stdlib: true", "stdlib: false")
    profiles.apply(root, "scratch")
    loaded = whole.load(root / "params.yaml")
    assert loaded.data.sources[0].stdlib is False  # type: ignore[union-attr]
    assert loaded.pretrain.base is None


def test_an_unknown_profile_names_those_there_are(root: Path) -> None:
    with pytest.raises(UserError, match=r"no profile 'huge'.*default, e2e, scratch, tiny"):
        profiles.apply(root, "huge")


def test_a_profile_that_does_not_fit_changes_nothing(root: Path) -> None:
    (root / "profiles" / "tiny.yaml").write_text("pretrain: {lr: -1.0}\n")
    before = text(root)
    with pytest.raises(ParamsError, match=r"profile tiny.*unchanged(.|\n)*pretrain\.lr"):
        profiles.apply(root, "tiny")
    assert text(root) == before


def test_a_profile_with_a_key_that_default_lacks_is_refused(root: Path) -> None:
    (root / "profiles" / "mine.yaml").write_text("report: {title: Mine}\n")
    with pytest.raises(UserError, match=r"profiles/mine.yaml sets report.title, which profiles/default.yaml lacks"):
        profiles.apply(root, "mine")


GRAPH = f"""stages:
  data:
    deps:
    - pipelines/data.py   # code
    {sources.MARKERS["data"]}
    outs:
    - artifacts/data
"""


def test_deps_of_user_files_come_and_go_below_the_marker(tmp_path: Path) -> None:
    place = tmp_path / "dvc.yaml"
    place.write_text(GRAPH)
    wanted = ["/data/a b.jsonl", "mine/ü: #1.txt", "mine/x.csv"]
    said = sources.write(place, "data", wanted)
    assert said == [f"dvc.yaml: stage data now depends on {path}" for path in wanted]
    assert yaml.safe_load(place.read_text())["stages"]["data"]["deps"] == ["pipelines/data.py", *wanted]
    assert sources.write(place, "data", wanted) == []
    assert sources.write(place, "data", wanted[:1])[-1] == "dvc.yaml: stage data no longer depends on mine/x.csv"
    sources.write(place, "data", [])
    assert place.read_text() == GRAPH


@pytest.mark.parametrize("name", ["2024", "2024-11-29", "1e5", "null", "on", "true", ".5", "0x1f", "~", "v1.2/x@y+z"])
def test_a_name_that_yaml_takes_for_something_else_is_a_text(tmp_path: Path, name: str) -> None:
    place = tmp_path / "dvc.yaml"
    place.write_text(GRAPH)
    sources.write(place, "data", [name])
    for found in (yaml.safe_load(place.read_text()), YAML(typ="safe").load(place.read_text())):  # ours, and DVC's
        assert found["stages"]["data"]["deps"][-1] == name
    assert sources.write(place, "data", [name]) == []


def test_without_a_marker_user_files_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    place = tmp_path / "dvc.yaml"
    bare = GRAPH.replace(sources.MARKERS["data"], "# other")
    place.write_text(bare)
    with pytest.raises(UserError, match="need the line `# files named in params.yaml"):
        sources.write(place, "data", ["mine.txt"])
    assert place.read_text() == bare


def test_paths_inside_the_repository_are_relative_and_others_absolute(root: Path, tmp_path: Path) -> None:
    inside = root / "mine.jsonl"
    outside = tmp_path.parent / f"{tmp_path.name}-outside.jsonl"
    for path in (inside, outside):
        path.write_text('{"text": "a"}\n')
    (root / "dvc.yaml").write_text(GRAPH)
    rows = "".join(f"  - {{path: {path}, table: corpus}}\n" for path in ("mine.jsonl", outside))
    start, end = text(root).index("  - builder"), text(root).index("  validation_share")
    (root / "params.yaml").write_text(text(root)[:start] + rows + text(root)[end:])
    sources.keep(root)
    deps = yaml.safe_load((root / "dvc.yaml").read_text())["stages"]["data"]["deps"]
    assert deps[1:] == sorted([str(outside), "mine.jsonl"])


def test_a_linked_folder_of_data_is_a_dep_by_its_name(root: Path, tmp_path: Path) -> None:
    """Or a run in a worktree, whose `data` is a link to the clone's, would write this machine's path into dvc.yaml."""
    elsewhere = tmp_path.with_name(f"{tmp_path.name}-elsewhere")
    elsewhere.mkdir()
    (elsewhere / "mine.jsonl").write_text('{"text": "a"}\n')
    (root / "data").symlink_to(elsewhere)
    (root / "dvc.yaml").write_text(GRAPH)
    start, end = text(root).index("  - builder"), text(root).index("  validation_share")
    row = "  - {path: data/mine.jsonl, table: corpus}\n"
    (root / "params.yaml").write_text(text(root)[:start] + row + text(root)[end:])
    assert sources.keep(root) == ["dvc.yaml: stage data now depends on data/mine.jsonl"]


def test_rewards_become_deps_of_ppo_and_leave_again(root: Path) -> None:
    place, before = root / "dvc.yaml", text(root)
    stage = GRAPH.removeprefix("stages:\n").replace(sources.MARKERS["data"], sources.MARKERS["ppo"])
    marked = GRAPH + stage.replace("  data:", "  ppo:").replace("data.py", "ppo.py").replace("/data", "/ppo")
    place.write_text(marked)
    (root / "mine").mkdir()
    (root / "mine/r.py").write_text("")
    (root / "a judge").mkdir()
    edit(root, "rewards: []", "rewards: [a judge, 'mine/r.py:f', 'mine/r.py:g']")
    assert sources.keep(root) == [f"dvc.yaml: stage ppo now depends on {name}" for name in ("a judge", "mine/r.py")]
    deps = {name: stage["deps"] for name, stage in yaml.safe_load(place.read_text())["stages"].items()}
    assert deps == {"data": ["pipelines/data.py"], "ppo": ["pipelines/ppo.py", "a judge", "mine/r.py"]}
    assert sources.keep(root) == []
    (root / "mine/r.py").unlink()
    with pytest.raises(ParamsError, match="ppo.rewards: mine/r.py:f: no such file"):
        sources.keep(root)
    (root / "params.yaml").write_text(before)
    sources.keep(root)
    assert place.read_text() == marked


def test_a_base_of_ones_own_is_a_dep_of_both_stages_that_read_it(root: Path) -> None:
    """Or new weights under the same name would change nothing."""
    shutil.copy(ROOT / "dvc.yaml", root)
    before = (root / "dvc.yaml").read_text()
    (root / "mine").mkdir()
    (root / "mine/config.json").write_text("{}")
    edit(root, "base: smollm2-135m", "base: mine")
    assert sources.keep(root) == [f"dvc.yaml: stage {stage} now depends on mine" for stage in ("tokenizer", "pretrain")]
    assert all("mine" in graph.stage(root, stage).inputs for stage in ("tokenizer", "pretrain"))
    runner._check_files(root, graph.stage(root, "pretrain"), whole.load(root / "params.yaml"))
    (root / "dvc.yaml").write_text(before)
    with pytest.raises(ParamsError, match=r"pretrain\.base reads mine, which is not among the deps of stage pretrain"):
        runner._check_files(root, graph.stage(root, "pretrain"), whole.load(root / "params.yaml"))


def test_models_that_dials_name_become_deps_and_leave_again(root: Path) -> None:
    place, before = root / "dvc.yaml", text(root)
    stage = GRAPH.removeprefix("stages:\n").replace(sources.MARKERS["data"], sources.MARKERS["quantize"])
    marked = GRAPH + stage.replace("  data:", "  quantize:").replace("data.py", "q.py").replace("/data", "/q")
    place.write_text(marked)
    (root / "mine").mkdir()
    (root / "mine/config.json").write_text("{}")
    edit(root, "  model: null                 # null: the policy", "  model: mine                 # null: the policy")
    assert sources.keep(root) == ["dvc.yaml: stage quantize now depends on mine"]
    (root / "mine/config.json").unlink()
    with pytest.raises(ParamsError, match=r"quantize\.model: .*mine: the directory has no config\.json"):
        sources.keep(root)
    (root / "params.yaml").write_text(before)
    sources.keep(root)
    assert place.read_text() == marked


def test_a_model_of_another_stage_can_be_named_before_it_is_made(root: Path) -> None:
    """In a fresh clone, or the worktree of an isolated run: DVC runs the other stage first, and lineage knows it."""
    shutil.copy(ROOT / "dvc.yaml", root)
    edit(root, "  model: null                 # null: the policy", "  model: artifacts/dpo/model # null: the policy")
    edit(root, "  teacher: null ", "  teacher: ./artifacts/sft/model ")
    edit(root, "  rewards: [] ", "  rewards: [artifacts/reward/model] ")
    told = [("ppo", "reward"), ("distill", "sft"), ("quantize", "dpo")]
    assert sources.keep(root) == [
        f"dvc.yaml: stage {one} now depends on artifacts/{other}/model" for one, other in told
    ]
    assert all(other in graph.stage(root, one).parents for one, other in told) and sources.keep(root) == []
    every = whole.load(root / "params.yaml")
    assert not runner._names_hub(root, every)
    runner._check_files(root, graph.stage(root, "quantize"), every)
    edit(root, "  teacher: ./artifacts/sft/model ", "  teacher: nowhere/at/all ")
    with pytest.raises(ParamsError, match=r"distill\.teacher: 'nowhere/at/all' is neither"):
        runner._names_hub(root, whole.load(root / "params.yaml"))
    edit(root, "  teacher: nowhere/at/all ", "  teacher: artifacts/stf/model ")
    with pytest.raises(ParamsError, match=r"distill\.teacher: '.*artifacts/stf/model' is neither"):
        sources.keep(root)


def test_what_a_stage_may_read_is_asked_of_the_graph_that_is_to_be(root: Path) -> None:
    """Not of `dvc.yaml` as other params have left it; nor of one stage at a time, or two could wait for each other."""
    shutil.copy(ROOT / "dvc.yaml", root)
    edit(root, "  reranker: null", "  reranker: artifacts/distill/model")
    assert sources.keep(root) == ["dvc.yaml: stage rag now depends on artifacts/distill/model"]
    before = (root / "dvc.yaml").read_text()
    edit(root, "  teacher: null ", "  teacher: artifacts/rag/index/embedder ")
    with pytest.raises(ParamsError, match=r"stage rag is to read artifacts/distill/model, and comes before .* distill"):
        sources.keep(root)
    assert (root / "dvc.yaml").read_text() == before
    edit(root, "  reranker: artifacts/distill/model", "  reranker: null")
    assert sources.keep(root) == [
        "dvc.yaml: stage distill now depends on artifacts/rag/index/embedder",
        "dvc.yaml: stage rag no longer depends on artifacts/distill/model",
    ]
    assert "rag" in graph.stage(root, "distill").parents


def test_a_base_model_in_a_directory_is_a_dep_of_both_its_stages(root: Path) -> None:
    """Or another model in the same place would change neither, and a checkpoint of the one go on as the other."""
    shutil.copy(ROOT / "dvc.yaml", root)
    (root / "mine").mkdir()
    (root / "mine/config.json").write_text("{}")
    before = (root / "dvc.yaml").read_text()
    edit(root, "  base: smollm2-135m ", "  base: mine ")
    said = [f"dvc.yaml: stage {stage} now depends on mine" for stage in ("tokenizer", "pretrain")]
    assert sources.keep(root) == said and sources.keep(root) == []
    for stage in ("tokenizer", "pretrain"):
        assert graph.stage(root, stage).inputs["mine"] == "mine"
        runner._check_files(root, graph.stage(root, stage), whole.load(root / "params.yaml"))
    (root / "dvc.yaml").write_text(before)
    with pytest.raises(ParamsError, match=r"pretrain\.base reads mine, which is not among the deps of stage pretrain"):
        runner._check_files(root, graph.stage(root, "pretrain"), whole.load(root / "params.yaml"))


def test_rankings_below_the_home_directory_are_a_dep(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path.with_name(f"{tmp_path.name}-home")
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    (home / "ranked.jsonl").write_text("{}\n")
    given = (
        text(root)
        .replace("  labeler: reference ", "  labeler: file ")
        .replace("rankings: null  ", "rankings: ~/ranked.jsonl ", 1)
    )
    (root / "params.yaml").write_text(given)
    (root / "dvc.yaml").write_text(
        GRAPH
        + f"""  feedback:
    deps:
    - pipelines/feedback.py
    {sources.MARKERS["feedback"]}
    outs:
    - artifacts/feedback
"""
    )
    assert sources.keep(root) == [f"dvc.yaml: stage feedback now depends on {home}/ranked.jsonl"]


def test_models_of_two_stages_of_one_name_are_both_deps(root: Path) -> None:
    """Both directories are called `model`; one was looked for in vain among the deps that `sluice run` had written."""
    shutil.copy(ROOT / "dvc.yaml", root)
    for stage in ("dpo", "sft"):
        (root / "artifacts" / stage / "model").mkdir(parents=True)
        (root / "artifacts" / stage / "model/config.json").write_text("{}")
    edit(root, "  teacher: null ", "  teacher: artifacts/dpo/model ")
    edit(root, "  student: layers ", "  student: artifacts/sft/model ")
    edit(root, "keep_layers: 15 ", "keep_layers: null ")
    edit(root, "fit: 0.3 ", "fit: null ")
    assert len(sources.keep(root)) == 2
    spec = graph.stage(root, "distill")
    assert {"artifacts/dpo/model", "artifacts/sft/model", "ppo"} <= set(spec.inputs)
    runner._check_files(root, spec, whole.load(root / "params.yaml"))


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("  teacher: null ", "  teacher: artifacts/distill/model ", "stage distill is to read .* makes it itself"),
        (
            "base: smollm2-135m",
            "base: artifacts/ppo/model",
            "stage tokenizer .* comes before stage ppo, which makes it",
        ),
    ],
)
def test_what_a_stage_makes_it_cannot_be_made_of(root: Path, old: str, new: str, told: str) -> None:
    """DVC would find a circle, and `dvc.yaml` be of no use to any stage."""
    shutil.copy(ROOT / "dvc.yaml", root)
    before = (root / "dvc.yaml").read_text()
    for stage in ("distill", "ppo"):
        (root / "artifacts" / stage / "model").mkdir(parents=True)
        (root / "artifacts" / stage / "model/config.json").write_text("{}")
    edit(root, old, new)
    with pytest.raises(ParamsError, match=told + r"\. Copy it to a place of its own"):
        sources.keep(root)
    assert (root / "dvc.yaml").read_text() == before
