import pytest

from potstill.code_references import is_code_reference, load_reference, resolve_reference
from potstill.errors import UsageError


@pytest.mark.parametrize("name", ["a:B", "a.b:C", "mine.py:C", "./some dir/mine.py:C", "/abs/my-own.py:C"])
def test_references(name):
    assert is_code_reference(name)


@pytest.mark.parametrize(
    "name", ["kd", "", ":", "a:", ":B", "cuda:1", "hf-hub:a", "a/b:C", "a b:C", "a.py:1", "a:b.c", "http://x"]
)
def test_other_names(name):
    assert not is_code_reference(name)
    with pytest.raises(UsageError, match="names no code"):
        load_reference(name)


def test_a_file_runs_once_for_each_content_and_imports_its_neighbours(tmp_path):
    (tmp_path / "beside_mine.py").write_text("number = 7\n")
    file = tmp_path / "my-own.py"
    file.write_text("from beside_mine import number\nclass Mine: value = number\n")
    first = load_reference(f"{file}:Mine")
    assert first.value == 7
    assert load_reference("my-own.py:Mine", base=tmp_path) is first
    file.write_text("class Mine: value = 8\n")
    assert load_reference(f"{file}:Mine").value == 8


def test_relative_paths_and_modules_start_from_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["/nowhere"])
    (tmp_path / "code_of_a_test.py").write_text("class Mine: pass\n")
    assert resolve_reference("code_of_a_test.py:Mine") == f"{tmp_path}/code_of_a_test.py:Mine"
    assert resolve_reference("code_of_a_test:Mine") == "code_of_a_test:Mine"
    assert load_reference("code_of_a_test:Mine").__module__ == "code_of_a_test"


@pytest.mark.parametrize(
    ("content", "name", "parts"),
    [
        (None, "mine.py:Mine", ["cannot read", "mine.py", "No such file"]),
        ("class Mines: pass", "mine.py:Mine", ["has no 'Mine'", "did you mean 'Mines'?"]),
        ("x = 1\ny = x + z", "mine.py:Mine", ["NameError: name 'z' is not defined", "mine.py, line 2"]),
        ("def f(:", "mine.py:Mine", ["not valid Python", "mine.py, line 1"]),
        ("import nosuchmodule", "mine.py:Mine", ["ModuleNotFoundError", "nosuchmodule", "mine.py, line 1"]),
        ("\nraise SystemExit(0)", "mine.py:Mine", ["SystemExit: 0", "line 2"]),
        (None, "nosuchpackage.inner:Mine", ["no module 'nosuchpackage'", "path/file.py:Name"]),
        (None, "potstill.nosuchmodule:Mine", ["no module 'potstill.nosuchmodule'"]),
        (None, "potstill.errors:UsageErrors", ["has no 'UsageErrors'", "did you mean 'UsageError'?"]),
    ],
)
def test_what_cannot_be_loaded_is_one_message(tmp_path, content, name, parts):
    if content is not None:
        (tmp_path / "mine.py").write_text(content)
    for _ in range(2):  # a failed import leaves nothing behind that would pass the second time
        with pytest.raises(UsageError) as caught:
            load_reference(name, base=tmp_path)
        assert str(caught.value).startswith(name)
        for part in parts:
            assert part in str(caught.value)


def test_the_module_of_a_package_that_misses_something_is_named_with_its_line(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "code_that_misses.py").write_text("\n\nimport nosuchmodule\n")
    with pytest.raises(UsageError, match=r"No module named 'nosuchmodule' \(.*code_that_misses.py, line 3\)"):
        load_reference("code_that_misses:Mine")
