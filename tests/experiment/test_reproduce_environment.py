"""The commit of a folder, and nothing that the repository would like to have run."""

import shutil
import subprocess

import pytest

from potstill.experiment.reproduce import git_state

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="there is no git")


def git(folder, *arguments):
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    done = subprocess.run(["git", "-C", folder, *who, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path):
    git(tmp_path, "init", "--quiet")
    (tmp_path / "file").write_text("one")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "--quiet", "-m", "first")
    return tmp_path


def test_commit_and_changes(repository):
    commit = git(repository, "rev-parse", "HEAD")
    assert git_state(repository) == {"commit": commit, "changed": False}
    (repository / "new").write_text("untracked files are no change")
    assert git_state(repository) == {"commit": commit, "changed": False}
    (repository / "file").write_text("two")
    (repository / "below").mkdir()
    assert git_state(repository / "below") == {"commit": commit, "changed": True}


def test_none_where_there_is_none(tmp_path, repository, monkeypatch):
    git(repository, "checkout", "--quiet", "--orphan", "empty")
    assert git_state(repository) is None  # no commit yet
    assert git_state(tmp_path / "missing") is None
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", "/")
    (tmp_path / ".git").rename(tmp_path / "elsewhere")
    assert git_state(tmp_path) is None
    monkeypatch.setenv("PATH", "")
    assert git_state(tmp_path) is None


def test_no_program_of_the_repository_is_started(repository):
    canary = repository / "canary"
    program = repository / "program.sh"
    program.write_text(f"#!/bin/sh\ntouch {canary}\n")
    program.chmod(0o755)
    git(repository, "config", "core.fsmonitor", str(program))
    git_state(repository)
    assert not canary.exists()
    git(repository, "status")
    assert canary.exists()  # it would have been
