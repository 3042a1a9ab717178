"""Two short runs of `main`, their page, and a browser that notes whatever goes wrong on a page."""

import json
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

REPO = Path(__file__).parents[2]
BROWSERS = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
)
STEPS, SAMPLES = 30, 16
KEYS = [f"total_steps={STEPS}", "rollout.prompts=2", f"rollout.samples={SAMPLES}", "eval.questions=16"]
KEYS += ["log.samples=-1", "log.every_steps=1", f"checkpoint.every_steps={STEPS}"]
KEYS += ["rollout.max_tokens=44"]  # cuts off completions that work out the sum, which is worth a warning
SEEDS = (0, 1)


def pytest_configure():
    """Ends with one line, before anything is trained, if there is no browser."""
    if not any(map(shutil.which, BROWSERS)):
        raise pytest.UsageError("expected Chromium or Chrome, found neither: apt-get install chromium")


def start(module: str, *flags: str) -> subprocess.Popen:
    """Starts an entry point on one CPU device."""
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"PYTHONPATH": str(REPO)}
    command = [sys.executable, "-m", f"grpo_jax.{module}", *map(str, flags)]
    return subprocess.Popen(command, cwd=REPO, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate()
    assert process.returncode == 0, output[-2000:]
    return output


def write_page(page: Path, *workdirs: Path) -> Path:
    """Writes the page of one or more runs."""
    finish(start("report", *[f"--workdir={workdir}" for workdir in workdirs], f"--out={page}"))
    return page


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Trains the two runs, which differ in their seed only, and returns their workdirs."""
    folder = tmp_path_factory.mktemp("runs")
    workdirs = [folder / f"seed-{seed}" for seed in SEEDS]
    keys = ["--config=configs/r1zero.py", *[f"--config.{key}" for key in KEYS]]
    processes = [
        start("main", f"--workdir={workdir}", f"--config.seed={seed}", *keys)
        for workdir, seed in zip(workdirs, SEEDS, strict=True)
    ]
    for process in processes:
        finish(process)
    return workdirs


@pytest.fixture(scope="session")
def page_file(runs, tmp_path_factory):
    """Writes the page of both runs."""
    return write_page(tmp_path_factory.mktemp("page") / "report.html", *runs)


@pytest.fixture(scope="session")
def browser():
    """Starts the browser that is installed."""
    with sync_playwright() as playwright:
        path = next(filter(None, map(shutil.which, BROWSERS)))
        # Chromium's sandbox refuses to work for root. The page is a file of ours, and needs no network.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """Returns a function that opens a file. At the end, nothing must have gone wrong on any of the pages."""
    problems, pages = [], []

    def open_file(file: Path, width=1280, scheme="light"):
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        pages.append(page)
        # Violations of the page's content security policy are errors on the console too.
        page.on("console", lambda message: problems.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("dialog", lambda dialog: problems.append(f"dialog: {dialog.message}"))
        page.on("request", lambda request: request.url == file.as_uri() or problems.append(f"request: {request.url}"))
        page.goto(file.as_uri())
        return page

    yield open_file
    for page in pages:
        page.close()
    assert problems == []


def read_jsonl(file: Path) -> list[dict]:
    """Reads a file of a workdir."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def read_groups(workdir: Path, step: int) -> dict[int, list[dict]]:
    """Returns the records of a step's rollout by prompt id."""
    groups = defaultdict(list)
    for record in read_jsonl(workdir / "samples" / f"train-{step:06d}.jsonl"):
        groups[record["prompt_id"]].append(record)
    return groups
