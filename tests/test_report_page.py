"""The report in a real browser: desktop and phone, light and dark, by mouse and by keyboard alone."""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_report import write_run
from trained import QUICKSTART

from simclr_pl.cli import main
from simclr_pl.report import write_report

_BROWSERS = ("chromium", "chromium-browser", "google-chrome")
HOSTILE = "</script><img src=x onerror=owned=1>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = next(filter(None, map(shutil.which, _BROWSERS)), None)
    if found is None:
        reason = f"none of {', '.join(_BROWSERS)} is installed; apt-get install chromium"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        opened = play.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("trained")
    sys.argv = ["simclr"]
    short = ["--trainer.max_epochs", "2", "--trainer.limit_train_batches", "3"]
    short += ["--trainer.check_val_every_n_epoch", "1", "--trainer.log_every_n_steps", "1"]
    short += ["--trainer.enable_progress_bar", "false", "--model.encoder.width", "4"]
    short += ["--model.warmup_epochs", "0", "--trainer.default_root_dir", str(root)]
    main(["fit", "--config", QUICKSTART, *short])
    return root / "quickstart/version_0"


@pytest.fixture(scope="module")
def both(trained: Path) -> Path:
    """The run and another one whose names and values would be code, if they were not escaped."""
    hostile = {
        "config.yaml": f"model: {{temperature: 0.5}}\nname: '{HOSTILE}'\n",
        "unreadable.tsv": f"{HOSTILE}\t{HOSTILE}\n",
    }
    other = write_run(trained.parent / "<b onclick=owned=1>", **hostile)
    with np.load(other / "pictures/map.npz") as table:
        numbers = dict(table)
    np.savez(other / "pictures/map.npz", **{**numbers, "classes": np.array([HOSTILE, "dog"])})
    return write_report([trained, other], trained.parent / "both.html")


def opened(browser: Any, file: Path, width: int = 1280, scheme: str = "light") -> Any:
    context = browser.new_context(
        viewport={"width": width, "height": 850}, color_scheme=scheme, offline=True
    )
    page = context.new_page()
    page.seen, page.complaints = [], []
    page.on("request", lambda request: page.seen.append(request.url))
    page.on("console", lambda message: page.complaints.append(message.text))
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.goto(file.as_uri())
    page.wait_for_selector(".u-wrap")
    return page


def pixels(page: Any, place: str) -> str:
    script = "e => e.toDataURL()"
    return str(page.locator(f"{place} canvas").first.evaluate(script))


def test_a_short_quick_start_takes_less_than_5_mb(trained: Path) -> None:
    assert (trained / "report.html").stat().st_size < 5e6


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_asks_for_nothing_and_has_no_errors(
    browser: Any, both: Path, width: int, scheme: str
) -> None:
    page = opened(browser, both, width, scheme)
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    page.wait_for_timeout(200)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.complaints == []
    assert [url for url in page.seen if not url.startswith("data:")] == [both.as_uri()]
    red, *_ = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g)")
    assert (int(red) < 60) == (scheme == "dark")
    assert page.locator("img:not([alt])").count() == 0
    assert page.evaluate("typeof owned") == "undefined"
    assert HOSTILE in page.locator("#outcome").inner_text()
    assert HOSTILE in page.locator("#differences").inner_text()
    assert page.locator("#map .legend").nth(1).inner_text().startswith(HOSTILE)
    page.context.close()


def tab_to(page: Any, selector: str) -> None:
    """Presses Tab until an element has the focus."""
    for _ in range(300):
        page.keyboard.press("Tab")
        if page.evaluate("s => document.activeElement.matches(s)", selector):
            return
    pytest.fail(f"Tab does not reach {selector}")


def test_the_keyboard_alone_works_everything(browser: Any, both: Path, trained: Path) -> None:
    page = opened(browser, both)
    tab_to(page, "#theme")
    page.keyboard.press("Enter")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    tab_to(page, "#smoothing")
    before = pixels(page, ".chart")
    page.keyboard.press("End")
    assert pixels(page, ".chart") != before
    tab_to(page, "#runs button")
    before = pixels(page, ".chart")
    page.keyboard.press("Space")
    assert page.locator("#runs button").first.get_attribute("aria-pressed") == "false"
    assert pixels(page, ".chart") != before
    tab_to(page, ".chart .plot")
    page.keyboard.press("End")
    assert page.locator(".tip").first.inner_text().startswith("step ")
    tab_to(page, "#map canvas")
    page.keyboard.press("ArrowRight")
    image = int(page.locator(".hover").first.inner_text().split()[1].rstrip(":"))
    page.keyboard.press("Enter")
    with np.load(trained / "pictures/map.npz") as table:
        at = table["index"].tolist().index(image)
        cosines = [f"{s:.3f}" for s in table["similarity"][at]]
    assert page.locator(".near .cosine").all_inner_texts() == cosines
    page.keyboard.press("Escape")
    assert page.locator(".near").count() == 0
    tab_to(page, "figure input")
    assert page.locator("figure .plate:visible").first.get_attribute("data-step") == "6"
    page.keyboard.press("ArrowLeft")
    assert page.locator("figure .plate:visible").first.get_attribute("data-step") == "3"
    assert page.complaints == []
    page.context.close()


def test_a_click_on_the_map_shows_neighbours_and_the_search_finds_keys(
    browser: Any, trained: Path
) -> None:
    page = opened(browser, trained / "report.html")
    canvas = page.locator("#map canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    for part in range(20, 80):
        page.mouse.move(box["x"] + box["width"] * part / 100, box["y"] + box["height"] / 2)
        if page.locator(".hover").is_visible():
            break
    page.mouse.down()
    page.mouse.up()
    assert page.locator(".near li").count() == 6
    assert page.locator(".near .thumb").count() == 6
    page.fill("#search", "temperature")
    shown = page.locator("#configurations .pairs > div:visible dt").all_inner_texts()
    assert "model.temperature" in shown
    assert all("temperature" in key for key in shown)
    assert page.complaints == []
    page.context.close()
