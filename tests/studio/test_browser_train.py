"""Training and drawing in a browser, from click to picture: the plan while typing, stop and go on, two pages
at once, a studio that is started anew while a run goes on."""

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
from PIL import Image

pytestmark = pytest.mark.browser
LOADING = 600_000  # milliseconds in which a training, a plan or a drawing begins on a busy machine
RUN = """
name: tiny
trigger_word: sks
device: cpu
model: {name_or_path: tiny_flux}
network: {linear: 4}
datasets: [{folder_path: photos, resolution: 64}]
train: {steps: 30, batch_size: 1, lr: 1e-3}
coat: {enabled: true}
save: {save_every: 10}
sample: {sample_every: 15, sample_steps: 2, width: 64, height: 64, prompts: ["[trigger] a red dress"]}
logging: {visualdl: false}
"""


@pytest.fixture
def root(tmp_path, drawings):
    """A folder with pictures. Runs that still go on at the end are ended."""
    drawings(tmp_path / "photos", 2)
    yield tmp_path
    for note in tmp_path.glob("output/**/studio.json"):
        pid = json.loads(note.read_text())["pid"]
        cmdline = Path(f"/proc/{pid}/cmdline")
        if pid and cmdline.exists() and b"ppcoat" in cmdline.read_bytes():
            os.kill(pid, signal.SIGKILL)


def fill_in(page, text=RUN):
    page.get_by_role("button", name="As YAML").click()
    page.locator(".q-dialog textarea").fill(text)
    page.get_by_role("button", name="Apply").click()
    page.locator(".q-dialog").wait_for(state="detached")


def start(page):
    page.get_by_role("button", name="Start", exact=True, disabled=False).click()


def status(page, word, timeout=LOADING):
    page.locator(".q-badge", has_text=word).first.wait_for(timeout=timeout)


def steps_of(root, name="tiny"):
    file = root / "output" / name / "log.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def test_the_plan_follows_what_is_typed(root, start_studio, open_page):
    url, _ = start_studio(root)
    page = open_page(f"{url}/train")
    page.get_by_label("Begin with").click()
    page.get_by_role("option", name="flux_lora_24gb.yaml").click()
    page.get_by_text("Fits: 23.15 of 24 GB").wait_for(timeout=LOADING)
    page.get_by_text("Estimated: about").first.wait_for()
    page.get_by_label("Card").click()
    page.get_by_role("option", name="12 GB", exact=True).click()
    page.get_by_text("Does not fit: 23.15 of 12 GB").wait_for(timeout=LOADING)
    page.get_by_text("Change this, and the peak is").wait_for()
    page.get_by_role("button", name="Use these settings").click()
    fits = page.get_by_text(re.compile(r"^Fits: 1[01]\.\d\d of 12 GB$"))
    fits.wait_for(timeout=LOADING)
    page.get_by_label("lr", exact=True).fill("fast")
    page.get_by_text("came 'fast', wanted a number without quotes").wait_for()
    page.get_by_text("No plan: the form has mistakes.").wait_for()
    page.get_by_label("lr", exact=True).fill("2e-4")
    fits.wait_for(timeout=LOADING)
    page.get_by_label("folder_path *").fill("../..")
    page.get_by_text("lies outside of the studio's folders").first.wait_for()
    assert page.get_by_role("button", name="Start", exact=True).is_disabled()


def test_a_run_from_click_to_preview_to_drawing(root, start_studio, open_page):
    url, _ = start_studio(root)
    page, other = (open_page(f"{url}/train") for _ in range(2))
    other.get_by_role("tab", name="Runs").click()
    fill_in(page)
    page.get_by_text("python -m ppcoat train output/tiny/studio.yaml").first.wait_for()
    start(page)
    page.get_by_text("Stop and save").wait_for()
    status(other, "running")  # a second page sees the same run
    status(page, "finished")
    status(other, "finished")
    page.get_by_text("sks a red dress", exact=True).wait_for()
    assert [file.name for file in sorted((root / "output/tiny/samples").iterdir())] == [
        "000000015_00.png",
        "000000030_00.png",
    ]
    assert steps_of(root) == 30 and page.get_by_text("30 / 30").count()

    page.get_by_role("button", name="Draw with it").click()
    page.wait_for_url("**/draw?run=output%2Ftiny")
    page.get_by_label("Compare").click()
    page.get_by_role("option", name="Beside it without the LoRA").click()
    page.get_by_role("button", name="Draw", exact=True).click()
    page.get_by_text("Drawn: 2").wait_for(timeout=LOADING)
    (folder,) = (root / "output/drawings").iterdir()
    on, off = (Image.open(folder / f"r0_c{column}.png") for column in (0, 1))
    assert on.size == off.size == (64, 64) and on.tobytes() != off.tobytes()
    assert on.info["prompt"] == "sks a red dress"
    # the file, dropped on a page of somebody who typed nothing
    fresh = open_page(f"{url}/draw")
    fresh.locator("input[type=file]").set_input_files(folder / "r0_c0.png")
    fresh.get_by_text("The settings of the picture are in the form").wait_for()
    assert fresh.get_by_label("Prompt", exact=True).input_value() == "sks a red dress"
    assert fresh.get_by_label("LoRA file", exact=True).input_value() == "output/tiny/tiny.safetensors"


def test_stop_saves_the_studio_starts_anew_and_the_run_goes_on(root, start_studio, open_page):
    url, process = start_studio(root)
    page = open_page(f"{url}/train")
    fill_in(page, RUN.replace("steps: 30", "steps: 3000").replace("sample_every: 15", "sample_every: 0"))
    start(page)
    deadline = time.monotonic() + LOADING / 1000
    while steps_of(root) < 2 and time.monotonic() < deadline:
        time.sleep(0.2)
    page.context.close()  # neither a closed page nor a stopped studio ends it
    process.kill()
    process.wait()
    before = steps_of(root)
    url, _ = start_studio(root)
    page = open_page(f"{url}/train")
    status(page, "running")
    while steps_of(root) < before + 2 and time.monotonic() < deadline:
        time.sleep(0.2)
    page.get_by_role("button", name="Stop and save").click()
    status(page, "stopped")
    done = steps_of(root)
    assert before + 2 <= done < 3000
    assert (root / f"output/tiny/checkpoints/{done:09d}").is_dir()
    page.get_by_role("button", name="Go on", exact=True).click()
    status(page, "running")
    while steps_of(root) < done + 2 and time.monotonic() < deadline + 60:
        time.sleep(0.2)
    assert steps_of(root) >= done + 2
    steps = [json.loads(line)["step"] for line in (root / "output/tiny/log.jsonl").read_text().splitlines()]
    assert steps[: done + 2] == list(range(1, done + 3))


def test_names_of_files_and_prompts_are_text(root, start_studio, open_page):
    bad = "<img src=x onerror=alert(1)>"
    (root / "output" / bad).mkdir(parents=True)
    (root / "output" / bad / "log.jsonl").write_text('{"step": 1, "loss": 0.5, "lr": 0.1}\n')
    (root / "output" / bad / "studio.log").write_text(f"{bad}\nerror: {bad}\n")
    shutil.copytree(root / "output" / bad, root / "output" / "b")
    url, _ = start_studio(root)
    page = open_page(f"{url}/train")
    page.get_by_role("tab", name="Runs").click()
    page.get_by_text(f"output/{bad}").wait_for()
    page.get_by_text(f"output/{bad}").click()
    page.locator(".studio-code", has_text=bad).wait_for()
    page.goto(f"{url}/draw")
    page.get_by_label("Prompt", exact=True).fill(bad)
    page.get_by_label("Model", exact=False).first.fill(f"../{bad}")
    page.get_by_role("button", name="Draw", exact=True).click()
    page.get_by_text("lies outside of the studio's folders").wait_for()
    assert page.locator("img[src=x]").count() == 0


# What the server says comes a second late, as on a slow line, but for the connection itself.
LATE = """window.WebSocket = class extends WebSocket {
    set onmessage(heard) {
        super.onmessage = (event) =>
            setTimeout(() => heard(event), /^(0|40)/.test(event.data) ? 0 : 1000);
    }
};"""


def test_what_is_typed_at_once_on_a_slow_line_stays(root, start_studio, open_page):
    url, _ = start_studio(root)
    page = open_page(f"{url}/train")
    page.add_init_script(LATE)
    page.goto(f"{url}/draw")
    page.get_by_label("Model", exact=False).first.fill("../x")
    page.wait_for_timeout(2000)
    page.get_by_role("button", name="Draw", exact=True).click()
    page.get_by_text("lies outside of the studio's folders").wait_for()


@pytest.mark.parametrize("path", ["train", "draw"])
@pytest.mark.parametrize("locale", ["en-US", "zh-CN"])
def test_a_phone_shows_the_page_in_its_width(root, start_studio, open_page, path, locale):
    url, _ = start_studio(root)
    page = open_page(f"{url}/{path}", width=390, locale=locale)
    page.wait_for_timeout(500)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
