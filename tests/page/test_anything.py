"""The page stays readable, quick and harmless whatever a run has written, on screens of any size."""

import itertools
import json
import re
import shutil

import numpy as np
import pytest

from tests.page.conftest import STEPS, read_jsonl, write_page

HACK = "window.hacked = 1"
MARKUP = [
    f"</script><script>{HACK}</script>",
    f'<img src=x onerror="{HACK}">',
    "<!--<script>",
    f"--><svg onload='{HACK}'>",
    f"</textarea></style></title><iframe srcdoc='<script>parent.{HACK}</script>'>",
    f"<a href='javascript:{HACK}'>here</a>",
    "{{script}} ${1} &lt;b&gt; &amp;amp; \\u003cb> $& $1",
]
INVISIBLE = {  # text and what the page shows of it
    "line\u2028paragraph\u2029end": "line\\u{2028}paragraph\\u{2029}end",
    "\u202eright to left\u2066 isolated": "\\u{202e}right to left\\u{2066} isolated",
    "\x1b[31mred\x00": "\\x1b[31mred\\x00",
    "lone \ud800 surrogate": "lone \\u{d800} surrogate",
    "👩‍👩‍👧 नमस्ते שלום": "👩‍👩‍👧 नमस्ते שלום",
}
TEXTS = [*MARKUP, *INVISIBLE, "word " * 5000, "x" * 200_000]


def write_jsonl(file, lines):
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def replace_texts(folder, workdir):
    """Writes a copy of a run in which every text that a model, a file or a config can bring holds a hostile one."""
    shutil.copytree(workdir, folder, ignore=shutil.ignore_patterns("checkpoints", "tensorboard", "train-*"))
    for name in "train-000001.jsonl", "eval-000000.jsonl", f"eval-{STEPS:06d}.jsonl":
        records, markup = read_jsonl(workdir / "samples" / name), itertools.cycle(MARKUP)
        for record, text in zip(records, itertools.cycle(TEXTS)):
            pieces = [text[start : start + 20] for start in range(0, len(text), 20)]
            record |= {"completion": text, "pieces": pieces, "tokens": [5] * len(pieces), "length": len(pieces)}
            record |= {key: [-0.5] * len(pieces) for key in ("logps", "policy_logps", "ref_logps") if key in record}
            record |= {key: next(markup) for key in ("question", "prompt", "expected", "parsed", "why")}
            record["rewards"] = {"accuracy": 0.0, MARKUP[0]: 1.0}
        write_jsonl(folder / "samples" / name, records)
    warnings = [{"step": 1, "name": text, "text": text} for text in [*MARKUP, *INVISIBLE]]
    write_jsonl(folder / "warnings.jsonl", warnings)
    lines = [line | {f"reward/{MARKUP[0]}": 0.5} for line in read_jsonl(folder / "metrics.jsonl")]
    write_jsonl(folder / "metrics.jsonl", lines)
    config = json.loads((folder / "config.json").read_text())
    config["task"]["path"] = MARKUP[1]
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def hostile_page(runs, tmp_path_factory):
    """Writes the page of a run with hostile texts in a folder with a hostile name."""
    folder = tmp_path_factory.mktemp("hostile")
    workdir = folder / MARKUP[1].replace("/", "")
    replace_texts(workdir, runs[0])
    return write_page(folder / "hostile.html", workdir)


def test_hostile_text_is_shown_and_never_runs(open_page, hostile_page):
    page = open_page(hostile_page)
    scripts = page.locator("script:not([type])").count()
    for button in reversed(page.get_by_role("button", name="Show the other").all()):
        button.click()
    shown = page.locator("#answers .tokens").all_text_contents()
    assert shown[: len(TEXTS)] == [INVISIBLE.get(text, text) for text in TEXTS]
    page.locator("#comparison-kind").select_option("wrong wrong")
    assert page.locator("#pairs article").count() > 0
    assert page.locator("#warning-list li").count() == len(MARKUP) + len(INVISIBLE)
    for text, item in zip(MARKUP, page.locator("#warning-list li").all_text_contents(), strict=False):
        assert text in item
    for summary in page.locator("summary").all():
        summary.press("Enter")
    assert MARKUP[1] in page.locator("#config-all").inner_text()
    assert page.evaluate("window.hacked") is None
    assert page.locator("img, iframe, textarea, a[href^=javascript], svg[onload]").count() == 0
    assert page.locator("script:not([type])").count() == scripts == 1


def test_the_policy_lets_nothing_else_run(browser, page_file, tmp_path):
    attack = tmp_path / "attack.html"
    attack.write_text(page_file.read_text().replace("</main>", f"</main><script>{HACK}</script>{MARKUP[1]}"))
    page, requests = browser.new_page(), []
    page.route("**/*", lambda route: (requests.append(route.request.url), route.continue_()))
    page.goto(attack.as_uri())
    assert page.locator("#answers article").count() > 0
    assert page.evaluate("window.hacked") is None
    page.close()


# Text whose contrast with its background is less than 4.5, the least that WCAG 2 asks for text of normal size.
FAINT_TEXT = """() => {
    const parse = color => (color.match(/[\\d.]+/g) || []).map(Number);
    const luminance = color => {
        const [r, g, b] = color.map(c => c / 255).map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const backgroundOf = node => {
        for (; node; node = node.parentElement) {
            const color = parse(getComputedStyle(node).backgroundColor);
            if (color.length === 3 || color[3] === 1) return color;
        }
        return [255, 255, 255];
    };
    const faint = new Map(), walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const parent = walker.currentNode.parentElement;
        if (!walker.currentNode.data.trim() || !parent.getClientRects().length || parent.closest(":disabled")) continue;
        const style = getComputedStyle(parent), back = backgroundOf(parent);
        const [r, g, b] = parse(parent.closest("svg") ? style.fill : style.color);
        const alpha = Number(style.opacity);
        const front = [r, g, b].map((c, n) => alpha * c + (1 - alpha) * back[n]);
        const [low, high] = [luminance(front), luminance(back)].sort((x, y) => x - y);
        const contrast = (high + 0.05) / (low + 0.05);
        const name = `${parent.tagName}.${parent.getAttribute("class")} ${parent.dataset.shade ?? ""}`;
        if (contrast < 4.5) faint.set(name, `${name}: ${contrast.toFixed(2)} ${walker.currentNode.data.slice(0, 30)}`);
    }
    return [...faint.values()];
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_background(open_page, page_file, scheme):
    page = open_page(page_file, scheme=scheme)
    for summary in page.locator("summary").all():
        summary.press("Enter")
    for mode in page.locator("#color-by input").all():
        mode.check()
        assert page.evaluate(FAINT_TEXT) == []


@pytest.mark.parametrize("width", [360, 800, 1280])
def test_nothing_is_wider_than_the_screen(open_page, page_file, hostile_page, width):
    for file in page_file, hostile_page:
        page = open_page(file, width=width)
        for summary in page.locator("summary").all():
            summary.press("Enter")
        assert page.evaluate("document.scrollingElement.scrollWidth") <= width


FOCUSED = """[
    [document.activeElement.id, document.activeElement.getAttribute("class"), document.activeElement.tagName],
    getComputedStyle(document.activeElement).outlineStyle,
]"""


def test_the_keyboard_reaches_every_control(open_page, page_file):
    page = open_page(page_file)
    reached = set()
    while page.keyboard.press("Tab") or page.evaluate("document.activeElement !== document.body"):
        names, outline = page.evaluate(FOCUSED)
        assert outline != "none", names
        reached |= set(names)
        if "step" in names:
            page.keyboard.press("ArrowRight")
    assert "Step 2 " in page.locator("#step-name").inner_text()
    controls = "smoothing seeds chart samples-run step next-step group token comparison-run comparison-kind SUMMARY"
    assert set(controls.split()) <= reached


def test_a_page_of_10_000_steps_opens(open_page, runs, tmp_path, capsys):
    workdir, steps = tmp_path / "long", 10_000
    shutil.copytree(runs[0], workdir, ignore=shutil.ignore_patterns("checkpoints", "tensorboard", "metrics.jsonl"))
    names = list(read_jsonl(runs[0] / "metrics.jsonl")[1])
    names = [name for name in names if name != "step"] + [f"extra/{n}" for n in range(61 - len(names))]
    values = np.abs(np.cumsum(np.random.default_rng(0).standard_normal((steps, 60)), axis=0))
    lines = (dict(zip(names, row, strict=True)) for row in values.tolist())
    write_jsonl(workdir / "metrics.jsonl", ({"step": step} | line for step, line in enumerate(lines, start=1)))
    long_page = write_page(tmp_path / "long.html", workdir)
    page = open_page(long_page)
    seconds = page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd / 1000")
    size = long_page.stat().st_size / 1e6
    with capsys.disabled():
        print(f"\nA page of {steps:,} steps x {len(names)} metrics, {size:.1f} MB, opened in {seconds:.2f} s")
    assert page.locator("figure[data-metric]").count() > 50
    readout = page.locator('figure[data-metric="reward/mean"] .readout').inner_text()
    # Each point of a curve stands for ten steps.
    mean = values[-10:, names.index("reward/mean")].mean()
    assert float(re.search(r"long (\S+)", readout)[1].replace(",", "")) == pytest.approx(mean, rel=6e-3)


def test_a_run_of_a_single_update_is_a_dot(open_page, runs, tmp_path):
    """A line without length is visible because its ends are round."""
    workdir = tmp_path / "short"
    shutil.copytree(runs[0], workdir, ignore=shutil.ignore_patterns("checkpoints", "tensorboard", "metrics.jsonl"))
    write_jsonl(workdir / "metrics.jsonl", read_jsonl(runs[0] / "metrics.jsonl")[:2])
    page = open_page(write_page(tmp_path / "short.html", workdir))
    curve = page.locator('figure[data-metric="reward/mean"] path.curve')
    assert curve.get_attribute("d").endswith("h0")
    assert curve.evaluate("path => getComputedStyle(path).strokeLinecap") == "round"
