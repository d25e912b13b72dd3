"""A run whose clients are on other machines: the server's part, and the files of its Flower app.

The two files only name the app of ``flower_app``.
"""

import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from potstill.config.recipe import load_recipe
from potstill.console import Progress, print_section
from potstill.contrib.federated.algorithms import parse_algorithms
from potstill.contrib.federated.federation import RESULTS_FILE, FederationOptions, federate, format_table
from potstill.contrib.federated.server import Clients, Schedule, wait_for_clients
from potstill.errors import PotstillError, UsageError
from potstill.io import read_checksummed_json, write_text

DEFAULT_CONFIG: dict[str, str | int | float | bool] = {
    "recipe": "quickstart",
    "data": "",  # the server's own images, for val, test and the classes
    "teacher": "",
    "settings": "",  # as after --set, separated by blanks
    "algorithms": "fedavg,feddf",
    "clients": 2,  # that must be connected before the first round
    "fewest": 1,  # that must answer a round
    "rounds": 5,
    "local-epochs": 1,
    "public-epochs": 5,
    "temperature": 1.0,
    "public-share": 0.0,
    "seed": 0,
    "root": "runs",
    "name": "federated",
    "overwrite": False,
    "wait": 300.0,  # seconds for the clients to connect
    "timeout": 600.0,  # seconds for a round's answers
}


def run_server(clients: Clients, given: Mapping[str, Any]) -> Path:
    """Wait for the clients, then carry out the rounds; prints the table at the end.

    Args:
        clients: somewhere.
        given: any of the keys of ``DEFAULT_CONFIG``.

    Raises:
        SystemExit: with the exit code of a mistake that a person can mend; its text is printed.
    """
    try:
        folder = _federate(clients, DEFAULT_CONFIG | dict(given))
    except PotstillError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(error.exit_code) from error
    found = read_checksummed_json(folder / RESULTS_FILE)
    print_section(f"{len(found['clients'])} clients: {folder / RESULTS_FILE}", format_table(found))
    return folder


def _federate(clients: Clients, wish: Mapping[str, Any]) -> Path:
    if unknown := sorted(set(wish) - set(DEFAULT_CONFIG)):
        raise UsageError(f"the app's configuration has {', '.join(unknown)}; known are {', '.join(DEFAULT_CONFIG)}")
    teacher = [str(wish["teacher"])] if wish["teacher"] else None
    flags = {"--data": wish["data"] or None, "--teacher": teacher, "--seed": int(wish["seed"])}
    recipe = load_recipe(str(wish["recipe"]), shlex.split(str(wish["settings"])), flags=flags)
    wishes = FederationOptions(
        clients=int(wish["clients"]),
        algorithms=tuple(parse_algorithms(str(wish["algorithms"]))),
        public=float(wish["public-share"]),
        schedule=Schedule(
            int(wish["rounds"]),
            int(wish["local-epochs"]),
            int(wish["public-epochs"]),
            float(wish["temperature"]),
            int(wish["fewest"]),
        ),
    )
    wait_for_clients(clients, int(wish["clients"]), float(wish["wait"]))
    with Progress() as progress:
        return federate(
            recipe,
            wishes,
            root=Path(str(wish["root"])).expanduser(),
            name=str(wish["name"]),
            overwrite=bool(wish["overwrite"]),
            observer=progress,
            clients=clients,
        )


_CODE = '''"""A Flower app: potstill's server and client."""

from potstill.contrib.federated.flower_app import client, server

__all__ = ["client", "server"]
'''


def write_app(folder: Path, recipe: str) -> list[Path]:
    """Write ``pyproject.toml`` and ``potstill_app.py`` for ``flwr run``.

    Args:
        folder: new, or empty.
        recipe: default of the app's configuration.

    Raises:
        UsageError: the folder holds something.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is there already; name a new folder")
    settings = "\n".join(f"{key} = {json.dumps(value)}" for key, value in (DEFAULT_CONFIG | {"recipe": recipe}).items())
    project = (
        '[project]\nname = "potstill-federated"\nversion = "1.0.0"\nlicense = "Apache-2.0"\ndependencies = []\n\n'
        '[tool.flwr.app]\npublisher = "potstill"\n\n'
        '[tool.flwr.app.components]\nserverapp = "potstill_app:server"\nclientapp = "potstill_app:client"\n\n'
        f"[tool.flwr.app.config]\n{settings}\n"
    )
    write_text(folder / "pyproject.toml", project)
    write_text(folder / "potstill_app.py", _CODE)
    return [folder / "pyproject.toml", folder / "potstill_app.py"]
