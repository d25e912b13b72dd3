"""G1: whatever is written below src goes through potstill.io, but for a short list with reasons."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import potstill

SOURCE = Path(potstill.__file__).parent
OURS = {
    "write_bytes",
    "write_text",
}  # names that pathlib has too: they count unless they were imported from potstill.io

# (file, call): why it may
EXCEPTIONS = {
    ("io.py", "os.open"): "the writer itself",
    ("io.py", "os.write"): "the writer itself",
    ("io.py", "os.replace"): "the writer itself",
    ("io.py", "os.link"): "the writer itself",
    ("cli/__init__.py", "os.open"): "/dev/null in place of a closed pipe",
    ("console.py", "os.open"): "/dev/null in place of what C libraries write",
    ("data/image_io.py", "os.open"): "reads an image, without waiting at a pipe",
    ("record_file.py", "os.open"): "records grow in place; their checksums are set after their bytes are synced",
    ("record_file.py", "os.pwrite"): "the same",
    ("data/decoded_cache.py", "tempfile.mkstemp"): "a file without a name, which ends with its process",
    ("distillation/teacher_cache/cache.py", "os.open"): "to lock the records",
    ("data/parquet_tables.py", "write_bytes"): "rows of a folder that counts as complete only with its manifest",
    ("distillation/teacher_cache/record_format.py", "rename"): "a new store appears together with its manifest",
    ("distillation/teacher_cache/cache.py", "rename"): "a store that is removed leaves the list at once",
    ("evaluation/predictions.py", "open"): "a file beside, which is synced and takes its place when it is whole",
    ("export/onnx.py", "write_bytes"): "into a temporary folder, from which ncnn reads",
    ("export/onnx.py", "extract"): "ncnn's name for running a network",
    ("report/canvas.py", "savefig"): "into memory",
}
WRITING = {
    "os": {
        "open",
        "write",
        "pwrite",
        "pwritev",
        "writev",
        "replace",
        "rename",
        "renames",
        "link",
        "truncate",
        "mkfifo",
    },
    "shutil": {"copy", "copy2", "copyfile", "copyfileobj", "copytree", "move"},
    "json": {"dump"},
    "yaml": {"dump", "safe_dump"},  # with a second argument
    "pickle": {"dump"},
    "np": {"save", "savez", "savez_compressed", "savetxt", "memmap"},
    "numpy": {"save", "savez", "savez_compressed", "savetxt", "memmap"},
    "torch": {"save"},
    "tempfile": {"mkstemp", "NamedTemporaryFile"},
    "safetensors": {"save_file"},
}
METHODS = {"tofile", "savefig", "save_file", "rename", "touch", "symlink_to", "hardlink_to", "extractall", "extract"}


def writes(path: Path) -> Iterator[tuple[str, int]]:
    """Calls in a file that may write: name and line."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "potstill.io"
        for alias in node.names
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = _writing(node, imported)
            if name is not None:
                yield name, node.lineno


def _writing(call: ast.Call, imported: set[str]) -> str | None:
    if isinstance(call.func, ast.Name):
        if call.func.id == "open":
            return "open" if _for_writing(call, 1) else None
        return None
    if not isinstance(call.func, ast.Attribute):
        return None
    owner = call.func.value.id if isinstance(call.func.value, ast.Name) else ""
    name = call.func.attr
    if name in WRITING.get(owner, ()):
        to_memory = owner == "yaml" and len(call.args) < 2 and not any(each.arg == "stream" for each in call.keywords)
        return None if to_memory else f"{owner}.{name}"
    if name == "open" and owner != "os":
        # A path's (mode first), or that of gzip and the like (mode second).
        return "open" if _for_writing(call, 0) or _for_writing(call, 1) else None
    if name in OURS and owner != "io":
        return name
    return name if name in METHODS else None


def _for_writing(call: ast.Call, position: int) -> bool:
    modes = [*call.args[position : position + 1], *(each.value for each in call.keywords if each.arg == "mode")]
    return any(
        isinstance(mode, ast.Constant) and re.fullmatch(r"[rbt]*[wax+][bt+]*", str(mode.value)) is not None
        for mode in modes
    )


@pytest.fixture(scope="module")
def found() -> dict[tuple[str, str], int]:
    """Line by file and call, below src."""
    return {
        (str(path.relative_to(SOURCE)), name): line
        for path in sorted(SOURCE.rglob("*.py"))
        for name, line in writes(path)
    }


def test_nothing_else_writes(found: dict[tuple[str, str], int]) -> None:
    assert {place: line for place, line in found.items() if place not in EXCEPTIONS} == {}


def test_every_exception_is_still_one(found: dict[tuple[str, str], int]) -> None:
    assert set(EXCEPTIONS) - set(found) == set()


@pytest.mark.parametrize(
    "text",
    [
        "open(path, 'w')", "open(path, mode='ab')", "open(path, 'r+b')", "path.open('wb')", "gzip.open(path, 'wt')",
        "path.write_text(text)", "path.write_bytes(data)", "np.save(path, array)", "array.tofile(path)",
        "torch.save(state, path)", "figure.savefig(path)", "json.dump(value, file)", "yaml.safe_dump(value, file)",
        "os.open(path, flags)", "shutil.copy(a, b)",
    ],
)  # fmt: skip
def test_a_planted_write_is_found(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.py").write_text(f"def f(path):\n    {text}\n")
    assert [line for _, line in writes(tmp_path / "x.py")] == [2]


def test_reading_and_our_own_names_are_not(tmp_path: Path) -> None:
    text = (
        "from potstill import io\nfrom potstill.io import write_text\n"
        "write_text(path, '')\nio.write_bytes(path, b'')\nopen(path)\npath.open('rb')\nyaml.safe_dump(value)\n"
    )
    (tmp_path / "x.py").write_text(text)
    assert list(writes(tmp_path / "x.py")) == []
