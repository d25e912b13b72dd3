"""The page classifies as PyTorch does, in a real browser that has no network."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from potstill.errors import UsageError
from potstill.export import page
from potstill.export.exporter import export
from potstill.export.options import ExportOptions
from potstill.export.page import RUNTIME, RUNTIME_FILES, build_page, find_runtime, open_page_files
from potstill.export.predict import predict
from potstill.input_spec import InputSpec
from potstill.models.exported_files import ExportMetadata

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
USERS_RUNTIME = Path("~/.cache/potstill/runtimes", RUNTIME).expanduser()  # tests have a cache of their own


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    for name in RUNTIME_FILES:
        (tmp_path / name).write_bytes(name.encode())
    return tmp_path


def test_names_cannot_leave_their_place(stand_in: Path) -> None:
    pytest.importorskip("onnxruntime", reason="needs potstill[export]")
    names = ("</script><script>alert(1)</script>", "b")
    html = build_page(b"network", ExportMetadata("a/b", names, InputSpec(8)), runtime=stand_in)[".html"].decode()
    facts = html.partition('id="facts">')[2].partition("</script>")[0]
    assert json.loads(facts)["class_names"] == list(names)
    assert html.count("<script>alert") == 0
    assert "default-src 'none'" in html


def test_a_missing_runtime_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"lacks ort\.wasm\.bundle\.min\.mjs or .*folder dist of onnxruntime-web"):
        find_runtime(tmp_path)
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path))
    monkeypatch.setattr(page.shutil, "which", lambda name: None)
    with pytest.raises(UsageError, match=r"npm is not installed here\nInstall Node\.js.*--runtime FOLDER"):
        find_runtime()
    npm = tmp_path / "npm"
    monkeypatch.setattr(page.shutil, "which", lambda name: str(npm))
    npm.write_text("#!/bin/sh\necho 'ENOTFOUND registry' >&2\nexit 1\n")
    npm.chmod(0o755)
    with pytest.raises(UsageError, match=r"npm cannot get onnxruntime-web.*: ENOTFOUND registry\nOr unpack"):
        find_runtime()


def test_files_of_npm_are_compared_with_their_digests(
    tmp_path: Path, stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "package"
    (package / "dist").mkdir(parents=True)
    for name in RUNTIME_FILES:
        shutil.copy(stand_in / name, package / "dist")
    npm = tmp_path / "npm"
    npm.write_text(f'#!/bin/sh\ntar czf "$5/runtime.tgz" -C {tmp_path} package\n')
    npm.chmod(0o755)
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(page.shutil, "which", lambda name: str(npm))
    with pytest.raises(UsageError, match="their SHA-256 differ"):
        find_runtime()
    digests = {name: page.sha256_hex(name.encode()) for name in RUNTIME_FILES}
    monkeypatch.setattr(page, "RUNTIME_FILES", digests)
    assert find_runtime() == {name: name.encode() for name in digests}
    npm.unlink()  # now from the cache
    assert list(find_runtime()) == list(digests)


@pytest.fixture(scope="module")
def written(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason="needs potstill[export]")
    if not USERS_RUNTIME.is_dir():
        pytest.skip(f"needs {RUNTIME} in {USERS_RUNTIME}: potstill export RUN --format page puts it there")
    output = tmp_path_factory.mktemp("page") / "digits.html"
    options = ExportOptions("page", output=output, data="digits", runtime=USERS_RUNTIME)
    return export(run, options=options, note=lambda line: None)


@pytest.fixture
def browser_page(written: Path):
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if CHROMIUM is None:
        pytest.skip("needs a Chromium")
    arguments = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        context = browser.new_context(offline=True, viewport={"width": 390, "height": 844})
        found = context.new_page()
        wrong: list[str] = []
        found.on("pageerror", lambda error: wrong.append(str(error)))
        found.on("console", lambda line: wrong.append(line.text))
        found.on(
            "request", lambda sent: None if sent.url.startswith(("data:", "blob:", "file:")) else wrong.append(sent.url)
        )
        found.goto(written.as_uri())
        found.locator("#choose:not([disabled])").wait_for(timeout=120_000)
        yield found
        browser.close()
    assert wrong == []


def pictures(folder: Path, digits, count: int) -> list[Path]:
    """Digits of other sizes: wide, tall, transparent."""
    paths = []
    for i in range(count):
        image = Image.fromarray(digits.test.pixels(i)).resize((17 + 7 * i % 97, 17 + 5 * i % 61))
        if i % 5 == 4:
            image.putalpha(Image.fromarray(np.tile(np.uint8([255, 0]), (image.height, image.width))[:, : image.width]))
        paths.append(folder / f"{i:03d}.png")
        image.save(paths[-1])
    return paths


def shown(card) -> list[tuple[str, float]]:
    texts = [row.inner_text().split("\n") for row in card.locator("li .row").all()]
    return [(name, float(share.removesuffix(" %")) / 100) for name, share in texts]


@pytest.mark.parametrize("count", [12, pytest.param(200, marks=pytest.mark.slow)])
def test_the_page_gives_the_same_classes(run: Path, tmp_path: Path, digits, browser_page, count: int) -> None:
    paths = pictures(tmp_path, digits, count)
    wanted = {each.path.name: each.classes for each in predict(run, paths, top=3, device="cpu")}
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    browser_page.set_input_files("#files", [str(each) for each in [*paths, broken]])
    browser_page.locator(".card").nth(count).wait_for(timeout=120_000)
    cards = {card.locator("h2").inner_text(): card for card in browser_page.locator(".card").all()}
    assert "no image that the browser can read" in cards.pop("broken.png").inner_text()
    assert cards.keys() == wanted.keys()
    for name, card in cards.items():
        found = shown(card)
        assert found[0][0] == wanted[name][0][0], name
        # Newer versions of Pillow round tall images otherwise; a percentage has one digit after its point.
        assert np.allclose([p for _, p in found], [p for _, p in wanted[name]], atol=0.01), name


def test_the_camera(browser_page) -> None:
    browser_page.click("#shoot")
    browser_page.locator("#live li").nth(2).wait_for(timeout=60_000)
    assert browser_page.locator("#live .fill").count() == 3
    assert browser_page.locator("#shoot").get_attribute("aria-expanded") == "true"
    browser_page.click("#shoot")
    assert browser_page.locator("#camera").is_hidden()


def test_the_network_in_the_page_is_the_exported_one(written: Path, digits) -> None:
    logits = open_page_files({".html": written.read_bytes()})(np.zeros((2, 3, 16, 16), np.float32))
    assert logits.shape == (2, 10)
