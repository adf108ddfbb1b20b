import json

import pytest

from radlads.recipe import load_recipe, recipe_names


def test_ls_names_every_recipe(radlads):
    page, found = radlads("recipes", "ls").out, json.loads(radlads("recipes", "ls", "--json").out)
    assert all(name in page for name in recipe_names())
    assert [row["name"] for row in found["recipes"]] == recipe_names()


def test_show_prints_yaml_that_means_the_same(radlads, tmp_path):
    page = radlads("recipes", "show", "tiny", "--set", "stages.0.lr=0.5").out
    (tmp_path / "shown.yaml").write_text(page)
    assert load_recipe(tmp_path / "shown.yaml") == load_recipe("tiny", ["stages.0.lr=0.5"])
    assert json.loads(radlads("recipes", "show", "tiny", "--json").out)["recipe"] == load_recipe("tiny").values()


def test_cp_keeps_every_byte_and_replaces_nothing_unasked(radlads, tmp_path):
    from radlads.recipe import find_recipe

    target = tmp_path / "mine.yaml"
    assert radlads("recipes", "cp", "tiny", target).status == 0
    assert target.read_bytes() == find_recipe("tiny").read_bytes()
    target.write_text("mine")
    refused = radlads("recipes", "cp", "tiny", target)
    assert refused.status == 2 and "R401" in refused.err and target.read_text() == "mine"
    assert radlads("recipes", "cp", "tiny", target, "--overwrite").status == 0 and target.read_text() != "mine"
    assert radlads("recipes", "cp", "tiny", tmp_path).status == 0 and (tmp_path / "tiny.yaml").is_file()


def test_validate_names_the_wrong_key_and_the_nearest(radlads, tmp_path):
    assert radlads("recipes", "validate", "tiny").out.startswith("tiny is valid")
    assert json.loads(radlads("recipes", "validate", "tiny", "--json").out)["valid"] is True
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("base: tiny\nsed: 5\n")
    outcome = radlads("recipes", "validate", wrong)
    assert outcome.status == 2 and "R102" in outcome.err and "'seed'" in outcome.err and outcome.out == ""


def test_schema_is_json_schema(radlads):
    schema = json.loads(radlads("recipes", "schema").out)
    assert schema["additionalProperties"] is False and "stages" in schema["properties"]


@pytest.mark.parametrize("words", [["show", "tny"], ["cp", "tny", "x"], ["validate", "nowhere.yaml"]])
def test_unknown_recipe_is_one_line(radlads, words):
    outcome = radlads("recipes", *words)
    assert outcome.status == 2 and "error: R" in outcome.err and "tiny" in outcome.err


def test_group_alone_prints_its_help(radlads):
    outcome = radlads("recipes")
    assert outcome.status == 0 and "validate" in outcome.out and outcome.err == ""
