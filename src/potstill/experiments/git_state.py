"""Which commit a folder is at; nothing of the repository is run, and nothing waits for it."""

import os
import shutil
import subprocess  # nosec B404 # git, with a fixed command line, see below
from pathlib import Path

_SECONDS = 2.0


def git_state(folder: Path) -> dict[str, str | bool] | None:
    """The commit, and whether tracked files differ from it.

    Returns:
        ``{"commit": 40 hex digits, "changed": bool}``; None where there is no git, no repository, no commit yet, or
        no answer within two seconds.
    """
    commit = _git(folder, "rev-parse", "--verify", "HEAD")
    status = _git(folder, "status", "--porcelain", "--untracked-files=no")
    if commit is None or status is None:
        return None
    return {"commit": commit.strip(), "changed": bool(status.strip())}


def _git(folder: Path, *arguments: str) -> str | None:
    program = shutil.which("git")
    if program is None or not folder.is_dir():
        return None
    # A repository's own settings may name programs that git is to start: a monitor of files, hooks.
    nothing = ("-c", "core.fsmonitor=false", "-c", f"core.hooksPath={os.devnull}")
    environment = os.environ | {"GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0"}
    try:
        done = subprocess.run(  # nosec B603 # no shell, no word of a user's but the folder's name
            [program, "-C", str(folder), *nothing, *arguments],
            capture_output=True,
            timeout=_SECONDS,
            env=environment,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode("utf-8", "replace")
