"""Damaged checkpoints are never restored: flipped bits, other damage, copies of the reference, rotation."""

import json
import random
import shutil
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts

import grpo_jax.run.arrays
import grpo_jax.run.checkpoint
import grpo_jax.run.context
import grpo_jax.run.saving
import grpo_jax.run.state
from grpo_jax import check as check_command
from grpo_jax.config import check, default, write_config
from grpo_jax.errors import UserError
from grpo_jax.model.decoder import param_shapes
from grpo_jax.model.parameters import tree_shardings
from grpo_jax.parallel.mesh import make_mesh
from grpo_jax.run.arrays import Damaged, describe_difference, read_blocks, read_onto_devices, read_sound
from grpo_jax.run.checkpoint import (
    damage_of,
    initial_reference_damage,
    newest_meta,
    newest_step,
    read_meta,
    saved_steps,
)
from grpo_jax.run.policy import restore_policy
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
    state = state.replace(skipped=state.skipped + step, is_reference=state.is_reference & (step > 3))
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
        patch.setattr(grpo_jax.run.state, "param_shapes", cache(param_shapes))  # slow, and the same for each resume
        patch.setattr(grpo_jax.run.context, "load", lambda *args, **kwargs: (tiny.CONFIG, scaled(params, 1)))
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
    """Resumes as training does, asserts that the state is what was saved, and returns the step."""
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


@pytest.mark.parametrize("count", [20, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_flipped_bit_is_never_restored(saved, count, capsys):
    """A bit of every file is flipped in turn. What is set aside keeps its content."""
    folder, draw = saved.workdir / "checkpoints", random.Random(count)
    files = [path for path in files_in(folder) if path.stat().st_size]
    steps, passed_over = [], 0
    # Files of arrays have random names, and many are not read any more, so the first file is one that always is.
    for path in [folder / "4" / "meta" / "metadata", *draw.choices(files, k=count - 1)]:
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
    """Damages one of every `share` files of the newest checkpoint."""
    for index, path in enumerate(files_in(made.workdir / "checkpoints" / "4")[::share]):
        workdir = Path(shutil.copytree(made.workdir, tmp_path / str(index)))
        damage(workdir / path.relative_to(made.workdir))
        resume(made._replace(workdir=workdir))


def test_a_large_array_is_read_back_in_blocks(monkeypatch):
    spec = {"driver": "zarr", "kvstore": "memory://", "metadata": {"shape": [7, 3], "chunks": [2, 3], "dtype": "<f4"}}
    array, values = ts.open(spec, create=True).result(), np.arange(21, dtype=np.float32).reshape(7, 3)
    array.write(values).result()
    for block_bytes, rows in ((1 << 20, [7]), (50, [4, 3]), (1, [2, 2, 2, 1])):
        monkeypatch.setattr(grpo_jax.run.arrays, "BLOCK_BYTES", block_bytes)
        blocks = list(read_blocks(array))
        assert [len(block) for block in blocks] == rows
        np.testing.assert_array_equal(np.concatenate(blocks), values)


def test_metadata_that_is_not_what_was_saved_is_not_read(tmp_path):
    tiny.write_meta(tmp_path, 3, {"seed": 0})
    path = tmp_path / "checkpoints" / "3" / "meta" / "metadata"
    text, deep = path.read_text(), '{"step": ' + "[" * 100_000
    for changed, says in (
        (text.replace('"seed": 0', '"seed": 1'), "differs from what was saved"),
        (text.replace("sha256", "sha"), "has no hash"),
        ("[1]", "cannot be read"),
        (deep, "cannot be read"),
    ):
        path.write_text(changed)
        with pytest.raises(Damaged, match=f"^its metadata {says}"):
            read_meta(tmp_path, 3)
        assert newest_step(tmp_path) == 0
        with pytest.raises(UserError, match=r"none in .* is sound"):
            newest_meta(tmp_path)
    path.write_text(text)
    assert newest_meta(tmp_path) == (3, read_meta(tmp_path, 3))


def test_every_array_is_read_back(made, monkeypatch):
    read, folder = [], made.workdir / "checkpoints"
    monkeypatch.setattr(grpo_jax.run.checkpoint, "find_damage", lambda item, *pair: read.append((item, *pair)) or "")
    digests = read_meta(made.workdir, 4)["digests"]
    assert digests.keys() == {"policy", "optimizer", "experience", "reference"}
    arrays = [(folder / "4" / item, *pair) for item, names in digests.items() for pair in names.items()]
    assert damage_of(made.workdir, 4) == "" and read == arrays
    read.clear()
    assert initial_reference_damage(made.workdir) == ""
    assert read == [
        (folder / "reference", *pair) for pair in read_meta(made.workdir, 2)["digests"]["reference"].items()
    ]


def test_an_item_must_have_the_arrays_that_were_saved_and_no_others(made):
    item, saved = made.workdir / "checkpoints" / "4" / "policy", read_meta(made.workdir, 4)["digests"]["policy"]
    name = min(saved)
    without = {other: digest for other, digest in saved.items() if other != name}
    assert describe_difference(item, saved, saved) == ""
    for found, expected in ((saved, without), (without, saved)):
        assert describe_difference(item, found, expected) == f"{name} in its policy differs from what was saved"
    with pytest.raises(ValueError, match=r"has the shape .* instead of \(1, 2\)"):
        read_onto_devices(item, name, (1, 2), None)


def test_devices_without_room_for_a_checkpoint_do_not_make_it_unsound(made):
    def read():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")

    with pytest.raises(jax.errors.JaxRuntimeError):
        read_sound(made.workdir / "checkpoints" / "4" / "policy", {}, read)


def test_without_a_sound_checkpoint_nothing_is_restored_or_renamed(saved):
    for step in STEPS:
        flip(saved.workdir / "checkpoints" / str(step) / "meta" / "metadata", 100)
    before = files_in(saved.workdir)
    with pytest.raises(UserError, match=r"none in .* is sound; the newest one \(step 4\) is damaged: its metadata "):
        resume(saved)
    assert files_in(saved.workdir) == before


def test_a_checkpoint_of_another_step_is_passed_over(saved):
    shutil.copytree(saved.workdir / "checkpoints" / "2", saved.workdir / "checkpoints" / "6")
    assert resume(saved) == 4
    assert (saved.workdir / "checkpoints" / "damaged-6").is_dir()


def damage_arrays(folder):
    """Flips a bit in the middle of every array file in a folder. Orbax does not read all of them."""
    for path in folder.rglob("d/*"):
        flip(path, 4 * path.stat().st_size)


def test_a_damaged_initial_reference_is_made_again_from_the_base_model(saved, capsys):
    folder = saved.workdir / "checkpoints"
    shutil.rmtree(folder / "4")
    damage_arrays(folder / "reference")
    assert resume(saved) == 2
    assert "checkpoints/reference is damaged: " in (line := capsys.readouterr().out) and "the base model." in line
    assert saved_steps(saved.workdir) == [2] and (folder / "damaged-reference").is_dir()

    store = make_store(saved, 2)  # the next checkpoint writes the reference again
    run, key = run_at(saved, 3)
    save_run(saved.cfg, store, run._replace(step=1), key, {}, {})
    store.finish()
    store.close()
    assert resume(saved) == 2 and not capsys.readouterr().out


def test_a_checkpoint_without_its_reference_is_not_sound(saved, monkeypatch):
    folder = saved.workdir / "checkpoints"
    damage_arrays(folder / "4" / "reference")
    assert "reference" in damage_of(saved.workdir, 4)
    assert resume(saved) == 2
    shutil.rmtree(folder / "reference")
    other = scaled(tiny.params(), 2)
    monkeypatch.setattr(grpo_jax.run.context, "load", lambda *args, **kwargs: (tiny.CONFIG, other))
    with pytest.raises(UserError, match=r"none in .* no sound copy, and model.path has other weights"):
        resume(saved)


@pytest.mark.parametrize("damage", [damage_arrays, shutil.rmtree])
def test_a_reference_is_taken_from_the_copy_of_another_checkpoint(saved, capsys, damage):
    """The damaged copy belongs to step 4; step 6 has the same reference."""
    store = make_store(saved, 4)
    run, key = run_at(saved, 4)
    run = run._replace(step=6)
    save_run(saved.cfg, store, run, key, {}, {})
    store.close()
    saved.states[6] = contents(run, key)
    damage(saved.workdir / "checkpoints" / "6" / "reference")
    assert resume(saved) == 6
    assert f"continues with a copy in {saved.workdir / 'checkpoints' / '4' / 'reference'}." in capsys.readouterr().out
    assert (saved.workdir / "checkpoints" / "reference").is_dir()  # which is sound, and that of step 2


def test_the_initial_reference_is_read_back_before_it_counts(tmp_path):
    (tmp_path / "checkpoints" / "reference").mkdir(parents=True)  # of a start that was killed
    store = make_store(SimpleNamespace(workdir=tmp_path), 0)
    assert not store.has_reference
    with pytest.raises(
        UserError, match=r"Files must hold what was just written to them, but .* reference differs from what was"
    ):
        store.save_reference({"w": np.ones(3)}, {"w": "0" * 16})
    assert not store.has_reference
    store.close()


def save_steps(saved, store, scores):
    """Saves a checkpoint for each step in `scores`, whose values become the metric eval/accuracy."""
    run, key = run_at(saved, 2)
    for step, score in scores.items():
        save_run(saved.cfg, store, run._replace(step=step), key, {}, {"eval/accuracy": score})
    store.finish()
    store.close()


def test_old_checkpoints_are_deleted_once_enough_newer_ones_have_been_read_back(saved, monkeypatch, capsys):
    """The checkpoints of steps 6 and 7 are damaged after they are committed and before they are read back."""
    read_back, deleted = grpo_jax.run.saving.read_back, []

    def damage_and_read_back(workdir, step, share):
        if step in (6, 7):
            damage_arrays(workdir / "checkpoints" / str(step) / "policy")
        deleted.append((step, saved_steps(workdir)))
        yield from read_back(workdir, step, share)

    monkeypatch.setattr(grpo_jax.run.saving, "read_back", damage_and_read_back)
    save_steps(saved, make_store(saved, 4), dict.fromkeys((5, 6, 7, 8)))
    assert deleted == [(5, [2, 4, 5]), (6, [4, 5, 6]), (7, [4, 5, 7]), (8, [4, 5, 8])]
    assert sorted(path.name for path in (saved.workdir / "checkpoints").iterdir()) == [
        "5",
        "8",
        "damaged-6",
        "damaged-7",
        "reference",
    ]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and "warning: The checkpoint of step 6 differs from what was saved: " in lines[0]


@pytest.mark.parametrize(
    "sound, keep, best, left",
    [
        ({4, 5}, 2, "", [4, 5, 6]),  # nobody knows yet whether that of step 6 is sound
        ({4, 5}, 3, "", [1, 2, 3, 4, 5, 6]),
        ({6}, 1, "", [6]),
        ({5, 6}, 2, "eval/accuracy", [2, 5, 6]),  # the first of two with the best score
        ({2, 6}, 1, "eval/accuracy", [2, 6]),
        ({5, 6}, 2, "eval/none", [5, 6]),
    ],
)
def test_sound_checkpoints_are_kept_and_the_best_one_as_well(tmp_path, monkeypatch, sound, keep, best, left):
    """A checkpoint that is being deleted is renamed before its first file is removed."""
    for step, score in {1: 0.5, 2: 0.75, 3: 0.75, 4: 0.25, 5: None, 6: 0.5}.items():
        tiny.write_meta(tmp_path, step, {}, {"eval/accuracy": score})
    monkeypatch.setattr(grpo_jax.run.saving.shutil, "rmtree", lambda *args, **kwargs: None)
    store = make_store(SimpleNamespace(workdir=tmp_path), 0, keep, best)
    store.sound = sound
    store.delete_old()
    store.close()
    assert saved_steps(tmp_path) == left


def test_commands_that_read_a_policy_refuse_a_damaged_one(saved):
    shapes = jax.eval_shape(lambda: tiny.params())
    shardings = tree_shardings(saved.context.mesh, shapes)
    assert are_equal(jax.device_get(restore_policy(saved.workdir, shapes, shardings)[1]), saved.states[4][0][0])
    damage_arrays(saved.workdir / "checkpoints" / "4" / "policy")
    with pytest.raises(UserError, match=r"of step 4 must be undamaged, but its policy .* grpo_jax\.check"):
        restore_policy(saved.workdir, shapes, shardings)
    half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), shapes)
    step, params = restore_policy(saved.workdir, half, shardings, 2)
    assert step == 2 and {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    assert (saved.workdir / "checkpoints" / "4").is_dir()


def test_check_says_which_checkpoints_are_sound(saved, capsys):
    def run_check(*flags):
        check_command.main([f"--workdir={saved.workdir}", *flags])

    run_check()
    assert capsys.readouterr().out.splitlines() == [
        "The checkpoint of step 2 is sound.",
        "The checkpoint of step 4 is sound.",
        "The initial reference is sound.",
    ]
    damage_arrays(saved.workdir / "checkpoints" / "4" / "experience")
    damage_arrays(saved.workdir / "checkpoints" / "reference")
    (saved.workdir / "checkpoints" / "damaged-1").mkdir()
    with pytest.raises(SystemExit, match="3"):
        run_check("--json")
    found = json.loads(capsys.readouterr().out)
    assert not found["sound"] and found["aside"] == ["damaged-1"]
    assert found["damage"]["2"] == "" and "experience" in found["damage"]["4"] and found["damage"]["reference"]
    with pytest.raises(SystemExit, match="3"):
        run_check()
    with pytest.raises(UserError, match="must be the workdir of a training run"):
        check_command.main([f"--workdir={saved.workdir / 'samples'}"])
