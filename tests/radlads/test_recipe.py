"""Recipes: defaults, files, bases, overrides, and the one-line errors that name the place and the nearest valid word."""

from pathlib import Path

import pytest

from radlads.errors import RadladsError
from radlads.recipe import Recipe, load_recipe, recipe_names

CONVERT = """\
name: small
teacher: some/teacher
data: {train: [a.txt], valid: [b.jsonl.xz]}
stages:
  - {kind: align, tokens: 1000, seq_len: 16, batch_size: 4, lr: 1e-3, lr_final: 1e-5, schedule: quarter_cosine}
  - {kind: lm, tokens: 100, seq_len: 8, batch_size: 2, lr: 1e-5}
"""
INIT = """\
teacher: null
tokenizer: tokenizer.json
init:
  {family: qwen3, hidden_size: 64, intermediate_size: 96, num_layers: 2, num_heads: 2, num_kv_heads: 1,
   head_dim: 64, vocab_size: 300}
data: {train: [a.txt], valid: [b.txt]}
stages: [{kind: lm, tokens: 100, seq_len: 8, batch_size: 2, lr: 1e-3}]
"""


def written(folder: Path, text: str, name: str = "r.yaml") -> Path:
    (folder / name).write_text(text)
    return folder / name


def refused(path: Path, *overrides: str) -> RadladsError:
    with pytest.raises(RadladsError) as caught:
        load_recipe(path, overrides)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_status == 2
    return caught.value


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_loads(name: str) -> None:
    assert load_recipe(name).name == name


def test_no_name_means_tiny() -> None:
    assert load_recipe().fingerprint() == load_recipe("tiny").fingerprint()


def test_defaults_are_resolved(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, CONVERT))
    align, lm = recipe.stages
    assert recipe.student is not None and recipe.student.arch == "rwkv7"
    assert (align.lr, align.lr_final, align.mixer_lr, align.mixer_lr_final) == (1e-3, 1e-5, 1e-3, 1e-5)
    assert (lm.lr_final, lm.mixer_lr_final) == (1e-5, 1e-5)
    assert (align.train, lm.train) == ("mixer", "all")
    assert (align.micro_batch, align.betas, align.clip) == (4, (0.9, 0.95), 1.0)
    assert (align.number, lm.number) == (1, 3)


def test_steps_cover_the_tokens(tmp_path: Path) -> None:
    path = written(tmp_path, CONVERT)
    assert load_recipe(path).stages[0].steps == 16  # 1000 / 64 = 15.6
    assert load_recipe(path, ["stages.0.tokens=1024"]).stages[0].steps == 16
    assert load_recipe(path, ["stages.0.tokens=1025"]).stages[0].steps == 17


def test_stable_cosine_stable_sets_its_window(tmp_path: Path) -> None:
    stage = load_recipe(written(tmp_path, CONVERT), ["stages.1.schedule=stable_cosine_stable"]).stages[1]
    assert (stage.lr_wait, stage.lr_endpoint) == (0.833, 0.875)


def test_the_resolved_recipe_reads_back_the_same(tmp_path: Path) -> None:
    for text in (CONVERT, INIT):
        recipe = load_recipe(written(tmp_path, text))
        again = load_recipe(written(tmp_path, recipe.to_yaml(), "resolved.yaml"))
        assert again == recipe
        assert again.fingerprint() == recipe.fingerprint()


def test_fingerprint_follows_the_values_not_the_text(tmp_path: Path) -> None:
    path = written(tmp_path, CONVERT)
    same = written(tmp_path, CONVERT.replace("lr: 1e-3", "lr: 0.001") + "seed: 1337\n", "same.yaml")
    assert load_recipe(same).fingerprint() == load_recipe(path).fingerprint()
    assert load_recipe(path, ["seed=1"]).fingerprint() != load_recipe(path).fingerprint()


def test_a_new_teacher_is_expressible(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, INIT))
    assert recipe.teacher is None and recipe.student is None
    assert recipe.init_spec().mixers == ("softmax", "softmax")
    assert "unknown key 'hiden_size', nearest is 'hidden_size'" in refused(tmp_path / "r.yaml", "init.hiden_size=3").why
    assert "the only stage is lm" in refused(tmp_path / "r.yaml", "stages.0.kind=distill").why
    assert "nearest is 'qwen3'" in refused(tmp_path / "r.yaml", "init.family=qwen4").why
    assert "needs a tokenizer" in refused(tmp_path / "r.yaml", "tokenizer=null").why
    assert "num_kv_heads 2" in refused(tmp_path / "r.yaml", "init.num_kv_heads=2", "init.num_heads=3").why


def test_a_base_is_overridden_key_by_key(tmp_path: Path) -> None:
    written(tmp_path, CONVERT, "parent.yaml")
    child = load_recipe(written(tmp_path, "base: parent.yaml\nname: child\ndata: {eos: false}\n"))
    assert (child.name, child.data.eos, child.data.train[0].path) == ("child", False, "a.txt")
    named = load_recipe(written(tmp_path, "base: tiny\nname: mine\n"))
    assert named.stages == load_recipe("tiny").stages
    assert "base of its own" in refused(written(tmp_path, "base: r.yaml\n")).why


def test_an_error_in_the_base_names_the_base(tmp_path: Path) -> None:
    written(tmp_path, CONVERT.replace("tokens: 1000", "tokens: -5"), "parent.yaml")
    assert "parent.yaml:5: stages.0.tokens" in refused(written(tmp_path, "base: parent.yaml\n")).where


def test_overrides_are_read_as_yaml(tmp_path: Path) -> None:
    recipe = load_recipe(
        written(tmp_path, CONVERT),
        ["stages.0.lr=1e-4", "student.keep_softmax=[1, 3]", "student.options.rope=false", "eval.prompt=Hello: you", "name=7b"],
    )
    assert recipe.student is not None
    assert recipe.stages[0].lr == 1e-4
    assert recipe.student.keep_softmax == (1, 3)
    assert recipe.student.options == {"rope": False}
    assert (recipe.eval.prompt, recipe.name) == ("Hello: you", "7b")


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("stages.0.lrr=1", "unknown key 'lrr', nearest is 'lr'"),
        ("stagse=1", "nearest is 'stages'"),
        ("stages.9.lr=1", "stages has no entry '9'"),
        ("stages.x.lr=1", "stages has no entry 'x'"),
        ("stages.0.lr=fast", "valid number"),
        ("stages.0.lr=.inf", "finite"),
        ("stages.0.lr=true", "a number is needed"),
        ("stages.0.kind=distil", "nearest is 'distill'; known: align, distill, lm"),
        ("stages.0.micro_batch=3", "3 does not divide batch_size 4"),
        ("stages.0.tokens=0", "greater than 0"),
        ("stages.0.tokens.x=1", "holds no table"),
        ("stages.0.train=all", "trains the mixers only"),
        ("stages.0.lr_wait=1", "not below lr_endpoint"),
        ("student.arch=rwkv8", "unknown value 'rwkv8', nearest is"),
        ("student.options.gate=half", "none of full, lowrank, none"),
        ("student.options.gat=none", "nearest is 'gate'"),
        ("student.options={clamp: deep}", "clamp: "),
        ("student.keep_softmax=[1, 1]", "twice"),
        ("student.keep_softmax=[-1]", "greater than or equal to 0"),
        ("data.train=[]", "at least 1 item"),
        ("data.train=[a", "expected"),
        ("name=../x", "pattern"),
        ("eval", "key=value"),
    ],
)
def test_a_bad_override_is_named(tmp_path: Path, override: str, told: str) -> None:
    error = refused(written(tmp_path, CONVERT), override)
    assert error.code == "R101"
    assert told in error.why
    assert override in error.where


@pytest.mark.parametrize(
    ("old", "new", "place", "told"),
    [
        ("name: small", "nmae: small", ":1: nmae", "unknown key 'nmae', nearest is 'name'"),
        ("lr: 1e-5}", "lr: 1e-5, warmup: 3}", ":6: stages.1.warmup", "nearest is 'warmup_steps'"),
        ("tokens: 100,", "tokens: many,", ":6: stages.1.tokens", "valid integer"),
        (" batch_size: 2,", "", ":6: stages.1.batch_size", "the key is missing"),
        ("teacher: some/teacher", "teacher: null", "", "exactly one of teacher"),
        ("name: small", "name: small\nname: other", ":2", "'name' stands twice"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path: Path, old: str, new: str, place: str, told: str) -> None:
    error = refused(written(tmp_path, CONVERT.replace(old, new)))
    assert error.code == "R102"
    assert told in error.why
    assert error.where.endswith(f"r.yaml{place}")


def test_stages_follow_the_papers_order(tmp_path: Path) -> None:
    swapped = refused(written(tmp_path, CONVERT), "stages.0.kind=lm", "stages.1.kind=align")
    assert (swapped.code, "this is lm, align" in swapped.why) == ("R103", True)
    assert refused(tmp_path / "r.yaml", "stages.0.kind=lm").code == "R103"


def test_an_unknown_recipe_suggests_one() -> None:
    with pytest.raises(RadladsError, match="nearest is 'tiny'"):
        load_recipe("tinny")


def test_a_recipe_cannot_be_changed(tmp_path: Path) -> None:
    recipe: Recipe = load_recipe(written(tmp_path, CONVERT))
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 2  # type: ignore[misc]
