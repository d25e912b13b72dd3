"""The page in a real browser."""

import csv
import shutil

import pytest

from .conftest import HOSTILE, png

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
EVIL = "<img src=x onerror=document.title='owned'>.png"


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("needs a Chromium")
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def page(browser, server):
    context = browser.new_context()
    found = context.new_page()
    errors = []
    found.on("pageerror", lambda error: errors.append(str(error)))
    found.on("console", lambda said: errors.append(said.text) if "Content Security" in said.text else None)
    found.goto(server.url)
    found.locator("#networks tbody tr").nth(2).wait_for()
    yield found
    context.close()
    assert errors == []


def give(page, *files):
    page.set_input_files("#files", [{"name": name, "mimeType": "image/png", "buffer": body} for name, body in files])


def test_a_dropped_file(page):
    assert page.locator("#bar").is_hidden()
    transfer = page.evaluate_handle(
        """bytes => { const data = new DataTransfer();
        data.items.add(new File([new Uint8Array(bytes)], "dropped.png")); return data; }""",
        list(png()),
    )
    page.dispatch_event("#drop", "drop", {"dataTransfer": transfer})
    page.locator(".model").nth(2).wait_for()
    assert page.locator(".model h3").all_inner_texts()[0].startswith("Student")
    assert page.locator(".fill").count() == 9
    assert page.locator(".look").count() == 0
    page.check("#gradcam")
    page.locator(".look").nth(2).wait_for()


def test_names_are_text(page):
    give(page, (EVIL, png()))
    page.locator(".model").nth(2).wait_for()
    assert page.locator(".card h2").inner_text() == EVIL
    assert page.get_by_text(HOSTILE, exact=True).count() == 3
    assert page.locator("img").count() == 0
    assert page.title() == "made · potstill"


def test_errors_and_the_empty_state_again(page, tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    (tmp_path / "large.png").write_bytes(bytes(10_000_001))
    page.set_input_files("#files", [tmp_path / "a.png", tmp_path / "large.png"])
    page.locator(".problem").nth(1).wait_for()
    assert "could not be used" in page.locator("#summary").inner_text()
    assert page.locator("#csv").is_disabled()
    page.click("#clear")
    assert page.locator("#bar").is_hidden()
    assert page.locator(".card").count() == 0


def test_csv(page, tmp_path):
    give(page, ("=cmd.png", png()), ("b.png", png(seed=1)))
    page.locator(".model").nth(5).wait_for()
    with page.expect_download() as download:
        page.click("#csv")
    download.value.save_as(tmp_path / "a.csv")
    with (tmp_path / "a.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 18
    assert rows[0]["file"] == "'=cmd.png"
    assert {row["class"] for row in rows} == {"cat", HOSTILE, "'=1+1\\u202e"}
    assert sum(float(row["probability"]) for row in rows[:3]) == pytest.approx(1)


def test_keyboard_and_runs(page):
    page.focus("#tab-try")
    page.keyboard.press("ArrowRight")
    page.locator("#list tbody tr").nth(1).wait_for()
    assert {row.split()[0] for row in page.locator("#list tbody tr").all_inner_texts()} == {"made", "live"}
    assert page.get_by_role("link", name="Report").count() == 1
