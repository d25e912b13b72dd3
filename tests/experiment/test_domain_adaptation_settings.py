import pytest

from potstill.config.recipe import dump_recipe, load_recipe
from potstill.config.yaml import parse_yaml
from potstill.errors import UsageError


def problems(*sets, source="domain", **flags):
    with pytest.raises(UsageError) as caught:
        load_recipe(source, sets, flags=flags or {"--data": "digits"})
    return str(caught.value)


def test_the_shipped_recipe_says_what_is_missing():
    text = problems(**{"--seed": 0})
    assert "data.source is missing" in text
    assert "`domain` needs data.target" in text
    assert "domain.yaml:" in text
    assert load_recipe("domain", data_needed=False).data.target is None  # it comes with the data from Python
    recipe = load_recipe("domain", ["data.target=digits"], flags={"--data": "digits"})
    assert (
        recipe.domain_settings.confidence,
        recipe.domain_settings.class_balance,
        recipe.domain_settings.adapt_batch_norm,
    ) == (
        0.9,
        True,
        False,
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("domain.confidence=1.1", "domain.confidence must be at most 1, got 1.1"),
        ("domain.confidence=-0.1", "domain.confidence must be at least 0, got -0.1"),
        ("domain.confidense=0.5", "did you mean 'confidence'"),
        ("data.target_labels=2", "data.target_labels must be at most 1, got 2"),
        ("data.target=digit", "did you mean 'digits'"),
        ("data.augment={cutmix: 1}", "data.augment.cutmix mixes labels, which target images do not have"),
        ("method={name: tfkd_reg}", "method tfkd_reg learns from no teacher; use kd"),
        ("data.target_options={classes: 2}", "unknown option 'classes'"),
    ],
)
def test_wrong_settings_are_named(change, message):
    found = problems("data.target=digits", change)
    assert message in found


@pytest.mark.parametrize("change", ["domain.confidence=0.5", "data.target_labels=0.1", "data.target_options={a: 1}"])
def test_settings_of_a_target_need_one(change):
    assert "data.target" in problems(change, source="quickstart")
    assert "not given" in problems(change, source="quickstart")


def test_a_recipe_without_a_target_is_written_and_read_as_before():
    recipe = load_recipe("quickstart")
    assert (recipe.domain, recipe.data.target) == (None, None)
    again = load_recipe(parse_yaml(dump_recipe(recipe), "again").value)
    assert again == recipe
    with_target = load_recipe("quickstart", ["data.target=digits"])
    assert with_target.domain is None
    assert with_target.domain_settings.confidence == 0.9
    assert load_recipe(parse_yaml(dump_recipe(with_target), "again").value) == with_target
