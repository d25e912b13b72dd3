"""Commands for the teacher caches, ls, verify and rm; and clear, for the images of the cache folder."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from potstill.console import escape_control
from potstill.errors import ArtifactError, UsageError
from potstill.formatting import format_columns, format_percent, format_scaled
from potstill.io import cache_folder

if TYPE_CHECKING:
    from potstill.distillation.teacher_cache.cache import CacheEntry


MIN_AGREEMENT = 0.95  # of records and the teacher's top class; rounding swaps near ties

cache_app = typer.Typer(
    help="List, verify or remove teacher caches; clear removes decoded images.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Folder = Annotated[
    Path | None,
    typer.Option("--folder", metavar="DIR", help="Folder of the teacher caches.  [default: in the user's cache]"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@cache_app.command()
def ls(folder: Folder = None, as_json: AsJson = False) -> None:
    """List the teacher caches with size, recorded share, teacher, data and last use."""
    from potstill.distillation.teacher_cache.cache import list_caches

    root = _root(folder)
    caches = list_caches(root)
    if as_json:
        sys.stdout.write(json.dumps([each.as_dict() for each in caches], indent=2) + "\n")
    elif not caches:
        sys.stdout.write(f"no teacher caches in {root}\n")
    else:
        sys.stdout.write("\n".join(_cache_table(caches)) + "\n")


@cache_app.command()
def verify(
    key: Annotated[str, typer.Argument(metavar="KEY", help="A cache's key, or its beginning.")],
    samples: Annotated[int, typer.Option(min=1, help="Largest number of records to recompute.")] = 256,
    folder: Folder = None,
    as_json: AsJson = False,
) -> None:
    """Check a cache's checksums, and recompute some of its records with the teacher."""
    from potstill.distillation.teacher_cache.cache import TeacherCache, find_cache

    path = find_cache(_root(folder), key)
    cache = TeacherCache.open_existing(path)
    try:
        recorded, damaged = sum(cache.coverage()), cache.damaged()
    finally:
        cache.close()
    found: dict[str, Any] = {"key": path.name, "intact": recorded, "damaged": len(damaged)}
    if recorded and cache.record.classes:  # others are compared by their checksums only
        from potstill.experiment.cache_verification import verify_cache

        result = verify_cache(path, samples)
        found |= {"compared": result.records, "largest_difference": result.largest, "same_class": result.same_class}
    if as_json:
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
    else:
        sys.stdout.write("\n".join(_verification_lines(found)) + "\n")
    sys.stdout.flush()
    if damaged:
        raise ArtifactError(
            f"{path}: {len(damaged):,} records are damaged; they are not used, and the next run replaces them"
        )
    if found.get("same_class", 1.0) < MIN_AGREEMENT:
        raise ArtifactError(f"{path} does not agree with its teacher; remove it with `potstill cache rm {path.name}`")


@cache_app.command()
def rm(
    keys: Annotated[list[str] | None, typer.Argument(metavar="[KEY...]", help="Keys, or their beginnings.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Remove all teacher caches.")] = False,
    folder: Folder = None,
) -> None:
    """Remove teacher caches; the next run that needs one builds it again."""
    from potstill.distillation.teacher_cache.cache import delete_leftovers, find_cache, list_caches, remove_cache

    root = _root(folder)
    if everything == bool(keys):
        raise UsageError("give the keys of the caches to remove, or --all; `potstill cache ls` shows them")
    paths = [find_cache(root, key) for key in keys] if keys else [each.path for each in list_caches(root)]
    for path in dict.fromkeys(paths):
        freed = remove_cache(path)
        sys.stdout.write(f"removed {path.name} ({format_scaled(freed, 'B')})\n")
    if not paths:
        sys.stdout.write(f"no teacher caches in {root}\n")
    delete_leftovers(root)


@cache_app.command()
def clear() -> None:
    """Remove decoded images and unpacked tables; teacher outputs stay.

    The next run that needs them makes them again.  Decoded images that a process is writing are left alone.
    """
    from potstill.data.decoded_cache import remove_decoded_pixels
    from potstill.data.parquet_tables import remove_unpacked_images

    for what, freed in (("decoded images", remove_decoded_pixels()), ("unpacked tables", remove_unpacked_images())):
        sys.stdout.write(f"{what}: {format_scaled(freed, 'B')} removed\n")


def _root(folder: Path | None) -> Path:
    return cache_folder("teachers") if folder is None else folder.expanduser()


def _cache_table(caches: "list[CacheEntry]") -> list[str]:
    rows: list[tuple[str, ...]] = [("key", "size", "views", "recorded", "record", "last use", "teacher", "data")]
    for each in caches:
        columns = _describe_cache(each)
        rows.append(
            (
                each.key,
                format_scaled(each.size, "B"),
                *columns[:3],
                _format_time(each.last_used),
                *map(escape_control, columns[3:]),
            )
        )
    total = sum(each.size for each in caches)
    count = f"{len(caches)} teacher cache{'s' if len(caches) > 1 else ''}"
    return [
        *format_columns(rows, left=(0, 4, 5, 6, 7)),
        f"{count}, {format_scaled(total, 'B')} in {caches[0].path.parent}",
    ]


def _describe_cache(cache: "CacheEntry") -> tuple[str, str, str, str, str]:
    """Return the columns views, recorded, record, teacher, data."""
    if cache.manifest is None:
        return "-", "-", "-", cache.error.splitlines()[0], ""
    record, facts = cache.manifest.record, cache.manifest.facts
    data = f"{facts.get('data', '?')}, {cache.manifest.identity.get('split', '?')}, {cache.manifest.samples:,} images"
    kind = f"{record.kind}, {record.nbytes} B"
    return (
        str(len(cache.recorded)),
        format_percent(cache.coverage),
        kind,
        str(facts.get("teacher", "?")),
        cache.error or data,
    )


def _format_time(seconds: float) -> str:
    from datetime import datetime

    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")


def _verification_lines(found: dict[str, Any]) -> list[str]:
    lines = [f"{found['key']}: {found['intact']:,} records are intact, {found['damaged']:,} are damaged"]
    if "compared" in found:
        lines.append(
            f"{found['compared']:,} of them recomputed: same top class for {format_percent(found['same_class'])}, "
            f"largest difference of a logit {found['largest_difference']:.3g}"
        )
    return lines
