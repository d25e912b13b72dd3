"""The two files of a Flower app that does nothing but name ours."""

import json
from pathlib import Path

from potstill.artifacts import write_text
from potstill.errors import UsageError
from potstill.federated.served import DEFAULTS

_CODE = '''"""A Flower app: potstill's server and client."""

from potstill.federated.flower import client, server

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
    settings = "\n".join(f"{key} = {json.dumps(value)}" for key, value in (DEFAULTS | {"recipe": recipe}).items())
    project = (
        '[project]\nname = "potstill-federated"\nversion = "1.0.0"\nlicense = "Apache-2.0"\ndependencies = []\n\n'
        '[tool.flwr.app]\npublisher = "potstill"\n\n'
        '[tool.flwr.app.components]\nserverapp = "potstill_app:server"\nclientapp = "potstill_app:client"\n\n'
        f"[tool.flwr.app.config]\n{settings}\n"
    )
    write_text(folder / "pyproject.toml", project)
    write_text(folder / "potstill_app.py", _CODE)
    return [folder / "pyproject.toml", folder / "potstill_app.py"]
