from pathlib import Path

import pytest

from potstill.errors import ArtifactError
from potstill.report.predictions import read_predictions


def test_names_with_commas_quotes_and_newlines(tmp_path: Path) -> None:
    path = tmp_path / "predictions_test.csv"
    path.write_text(
        'path,label,prediction,"p:a,b","p:c""\nd"\n"x,1.png","a,b","c""\nd",0.1,0.9\ny.png,"a,b","a,b",1,0\n'
    )
    found = read_predictions(path)
    assert found is not None
    assert found.class_names == ["a,b", 'c"\nd']
    assert (found.paths, found.labels, found.predicted) == (["x,1.png", "y.png"], [0, 0], [1, 0])


def test_absent(tmp_path: Path) -> None:
    assert read_predictions(tmp_path / "none.csv") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("label,path\n", "first line"),
        ("path,label,prediction,p:a\nx,a,b,1\n", "line 2"),
        ("path,label,prediction,p:a\nx,a,a,1\ny,a\n", "line 3"),
    ],
)
def test_damage_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "predictions_test.csv"
    path.write_text(text)
    with pytest.raises(ArtifactError, match=message):
        read_predictions(path)
