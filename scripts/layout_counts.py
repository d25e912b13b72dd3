"""Count the source: modules, lines, and modules that only one other module imports.

`python scripts/layout_counts.py` prints the counts, and the modules with one importer by name.
A package's `__init__.py` counts as a module; imports for type checking only count as imports.
"""

import ast
from collections import defaultdict
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src"


def modules() -> dict[str, Path]:
    """Return every module of the package by its dotted name."""
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def importers() -> dict[str, set[str]]:
    """Return, for every module, the other modules that import it or a name out of it."""
    known = modules()
    found: dict[str, set[str]] = defaultdict(set)
    for name, path in known.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                inside = [f"{node.module}.{alias.name}" for alias in node.names]
                targets = [target if target in known else node.module for target in inside]
            else:
                continue
            for target in set(targets) & known.keys() - {name}:
                found[target].add(name)
    return {name: found[name] for name in known}


def with_one_importer() -> list[str]:
    """Return the modules with exactly one importer; not those of methods, which are found by their folder."""
    return [name for name, users in importers().items() if len(users) == 1 and not name.startswith("potstill.methods.")]


def lines() -> int:
    """Return the lines of source, docstrings, comments and blank lines included."""
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in modules().values())


if __name__ == "__main__":
    single, users = with_one_importer(), importers()
    print(f"{len(modules())} modules, {lines()} lines, {len(single)} with one importer:")
    for name in single:
        print(f"  {name} <- {next(iter(users[name]))}")
