"""What a model can be exported to: one file a format, one line to register it."""

from importlib import import_module
from importlib.util import find_spec

from potstill.deploy.formats.format import Format
from potstill.errors import UsageError, nearest

FORMATS = {
    "onnx": "potstill.deploy.formats.onnx",
    "openvino": "potstill.deploy.formats.openvino",
    "torch-export": "potstill.deploy.formats.torch_export",
    "executorch": "potstill.deploy.formats.executorch",
    "coreml": "potstill.deploy.formats.coreml",
}


def find_format(name: str) -> Format:
    """The format of a name, whose packages are there.

    Raises:
        UsageError: an unknown name, or a package that is not installed.
    """
    if name not in FORMATS:
        raise UsageError(f"no format {name!r}{nearest(name, FORMATS)}\nKnown formats: {', '.join(FORMATS)}")
    found: Format = import_module(FORMATS[name]).FORMAT
    missing = [package for package in found.packages if find_spec(package) is None]
    if missing:
        needs = f"the format {name} needs {' and '.join(missing)}, not installed here"
        raise UsageError(f'{needs}\nInstall: pip install "potstill[{found.extra}]"')
    return found
