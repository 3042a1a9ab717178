"""Reads the files of a run: metrics, samples, checkpoints and TensorBoard events. Nothing here knows `grpo_jax`."""

import json
import struct

import jax
import numpy as np
import orbax.checkpoint as ocp
from tensorboardX.proto import event_pb2


def read_jsonl(path):
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def read_samples(workdir, kind):
    """Maps the step of each file of a kind, "train" or "eval", to its records."""
    return {int(path.stem.split("-")[1]): read_jsonl(path) for path in sorted((workdir / "samples").glob(f"{kind}-*"))}


def read_checkpoint(path):
    """Reads one item of an Orbax checkpoint as NumPy arrays, whatever devices wrote it."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        tree = checkpointer.metadata(path).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))


def read_events(folder):
    """Maps (tag, step) to the values that TensorBoard shows: a restart hides earlier events from its first step on."""
    shown = {}
    for path in sorted(folder.iterdir()):  # their names begin with the time of creation
        data, start = path.read_bytes(), 0
        while start < len(data):
            (size,) = struct.unpack_from("<Q", data, start)  # a record: size, checksum, event, checksum
            event = event_pb2.Event.FromString(data[start + 12 : start + 12 + size])
            start += 16 + size
            if event.session_log.status == event_pb2.SessionLog.START:
                shown = {key: values for key, values in shown.items() if key[1] < event.step}
            for value in event.summary.value:
                shown.setdefault((value.tag, event.step), []).append(value.simple_value)
    return shown
