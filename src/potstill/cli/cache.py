"""Verbs for the cached teacher outputs: ls, verify, rm."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from potstill.errors import ArtifactError, UsageError

if TYPE_CHECKING:
    from potstill.distillation.teacher_cache.cache import CacheEntry


MIN_AGREEMENT = 0.95  # the least share of records with the teacher's top class; rounding swaps near ties

cache_app = typer.Typer(
    help="Show, check or remove the stored teacher outputs.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Folder = Annotated[
    Path | None, typer.Option("--folder", metavar="DIR", help="Where the stores stand; by default in the cache.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@cache_app.command()
def ls(folder: Folder = None, as_json: AsJson = False) -> None:
    """List the stores: size, what is recorded, teacher, data, last use."""
    from potstill.distillation.teacher_cache.cache import list_caches

    root = _root(folder)
    stores = list_caches(root)
    if as_json:
        sys.stdout.write(json.dumps([each.as_dict() for each in stores], indent=2) + "\n")
    elif not stores:
        sys.stdout.write(f"no stores in {root}\n")
    else:
        sys.stdout.write("\n".join(_cache_table(stores)) + "\n")


@cache_app.command()
def verify(
    key: Annotated[str, typer.Argument(metavar="KEY", help="A store's key, or its beginning.")],
    samples: Annotated[int, typer.Option(min=1, help="Records to compute again, at most.")] = 256,
    folder: Folder = None,
    as_json: AsJson = False,
) -> None:
    """Compare a store's checksums, and ask its teacher again for some of its records."""
    from potstill.distillation.teacher_cache.cache import TeacherCache, find_cache

    path = find_cache(_root(folder), key)
    store = TeacherCache.open_existing(path)
    try:
        recorded, damaged = sum(store.coverage()), store.damaged()
    finally:
        store.close()
    found: dict[str, Any] = {"key": path.name, "intact": recorded, "damaged_blocks": len(damaged)}
    if recorded:
        from potstill.experiment.cache_verification import verify_cache

        again = verify_cache(path, samples)
        found |= {"compared": again.records, "largest_difference": again.largest, "same_class": again.same_class}
    if as_json:
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
    else:
        sys.stdout.write("\n".join(_verification_lines(found)) + "\n")
    sys.stdout.flush()
    if damaged:
        raise ArtifactError(
            f"{path}: {len(damaged)} blocks are damaged; their records are not used, and the next run records them anew"
        )
    if recorded and found["same_class"] < MIN_AGREEMENT:
        raise ArtifactError(
            f"{path} does not hold what its teacher says; remove it with `potstill cache rm {path.name}`"
        )


@cache_app.command()
def rm(
    keys: Annotated[list[str] | None, typer.Argument(metavar="[KEY...]", help="Keys, or their beginnings.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Remove every store.")] = False,
    folder: Folder = None,
) -> None:
    """Remove stores; a run that needs one records it anew."""
    from potstill.console import format_bytes
    from potstill.distillation.teacher_cache.cache import delete_leftovers, find_cache, list_caches, remove_cache

    root = _root(folder)
    if everything == bool(keys):
        raise UsageError("give the keys of the stores to remove, or --all; `potstill cache ls` shows them")
    paths = [find_cache(root, key) for key in keys] if keys else [each.path for each in list_caches(root)]
    for path in dict.fromkeys(paths):
        freed = remove_cache(path)
        sys.stdout.write(f"removed {path.name} ({format_bytes(freed)})\n")
    if not paths:
        sys.stdout.write(f"no stores in {root}\n")
    delete_leftovers(root)


def _root(folder: Path | None) -> Path:
    from potstill.io import cache_folder

    return cache_folder("teachers") if folder is None else folder.expanduser()


def _cache_table(stores: "list[CacheEntry]") -> list[str]:
    from potstill.console import escape_control, format_bytes

    rows: list[tuple[str, ...]] = [("key", "size", "views", "recorded", "record", "last use", "teacher", "data")]
    for each in stores:
        what = _describe_cache(each)
        rows.append(
            (each.key, format_bytes(each.size), *what[:3], _format_age(each.last_used), *map(escape_control, what[3:]))
        )
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    right = {1, 2, 3}
    lines = [
        "  ".join(f"{cell:>{w}}" if at in right else f"{cell:<{w}}" for at, (cell, w) in enumerate(zip(row, widths)))  # noqa: B905
        for row in rows
    ]
    total = sum(each.size for each in stores)
    count = f"{len(stores)} store{'s' if len(stores) > 1 else ''}"
    return [*(line.rstrip() for line in lines), f"{count}, {format_bytes(total)} in {stores[0].path.parent}"]


def _describe_cache(store: "CacheEntry") -> tuple[str, str, str, str, str]:
    """Views, share that is recorded, record, teacher, data."""
    from potstill.console import format_percent

    if store.manifest is None:
        return "-", "-", "-", store.error.splitlines()[0], ""
    record, facts = store.manifest.record, store.manifest.facts
    data = f"{facts.get('data', '?')}, {store.manifest.identity.get('split', '?')}, {store.manifest.samples:,} images"
    kind = f"{record.kind}, {record.nbytes} B"
    return (
        str(len(store.recorded)),
        format_percent(store.coverage),
        kind,
        str(facts.get("teacher", "?")),
        store.error or data,
    )


def _format_age(seconds: float) -> str:
    from datetime import datetime

    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")


def _verification_lines(found: dict[str, Any]) -> list[str]:
    from potstill.console import format_percent

    lines = [f"{found['key']}: {found['intact']:,} records are intact, {found['damaged_blocks']} blocks are damaged"]
    if "compared" in found:
        lines.append(
            f"{found['compared']:,} of them computed again: top class the same in "
            f"{format_percent(found['same_class'])}, "
            f"largest difference of a logit {found['largest_difference']:.3g}"
        )
    return lines
