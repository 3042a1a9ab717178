"""Exports of every golden model: two releases of `transformers` compute the same logits and token ids as we do.

`make test-exports` makes an environment with PyTorch for each release; nothing here is skipped without them.
"""

import json
import shutil
import subprocess
from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest

from grpo_jax import forward, load, save
from grpo_jax.weights.source import find_model
from grpo_jax.weights.tokenizer import load_tokenizer
from tests.exports.tokenizer import WORDS, small_tokenizer

REPO = Path(__file__).parents[2]
GOLDEN = REPO / "tests" / "golden"
RELEASES = ("4.57", "5")
# Model types that transformers 4.57 does not have.
NEWER_THAN_4_57 = ("cwm", "glm4_moe_lite", "ministral3")
FOLDERS = sorted(path.parent.name for path in GOLDEN.glob("*/config.json"))
GGUF_FILES = sorted(path.name for path in (GOLDEN / "gguf").glob("*.gguf"))
CASES = [*FOLDERS, *GGUF_FILES, "tiny"]

jit_forward = jax.jit(forward, static_argnums=0)


def source_of(case: str, folder: Path) -> Path:
    """Returns the model of a case; a golden folder gets a tokenizer, as transformers 5 saves it."""
    if case in GGUF_FILES:
        return GOLDEN / "gguf" / case
    if case not in FOLDERS:
        return find_model(case)
    source = Path(shutil.copytree(GOLDEN / case, folder / "source"))
    small_tokenizer().save_pretrained(source)
    assert "TokenizersBackend" in (source / "tokenizer_config.json").read_text()
    return source


def write_case(case: str, folder: Path) -> None:
    """Exports the model of a case and writes the expected results; see `read_exports.py`."""
    source = source_of(case, folder)
    save(folder / "model", *load(source))
    model_cfg, params = load(folder / "model")  # of a quantized model, the weights were rounded
    tokens = np.random.default_rng(0).integers(3, 90, (2, 40))
    arrays = {"tokens": tokens, "logits": np.asarray(jit_forward(model_cfg, params, tokens))}
    if case in FOLDERS:
        with np.load(GOLDEN / case / "reference.npz") as reference:
            arrays |= {"start": reference["tokens"], "greedy": reference["greedy"]}
    np.savez(folder / "expected.npz", **arrays)
    tokenizer = load_tokenizer(source)
    texts = json.loads((GOLDEN / "gguf/tokens.json").read_text(encoding="utf-8"))["texts"] if case in GGUF_FILES else []
    ids = [tokenizer(text)["input_ids"] for text in (*texts, *WORDS)]
    chat = [{"role": "user", "content": "what is it"}]
    templates = tokenizer.chat_template or {}
    templates = templates if isinstance(templates, dict) else {"default": templates}
    expected = {
        "eos_ids": model_cfg.eos_ids,
        "texts": [*texts, *WORDS],
        "ids": ids,
        "decoded": [tokenizer.decode(row) for row in ids],
        "special_tokens": {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "pad_token")},
        "all_special_tokens": tokenizer.all_special_tokens,
        "prompts": {
            name: tokenizer.apply_chat_template(chat, chat_template=text, tokenize=False, add_generation_prompt=True)
            for name, text in templates.items()
        },
    }
    (folder / "expected.json").write_text(json.dumps(expected), encoding="utf-8")


@pytest.fixture(scope="session")
def exported(request, tmp_path_factory) -> Path:
    """Exports the cases of the selected tests, and returns the folder that holds them."""
    folder = tmp_path_factory.mktemp("exports")
    for case in {item.callspec.params["case"]: None for item in request.session.items if "case" in item.fixturenames}:
        (folder / case).mkdir()
        write_case(case, folder / case)
    return folder


@cache
def read_exports(release: str, folder: Path) -> dict[str, dict]:
    """Returns the results of all cases with a release of `transformers`."""
    python = REPO / f".venv-exports-{release}" / "bin" / "python"
    assert python.exists(), f"{python} must exist; run: make test-exports"
    command = [str(python), str(Path(__file__).with_name("read_exports.py")), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = {result["case"]: result for result in map(json.loads, done.stdout.splitlines())}
    assert all(result["release"].startswith(f"{release}.") for result in results.values())
    return results


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("case", CASES)
def test_an_export_gives_the_same_logits_and_ids(exported, case, release):
    result = read_exports(release, exported)[case]
    newer = NEWER_THAN_4_57 if release == "4.57" else ()
    assert result["problems"] == [] and set(result["newer"]) <= set(newer)


@pytest.mark.parametrize("release", RELEASES)
def test_every_case_was_read(exported, release, capsys):
    results = read_exports(release, exported)
    assert results.keys() == set(CASES)
    newer = {case: result["newer"] for case, result in results.items() if result["newer"]}
    with capsys.disabled():
        print(f"\ntransformers {release}: read {len(CASES) - len(newer)} exports; too new for it: {newer or 'none'}")
    if release == "4.57":
        assert {name for names in newer.values() for name in names} == set(NEWER_THAN_4_57)
