"""Names of code from outside the package: ``package.module:Class`` and ``path/file.py:Class``, and how they are loaded.

Loading runs the code. A name that comes from a file of unknown origin needs permission first:
see ``potstill.code_references``.
"""

import hashlib
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from potstill.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from potstill.config.yaml import KeyLocations, KeyPath


def is_code_reference(name: str) -> bool:
    """Whether a name stands for code: a Python module or a file that ends in ``.py``, a colon, an identifier.

    Example:
        >>> [is_code_reference(name) for name in ("my.methods:Mine", "src/mine.py:Mine", "kd", "cuda:0", "hf-hub:a")]
        [True, True, False, False, False]
    """
    module, colon, attribute = name.rpartition(":")
    if not colon or not attribute.isidentifier():
        return False
    return is_file_reference(name) or all(part.isidentifier() for part in module.split("."))


def is_file_reference(name: str) -> bool:
    """Whether a name stands for code in a file, whose path may be relative.

    Example:
        >>> is_file_reference("src/mine.py:Mine"), is_file_reference("my.methods:Mine")
        (True, False)
    """
    module, _, attribute = name.rpartition(":")
    return attribute.isidentifier() and module.endswith(".py")


def resolve_reference(name: str, base: Path | None = None) -> str:
    """Return the name with an absolute path, from ``base`` or the working folder, if it is that of code in a file."""
    if not is_file_reference(name):
        return name
    file, _, attribute = name.rpartition(":")
    return f"{Path(os.path.abspath((base or Path.cwd()) / Path(file).expanduser()))}:{attribute}"


def load_reference(name: str, *, base: Path | None = None) -> Any:
    """Import the module or run the file that a name stands for, and return the object.

    A file, relative to ``base`` or the working folder, is run once for each content, and may import what lies beside
    it. Modules are also looked for in the working folder, as ``python -m`` does.  UsageError: no such file, module or
    attribute, or the code raises while it is imported.
    """
    if not is_code_reference(name):
        raise UsageError(f"{name!r} names no code: write package.module:Name or path/file.py:Name")
    where, _, attribute = resolve_reference(name, base).rpartition(":")
    module = _load_file(Path(where), name) if is_file_reference(name) else _load_module(where, name)
    try:
        return getattr(module, attribute)
    except AttributeError as error:
        public = [each for each in vars(module) if not each.startswith("_")]
        raise UsageError(f"{name}: {where} has no {attribute!r}{did_you_mean(attribute, public)}") from error


def digest_code(recipe: Any) -> dict[str, str | None]:
    """Return the SHA-256 of the file of each piece of code that a recipe's plain values name; None: no such file.

    Modules must be loaded already.  The keys have no folders: they are written to files that people publish.
    """
    found: dict[str, str | None] = {}
    for _, name in find_code(recipe):
        where, _, attribute = name.rpartition(":")
        path = where if is_file_reference(name) else getattr(sys.modules.get(where), "__file__", None)
        try:
            digest = None if path is None else hashlib.sha256(Path(path).read_bytes()).hexdigest()
        except OSError:
            digest = None
        found[f"{Path(where).name}:{attribute}"] = digest
    return found


def _load_file(path: Path, name: str) -> ModuleType:
    try:
        content = path.read_bytes()
    except OSError as error:
        near = did_you_mean(path.name, [each.name for each in path.parent.glob("*.py")])
        raise UsageError(f"{name}: cannot read {path}: {error.strerror or error}{near}") from error
    # By content too: a file that changes in a notebook's lifetime is run again.
    key = f"{path.stem}_{hashlib.sha256(os.fsencode(path) + content).hexdigest()[:12]}"
    if key in sys.modules:
        return sys.modules[key]
    if str(path.parent) not in sys.path:  # at the end: the folder hides no installed package
        sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(key, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[key] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[key]
        raise UsageError(f"{name}: {_reason(error)}") from error
    return module


def _load_module(module: str, name: str) -> ModuleType:
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
        importlib.invalidate_caches()
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):  # missing inside of what was found
            raise UsageError(f"{name}: {_reason(error)}") from error
        raise UsageError(
            f"{name}: no module {error.name!r}; install it, run where it lies, or give its file as path/file.py:Name"
        ) from error
    except (Exception, SystemExit) as error:
        raise UsageError(f"{name}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """What the code raised, and the line that it did so in."""
    if isinstance(error, SyntaxError):
        return f"it is not valid Python: {error.msg} ({error.filename}, line {error.lineno})"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
    outside = [frame for frame in frames if frame.filename != __file__]
    place = f" ({outside[-1].filename}, line {outside[-1].lineno})" if outside else ""
    message = f": {error}" if str(error) else ""
    return f"importing it raised {type(error).__name__}{message}{place}"


PERMISSION = "POTSTILL_ALLOW_CODE"  # in the environment: "1" lets model files name code; worker processes inherit it
_permitted: set[str] = set()


def permit_code(names: Iterable[str]) -> None:
    """Let files of this process name this code: it was on the command line, or its recipe was accepted."""
    _permitted.update(names)


def is_permitted(name: str, *, itself: bool = False) -> bool:
    """Whether code that a file names may be loaded."""
    return name in _permitted or (os.environ.get(PERMISSION) == "1" and not itself)


@contextmanager
def allowed_code(allow: bool = True) -> Iterator[None]:
    """Let model files name any code within the block, in this process and those that it starts, if ``allow``."""
    former = os.environ.get(PERMISSION)
    if allow:
        os.environ[PERMISSION] = "1"
    try:
        yield
    finally:
        if allow and former is None:
            del os.environ[PERMISSION]


CODE_KEYS = {  # by section
    "method": ("name",),
    "teacher": ("model",),
    "assistants": ("model",),
    "student": ("model",),
    "data": ("source", "target"),
}


def find_code(value: Any) -> "Iterator[tuple[KeyPath, str]]":
    """Yield the code references in a recipe's plain values, as (key path, reference).

    Example:
        >>> list(find_code({"method": {"name": "ls", "base_method": {"name": "mine.py:Mine"}}, "name": "a:b"}))
        [(('method', 'base_method', 'name'), 'mine.py:Mine')]
    """
    for section, keys in CODE_KEYS.items():
        if isinstance(value, dict):
            yield from _find_code(value.get(section), (section,), keys)


def _find_code(value: Any, path: "KeyPath", keys: tuple[str, ...]) -> "Iterator[tuple[KeyPath, str]]":
    if isinstance(value, dict):
        for name, item in value.items():
            if name in keys and isinstance(item, str) and is_code_reference(item):
                yield (*path, name), item
            yield from _find_code(item, (*path, name), keys)
    elif isinstance(value, list):
        for position, item in enumerate(value):
            yield from _find_code(item, (*path, position), keys)


def refuse_code_in_recipe(value: Any, locations: "KeyLocations | None" = None) -> None:
    """Raise UsageError, with all keys, if a recipe file names code (all values without ``locations``); load nothing."""
    found = [
        (locations.find(path) if locations else "", name)
        for path, name in find_code(value)
        if locations is None or not is_from_caller(path, locations)
    ]
    if found:
        lines = [f"{location}: {name}" if location else name for location, name in found]
        raise UsageError(
            "this recipe names code that would run on this machine:\n"
            + "\n".join(lines)
            + "\nRead that code; if you trust it, add --allow-code (from Python: allow_code=True)"
        )


def resolve_code_paths(value: Any, locations: "KeyLocations", folder: Path) -> None:
    """Make the paths of code files absolute, in place: from ``folder``, or for flags from the working folder."""
    for path, name in list(find_code(value)):
        section = value
        for key in path[:-1]:
            section = section[key]
        section[path[-1]] = resolve_reference(name, None if is_from_caller(path, locations) else folder)


def is_from_caller(path: "KeyPath", locations: "KeyLocations") -> bool:
    """Return whether a value comes from a flag or from Python, not from a recipe file."""
    location = locations.find(path)
    return not location or location.startswith("--")
