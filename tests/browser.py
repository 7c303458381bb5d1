"""A page in a browser without a window, with a script of the test in it."""

import html
import json
import re
import shutil
import subprocess

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def run(page, script, folder):
    """Returns what `script` put into the object `found`, once the page was loaded; skips without Chromium.

    Errors on the page are in `found.said`; whether it is as narrow as its window, in `found.wide`.
    """
    browser = next(filter(None, map(shutil.which, _NAMES)), None)
    if browser is None:
        pytest.skip("no Chromium here")
    driver = f"""<script>
const said = [], found = {{}};
addEventListener("error", (event) => said.push(event.message));
{script}
found.wide = document.documentElement.scrollWidth <= innerWidth;
found.said = said;
document.title = JSON.stringify(found);
</script>"""
    copy = folder / "page.html"
    copy.write_text(page.read_text(encoding="utf-8").replace("</body>", f"{driver}</body>"), encoding="utf-8")
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--window-size=1280,900")
    profile = f"--user-data-dir={folder / 'profile'}"
    command = [browser, *options, profile, "--virtual-time-budget=2000", "--dump-dom", copy.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert "CONSOLE" not in done.stderr, done.stderr
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert title, done.stderr
    return json.loads(html.unescape(title.group(1)))


def check(page):
    """Asserts that a page's text loads nothing, names everything once, and speaks to those who do not see it."""
    assert not re.findall(r"(?:src|href)=\"(?!#|data:)", re.sub(r"xlink:href", "x", page))
    assert not re.findall(r"@import|fetch\(|XMLHttpRequest|url\(['\"]?http", page)
    heads = re.findall(r"<th\b[^>]*>", page)
    assert heads and all("scope=" in head for head in heads)
    assert 'lang="en"' in page and "prefers-color-scheme: dark" in page and ":focus-visible" in page
    names = re.findall(r'\bid="([^"]+)"', page)
    assert len(set(names)) == len(names), "an id names one thing"
    targets = {one for pair in re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', page) for one in pair if one}
    assert targets and targets <= set(names)
