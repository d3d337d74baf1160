"""The page Files in a browser: its commands run, and say what they say in a shell."""

import shutil
from pathlib import Path

import pytest

from ppcoat.lora import read_lora_file

pytestmark = pytest.mark.browser
LORA = Path(__file__).parents[1] / "fixtures/adapters/rslora.safetensors"


@pytest.fixture
def panel(tmp_path, start_studio, open_page):
    """panel("convert") -> the page, and the part of it that holds this tool."""
    shutil.copy(LORA, tmp_path / "my lora.safetensors")

    def opened(tool):
        url, _ = start_studio(tmp_path)
        page = open_page(f"{url}/files?tool={tool}")
        return page, page.locator(".q-tab-panel:visible")

    return opened


def test_a_lora_is_inspected_by_path(panel, tmp_path):
    _, tool = panel("inspect")
    tool.get_by_label("LoRA file or folder").fill("my lora.safetensors")
    command = tool.locator(".studio-code", has_text="python -m ppcoat")
    command.wait_for()
    assert command.inner_text() == "python -m ppcoat inspect 'my lora.safetensors'"
    tool.get_by_role("button", name="Run").click()
    tool.get_by_text("Done").wait_for()
    log = tool.locator(".nicegui-log")
    assert "rank" in log.inner_text() and log.bounding_box()["height"] > 200  # it can be read


def test_a_lora_that_is_sent_is_converted(panel, tmp_path):
    page, tool = panel("convert")
    tool.locator("input[type=file]").set_input_files(LORA)
    page.get_by_text("Stored as studio_uploads/rslora.safetensors").wait_for()
    assert tool.get_by_label("Write to").input_value() == "studio_uploads/rslora_kohya.safetensors"
    tool.get_by_role("button", name="Run").click()
    tool.get_by_text("Done").wait_for()
    assert read_lora_file(tmp_path / "studio_uploads/rslora_kohya.safetensors").format == "kohya"
    tool.get_by_role("button", name="Run").click()  # it is there now
    tool.get_by_text("Ended with status 2").wait_for()
    assert "exists: remove it, or choose another name" in tool.locator(".nicegui-log").inner_text()


def test_what_is_no_lora_is_not_kept(panel, tmp_path):
    page, tool = panel("inspect")
    (tmp_path / "fake.safetensors").write_bytes(b"<script>alert(1)</script>")
    tool.locator("input[type=file]").set_input_files(tmp_path / "fake.safetensors")
    page.get_by_text("fake.safetensors is no safetensors file").wait_for()
    assert not (tmp_path / "studio_uploads").exists()


def test_a_lora_is_made_smaller(panel, tmp_path):
    _, tool = panel("resize")
    tool.get_by_label("LoRA file or folder").fill("my lora.safetensors")
    tool.get_by_label("Largest rank").fill("2")
    tool.get_by_text("--rank=2").wait_for()
    tool.get_by_role("button", name="Run").click()
    tool.get_by_text("Done").wait_for()
    modules = read_lora_file(tmp_path / "my lora_rank2.safetensors").modules
    assert {module.rank for module in modules.values()} == {2}


def test_paths_outside_are_refused_and_a_merge_is_put_together(panel, tmp_path):
    page, tool = panel("merge")
    tool.get_by_label("LoRA file or folder").fill("/etc/passwd")
    tool.get_by_label("FLUX model").fill("tiny_flux")
    tool.get_by_text("/etc/passwd lies outside of the studio's folders").wait_for()
    assert tool.get_by_role("button", name="Run").is_disabled()
    tool.get_by_label("LoRA file or folder").fill("my lora.safetensors")
    tool.get_by_label("Strength").fill("0.5")
    tool.get_by_text("--scale 0.5").wait_for()
    command = tool.locator(".studio-code", has_text="python -m ppcoat").inner_text()
    assert "--model=tiny_flux --lora 'my lora.safetensors' --scale 0.5 --output_dir=merged" in command
