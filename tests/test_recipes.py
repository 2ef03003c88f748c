import pytest

pytest.importorskip("accelerate")

from llama_bidir.recipes import list_recipes, load_recipe


def test_bundled_recipe_with_overrides(tmp_path):
    assert "quickstart" in list_recipes()
    recipe = load_recipe("quickstart", {"training": {"max_steps": 3, "output_dir": str(tmp_path)}})
    assert (recipe.training.max_steps, recipe.training.learning_rate) == (3, 2e-3)
    assert recipe.data.group_size == 8
    assert recipe.model.pooling == "avg"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("modle: {}", "unknown key 'modle'; the nearest known one is 'model'"),
        (
            "training: {learning_rat: 1.0}",
            "training: unknown key 'learning_rat'; the nearest known one is 'learning_rate'",
        ),
        ("model: {poolng: avg}", "model: unknown key 'poolng'; the nearest known one is 'pooling'"),
        ("model: {pooling: avg}", "model: model_name_or_path is required"),
        ("- 1", "a recipe holds the blocks model, data, training, got list"),
    ],
)
def test_wrong_recipes(content, message, tmp_path):
    path = tmp_path / "recipe.yaml"
    base = "" if content.startswith(("model", "-")) else "model: {model_name_or_path: m}\n"
    path.write_text(base + content)
    with pytest.raises(ValueError, match=message):
        load_recipe(path)


def test_missing_recipe():
    with pytest.raises(FileNotFoundError, match=r"there is no recipe 'nope': pass a YAML file or one of .*quickstart"):
        load_recipe("nope")
