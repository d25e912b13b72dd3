"""The same requests and replies through Flower (https://flower.ai): a SuperLink here, a SuperNode at each client.

``potstill federated app`` writes a Flower app of two small files, which create its server and client.  Only functions
import Flower, the extra ``federated``, so that the rest works without it.
"""

import io
import json
import logging
import re
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from potstill.config.recipe import load_recipe
from potstill.console import Progress, print_section
from potstill.contrib.federated import ALGORITHMS, parse_names
from potstill.contrib.federated.client import Client
from potstill.contrib.federated.federation import RESULTS_FILE, FederationOptions, federate, format_table
from potstill.contrib.federated.messages import Arrays, Message
from potstill.contrib.federated.partition import client_folders, load_client_images
from potstill.contrib.federated.server import Clients, Replies, Schedule
from potstill.errors import PotstillError, UsageError, WorkerError
from potstill.formatting import format_many
from potstill.io import read_checksummed_json, write_text

if TYPE_CHECKING:
    from flwr.app import Array, ArrayRecord, Context, RecordDict
    from flwr.app import Message as FlowerMessage
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp

_LOG = logging.getLogger("flwr")
_MEMORY_KEY = "potstill"
_POLL_SECONDS = 0.5

# Messages in Flower's records


def message_to_records(message: Message) -> "RecordDict":
    """Return a message as Flower's records."""
    from flwr.app import ConfigRecord, MetricRecord, RecordDict

    texts = ConfigRecord({"task": message.task, **message.texts})
    numbers = MetricRecord(dict(message.numbers))
    return RecordDict({"arrays": _arrays_to_record(message.arrays), "numbers": numbers, "texts": texts})


def records_to_message(content: "RecordDict") -> Message:
    """Return the message in Flower's records; a hostile client's raise any kind of Exception."""
    texts = {str(name): str(value) for name, value in content["texts"].items()}
    numbers = {str(name): float(value) for name, value in content["numbers"].items()}
    return Message(texts.pop("task"), _record_to_arrays(content["arrays"]), numbers, texts)


def decode_array(array: "Array") -> NDArray[Any]:
    """Return the values of a Flower array: numbers, in NumPy's format, exactly as many as its bytes hold.

    NumPy's own reader first allocates what the header claims, which a hostile client may set to terabytes.
    """
    stream = io.BytesIO(array.data)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError("not an array in NumPy's format 1.0")
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
    if fortran_order or dtype.kind not in "biuf":
        raise ValueError(f"not an array of numbers in C order, but of {dtype}")
    return np.frombuffer(array.data, dtype, offset=stream.tell()).reshape(shape).copy()


def _arrays_to_record(arrays: Arrays) -> "ArrayRecord":
    from flwr.app import Array, ArrayRecord

    return ArrayRecord({name: Array(np.asarray(value, order="C")) for name, value in arrays.items()})


def _record_to_arrays(record: "ArrayRecord") -> Arrays:
    return {str(name): decode_array(value) for name, value in record.items()}


class GridClients:
    """All SuperNodes that are connected, through the grid of a running ServerApp.

    Requests are sent, and replies fetched, one by one: Flower's ``send_and_receive`` raises at the first reply that it
    cannot read, so that one client could end the run.  A client that needs over ``timeout`` seconds is left out of the
    round.
    """

    def __init__(self, grid: "Grid", timeout: float) -> None:
        self.grid, self.timeout = grid, timeout
        self.numbers: dict[int, int] = {}  # node id -> number, in the order in which they were first seen

    def connected(self) -> Sequence[int]:
        """Return the numbers of the nodes that are connected now."""
        nodes = sorted(self.grid.get_node_ids())
        for node in nodes:
            self.numbers.setdefault(node, len(self.numbers))
        return sorted(self.numbers[node] for node in nodes)

    def send_and_receive(self, requests: Mapping[int, Message]) -> Replies:
        """See ``server.Clients``; bytes are those of our messages, without Flower's envelopes."""
        from flwr.app import Message as FlowerMessage

        nodes = {number: node for node, number in self.numbers.items()}
        result, pending = Replies(), {}
        for number, request in requests.items():
            content = message_to_records(request)
            envelope = FlowerMessage(content=content, dst_node_id=nodes[number], message_type="train")
            if identity := next(iter(self.grid.push_messages([envelope])), None):
                pending[number] = identity
                result.bytes_down += request.size
            else:
                result.failed[number] = "not reached"
        end = time.monotonic() + self.timeout
        while pending:
            for number, identity in list(pending.items()):
                try:
                    replies = list(self.grid.pull_messages([identity]))
                    if not replies:
                        continue
                    self._receive(number, replies[0], result)
                except Exception as error:
                    _LOG.warning("potstill: a reply of client %d cannot be read: %r", number, error)
                    result.failed[number] = "unreadable reply"
                del pending[number]
            if pending and time.monotonic() > end:
                break
            if pending:
                time.sleep(_POLL_SECONDS)
        return Replies(
            result.replies,
            result.failed | dict.fromkeys(pending, "no reply"),
            result.bytes_down,
            result.bytes_up,
        )

    def _receive(self, number: int, reply: "FlowerMessage", result: Replies) -> None:
        if reply.has_error():
            result.failed[number] = "no reply"
            return
        message = records_to_message(reply.content)
        if "failed" in message.texts:
            kind = message.texts["failed"]
            result.failed[number] = kind if re.fullmatch(r"\w{1,60}", kind, re.ASCII) else "failed"
            return
        result.bytes_up += message.size
        result.replies[number] = message


def wait_for_clients(clients: Clients, count: int, seconds: float) -> None:
    """Return once ``count`` clients are connected; WorkerError: they are not after so many seconds."""
    end = time.monotonic() + seconds
    while (connected := len(clients.connected())) < count:
        if time.monotonic() > end:
            raise WorkerError(f"{connected} of {format_many(count, 'client')} connected within {seconds:g} s")
        time.sleep(_POLL_SECONDS)


def handle_message(
    envelope: "FlowerMessage", context: "Context", find_client: Callable[[Message], Client]
) -> "FlowerMessage":
    """Reply to a request; errors go to the client's own log, and only their class name to the server."""
    from flwr.app import Message as FlowerMessage

    task = ""
    try:
        request = records_to_message(envelope.content)
        task = request.task
        memory = _record_to_arrays(context.state[_MEMORY_KEY]) if _MEMORY_KEY in context.state else {}
        before = dict(memory)
        reply = find_client(request).reply(request, memory)
        if before.keys() != memory.keys() or any(memory[name] is not value for name, value in before.items()):
            context.state[_MEMORY_KEY] = _arrays_to_record(memory)
    except PotstillError as error:
        _LOG.error("potstill: %s", error)
        reply = Message(task, texts={"failed": type(error).__name__})
    except Exception as error:
        _LOG.exception("potstill: a request has failed")
        reply = Message(task, texts={"failed": type(error).__name__})
    return FlowerMessage(content=message_to_records(reply), reply_to=envelope)


# The app

DEFAULT_CONFIG: dict[str, str | int | float | bool] = {
    "recipe": "quickstart",
    "data": "",  # the server's own images, for classes, val and test
    "teacher": "",
    "settings": "",  # as after --set, separated by blanks
    "algorithms": "fedavg,feddf",
    "clients": 2,  # that must be connected before the first round
    "min-replies": 1,  # valid ones that a round needs
    "max-share": 0.5,  # of one client in an average
    "rounds": 5,
    "local-epochs": 1,
    "public-epochs": 5,
    "temperature": 1.0,
    "public-share": 0.0,
    "seed": 0,
    "output-dir": "runs",
    "name": "federated",
    "overwrite": False,
    "wait": 300.0,  # seconds for the clients to connect
    "timeout": 600.0,  # seconds for the replies to a request
    "simulated-clients": "",  # for Flower's simulation: a folder with one folder for each client
}


def create_server_app() -> "ServerApp":
    """Return the server's part of the app."""
    from flwr.serverapp import ServerApp

    app = ServerApp()

    def serve(grid: "Grid", context: "Context") -> None:
        config = DEFAULT_CONFIG | dict(context.run_config)
        run_server(GridClients(grid, float(config["timeout"])), config)

    app.main()(serve)
    return app


def create_client_app() -> "ClientApp":
    """Return the clients' part of the app."""
    from flwr.clientapp import ClientApp

    app = ClientApp()

    def respond(message: "FlowerMessage", context: "Context") -> "FlowerMessage":
        return handle_message(message, context, lambda _: _create_client(context.node_config, context.run_config))

    app.train()(respond)
    return app


def _create_client(node: Mapping[str, Any], run: Mapping[str, Any]) -> Client:
    """Return a client with the images of the node's configuration, or in a simulation of the run's."""
    folder = node.get("folder")
    if not folder and "partition-id" in node and run.get("simulated-clients"):
        folders = client_folders(Path(str(run["simulated-clients"])).expanduser())
        folder = folders[int(node["partition-id"]) % len(folders)]
    if not folder:
        raise UsageError(
            "this SuperNode has no images: start it with --node-config 'folder=\"DIR\"'; in Flower's simulation, give "
            'simulated-clients="DIR" in flwr run\'s --run-config'
        )

    flags = {key: bool(node.get(key, False)) for key in ("follow_links", "skip_bad")}
    root = Path(str(folder)).expanduser()
    return Client(lambda classes: load_client_images(root, classes, **flags))


def run_server(clients: Clients, config: Mapping[str, Any]) -> Path:
    """Wait for the clients, train all rounds, and print the table; ``config`` has keys of ``DEFAULT_CONFIG``."""
    try:
        folder = _federate(clients, DEFAULT_CONFIG | dict(config))
    except PotstillError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(error.exit_code) from error
    found = read_checksummed_json(folder / RESULTS_FILE)
    print_section(f"{format_many(len(found['clients']), 'client')}: {folder / RESULTS_FILE}", format_table(found))
    return folder


def _federate(clients: Clients, config: Mapping[str, Any]) -> Path:
    if unknown := sorted(set(config) - set(DEFAULT_CONFIG)):
        raise UsageError(
            f"unknown in the app's configuration: {', '.join(unknown)}; known: {', '.join(DEFAULT_CONFIG)}"
        )
    teacher = [str(config["teacher"])] if config["teacher"] else None
    flags = {"--data": config["data"] or None, "--teacher": teacher, "--seed": int(config["seed"])}
    recipe = load_recipe(str(config["recipe"]), shlex.split(str(config["settings"])), flags=flags)
    options = FederationOptions(
        clients=int(config["clients"]),
        algorithms=tuple(parse_names(str(config["algorithms"]), ALGORITHMS, "algorithm")),
        public=float(config["public-share"]),
        schedule=Schedule(
            rounds=int(config["rounds"]),
            local_epochs=int(config["local-epochs"]),
            public_epochs=int(config["public-epochs"]),
            temperature=float(config["temperature"]),
            min_replies=int(config["min-replies"]),
            max_share=float(config["max-share"]),
        ),
    )
    wait_for_clients(clients, int(config["clients"]), float(config["wait"]))
    with Progress() as progress:
        return federate(
            recipe,
            options,
            output_dir=Path(str(config["output-dir"])).expanduser(),
            name=str(config["name"]),
            overwrite=bool(config["overwrite"]),
            observer=progress,
            clients=clients,
        )


_CODE = '''"""A Flower app: potstill's server and client."""

from potstill.contrib.federated.flower import create_client_app, create_server_app

server = create_server_app()
client = create_client_app()
'''


def write_app(folder: Path, recipe: str) -> list[Path]:
    """Write ``pyproject.toml`` and ``potstill_app.py`` for ``flwr run`` to an empty folder; return their paths."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} exists already; name a new folder")
    config = "\n".join(f"{key} = {json.dumps(value)}" for key, value in (DEFAULT_CONFIG | {"recipe": recipe}).items())
    project = (
        '[project]\nname = "potstill-federated"\nversion = "1.0.0"\nlicense = "Apache-2.0"\n'
        'description = "Federated distillation with potstill"\ndependencies = []\n\n'
        '[tool.flwr.app]\npublisher = "potstill"\n\n'
        '[tool.flwr.app.components]\nserverapp = "potstill_app:server"\nclientapp = "potstill_app:client"\n\n'
        f"[tool.flwr.app.config]\n{config}\n"
    )
    write_text(folder / "pyproject.toml", project)
    write_text(folder / "potstill_app.py", _CODE)
    return [folder / "pyproject.toml", folder / "potstill_app.py"]
