"""Takes docs/report.png, a picture of the report of two runs, in an installed browser. Needs the extra `page`.

    make r1zero WORKDIR=runs/seed-0
    make r1zero WORKDIR=runs/seed-1 ARGS=--config.seed=1
    make test-page  # installs the extra
    .venv/bin/python docs/make_report_picture.py runs/seed-0 runs/seed-1

The picture shows the top of the report, its first curves, and some completions of one step. The parts in between are
hidden.
"""

import shutil
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from grpo_jax import report

PICTURE = Path(__file__).parent / "report.png"
WIDTH, HEIGHT = 1280, 1370
STEP = 10  # the completions of a group still differ
HIDE = "#curves-note, #charts, #other, #question details, #answers article:nth-child(n + 4) { display: none } "
HIDE += "#top, section { padding-top: 1rem !important } #steps { margin-top: 0 !important }"


def main(workdirs: list[str]) -> None:
    """Writes the report of the runs and takes its picture."""
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        file = Path(folder) / "report.html"
        report.main([*[f"--workdir={workdir}" for workdir in workdirs], f"--out={file}"])
        path = shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        # Without bypass_csp, the page's policy would not admit the style.
        page = browser.new_context(bypass_csp=True, viewport={"width": WIDTH, "height": HEIGHT}).new_page()
        page.goto(file.as_uri())
        page.add_style_tag(content=HIDE)
        while f"Step {STEP} " not in page.locator("#step-name").inner_text():
            page.locator("#next-step").click()
        page.locator("#answers [data-shade]").first.focus()
        page.evaluate("window.scrollTo(0, 0)")
        page.screenshot(path=PICTURE)


if __name__ == "__main__":
    main(sys.argv[1:])
