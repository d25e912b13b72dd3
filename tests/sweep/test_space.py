"""What --search may say."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potstill.errors import UsageError
from potstill.sweep import parse_space, read_dimension

NUMBERS = st.floats(min_value=1e-6, max_value=1e6, allow_nan=False)
WORDS = st.text("abcdefghij0123456789_-", min_size=1, max_size=8)


@given(NUMBERS, NUMBERS, st.booleans())
def test_a_range_means_its_ends(one, other, log):
    low, high = sorted((one, other))
    text = f"training.lr={low!r}..{high!r}{':log' if log else ''}"
    if low == high:
        with pytest.raises(UsageError, match="smaller to a larger"):
            read_dimension(text)
        return
    found = read_dimension(text)
    assert (found.low, found.high, found.log, found.choices) == (low, high, log, ())


@given(st.lists(WORDS, min_size=1, max_size=6, unique=True))
def test_choices_stay_in_order(words):
    assert read_dimension("student.model=" + ",".join(words)).choices == tuple(words)


@given(st.text(max_size=30))
def test_any_text_is_read_or_refused_in_words(text):
    try:
        found = read_dimension(text)
    except UsageError as error:
        said = str(error)
    else:
        said = f"--search {found}"
    assert said.startswith("--search")


def test_commas_inside_brackets_do_not_divide():
    assert read_dimension("training.milestones=[1,2],[3]").choices == ("[1,2]", "[3]")


def space(*texts, sets=()):
    return parse_space(texts, "quickstart", sets, {})


def test_a_range_is_whole_where_the_setting_is():
    alpha, epochs = space("method.alpha=0..1", "training.epochs=1..9").dimensions
    assert not alpha.whole
    assert epochs.whole


def test_the_options_of_a_method_count_only_there():
    # kd has a temperature and dist has none (their documentation pages): 3 combinations, not 4
    grid = space("method.temperature=1,2", "method.name=kd,supervised").grid()
    assert sorted(map(str, grid)) == sorted(
        map(
            str,
            [
                {"method.name": "kd", "method.temperature": "1"},
                {"method.name": "kd", "method.temperature": "2"},
                {"method.name": "supervised"},
            ],
        )
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("method.temprature=1,2", "temperature"),
        ("trainig.lr=1,2", "training"),
        ("training.schedule=cosine,stepp", "step"),
        ("method.alpha=0..2", "got 2.0"),
        ("training.lr=0..1:log", "begins above 0"),
        ("teacher.model=cifar/vgg8,cifar/vgg11", "share teacher"),
        ("data.source=digits,other", "share teacher"),
        ("seed=1,2", "seed"),
        ("training.selection_metric=top1,nll", "measure"),
        ("training.lr", "KEY=a,b,c"),
        ("training.lr=1,,2", "between two commas"),
        ("training.lr=1..2:lin", ":log"),
    ],
)
def test_a_mistake_is_named(text, says):
    with pytest.raises(UsageError, match=f"(?s){says}"):
        space(text)


def test_a_key_twice_is_refused():
    with pytest.raises(UsageError, match="twice"):
        space("training.lr=0.1,0.2", "training.lr=0.3,0.4")


def test_test_curves_are_refused():
    with pytest.raises(UsageError, match="only the best trial"):
        space("training.lr=0.1,0.2", sets=["training.evaluate_test_every_epoch=true"])
