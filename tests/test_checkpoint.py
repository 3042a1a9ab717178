"""Checkpoints are what was saved, or are passed over: flipped bits, other damage, copies of the reference, rotation."""

import random
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import jax
import numpy as np
import pytest

import grpo_jax.run.state
from grpo_jax.config import check, default, write_config
from grpo_jax.parallel.mesh import make_mesh
from grpo_jax.run.saving import CheckpointStore
from grpo_jax.run.state import save_run, start_or_resume
from tests import tiny

STEPS = (2, 4)
MESH = dict(data=2, fsdp=2, tensor=2)


class Saved(NamedTuple):
    """A workdir with two checkpoints of a tiny model, and what they hold."""

    workdir: Path
    cfg: object
    context: object
    states: dict[int, tuple]  # by step: what `contents` returns


def contents(run, root_key):
    """Returns everything that a checkpoint holds, as host arrays and plain values."""
    experience = None if run.experience is None else vars(run.experience)
    arrays = run.train.params, run.train.opt_state, run.reference, experience, run.train.skipped, run.train.is_reference
    return jax.device_get(arrays), run.rollout_metrics, run.skipped_in_a_row, jax.random.key_data(root_key).tolist()


def are_equal(one, other):
    """Returns whether two trees have the same structure and the same bits."""
    leaves = (jax.tree.leaves(one), jax.tree.leaves(other))
    same = jax.tree.structure(one) == jax.tree.structure(other)
    return same and all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in zip(*leaves, strict=True))


def scaled(tree, factor):
    return jax.tree.map(lambda x: (x * factor).astype(x.dtype), tree)


def make_store(saved, step, keep=2, best=""):
    return CheckpointStore(saved.workdir, keep, best, step)


def run_at(saved, step):
    """Returns a run whose values depend on the step. Its reference is replaced after step 3."""
    run, key = start_or_resume(saved.cfg, saved.context, saved.workdir.parent / "new")
    reference = scaled(run.reference, 5) if step > 3 else run.reference
    state = run.train.replace(params=scaled(run.train.params, 1 + step), opt_state=scaled(run.train.opt_state, step))
    experience = tiny.experience(seed=step) if step != 2 else None
    run = run._replace(step=step, train=state, reference=reference)
    return run._replace(experience=experience, rollout_metrics={"a/b": step / 3}), key


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Saves the checkpoints. Tests must not change them."""
    raw = default()
    raw.loss.kl_coef, raw.reference.every_updates = 0.1, 3
    cfg, params = check(raw), tiny.params()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo_jax.run.state, "load", lambda *args, **kwargs: (tiny.CONFIG, scaled(params, 1)))
        context = SimpleNamespace(mesh=make_mesh(**MESH), model_cfg=tiny.CONFIG, source=None)
        saved = Saved(tmp_path_factory.mktemp("made") / "run", cfg, context, {})
        write_config(saved.workdir, cfg)
        store = make_store(saved, 0)
        for step in STEPS:
            run, key = run_at(saved, step)
            save_run(cfg, store, run, key, {}, {})
            saved.states[step] = contents(run, key)
        store.finish()
        store.close()
        yield saved


@pytest.fixture
def saved(made, tmp_path):
    """Returns a copy of the workdir that tests may change."""
    return made._replace(workdir=Path(shutil.copytree(made.workdir, tmp_path / "run")))


def resume(saved):
    """Resumes as training does, and returns the step, after asserting that the run is what was saved."""
    run, key = start_or_resume(saved.cfg, saved.context, saved.workdir)
    assert are_equal(contents(run, key), saved.states[run.step])
    return run.step


def files_in(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip(path, bit):
    """Flips a bit of a file. Doing it again restores the file."""
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


@pytest.mark.parametrize("count", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_flipped_bit_is_never_restored(saved, count, capsys):
    """Every file is flipped in turn. All that is set aside stays what it was."""
    folder, draw = saved.workdir / "checkpoints", random.Random(count)
    files = [path for path in files_in(folder) if path.stat().st_size]
    steps, passed_over = [], 0
    for path in draw.choices(files, k=count):
        bit, before = draw.randrange(8 * path.stat().st_size), {path: path.read_bytes() for path in files}
        flip(path, bit)
        steps.append(resume(saved))
        lines = capsys.readouterr().out.splitlines()
        aside = folder / "damaged-4"
        assert len(lines) == aside.exists() == (steps[-1] == 2)
        if aside.exists():
            assert "The checkpoint of step 4 is damaged: " in lines[0] and "continues from step 2" in lines[0]
            assert path.is_relative_to(folder / "4")
            aside.rename(folder / "4")
            passed_over += 1
        flip(path, bit)
        assert {path: path.read_bytes() for path in files} == before
    assert 0 < passed_over < count


def delete(path):
    path.unlink()


def empty(path):
    path.write_bytes(b"")


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def overwrite(path):
    path.write_bytes(random.Random(1).randbytes(path.stat().st_size))


def put_a_folder(path):
    path.unlink()
    path.mkdir()


def link_to_zeros(path):
    path.unlink()
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("damage", [delete, empty, cut, overwrite, put_a_folder, link_to_zeros])
@pytest.mark.parametrize("share", [20, pytest.param(1, marks=pytest.mark.slow)])
def test_a_damaged_file_is_never_restored(made, tmp_path, damage, share):
    """Of the files of the newest checkpoint, every `share`th is damaged."""
    for index, path in enumerate(files_in(made.workdir / "checkpoints" / "4")[::share]):
        workdir = Path(shutil.copytree(made.workdir, tmp_path / str(index)))
        damage(workdir / path.relative_to(made.workdir))
        resume(made._replace(workdir=workdir))
