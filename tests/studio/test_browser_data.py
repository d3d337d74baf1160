"""The page Data in a browser."""

import os
import shutil
import time

import pytest
from PIL import Image

pytestmark = pytest.mark.browser
HOSTILE = "<img src=x onerror=alert(1)>'\"`${1}{{2}}</script>"
SPOKEN = "<script>alert(1)</script> \"quoted\" 'x' `${alert(1)}` {{ 7*7 }} </textarea><b>bold</b>"


@pytest.fixture
def data(tmp_path):
    """Six pictures with captions below tmp_path."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(6):
        size = (1500, 1000) if number == 2 else (512, 512)
        Image.new("RGB", size, (40 * number, 90, 120)).save(folder / f"p{number}.png")
        (folder / f"p{number}.txt").write_text(f"number {number} of sks")
    return folder


def card(page, name):
    return page.locator(".picture", has_text=name)


def test_captions_are_edited_in_place_and_taken_back(data, start_studio, open_page):
    url, _ = start_studio(data.parent)
    page = open_page(f"{url}/data")
    page.get_by_label("Folder of pictures").fill("pictures")
    page.get_by_label("Trigger word").fill("sks")
    page.get_by_role("button", name="Open").click()
    page.wait_for_selector(".picture")
    page.wait_for_function("document.querySelectorAll('.picture').length == 6")
    assert card(page, "p2.png").locator(".picture-note").inner_text() == "14% cropped"
    assert card(page, "p2.png").locator(".picture-crop").count() == 1
    assert card(page, "p1.png").locator(".word").inner_text() == "sks"
    card(page, "p1.png").locator(".picture-caption").click()
    field = card(page, "p1.png").locator("textarea")
    field.fill("a new caption\nin two lines")
    field.press("Control+Enter")
    page.get_by_text("a new caption").wait_for()
    assert (data / "p1.txt").read_text() == "a new caption\nin two lines"
    assert card(page, "p1.png").locator(".added").inner_text().strip() == "sks"
    card(page, "p3.png").locator(".picture-caption").click()
    card(page, "p3.png").locator("textarea").fill("not this")
    card(page, "p3.png").locator("textarea").press("Escape")
    page.get_by_role("button", name="Undo").click()
    page.get_by_text("Captions taken back: 1").wait_for()
    assert (data / "p1.txt").read_text() == "number 1 of sks"
    assert (data / "p3.txt").read_text() == "number 3 of sks"


def test_many_are_changed_at_once_with_their_number_and_command_before(data, start_studio, open_page):
    url, _ = start_studio(data.parent)
    page = open_page(f"{url}/data?folder=pictures")
    page.wait_for_selector(".picture")
    page.get_by_label("Search captions and names").fill("number 4")
    page.wait_for_function("document.querySelectorAll('.picture').length == 1")
    page.get_by_text("Change many captions").click()
    page.get_by_label("Put in front").fill("photo, ")
    page.get_by_text("Captions that change: 1").wait_for()
    command = page.locator(".studio-code", has_text="data captions").inner_text()
    assert command.endswith("'--search=number 4' '--prepend=photo, ' --write")
    page.get_by_role("button", name="Apply").click()
    page.get_by_text("photo, number 4 of sks").wait_for()
    texts = [(data / f"p{number}.txt").read_text() for number in range(6)]
    assert [text.startswith("photo, ") for text in texts] == [number == 4 for number in range(6)]


def test_two_pages_see_each_other(data, start_studio, open_page):
    url, _ = start_studio(data.parent)
    first, second = open_page(f"{url}/data?folder=pictures"), open_page(f"{url}/data?folder=pictures")
    for page in (first, second):
        page.wait_for_selector(".picture")
    card(first, "p0.png").locator(".picture-caption").click()
    card(first, "p0.png").locator("textarea").fill("half written")
    card(second, "p0.png").locator(".picture-caption").click()
    card(second, "p0.png").locator("textarea").fill("by the second")
    card(second, "p0.png").get_by_role("button", name="Save").click()
    second.get_by_text("by the second").wait_for()
    card(second, "p5.png").locator(".picture-caption").click()
    card(second, "p5.png").locator("textarea").fill("five")
    card(second, "p5.png").get_by_role("button", name="Save").click()
    first.get_by_text("five", exact=True).wait_for()
    assert (
        card(first, "p0.png").locator("textarea").input_value() == "half written"
    )  # stays while it is edited
    (data / "p4.txt").write_text("by an editor")
    card(first, "p4.png").locator(".picture-caption").click()
    card(first, "p4.png").locator("textarea").fill("mine")
    card(first, "p4.png").get_by_role("button", name="Save").click()
    first.get_by_text("p4.txt was changed since it was read").wait_for()
    card(first, "p4.png").get_by_text("by an editor").wait_for()


def test_hostile_names_and_captions_are_text(data, tmp_path, start_studio, open_page):
    names = [HOSTILE.replace("/", "|"), "line\nend", "\u202egnp.exe", "n" * 200, "图 片", "emoji 🙂"]
    for name in names:
        shutil.copy(data / "p0.png", data / f"{name}.png")
        (data / f"{name}.txt").write_text(SPOKEN + "\nsecond line " + "w" * 3000, "utf-8")
    (data / "rtl.txt").write_text("\u05e9\u05dc\u05d5\u05dd \u202e abc", "utf-8")
    shutil.copy(data / "p0.png", data / "rtl.png")
    shutil.copy(data / "p0.png", bytes(data) + b"/\xff\xfe.png")
    (data / "bad.png").write_bytes(b"<svg onload=alert(1)>")
    folder = tmp_path / HOSTILE.replace("/", "|")
    data.rename(folder)
    url, _ = start_studio(tmp_path)
    page = open_page(f"{url}/data")
    page.get_by_role("button", name="Browse").first.click()
    page.locator(".q-dialog").get_by_text("onerror").click()
    page.get_by_role("button", name="Choose this folder").click()
    page.get_by_role("button", name="Open").click()
    page.wait_for_selector(".picture")
    page.wait_for_function(f"document.querySelectorAll('.picture').length == {6 + len(names) + 2}")
    assert page.get_by_text(HOSTILE.replace("/", "|") + ".png", exact=True).count() == 1
    assert page.locator(".picture-caption b, .picture script, .picture-text img").count() == 0
    name = page.get_by_text(HOSTILE.replace("/", "|") + ".png", exact=True)
    hostile = page.locator(".picture", has=name)  # others are told to be the same file
    assert SPOKEN in hostile.locator(".picture-caption").inner_text()
    hostile.locator(".picture-caption").click()
    assert hostile.locator("textarea").input_value().startswith(SPOKEN)
    hostile.locator("textarea").press("Escape")
    hostile.locator(".picture-views").click()
    page.locator(".q-dialog").get_by_text("trained at").wait_for()
    page.keyboard.press("Escape")
    page.get_by_label("Search captions and names").fill("<script>")
    page.wait_for_function(f"document.querySelectorAll('.picture').length == {len(names)}")
    loaded = "Array.from(document.querySelectorAll('.picture img')).every(each => each.naturalWidth > 1)"
    page.wait_for_function(loaded)


@pytest.mark.parametrize(
    ("folder", "said"),
    [
        ("nowhere", "does not exist; give a folder of pictures and captions"),
        ("empty", "no pictures in"),
        ("broken", "no usable picture is left"),
        ("/etc", "outside of the studio's folders"),
        ("a%00b", "is no path"),
        ("pictures&resolution=1000", "resolution: came 1000, wanted a multiple of 16"),
        ("pictures&resolution=big", "resolution: came 'big', wanted a whole number"),
    ],
)
def test_a_bad_folder_is_one_line_in_the_page(data, tmp_path, start_studio, open_page, folder, said):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/a.png").write_bytes(b"no picture")
    (tmp_path / "broken/a.txt").write_text("x")
    url, _ = start_studio(tmp_path)
    page = open_page(f"{url}/data?folder={folder}")
    error = page.locator(".studio-error")
    error.wait_for()
    assert said in error.inner_text() and "\n" not in error.inner_text()
    assert page.locator(".picture").count() == 0


def test_many_pictures_are_loaded_as_they_are_scrolled_to(tmp_path, start_studio, open_page, slowness):
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(500):
        Image.new("RGB", (96, 64 + 16 * (number % 3)), (number % 255, 80, 90)).save(
            folder / f"{number:03d}.jpg"
        )
        (folder / f"{number:03d}.txt").write_text(f"picture {number}")
    url, _ = start_studio(tmp_path)
    page = open_page(f"{url}/data?folder=many&resolution=64")
    page.wait_for_selector(".picture")
    assert page.locator(".picture").count() <= 120
    for _ in range(200):
        page.mouse.wheel(0, 3000)
        page.wait_for_timeout(150)
        if page.locator(".picture").count() == 500:
            break
    assert page.locator(".picture").count() == 500
    page.get_by_text("picture 499", exact=True).scroll_into_view_if_needed()
    frames = page.evaluate("""async () => {
        const times = []; let last = performance.now();
        for (let i = 0; i < 40; i++) {
            window.scrollBy(0, i < 20 ? -400 : 400);
            await new Promise(requestAnimationFrame);
            const now = performance.now(); times.push(now - last); last = now;
        }
        return times.sort((a, b) => a - b)[20];
    }""")
    assert frames < 100 * slowness()  # ms, of two cores that are shared: 16 where nothing else runs


def test_the_first_page_comes_in_two_seconds(data, start_studio, open_page, slowness):
    url, _ = start_studio(data.parent)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        open_page(f"{url}/data")  # a new user: nothing is in the browser's cache
        times.append(time.perf_counter() - start)
    if min(times) >= 2 and os.getloadavg()[0] > 1.5 * os.cpu_count():
        pytest.skip("others use the processors: the clock tells nothing of the page")
    assert min(times) < 2 * slowness()


def test_a_narrow_page_needs_no_sideways_scrolling_and_speaks_chinese(data, start_studio, open_page):
    url, _ = start_studio(data.parent)
    for path in ("data", "data?folder=pictures&trigger_word=sks", "files", "files?tool=merge"):
        page = open_page(f"{url}/{path}", width=390, locale="zh-CN")
        page.get_by_text("数据").first.wait_for()
        if "folder" in path:
            page.wait_for_selector(".picture")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, path
    page.get_by_text("English").click()
    page.get_by_text("Merge").first.wait_for()
    assert page.url.endswith("/files?tool=merge")
    page.goto(f"{url}/data")
    page.get_by_text("Folder of pictures", exact=True).wait_for()


def test_references_and_masks_stand_beside_their_picture(data, start_studio, open_page):
    for folder, mode in (("references", "RGB"), ("masks", "L")):
        (data.parent / folder).mkdir()
        for number in (0, 1):
            image = Image.new(mode, (512, 512))
            image.paste(255 if mode == "L" else "white", (0, 0, 200, 200))
            image.save(data.parent / folder / f"p{number}.png")
    url, _ = start_studio(data.parent)
    page = open_page(f"{url}/data?folder=pictures&control_path=references&mask_path=masks")
    page.wait_for_selector(".picture")
    assert card(page, "p0.png").locator("img").count() == 3
    assert card(page, "p5.png").locator("img").count() == 1


def test_another_machine_needs_the_token(data, start_studio, chromium, capfd):
    url, _ = start_studio(data.parent, "--host", "0.0.0.0")
    token = capfd.readouterr().out.split("?token=")[1].split()[0]
    page = chromium.new_context().new_page()
    page.set_default_timeout(300_000)
    assert page.goto(f"{url}/data").status == 403
    page.goto(f"{url}/data?folder=pictures&token={token}")
    page.wait_for_selector(".picture")
    assert "token" not in page.url
    page.context.close()
