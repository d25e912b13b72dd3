"""G18: no network access of its own.  CI runs the whole suite without a network: scripts/offline."""

import socket

import pytest

from potstill.cli import main


@pytest.fixture
def nobody_answers(monkeypatch):
    """Whoever looks up a host or connects to anything fails the test."""
    asked = []

    def refuse(*arguments, **_):
        asked.append(arguments)
        raise OSError("there is no network in this test")

    for name in ("getaddrinfo", "gethostbyname", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    return asked


def test_no_verb_asks_for_anything(nobody_answers, tiny_recipe, tmp_path, capsys):
    root = tmp_path / "runs"
    source = next(
        line.split("source: ")[1].split(",")[0] for line in tiny_recipe.read_text().splitlines() if "source: " in line
    )
    verbs = [
        ["run", tiny_recipe, "--output-dir", root],
        ["report", root / "tiny"],
        ["check", source],
        ["predict", root / "tiny", source],
        ["evaluate", root / "tiny", "--data", source],
        ["recipes"],
        ["models", "resnet18"],
        ["methods", "kd"],
        ["cache", "ls"],
    ]
    for verb in verbs:
        assert main([str(part) for part in verb]) in (0, 3), (verb, capsys.readouterr().err)  # 3: findings of check
        assert nobody_answers == [], verb


def test_the_page_names_no_address_that_a_browser_would_ask(finished_run):
    page = (finished_run / "report.html").read_text()
    assert not any(f'{attribute}="http' in page for attribute in ("src", "srcset", "action", "data"))
    assert "@import" not in page
    assert "url(http" not in page
    assert "<script" not in page
    assert "default-src &#39;none&#39;" in page or "default-src 'none'" in page
