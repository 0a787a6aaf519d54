"""The pages in a real browser, at the width of a phone and a desktop: nothing overflows, nothing fails."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from skill_fairseq.cli import report

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chromium-headless-shell")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
OPTIONS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --enable-logging=stderr "
    "--virtual-time-budget=20000 --window-size=1400,900"
)
# A Chromium window is at least 500 px wide, but a frame in it can have any width.
CHECK = """<!doctype html><body><iframe id="frame" width="%d" height="800" style="border:0" srcdoc="%s"></iframe>
<script>
addEventListener("load", () => {
  const view = document.getElementById("frame").contentWindow, page = view.document;
  const width = page.documentElement.clientWidth;  // without the scroll bar
  for (const folded of page.querySelectorAll("details")) folded.open = true;
  const boxes = ".scroll, pre";
  const wide = [...page.body.querySelectorAll("*")].filter(e => {
    const place = e.getBoundingClientRect();
    return !e.parentElement.closest(boxes) && (place.right > width + 0.5 || place.left < 0);
  });
  const images = [...page.images];
  const loose = [...page.querySelectorAll(".scroll")].filter(e => {  // whose first column goes when scrolled
    e.scrollLeft = 100;
    const cell = e.querySelector(".short td"), moved = e.scrollLeft > 0;
    const gone = moved && cell && Math.abs(cell.getBoundingClientRect().left - e.getBoundingClientRect().left) > 1;
    e.scrollLeft = 0;
    return gone;
  });
  const found = {
    frame: view.innerWidth, width, scroll: page.documentElement.scrollWidth,
    elements: page.body.querySelectorAll("*").length,
    wide: wide.map(e => e.tagName + ": " + e.textContent.slice(0, 60)),
    loose: loose.length, staying: page.querySelectorAll(".short").length,
    images: images.length, broken: images.filter(i => !i.complete || !i.naturalWidth).length,
    tables: page.querySelectorAll("table").length, boxed: page.querySelectorAll(".scroll > table").length,
    scrollable: [...page.querySelectorAll(boxes)].filter(e => e.scrollWidth > e.clientWidth).length,
    small: [...page.querySelectorAll("td, th, p, li, summary, pre")].filter(
      e => parseFloat(view.getComputedStyle(e).fontSize) < 12).length,
  };
  const out = document.createElement("pre");
  out.id = "found";
  out.textContent = JSON.stringify(found);
  document.body.append(out);
});
</script>"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason=f"no Chromium, none of {BROWSERS}: apt-get install chromium"),
]


def browse(page: str, width: int, folder: Path) -> dict[str, Any]:
    """The browser's findings for a page of this width."""
    wrapper = folder / f"wrapper_{width}.html"
    wrapper.write_text(CHECK % (width, html.escape(page)), encoding="utf-8")
    profile = folder / f"profile_{width}"
    command = [str(CHROMIUM), *OPTIONS.split(), f"--user-data-dir={profile}", "--dump-dom", wrapper.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-2000:]
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stdout[-2000:] + done.stderr[-2000:]
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return {**json.loads(html.unescape(found[1])), "console": console}


@pytest.fixture(scope="module", params=["run_folder", "benchmark_folder"])
def page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("page")
    assert report.main([str(request.getfixturevalue(request.param)), "--out", str(out)]) == 0
    return (out / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_is_wider_than_the_screen(page: str, width: int, tmp_path: Path) -> None:
    found = browse(page, width, tmp_path)
    assert found["frame"] == width and found["elements"] > 100
    assert found["wide"] == [] and found["scroll"] == found["width"] <= width
    assert found["tables"] == found["boxed"] > 3  # every table scrolls in a box of its own
    assert found["images"] >= 7 and found["broken"] == 0 and found["small"] == 0
    assert found["console"] == [] and found["loose"] == 0 and found["staying"] >= 3
    if width == 360:
        assert found["scrollable"] > 0


def test_the_check_finds_what_sticks_out_and_what_fails(page: str, tmp_path: Path) -> None:
    """The test above can fail."""
    spoiled = page.replace("</body>", '<p style="width:900px">too wide</p><script>undefined_name</script></body>')
    spoiled = spoiled.replace("data:image/png;base64,iVBOR", "data:image/png;base64,AAAA", 1)
    found = browse(spoiled, 360, tmp_path)
    assert any(line.startswith("P: too wide") for line in found["wide"]) and found["scroll"] > 360
    assert found["broken"] == 1 and any("undefined_name is not defined" in line for line in found["console"])
