"""The report in a real browser: headless Chromium opens it without a word on its console."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from sse_server import SseServer, in_thread

from minisgl_fast.bench.cli import main

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome", "headless_shell")


def chromium():
    """A Chromium: $CHROMIUM, one on the path, or Playwright's; None if there is none."""
    found = os.environ.get("CHROMIUM")
    for name in NAMES:
        found = found or shutil.which(name)
    folder = Path(os.environ.get("PLAYWRIGHT_BROWSERS_PATH", Path.home() / ".cache/ms-playwright"))
    for pattern in ("chromium_headless_shell-*/*/*headless*shell*", "chromium-*/*/chrome"):
        for path in sorted(folder.glob(pattern)):
            found = found or str(path)
    return found


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A folder with the page of a run, of a comparison and of a sweep."""
    folder = tmp_path_factory.mktemp("report")
    with in_thread(SseServer()) as server:
        options = ["--base-url", server.url, "--model", "m", "--quiet", "--num-prompts", "8"]
        options += ["--output-len", "5", "--input-len", "4"]
        for name in ("one", "two"):
            files = ["--json", str(folder / f"{name}.json"), "--html", str(folder / f"{name}.html")]
            assert main([*options, "--label", name, *files]) == 0
        points = ["--concurrencies", "1,4", "--html", str(folder / "sweep.html")]
        assert main(["sweep", *options, *points]) == 0
    files = [str(folder / "one.json"), str(folder / "two.json")]
    assert main(["compare", *files, "--html", str(folder / "both.html")]) == 0
    return folder


@pytest.fixture
def open_page(tmp_path):
    """Opens a page; what the browser made of it, and what it said."""
    browser = chromium()
    if browser is None:
        pytest.skip("no Chromium: none on the path, none of Playwright's, no $CHROMIUM")

    def run(path):
        command = [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--enable-logging=stderr",
        ]
        command += ["--disable-dev-shm-usage", f"--user-data-dir={tmp_path}", "--v=0"]
        command += ["--virtual-time-budget=2000", "--dump-dom", path.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=90)
        assert done.returncode == 0, done.stderr
        return done.stdout, done.stderr

    return run


@pytest.mark.parametrize(
    ("name", "labels"),
    [("one", ["one"]), ("both", ["one", "two"]), ("sweep", ["1 at once", "4 at once"])],
)
def test_a_page_is_drawn_without_a_console_error(pages, open_page, name, labels):
    drawn, said = open_page(pages / f"{name}.html")
    assert "CONSOLE" not in said, said
    assert drawn.count("<svg") >= 6 and drawn.rstrip().endswith("</html>")
    assert all(label in drawn for label in labels)
    assert json.loads((pages / "one.json").read_text())["completed"] == 8


def test_a_console_error_would_be_noticed(open_page, tmp_path):
    broken = tmp_path / "broken.html"
    broken.write_text("<!doctype html><script>nothing.there()</script>")
    assert "CONSOLE" in open_page(broken)[1]


@pytest.mark.parametrize("name", ["one", "both", "sweep"])
def test_nothing_in_a_page_can_run_or_fetch(pages, name):
    text = (pages / f"{name}.html").read_text()
    for word in ("<script", 'http-equiv="refresh', "src=", "@import", "url(", "onload", "<iframe"):
        assert word not in text
