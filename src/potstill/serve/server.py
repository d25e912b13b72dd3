"""Starts the server, and says where it is."""

import ipaddress
import socket
from collections.abc import Callable
from pathlib import Path

import uvicorn

from potstill.errors import UsageError
from potstill.experiments.run_folder import find_model
from potstill.serve.app import application
from potstill.serve.guard import Guard
from potstill.serve.limits import Limits
from potstill.serve.oracle import Oracle
from potstill.serve.runs import known_runs
from potstill.serve.slow_heads import bounded

_STAGES = ("distilled", "teacher", "baseline")
_LOCAL = ("127.0.0.1", "localhost", "[::1]")


def serve(
    run: Path, *, host: str, port: int, root: Path, say: Callable[[str], None], limits: Limits | None = None
) -> None:
    """Serve the page until SIGINT or SIGTERM.

    Args:
        run: a run folder, or a model's folder.
        host: address or name to listen at.
        port: 0 takes a free one.
        root: where runs are, to be browsed.
        say: is told where the page is.
        limits: others than the usual ones.

    Raises:
        UsageError: an address that stands for all of them, or that cannot be listened at.
        ArtifactError: no model there, or a damaged one.
    """
    limits = limits or Limits()
    folders = _folders(run)
    listening = _listen(host, port)
    with listening:
        port = listening.getsockname()[1]
        shown = f"[{host}]" if ":" in host else host
        oracle = Oracle(folders, limits)
        try:
            oracle.start()
            app = application(oracle, run.resolve().name, lambda: known_runs(root, run))
            guard = Guard(app, _hosts(shown, port), limits)
            config = uvicorn.Config(
                guard,
                http=bounded(limits),
                ws="none",
                lifespan="off",
                log_level="error",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                h11_max_incomplete_event_size=16_384,
                timeout_keep_alive=5,
                timeout_graceful_shutdown=3,
            )
            say(f"http://{shown}:{port}/")
            uvicorn.Server(config).run(sockets=[listening])
        finally:
            oracle.close()


def _hosts(shown: str, port: int) -> set[str]:
    names = {shown.lower(), *_LOCAL}
    return {f"{name}:{port}" for name in names} | (names if port == 80 else set())


def _folders(run: Path) -> dict[str, Path]:
    """The student, its teacher and its baseline; or the one model that was meant."""
    found = {stage: run / stage for stage in _STAGES if (run / stage / "model.json").is_file()}
    if found:
        return found
    folder = find_model(run)
    return {folder.name if folder.name in _STAGES else "model": folder}


def _listen(host: str, port: int) -> socket.socket:
    try:
        everywhere = ipaddress.ip_address(host).is_unspecified
    except ValueError:
        everywhere = not host
    if everywhere:
        raise UsageError(
            f"--host {host or '(nothing)'} stands for every address, and the server answers to known ones only; "
            "give the address that people will type, such as 127.0.0.1"
        )
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise UsageError(f"--host {host}: {getattr(error, 'strerror', None) or 'no address'}") from error
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(128)  # before the address is printed: who opens it at once waits, and is not refused
    except OSError as error:
        listening.close()
        said = f"cannot listen at {host} port {port}: {error.strerror or error}; --port gives another"
        raise UsageError(said) from error
    return listening
