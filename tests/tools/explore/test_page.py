"""The page of the explorer in a real Chromium: each control, wide and narrow, and by keyboard."""

import contextlib
import io
import re
import shutil
import time

import numpy as np
import pytest
from explore_helpers import Running, a_waiting_session, class_session
from PIL import Image

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or ""
pytestmark = [pytest.mark.run, pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium")]
PATIENCE = 60_000  # ms; a busy machine is no failure
playwright.expect.set_options(timeout=PATIENCE)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextlib.contextmanager
def page_of(browser, session):
    with contextlib.closing(Running(session)) as running:
        page = browser.new_page()
        page.set_default_timeout(PATIENCE)
        page.goto(running.url)
        yield page
        page.close()


@pytest.fixture(params=[1200, 400])
def page(request, browser, running):
    """The page with its samples. At its end, nothing has been reported to be wrong."""
    context = browser.new_context(
        viewport={"width": request.param, "height": 900}, reduced_motion="reduce"
    )
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    wrong = []
    page.on("pageerror", lambda error: wrong.append(str(error)))

    def note(said):  # what was refused, or outdated by a newer move, is no error of the page
        if said.type == "error" and "status of 4" not in said.text:
            wrong.append(said.text)

    page.on("console", note)
    page.goto(running.url)
    page.wait_for_selector("body[data-facts]")  # of the first sample, which is open at first
    yield page
    assert wrong == []
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= request.param  # nothing is cut off
    assert page.locator("img:not([alt])").count() == 0
    context.close()


def shown(page):
    return page.get_attribute("#shown", "src")


def changed(page, do):
    """Does something, and waits for another image. Returns it."""
    before, image = shown(page), page.locator("#shown")
    do()
    playwright.expect(image).not_to_have_attribute("src", before)
    return shown(page)


def slide(control, value):
    control.evaluate(
        "(input, value) => { input.value = value; input.dispatchEvent(new Event('input')) }",
        str(value),
    )


def settled(page, do):
    """Does something, and waits until the page has all that it knows of the image."""
    page.evaluate("delete document.body.dataset.facts")
    do()
    page.wait_for_selector("body[data-facts]")


def images(page, panel):
    return page.locator(f"#{panel} .grid button")


def open_sample(page, number=0):
    button = images(page, "samples").nth(number)
    button.click()
    playwright.expect(button).to_have_attribute("aria-pressed", "true")
    playwright.expect(page.locator("#shown")).to_have_attribute(
        "src", button.locator("img").get_attribute("src")
    )


def test_samples_by_temperature_and_seed(page):
    grid = images(page, "samples").locator("img")
    assert grid.count() == 36

    def after(do):
        before = grid.first.get_attribute("src")
        do()
        playwright.expect(grid.first).not_to_have_attribute("src", before)

    temperatures = page.locator("#temperatures input")
    assert temperatures.count() == 2
    after(lambda: slide(temperatures.first, 0.2))
    playwright.expect(page.locator("#samples-command")).to_be_hidden()
    after(lambda: slide(temperatures.last, 0.2))
    command = page.locator("#samples-command code")
    playwright.expect(command).to_have_text(
        "flowtrain sample glow_digits --num-images 36 --temperature 0.2 --seed 0"
    )
    after(lambda: page.fill("#seed", "7"))
    after(page.locator("#another").click)
    page.fill("#seed", "-1")
    playwright.expect(page.locator("#status")).to_contain_text("not negative")
    open_sample(page, 1)
    playwright.expect(page.locator("#status")).to_be_empty()
    page.fill("#seed", "0")
    page.click("#more-samples")
    playwright.expect(grid).to_have_count(72)
    assert page.locator("#samples .of-classes:visible").count() == 0


def test_an_image_is_opened_and_changed_and_reset(page):
    assert page.get_attribute("#shown", "alt") == "Sample 0 of seed 0"  # open at first
    assert images(page, "samples").first.get_attribute("aria-pressed") == "true"
    assert page.evaluate("scrollY") == 0  # nothing has moved under the reader
    assert float(page.locator("#bits .figure").text_content()) > 0
    playwright.expect(page.locator("#nearest img")).to_have_count(8)
    open_sample(page, 3)
    assert page.get_attribute("#shown", "alt") == "Sample 3 of seed 0"
    before = shown(page)
    page.wait_for_selector("#principal input")
    slider = page.locator("#principal input").first
    assert page.locator("#principal input").count() == 16
    changed(page, lambda: slide(slider, 3))
    assert "changed" in page.get_attribute("#shown", "alt")
    assert slider.locator("xpath=following-sibling::output").text_content() == "3.00"
    assert changed(page, page.locator("#reset").click) == before
    assert slider.input_value() == "0"
    changed(page, lambda: slide(slider, -3))
    slider.dblclick(force=True)
    playwright.expect(slider).to_have_value("0")


def test_facts_come_if_images_take_long(page, running, monkeypatch):
    """An overtaken move is not the last one whose facts are shown."""
    page.wait_for_selector("#principal input")
    decode = running.session.decode

    def slow(*args):
        time.sleep(1)
        return decode(*args)

    monkeypatch.setattr(running.session, "decode", slow)
    page.locator("#principal input").first.evaluate(
        """input => {
          for (const amount of [0.5, 1.5, 2.5]) {
            input.value = amount;
            input.dispatchEvent(new Event("input"));
          }
        }"""
    )
    page.wait_for_selector("body[data-facts*='2.5']")
    playwright.expect(page.locator("#maps")).not_to_have_class("waiting")


def test_by_keyboard(page):
    images(page, "samples").first.focus()
    for _ in range(2):
        page.keyboard.press("ArrowRight")
    changed(page, lambda: page.keyboard.press("Enter"))
    assert page.get_attribute("#shown", "alt") == "Sample 2 of seed 0"
    page.focus("#tab-directions")
    page.keyboard.press("ArrowRight")
    assert page.locator("#path").is_visible() and not page.locator("#directions").is_visible()
    page.keyboard.press("ArrowLeft")
    page.wait_for_selector("#principal input")
    page.locator("#principal input").first.focus()
    changed(page, lambda: [page.keyboard.press("ArrowRight") for _ in range(40)])
    page.focus("#tab-samples")
    page.keyboard.press("ArrowRight")
    playwright.expect(images(page, "tests")).to_have_count(36)
    # In the tab order a grid is one stop.
    assert page.locator("#tests .grid button[tabindex='0']").count() == 1


def test_the_models_figures(page):
    settled(page, lambda: open_sample(page))
    bits = float(page.locator("#bits .figure").text_content())
    figures = page.locator("#maps figcaption")
    assert figures.count() == 3
    of_all, *levels = (float(text.split()[-1]) for text in figures.all_text_contents())
    assert of_all == pytest.approx(bits, abs=2e-3) == pytest.approx(sum(levels), abs=3e-3)
    assert page.locator("#maps canvas").first.get_attribute("aria-label").startswith("All levels")
    assert page.locator("#scores .score").count() == 3
    assert "of 180 test images" in page.locator("#scores").text_content()
    near = page.locator("#nearest img")
    playwright.expect(near).to_have_count(8)
    by_pixels = near.first.get_attribute("src")
    page.check("#nearest-by input[value=latents]")
    playwright.expect(page.locator("#nearest-note")).to_contain_text("that are encoded")
    assert by_pixels and "Training image" in near.first.get_attribute("alt")
    page.click("#tab-tests")
    settled(page, lambda: changed(page, images(page, "tests").nth(5).click))
    assert page.get_attribute("#shown", "alt") == "Test image 5"


def test_a_map_has_as_many_cells_as_the_image(page):
    """More than a function can have arguments."""
    page.evaluate(
        """async side => {
          const { show } = await import("/facts.js");
          const map = { size: [side, side], values: btoa("\\0".repeat(4 * side ** 2)), loss: 1 };
          const answer = { loss: 1, map, levels: [], noise: 0, class: null, scores: [] };
          show(answer, { exact: true, unit: "bits/dim" });
        }""",
        512,
    )
    assert page.locator("#maps canvas").get_attribute("width") == "512"


def test_nothing_is_copied_without_a_clipboard(page):
    """Which plain HTTP lacks, but for the machine itself."""
    copy = page.locator(".copy:visible")
    playwright.expect(copy).to_have_count(2)
    page.add_init_script("delete Navigator.prototype.clipboard")
    page.reload()
    page.wait_for_selector("body[data-facts]")
    playwright.expect(copy).to_have_count(0)


def choose_second(page, tab):
    """Opens a sample, and chooses a second one in a tab. Returns both images and its button."""
    open_sample(page)
    start = shown(page)
    page.click(f"#tab-{tab}")
    page.locator(f"#{tab} .choose-other").click()
    second = images(page, "samples").nth(4)
    second.click()
    return start, second.locator("img").get_attribute("src"), second


def test_a_reload_keeps_the_image(page):
    start, _, _ = choose_second(page, "path")
    middle = changed(page, lambda: slide(page.locator("#way"), 0.5))
    page.click("#tab-directions")
    page.wait_for_selector("#principal input")
    there = changed(page, lambda: slide(page.locator("#principal input").nth(1), 3))
    page.reload()
    playwright.expect(page.locator("#shown")).to_have_attribute("src", there)
    page.wait_for_selector("#principal input")
    assert page.locator("#principal input").nth(1).input_value() == "3"
    assert changed(page, lambda: slide(page.locator("#principal input").nth(1), 0)) == middle
    assert page.locator("#way").input_value() == "0.5"
    assert page.locator("#path .end-source").get_attribute("src") == start
    page.wait_for_selector("body[data-facts]")
    page.evaluate(  # as a model of this name would have left it that had three levels
        """() => {
          const kept = JSON.parse(sessionStorage.getItem("kept"));
          kept.place.from_other.push(true);
          sessionStorage.setItem("kept", JSON.stringify(kept));
        }"""
    )
    page.reload()
    playwright.expect(page.locator("#shown")).to_have_attribute("alt", "Sample 0 of seed 0")
    page.wait_for_selector("body[data-facts]")
    # Two large images are more than a browser keeps.
    page.evaluate("() => { Storage.prototype.setItem = () => { throw new Error('full') } }")
    page.wait_for_selector("#principal input")
    changed(page, lambda: slide(page.locator("#principal input").first, 3))
    assert page.evaluate("sessionStorage.length") == 0


def test_the_ends_of_the_sliders(page):
    low, high = (page.locator("#principal details[open] img").nth(i) for i in range(2))
    playwright.expect(high).to_have_attribute("src", re.compile("data:image"))
    before = low.get_attribute("src")
    assert before != high.get_attribute("src")
    open_sample(page, 3)
    playwright.expect(low).not_to_have_attribute("src", before)


def test_images_that_are_not_here_are_asked_for(browser):
    session, folder = a_waiting_session()
    with page_of(browser, session) as page:
        page.click("#tab-tests")
        playwright.expect(page.locator("#tests .missing")).to_contain_text(folder)
        page.click("#tests .get-data")
        playwright.expect(images(page, "tests")).to_have_count(36)
        playwright.expect(page.locator("#tests .get-data")).to_be_hidden()


def test_a_path_to_a_second_image(page):
    assert page.locator("#way").is_disabled() and page.locator("#save-gif").is_disabled()
    page.click("#tab-path")
    assert page.locator("#path .none:visible").all_text_contents() == ["no second image"]
    assert not page.locator("#path .end-other").is_visible()
    start, other, second = choose_second(page, "path")
    playwright.expect(page.locator("#way")).to_be_enabled()
    assert "second" in second.get_attribute("class")
    assert page.is_checked("#target input[value=source]")  # the next click opens an image again
    end = changed(page, lambda: slide(page.locator("#way"), 1))
    assert end == other
    middle = changed(page, lambda: slide(page.locator("#way"), 0.5))
    assert middle not in (start, end)
    words = "Sample 0 of seed 0, 50% of the way to Sample 4 of seed 0"
    playwright.expect(page.locator("#shown")).to_have_attribute("alt", words)
    assert changed(page, lambda: slide(page.locator("#way"), 0)) == start
    changed(page, page.locator("#play").click)
    assert page.get_attribute("#play", "aria-pressed") == "true"
    page.click("#play")
    with page.expect_download() as download:
        page.click("#save-gif")
    assert Image.open(download.value.path()).n_frames == 46


def test_levels_of_two_images_are_mixed(page):
    start, other, _ = choose_second(page, "mix")
    playwright.expect(page.locator("#mix-levels input").first).to_be_enabled()
    coarse = changed(page, page.locator("[name=mix-1][value=other]").check)
    both = changed(page, page.locator("[name=mix-0][value=other]").check)
    assert len({start, coarse, both}) == 3 and both == other


def test_files_are_saved(page, tmp_path):
    open_sample(page)
    files = {}
    for button, name in (("#save-png", "image.png"), ("#save-npz", "latent.npz")):
        with page.expect_download() as download:
            page.click(button)
        assert download.value.suggested_filename == name
        files[name] = download.value.path()
    assert Image.open(files["image.png"]).size == (32, 32)
    arrays = np.load(files["latent.npz"])
    assert arrays["level1"].shape == (1, 2, 4, 4) and arrays["level2"].shape == (1, 8, 2, 2)
    command = page.locator("#image-command code").text_content()
    assert command == "flowtrain decode glow_digits latent.npz --out images"


def test_an_image_of_the_user(page, tmp_path):
    Image.fromarray(np.arange(600, dtype=np.uint8).reshape(20, 30)).save(tmp_path / "mine.png")
    (tmp_path / "broken.png").write_text("no image")
    page.click("#tab-own")
    changed(page, lambda: page.set_input_files("#files", [tmp_path / "mine.png"]))
    said = page.locator("#said li")
    playwright.expect(said).to_contain_text("mine.png: 30 x 20 pixels")
    assert page.get_attribute("#shown", "alt") == "mine.png"
    page.set_input_files("#files", [tmp_path / "broken.png"])
    playwright.expect(said.last).to_contain_text("cannot be read as an image")
    # The same by dropping it onto the page.
    buffer = io.BytesIO()
    Image.new("RGB", (9, 9), "red").save(buffer, "PNG")
    drop = """bytes => {
      const transfer = new DataTransfer();
      transfer.items.add(new File([new Uint8Array(bytes)], "dropped.png"));
      document.body.dispatchEvent(new DragEvent("drop", {dataTransfer: transfer, bubbles: true}));
    }"""
    changed(page, lambda: page.evaluate(drop, list(buffer.getvalue())))
    assert page.get_attribute("#shown", "alt") == "dropped.png"
    playwright.expect(images(page, "own")).to_have_count(2)


def test_classes(browser, tmp_path):
    with page_of(browser, class_session(tmp_path)) as page:
        page.wait_for_selector("body[data-facts]")
        page.select_option("#sample-class", "2")
        command = page.locator("#samples-command code")
        playwright.expect(command).to_have_text(re.compile("--classes 2$"))
        settled(page, lambda: open_sample(page))
        assert re.search(r"class \d \(.* likely\)", page.locator("#maps").text_content())
        start = shown(page)
        page.click("#tab-class")
        page.select_option("#to-class", "1")
        changed(page, lambda: slide(page.locator("#class-amount"), 1))
        assert changed(page, page.locator("#reset").click) == start
        # An attribute that `flowtrain attributes` would have found.
        page.click("#tab-directions")
        changed(page, lambda: slide(page.get_by_label("thick"), 2))
