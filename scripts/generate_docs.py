"""Write everything that the site is built from into a folder: the pages of docs/ with their tables filled in, a page
for each method, the API reference, and the settings of the site with the navigation of the generated pages.

Usage: python scripts/generate_docs.py FOLDER   (FOLDER is replaced; scripts/docs then builds the site from it)

Nothing that is generated is kept in git.  A page asks for a table by a line ``<!-- table: NAME -->``, with a name of
``docs_tables.TABLES``; zensical.toml has the lines ``# methods`` and ``# api`` where those pages belong.
"""

import re
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import api_pages
import docs_tables
import method_pages

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
TABLE = re.compile(r"^<!-- table: (.+?) -->$", re.MULTILINE)


def pages() -> dict[str, str]:
    """Every page of the site: path below docs/ -> Markdown."""
    written = {str(path.relative_to(DOCS)): fill_tables(path.read_text("utf-8")) for path in sorted(DOCS.rglob("*.md"))}
    return written | method_pages.pages() | api_pages.pages()


def fill_tables(text: str) -> str:
    """Return a page with its tables in place of the lines that ask for them."""
    return TABLE.sub(lambda match: docs_tables.TABLES[match[1]](), text)


def site_settings() -> str:
    """Return zensical.toml with the navigation of the generated pages."""
    text = (ROOT / "zensical.toml").read_text("utf-8")
    for marker, lines in (("# methods", method_pages.navigation()), ("# api", api_pages.navigation())):
        head, found, tail = text.partition(f"    {marker}\n")
        if not found:
            raise SystemExit(f"zensical.toml has no line {marker!r}")
        text = head + "".join(f"    {line},\n" for line in lines) + tail
    return text


def generate(folder: Path) -> None:
    """Replace ``folder`` by what ``zensical build`` needs."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(DOCS, folder / "docs", ignore=shutil.ignore_patterns("*.md"))
    for name, text in pages().items():
        path = folder / "docs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (folder / "zensical.toml").write_text(site_settings(), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python scripts/generate_docs.py FOLDER")
    generate(Path(sys.argv[1]))
