import hashlib
from pathlib import Path

import pytest

from potstill.errors import ArtifactError
from potstill.report.run_reader import StageResult, read_predictions


def stage_with(folder: Path, text: str) -> StageResult:
    """A stage with these predictions, and their right digest."""
    (folder / "predictions_test.csv").write_bytes(text.encode())
    return StageResult("teacher", folder, {}, files={"predictions_test.csv": hashlib.sha256(text.encode()).hexdigest()})


def test_names_with_commas_quotes_and_newlines(tmp_path: Path) -> None:
    stage = stage_with(
        tmp_path,
        'path,label,prediction,"p:a,b","p:c""\nd"\n"x,1.png","a,b","c""\nd",0.1,0.9\ny.png,"a,b","a,b",1,0\n',
    )
    found = read_predictions(stage, "test")
    assert found is not None
    assert found.class_names == ["a,b", 'c"\nd']
    assert (found.paths, found.labels.tolist(), found.predicted.tolist()) == (["x,1.png", "y.png"], [0, 0], [1, 0])


def test_the_most_probable_classes_alone(tmp_path: Path) -> None:
    text = "path,label,prediction,label_index,prediction_index,p_1,class_2,p_2\nx,cat,ox,3,7,0.9,cat,0.1\n"
    found = read_predictions(stage_with(tmp_path, text), "test")
    assert found is not None
    assert (found.labels.tolist(), found.predicted.tolist()) == ([3], [7])
    assert [found.class_names[i] for i in (3, 7)] == ["cat", "ox"]


def test_absent(tmp_path: Path) -> None:
    assert read_predictions(StageResult("teacher", tmp_path, {}), "test") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("label,path\n", "first line"),
        ("path,label,prediction,p:a\nx,a,b,1\n", "line 2"),
        ("path,label,prediction,p:a\nx,a,a,1\ny,a\n", "line 3"),
        ("path,label,prediction,label_index,prediction_index\nx,a,b,0,1\ny,a,b,1,1\n", "line 3"),
    ],
)
def test_damage_is_named(tmp_path: Path, text: str, message: str) -> None:
    stage = stage_with(tmp_path, text)
    with pytest.raises(ArtifactError, match=message):
        read_predictions(stage, "test")


def test_other_bytes_than_the_run_wrote_are_never_parsed(tmp_path: Path) -> None:
    stage = stage_with(tmp_path, "path,label,prediction,p:a,p:b\nx.png,a,a,0.9,0.1\n")
    (tmp_path / "predictions_test.csv").write_text("path,label,prediction,p:a,p:b\nx.png,a,b,0.9,0.1\n")
    with pytest.raises(ArtifactError, match=r"predictions_test\.csv is damaged: its SHA-256"):
        read_predictions(stage, "test")
    with pytest.raises(ArtifactError, match=r"none of the files that results\.json lists"):
        read_predictions(StageResult("teacher", tmp_path, {}), "test")


def test_apostrophes_before_formulas_are_taken_off(tmp_path: Path) -> None:
    text = "path,label,prediction,p:=a,p:'b\n'=x.png,'=a,'b,0.2,0.8\n"
    found = read_predictions(stage_with(tmp_path, text), "test")
    assert found is not None
    assert found.class_names == ["=a", "'b"]
    assert (found.paths, found.labels.tolist(), found.predicted.tolist()) == (["=x.png"], [0], [1])
