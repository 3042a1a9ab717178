"""`make torture` with each of its parts once or twice. Its short form is in test_train.py."""

import os

import pytest

from tests.torture.__main__ import COUNTS, main


@pytest.mark.slow
def test_torture_finds_nothing(tmp_path):
    counts = dict.fromkeys(COUNTS, 1) | {"damage": 6, "flips": 10, "disks": int(os.geteuid() == 0)}
    out = tmp_path / "reliability.md"
    code = main(["--seed=7", f"--out={out}", *(f"--{name}={count}" for name, count in counts.items())])
    assert code == 0, out.read_text()
