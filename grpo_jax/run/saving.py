"""Saves checkpoints in the background with Orbax, reads each back once it is complete, and deletes old ones."""

import contextlib
import logging
import shutil
import threading
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from grpo_jax.errors import UserError
from grpo_jax.run.arrays import Damaged, find_damage, raise_if_damaged
from grpo_jax.run.checkpoint import checkpoints_folder, hash_meta, read_back, read_meta, saved_steps, set_aside
from grpo_jax.run.digests import digest_arrays
from grpo_jax.run.progress import announce
from grpo_jax.types import Experience, TrainState

ITEMS = ("policy", "optimizer", "meta", "experience", "reference")


class CheckpointStore:
    """The checkpoints of a run in training. None is deleted before enough newer ones have been verified.

    Every process must call `save` and `finish`.
    """

    def __init__(self, workdir: Path, keep: int, best: str, step: int):
        """Opens the checkpoints of a run.

        Args:
            workdir: The run.
            keep: How many sound checkpoints to keep, the newest ones.
            best: The metric whose best checkpoint is kept as well; "" for none.
            step: The step of the sound checkpoint from which the run continues; 0 for a new run.
        """
        self.workdir, self.folder, self.keep, self.best = workdir, checkpoints_folder(workdir), keep, best
        self.sound = {step} - {0}  # steps of checkpoints that this process has restored, or saved and read back
        self.has_reference = step > 0 and (self.folder / "reference").is_dir()
        # Orbax logs every save at INFO, and logs several tracebacks when a save fails, in addition to the exception.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        # If folders were created in the background, Orbax's other threads would wait for minutes when a disk fails.
        no_waiting = ocp.AsyncOptions(create_directories_asynchronously=False)
        options = ocp.CheckpointManagerOptions(enable_async_checkpointing=True, async_options=no_waiting)
        self.manager = ocp.CheckpointManager(self.folder, options=options, item_names=ITEMS)
        self.damaged = 0  # step of the last checkpoint that differed from what had been saved
        # The step of the last checkpoint that was saved, 0 if it was set aside, and what is wrong with its share here.
        self.step, self.damage = 0, ""
        self.is_read = False  # whether it has been read back, at least up to the first damage
        self.reader: threading.Thread | None = None  # the thread that reads it back
        self.is_closing = threading.Event()

    def save(
        self, state: TrainState, meta: dict[str, Any], experience: Experience | None, reference: Any, is_replaced: bool
    ) -> None:
        """Starts saving a checkpoint as step `meta["step"]`. The arrays may be donated right after the call.

        Args:
            state: The train state.
            meta: The metadata, which JSON must be able to represent.
            experience: The current rollout, if some of its updates are still to come.
            reference: The parameters of the reference; None if there is none.
            is_replaced: Whether the policy has replaced the initial reference.
        """
        self.finish()
        trees = {"policy": state.params, "optimizer": state.opt_state}
        trees |= {"experience": vars(experience)} if experience is not None else {}
        trees |= {"reference": reference} if reference is not None else {}
        digests = {item: digest_arrays(tree) for item, tree in trees.items()}
        if reference is not None and not is_replaced:
            if not self.has_reference:
                self.save_reference(reference, digests["reference"])
            del trees["reference"]
        meta = meta | {"skipped": int(state.skipped), "is_reference": bool(state.is_reference), "digests": digests}
        items = {item: ocp.args.StandardSave(tree) for item, tree in trees.items()}
        items["meta"] = ocp.args.JsonSave(meta | {"sha256": hash_meta(meta)})
        self.manager.save(meta["step"], args=ocp.args.Composite(**items), force=True)
        self.step, self.damage, self.is_read = meta["step"], "", False
        self.reader = threading.Thread(target=self.read_saved, daemon=True)
        self.reader.start()

    def save_reference(self, reference: Any, digests: dict[str, str]) -> None:
        """Saves the initial reference and reads it back.

        Raises:
            UserError: It differs from what was saved.
        """
        item = self.folder / "reference"
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(item, reference, force=True)
        share = list(digests)[jax.process_index() :: jax.process_count()]
        try:
            raise_if_damaged(next(filter(None, (find_damage(item, name, digests[name]) for name in share)), ""))
        except Damaged as error:
            raise UserError(
                f"Files must hold what was just written to them, but those in {item} do not: {error}. The disk may be "
                "failing; choose a --workdir on another one."
            ) from None
        self.has_reference = True

    def read_saved(self) -> None:
        """Waits until the last checkpoint is complete, and reads back the share of this process."""
        with contextlib.suppress(Exception):  # the save has failed, which the main thread notices as well
            self.manager.wait_until_finished()
            for damage in read_back(self.workdir, self.step, slice(jax.process_index(), None, jax.process_count())):
                self.damage = damage
                if damage or self.is_closing.is_set():
                    break
            self.is_read = True

    def finish(self) -> None:
        """Waits until the last checkpoint is complete and has been read back, and deletes those no longer needed."""
        self.manager.wait_until_finished()
        if self.reader is None:
            return
        self.reader.join()
        self.reader = None
        if not self.is_read:  # it could not be saved
            return
        try:
            raise_if_damaged(self.damage)
        except Damaged as error:
            step, self.step = self.step, 0
            aside = f"It is kept as {self.folder / set_aside(self.workdir, str(step))}"
            self.manager.reload()  # so that the step can be saved again
            if self.damaged == step:
                raise UserError(
                    f"Files must hold what was just written to them, but the checkpoint of step {step} was damaged "
                    f"twice: {error}. {aside}. Replace the disk, and start the run again."
                ) from None
            announce(
                f"warning: The checkpoint of step {step} differs from what was saved: {error}. {aside}, and the run "
                "continues. Check the disk."
            )
            self.damaged = step
            return
        self.sound.add(self.step)
        if jax.process_index() == 0:
            self.delete_old()

    def delete_old(self) -> None:
        """Deletes checkpoints older than the newest `keep` sound ones, if there are that many, except the best one."""
        newest, best = sorted(self.sound)[-self.keep :], self.best_step()
        for step in saved_steps(self.workdir):
            if len(newest) == self.keep and step < newest[0] and step != best:
                # Deleting is not atomic. With this name, what is left of it cannot be mistaken for a checkpoint.
                deleted = (self.folder / str(step)).rename(self.folder / f"{step}.orbax-checkpoint-tmp")
                shutil.rmtree(deleted, ignore_errors=True)

    def best_step(self) -> int | None:
        """Returns the step of the checkpoint with the highest value of the metric `best`, the first of several."""
        scores = {}
        for step in saved_steps(self.workdir) if self.best else ():
            with contextlib.suppress(Damaged):
                score = read_meta(self.workdir, step)["line"].get(self.best)
                scores |= {step: score} if score is not None else {}
        return max(scores, key=lambda step: (scores[step], -step), default=None)

    def close(self) -> None:
        """Waits until the last checkpoint is complete, and closes the checkpoints."""
        self.is_closing.set()
        if self.reader is not None:
            self.reader.join()
        self.manager.close()
