"""A Flower app (https://flower.ai): the same messages between a SuperLink and SuperNodes on other machines.

``server`` and ``client`` are its two halves; ``potstill federated app`` writes the two small files that name them.
Needs the extra ``federated``.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.app import Message as Envelope
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from potstill.contrib.federated.client import Client
from potstill.contrib.federated.flower_clients import GridClients, handle_message
from potstill.contrib.federated.partition import load_client_images
from potstill.data.file_datasets import list_images
from potstill.data.image_sets import ImageSet, UnlabeledFileSet
from potstill.data.settings import DataSettings
from potstill.errors import UsageError

client = ClientApp()
server = ServerApp()


def _run_server(grid: Grid, context: Context) -> None:
    """Carry out the rounds that the app's configuration asks for."""
    from potstill.contrib.federated.deployment import run_server

    wishes = dict(context.run_config)
    run_server(GridClients(grid, float(wishes.get("timeout", 600.0))), wishes)


def _create_client(config: Mapping[str, Any]) -> Client:
    folder, public = config.get("folder"), config.get("public")
    if not folder:
        raise UsageError("this SuperNode has no images: start it with --node-config 'folder=\"DIR\"'")
    asked = None if not public else (lambda: _load_public_images(Path(str(public)).expanduser()))
    how = {key: bool(config.get(key, False)) for key in ("follow_links", "skip_bad")}
    return Client(lambda classes: load_client_images(Path(str(folder)).expanduser(), classes, **how), asked)


def _load_public_images(root: Path) -> ImageSet:
    return UnlabeledFileSet(root, list_images(root, DataSettings())[0])


def _handle_message(envelope: Envelope, context: Context) -> Envelope:
    return handle_message(envelope, context, lambda message: _create_client(context.node_config))


client.train()(_handle_message)
server.main()(_run_server)
