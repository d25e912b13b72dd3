"""G15: a recipe is data: nothing in it is run, loaded from an address, or grows without bounds."""

import pytest

from potstill.cli import main

TAGS = [
    "!!python/object/apply:os.mkdir [CANARY]",
    "!!python/object/new:os.mkdir [CANARY]",
    "!!python/name:os.system ''",
    "!!python/module:os ''",
    "!!python/object:potstill.errors.UsageError {}",
    "!include /etc/passwd",
]


def refused(capsys, recipe, *flags):
    """The message, of at most 30 lines."""
    capsys.readouterr()
    assert main(["run", str(recipe), *map(str, flags)]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert len(error) < 10_000
    return error


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("where", ["{}", "name: {}", "data: {{source: {}}}", "method: {{name: kd, temperature: {}}}"])
def test_no_tag_makes_an_object(tag, where, tmp_path, capsys):
    canary = tmp_path / "canary"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(where.format(tag.replace("CANARY", str(canary))))
    refused(capsys, recipe, "--output-dir", tmp_path)
    assert not canary.exists()


@pytest.mark.parametrize("tag", TAGS)
def test_nor_after_set(tag, tmp_path, capsys):
    canary = tmp_path / "canary"
    refused(capsys, "quickstart", "--output-dir", tmp_path, "--set", f"name={tag.replace('CANARY', str(canary))}")
    assert not canary.exists()


def test_what_grows_on_being_read(tmp_path, capsys):
    """A billion laughs: nine lists of nine of the list before."""
    lines = ["a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("\n".join([*lines, "name: *a9"]))
    refused(capsys, recipe)


def test_what_is_nested_without_end(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: " + "[" * 100_000)
    refused(capsys, recipe)


def test_what_refers_to_itself(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("method: &m {name: kd, other: *m}")
    refused(capsys, recipe)


@pytest.mark.parametrize("address", ["http://127.0.0.1:9/recipe.yaml", "file:///etc/passwd", "ftp://127.0.0.1/x"])
def test_addresses_are_no_names_of_anything(address, tmp_path, capsys, monkeypatch):
    import socket

    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("somebody asked the network"))
    refused(capsys, address)
    for flag in ("--data", "--teacher", "--student"):
        capsys.readouterr()
        assert main(["run", "quickstart", flag, address, "--output-dir", str(tmp_path)]) in (2, 4)
        assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["__import__('os').system('true')", "os", "..", "kd; rm", "kd\x00"])
def test_names_of_methods_and_models_are_looked_up_only(name, tmp_path, capsys):
    refused(capsys, "quickstart", "--output-dir", tmp_path, "--set", f"method={{name: {name!r}}}")
    refused(capsys, "quickstart", "--output-dir", tmp_path, "--set", f"student.model={name!r}")


@pytest.mark.parametrize(
    "lines",
    ["method: {name: 'potstill.methods.kd:KD'}", "student: {model: 'os:getcwd'}", "teacher: {model: 'mine.py:f'}"],
)
def test_a_recipe_file_that_names_code_is_refused(lines, tmp_path, capsys):
    """Typed on the command line such a name is the user's own; in a file, somebody else may have written it."""
    recipe = tmp_path / "sent.yaml"
    whole = {"data": "{source: digits}", "teacher": "{model: cifar/resnet8}", "student": "{model: cifar/resnet8}"}
    whole |= dict([lines.split(": ", 1)])
    recipe.write_text("name: sent\n" + "".join(f"{key}: {value}\n" for key, value in whole.items()))
    (tmp_path / "mine.py").write_text("raise SystemExit('it was run')\n")
    assert "--allow-code" in refused(capsys, recipe, "--output-dir", tmp_path)
