"""The server's part of a run whose clients are elsewhere."""

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from potstill.console import Progress, say_lines
from potstill.errors import PotstillError, UsageError
from potstill.experiments.recipe import load_recipe
from potstill.federated.algorithms import parse_algorithms
from potstill.federated.federation import Wishes, federate
from potstill.federated.record import FILE, table
from potstill.federated.rounds import Schedule
from potstill.federated.transport import Clients, wait_for
from potstill.sealed import read_sealed_json

DEFAULTS: dict[str, str | int | float | bool] = {
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


def serve(clients: Clients, given: Mapping[str, Any]) -> Path:
    """Wait for the clients, then carry out the rounds; prints the table at the end.

    Args:
        clients: somewhere.
        given: any of the keys of ``DEFAULTS``.

    Raises:
        SystemExit: with the exit code of a mistake that a person can mend; its text is printed.
    """
    try:
        folder = _serve(clients, DEFAULTS | dict(given))
    except PotstillError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(error.exit_code) from error
    found = read_sealed_json(folder / FILE)
    say_lines(f"{len(found['clients'])} clients: {folder / FILE}", table(found))
    return folder


def _serve(clients: Clients, wish: Mapping[str, Any]) -> Path:
    if unknown := sorted(set(wish) - set(DEFAULTS)):
        raise UsageError(f"the app's configuration has {', '.join(unknown)}; known are {', '.join(DEFAULTS)}")
    teacher = [str(wish["teacher"])] if wish["teacher"] else None
    flags = {"--data": wish["data"] or None, "--teacher": teacher, "--seed": int(wish["seed"])}
    recipe = load_recipe(str(wish["recipe"]), shlex.split(str(wish["settings"])), flags=flags)
    wishes = Wishes(
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
    wait_for(clients, int(wish["clients"]), float(wish["wait"]))
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
