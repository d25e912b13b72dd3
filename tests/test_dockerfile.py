"""The Dockerfile cannot be built here; what it names must exist, and its command must start the server."""

import json
import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import typer

from potstill.cli import app

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def lines() -> list[str]:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def arguments(lines: list[str], instruction: str) -> list[str]:
    return [line.removeprefix(f"{instruction} ") for line in lines if line.startswith(f"{instruction} ")]


def test_it_installs_extras_that_exist_on_a_python_that_is_supported(lines):
    extras = re.findall(r'"\.\[([\w,-]+)\]"', " ".join(arguments(lines, "RUN")))
    assert extras == ["serve"]
    assert set(extras) <= PROJECT["optional-dependencies"].keys()
    (image,) = arguments(lines, "FROM")
    version = tuple(map(int, re.findall(r"\d+", image)[:2]))
    assert version >= tuple(map(int, re.findall(r"\d+", PROJECT["requires-python"])))


def test_it_copies_all_that_the_package_is_built_from(lines):
    copied = {name for line in arguments(lines, "COPY") for name in line.split()[:-1]}
    needed = {PROJECT["readme"], *PROJECT["license-files"], "pyproject.toml", "src"}
    assert copied == needed
    assert all((ROOT / name).exists() for name in copied)
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert kept == copied  # all else is not sent to the builder


def test_its_command_starts_the_server_at_one_address(lines, tmp_path):
    stub = tmp_path / "potstill"
    stub.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "hostname").write_text("#!/bin/sh\necho 172.17.0.2 fd00::2\n")
    for name in ("potstill", "hostname"):
        (tmp_path / name).chmod(0o755)
    entry, command = (json.loads(arguments(lines, key)[0]) for key in ("ENTRYPOINT", "CMD"))
    environment = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run([*entry, *command], env=environment, capture_output=True, text=True, check=True)
    words = done.stdout.split()
    assert words[:2] == ["serve", "/runs/quickstart"]
    verb = typer.main.get_command(app).commands["serve"]
    given = verb.make_context("serve", words[1:]).params
    assert (given["host"], given["port"]) == ("172.17.0.2", 8000)
    assert arguments(lines, "EXPOSE") == [str(given["port"])]
    check = json.loads(arguments(lines, "HEALTHCHECK")[0].removeprefix("CMD "))
    assert f":{given['port']}/healthz" in check[-1]
    compile(check[-1], "HEALTHCHECK", "exec")


def test_a_browser_outside_reaches_it_by_the_published_port():
    pytest.importorskip("fastapi", reason="the extra serve is not installed")
    from potstill.serve.server import _allowed_hosts

    assert {"127.0.0.1:8000", "localhost:8000", "172.17.0.2:8000"} <= _allowed_hosts("172.17.0.2", 8000)
