"""Reads exported models with the installed `transformers`, and compares its results with the expected ones.

    python tests/exports/read_exports.py FOLDER

Needs PyTorch and `transformers`, and nothing of grpo_jax. FOLDER holds a folder for each case, with the exported model
in `model`, and the expected results in expected.json and expected.npz (`test_exports.py` writes them). Prints the
result of each case as a line of JSON: `case`, `release`, `newer` (model types that this release does not know) and
`problems`.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer

TOLERANCE = 1e-5  # of the largest logit


def read_config(folder: Path) -> dict:
    """Returns the contents of config.json."""
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def newer_types(folder: Path) -> list[str]:
    """Returns the model types in a config.json that the installed `transformers` does not know."""
    fields = read_config(folder)
    sections = fields, fields.get("text_config", {})
    return sorted({section["model_type"] for section in sections if "model_type" in section} - {*CONFIG_MAPPING})


def model_problems(folder: Path, arrays: dict[str, np.ndarray], eos_ids: list[int]) -> list[str]:
    """Compares the logits, the tokens that `generate` adds and the stop ids of an exported model."""
    AutoConfig.from_pretrained(folder)
    model_class = getattr(transformers, read_config(folder)["architectures"][0])
    model, info = model_class.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    model.eval()
    problems = [f"{kind}: {sorted(info[kind])[:3]}" for kind in ("missing_keys", "unexpected_keys") if info[kind]]
    logits = model(input_ids=torch.tensor(arrays["tokens"], dtype=torch.long)).logits.numpy()
    error = np.abs(logits - arrays["logits"]).max() / np.abs(arrays["logits"]).max()
    if not error <= TOLERANCE:
        problems.append(f"the logits differ by {error:.1e} of the largest")
    if (logits.argmax(-1) != arrays["logits"].argmax(-1)).any():
        problems.append("the most likely tokens differ")
    stops = model.generation_config.eos_token_id
    if {*(stops if isinstance(stops, list) else [stops])} - {None} != {*eos_ids}:
        problems.append(f"generation stops at {stops}, not at {eos_ids}")
    if "greedy" in arrays:
        greedy = torch.tensor(arrays["greedy"], dtype=torch.long)
        start = arrays["start"].shape[1]
        new = greedy.shape[1] - start
        inputs = dict(input_ids=greedy[:, :start], attention_mask=torch.ones(greedy[:, :start].shape, dtype=torch.long))
        written = model.generate(**inputs, max_new_tokens=new, do_sample=False, eos_token_id=None)
        if not torch.equal(written, greedy):
            problems.append("`generate` writes other tokens")
    return problems


def tokenizer_problems(folder: Path, expected: dict) -> list[str]:
    """Compares the ids of texts, the texts of ids and the prompt of a chat by an exported tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    problems = []
    for text, ids, decoded in zip(expected["texts"], expected["ids"], expected["decoded"], strict=True):
        if tokenizer(text)["input_ids"] != ids:
            problems.append(f"{text!r:.40} has the ids {tokenizer(text)['input_ids']}, not {ids}")
        if tokenizer.decode(ids) != decoded:
            problems.append(f"{ids} are {tokenizer.decode(ids)!r}, not {decoded!r}")
    for name, value in expected["special_tokens"].items():
        if getattr(tokenizer, name) != value:
            problems.append(f"{name} is {getattr(tokenizer, name)}, not {value}")
    if not {*expected["all_special_tokens"]} <= {*tokenizer.all_special_tokens}:
        problems.append(f"the special tokens are {tokenizer.all_special_tokens}, not {expected['all_special_tokens']}")
    for template, prompt in expected["prompts"].items():
        chat = [{"role": "user", "content": "what is it"}]
        options = {} if template == "default" else {"chat_template": template}
        found = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, **options)
        if found != prompt:
            problems.append(f"the chat template {template} gives {found!r}, not {prompt!r}")
    return problems


def read_case(folder: Path) -> dict:
    """Returns the result of a case."""
    newer = newer_types(folder / "model")
    result = {"case": folder.name, "release": transformers.__version__, "newer": newer, "problems": []}
    expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    with np.load(folder / "expected.npz") as file:
        arrays = dict(file)
    checks = [(tokenizer_problems, (expected,))]
    if not result["newer"]:
        checks.append((model_problems, (arrays, expected["eos_ids"])))
    for check, arguments in checks:
        try:
            result["problems"] += check(folder / "model", *arguments)
        except Exception as error:  # a release that cannot read an export raises anything
            result["problems"].append(f"{check.__name__}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
    return result


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    with torch.no_grad():
        for case_folder in sorted(path for path in Path(sys.argv[1]).iterdir() if path.is_dir()):
            print(json.dumps(read_case(case_folder)), flush=True)
