"""Flower's own simulation: the rounds of this machine, with every client in a worker process of Ray.

Needs the extra ``federated``.  The weights are those of ``transport.InProcess``; what is gained is that clients work at
the same time, and that messages take the way they take between machines.
"""

import logging
import os
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Literal

from potstill.errors import UsageError, WorkerError, nearest
from potstill.federated.client import Client
from potstill.federated.transport import Clients, wait_for

Engine = Literal["process", "flower"]
ENGINES: tuple[Engine, ...] = ("process", "flower")
INSTALL = "pip install 'potstill[federated]'"


def parse_engine(text: str) -> Engine:
    """``process`` or ``flower``.

    Raises:
        UsageError: anything else; names what is near.
    """
    for known in ENGINES:
        if text == known:
            return known
    raise UsageError(f"--engine is {' or '.join(ENGINES)}, got {text!r}{nearest(text, ENGINES)}")


def refuse_without_flower() -> None:
    """Whether the simulation can be started at all.

    Raises:
        UsageError: Flower or Ray is not installed; says how to install them.
    """
    missing = [name for name in ("flwr", "ray") if find_spec(name) is None]
    if missing:
        raise UsageError(f"--engine flower needs Flower and Ray, and there is no {' and no '.join(missing)}: {INSTALL}")


def simulate(clients: Mapping[int, Client], work: Callable[[Clients], None], timeout: float = 3600.0) -> None:
    """Do ``work`` with clients that live in Flower's simulation; returns when it is done.

    Args:
        clients: by number from 0; copied to the workers.
        work: receives the same clients, behind Flower's messages.
        timeout: seconds to wait for the answers of a round.

    Raises:
        WorkerError: the simulation has ended before the work.
        PotstillError: whatever ``work`` raises.
    """
    for name in ("FLWR_TELEMETRY_ENABLED", "RAY_USAGE_STATS_ENABLED", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"):
        os.environ.setdefault(name, "0")  # nothing is sent anywhere unless somebody wants it; and Ray warns less

    from flwr.app import Context
    from flwr.app import Message as Envelope
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.simulation import run_simulation

    from potstill.federated.flower import GridClients, answer

    server, client = ServerApp(), ClientApp()
    failed: list[BaseException] = []
    done: list[bool] = []

    def serve(grid: Grid, context: Context) -> None:
        try:
            here = GridClients(grid, timeout)
            wait_for(here, len(clients), timeout)
            work(here)
            done.append(True)
        except BaseException as error:
            failed.append(error)  # Flower would print a traceback

    def respond(envelope: Envelope, context: Context) -> Envelope:
        # Flower numbers its nodes at random; who a message is for stands in it.
        return answer(envelope, context, lambda message: clients[int(message.numbers["client"])])

    server.main()(serve)
    client.train()(respond)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    try:
        run_simulation(
            server_app=server,
            client_app=client,
            num_supernodes=len(clients),
            backend_config={
                "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
                "init_args": {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR},
            },
        )
    except RuntimeError as error:
        if not failed:
            raise WorkerError(f"Flower's simulation has ended early: {error}") from error
    if failed:
        raise failed[0]
    if not done:
        raise WorkerError("Flower's simulation has ended before the rounds were done; its log says why")
