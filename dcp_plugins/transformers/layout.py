"""The contents of a Trainer's checkpoint directory, the search for the newest one, and the deletion of old ones.

A directory that `DCPCallback` writes, ``checkpoint-<step>`` as the Trainer calls it::

    .metadata            DCP's index; the checkpoint exists from the instant this file does
    *.distcp             "model", "optimizer", "trainer" (scheduler, scaler, the Trainer's state), "random"
    trainer_state.json   the Trainer's state, where the Trainer looks for it
    model.safetensors, config.json, ...    with hf_weights: what ``save_pretrained`` writes

``trainer_state.json`` is published after the commit and deleted before anything else, so a directory that lacks it is
either no checkpoint or has the same text in its DCP data, from which it is written anew.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from accelerate.utils.constants import FSDP_MODEL_NAME
from accelerate.utils.constants import OPTIMIZER_NAME as ACCELERATE_OPTIMIZER_NAME
from transformers.trainer import OPTIMIZER_NAME, OPTIMIZER_NAME_BIN, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

import dcp_plugins as dcp
from dcp_plugins.errors import CheckpointError, CheckpointNotFoundError, CorruptCheckpointError
from dcp_plugins.format.names import METADATA_NAME
from dcp_plugins.manager import (
    StepNames,
    delete_checkpoint,
    is_committed,
    remove_if_uncommitted,
    verify_checkpoint,
)
from dcp_plugins.storage.local import publish
from dcp_plugins.storage.regular import read_regular
from dcp_plugins.user_warnings import warn_user

__all__ = [
    "MODEL",
    "NAMES",
    "OPTIMIZER",
    "RANDOM",
    "STATE",
    "TRAINER",
    "find_checkpoint",
    "forget_state",
    "forget_states_but",
    "has_stock_files",
    "has_weights",
    "is_stock",
    "last_checkpoint",
    "later_checkpoints",
    "publish_state",
    "restore_state",
    "rotate",
]

MODEL = "model"
OPTIMIZER = "optimizer"
RANDOM = "random"
TRAINER = "trainer"
STATE = "state"

NAMES = StepNames(f"{PREFIX_CHECKPOINT_DIR}-")

# The files, beside weights, that resuming a stock checkpoint needs; no save of ours writes such names.
_STOCK_FILES = (
    OPTIMIZER_NAME,
    OPTIMIZER_NAME_BIN,
    f"{ACCELERATE_OPTIMIZER_NAME}_*",
    f"{FSDP_MODEL_NAME}*",
    SCHEDULER_NAME,
    "rng_state*.pth",
)
# The stock Trainer writes these files last, under every kind of distribution.
_LAST_STOCK_FILES = ("rng_state*.pth",)
_WEIGHTS = ("*.safetensors*", "pytorch_model*.bin*", "adapter_model.bin", "*/adapter_model.*")

# A file that a save at SIGTERM (enable_jit_checkpoint) puts beside the checkpoint until it has returned.
_MARK_OF_JIT_SAVE = "checkpoint-is-incomplete.txt"

log = logging.getLogger(__name__)

_PathLike = str | os.PathLike[str]


def last_checkpoint(output_dir: _PathLike) -> Path | None:
    """Find the checkpoint of the highest step that is committed and whole, or None; warn of newer ones skipped.

    Checkpoints of the stock Trainer count, too: those that have come as far as their ``trainer_state.json``.
    """
    root = Path(output_dir)
    steps = ((NAMES.step_of(path.name), path) for path in (root.iterdir() if root.is_dir() else ()))
    found = sorted(((step, path) for step, path in steps if step is not None and path.is_dir()), reverse=True)
    for _, path in found:
        try:
            _verify(path)
        except (CheckpointError, OSError) as exc:
            warn_user(f"Skipped {path}, which is no good checkpoint: {exc}")
            continue
        return path
    return None


def find_checkpoint(requested: str | bool | None, output_dir: _PathLike) -> Path | None:
    """Return the checkpoint that ``train(resume_from_checkpoint=requested)`` means; None to start anew.

    True means the newest good one. A path means itself, unless nothing good is there and it is the newest in
    ``output_dir``: it then comes from ``get_last_checkpoint``, which takes whatever has the name.

    Raises:
        ValueError: There is no good checkpoint to take, or the path cannot be one; names the newest one near it.
        CheckpointNotFoundError: The save into the path did not finish.
        CorruptCheckpointError: The path is one, with damaged files.
    """
    if requested is None or requested is False:
        return None
    if requested is True:
        newest = last_checkpoint(output_dir)
        if newest is None:
            raise ValueError(
                f"No valid checkpoint found in output directory ({output_dir}): expected a committed"
                f" {NAMES.name(0)[:-1]}<step>. Train without resume_from_checkpoint to begin."
            )
        return newest
    path = Path(requested)
    problem = _why_no_checkpoint(requested, path)
    if problem is not None:
        raise ValueError(
            f"Can't find a valid checkpoint at {requested!r}: {problem}. {_advice(path, Path(output_dir))}"
        )
    try:
        _verify(path)
    except (CheckpointNotFoundError, CorruptCheckpointError) as exc:
        newest = last_checkpoint(output_dir) if _is_newest_name(path, Path(output_dir)) else path
        # Damage is not a reason to throw away a run without being asked.
        if newest == path or (newest is None and isinstance(exc, CorruptCheckpointError)):
            raise
        instead = "Starting anew." if newest is None else f"Going on from {newest}, the newest good one beside it."
        warn_user(f"{exc}. {instead}")
        return newest
    return path


def _why_no_checkpoint(requested: str, path: Path) -> str | None:
    """Say why a path cannot be that of a checkpoint, finished or not; None if it can."""
    if not requested:
        return "it is empty"
    if path.is_dir():
        if _is_checkpoint(path) or NAMES.step_of(path.name) is not None or _holds(path, ("*.distcp",)):
            return None
        inside = any(_is_checkpoint(other) for other in path.iterdir() if NAMES.step_of(other.name) is not None)
        return (
            "it is a directory of checkpoints" if inside else f"it has neither {METADATA_NAME} nor {TRAINER_STATE_NAME}"
        )
    if requested.lower() in ("true", "false"):
        return "it is a text, not the boolean"
    return "it is a file, not a directory" if path.exists() else "it does not exist"


def _advice(path: Path, output_dir: Path) -> str:
    """Name the newest good checkpoint inside of a path, beside it, or in ``output_dir``."""
    for folder, where in ((path, "in it"), (path.parent, "beside it"), (output_dir, f"in {output_dir}")):
        newest = last_checkpoint(folder) if folder != Path() or folder == output_dir else None
        if newest is not None:
            return f"The newest checkpoint {where} is {newest}. Pass that path, or True for the newest in {output_dir}."
    return f"There is no checkpoint in {output_dir} either. Pass None to begin."


def is_stock(path: Path) -> bool:
    """Tell whether the stock Trainer wrote the checkpoint at ``path``, to the end as far as one can see."""
    if is_committed(path) or not (path / TRAINER_STATE_NAME).is_file():
        return False
    # With save_only_model it writes weights alone; beside data files of ours these are a killed save's.
    return has_stock_files(path) or (has_weights(path) and not _holds(path, ("*.distcp",)))


def has_stock_files(path: Path) -> bool:
    """Tell whether the stock Trainer has written files at ``path``.

    Beside a commit of ours, only the files that it writes last count: the ``_save_optimizer_and_scheduler`` of a
    subclass of `Trainer` may have written the others.
    """
    return _holds(path, _LAST_STOCK_FILES if is_committed(path) else _STOCK_FILES)


def has_weights(path: Path) -> bool:
    """Tell whether there are files of weights at ``path``, as ``from_pretrained`` loads them."""
    return _holds(path, _WEIGHTS)


def later_checkpoints(path: Path) -> list[Path]:
    """Return the checkpoints beside ``path`` with a later step, which a resumed run would prefer."""
    step = NAMES.step_of(path.name)
    assert step is not None
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    found = [(other, NAMES.step_of(other.name)) for other in beside]
    return [other for other, number in found if number is not None and number > step and _is_checkpoint(other)]


def publish_state(path: Path, text: str, *, sync: bool) -> None:
    """Write the Trainer's state beside a committed checkpoint, in one step."""
    fresh = path / f"{TRAINER_STATE_NAME}.new"
    publish(path / TRAINER_STATE_NAME, text.encode(), fresh, sync=sync)


def restore_state(path: Path) -> None:
    """Write ``trainer_state.json`` from the DCP data, if it is damaged, or a kill came before its publication.

    Raises:
        UnsafeCheckpointError: A link to a file outside the checkpoint is in its place.
    """
    file = path / TRAINER_STATE_NAME
    if not is_committed(path):
        return
    if file.is_file():
        read_regular(path, TRAINER_STATE_NAME)
        try:
            TrainerState.load_from_json(str(file))
            return
        # Damaged text can make it raise any error.
        except Exception as exc:
            warn_user(f"{file} is damaged ({type(exc).__name__}: {exc}): wrote it anew from the checkpoint's data")
    item = dcp.load_from_keys(f"{TRAINER}.{STATE}", storage_reader=dcp.FileSystemReader(path))
    publish_state(path, item[TRAINER][STATE], sync=False)


def forget_state(path: Path) -> None:
    """Delete the Trainer's state before the checkpoint it belongs to is replaced or deleted."""
    (path / TRAINER_STATE_NAME).unlink(missing_ok=True)


def forget_states_but(run_dir: Path, best: Path) -> None:
    """Let the Trainer delete all checkpoints but the best, in any order of their files.

    It removes whole trees. Of one of ours that is interrupted, a ``trainer_state.json`` without the commit would be
    left, which is what a checkpoint of the stock Trainer looks like.
    """
    for path in run_dir.iterdir():
        if NAMES.step_of(path.name) is not None and is_committed(path) and path.resolve() != best.resolve():
            forget_state(path)


def rotate(run_dir: Path, limit: int, keep: Collection[Path], *, own: Sequence[Path] = ()) -> None:
    """Delete the oldest checkpoints until ``limit`` are left, and what killed saves have left among them.

    Args:
        run_dir: Where the checkpoints are.
        limit: How many may stay; more do if more are to be kept.
        keep: Never deleted: the newest, the best, one that is being read.
        own: The checkpoints that this run has saved, the oldest first. Those of earlier runs are older, whatever their
            steps.
    """
    kept = {path.resolve() for path in keep}
    saved_at = {path.resolve(): place for place, path in enumerate(own)}
    newest = max(NAMES.step_of(path.name) or 0 for path in keep)
    complete = []
    for path in run_dir.iterdir():
        step = NAMES.step_of(path.name)
        if step is None or not path.is_dir():
            continue
        if _is_checkpoint(path):
            complete.append((saved_at.get(path.resolve(), -1), step, path))
        elif step < newest and path.resolve() not in kept:
            remove_if_uncommitted(path, also=(TRAINER_STATE_NAME, f"{TRAINER_STATE_NAME}.new", _MARK_OF_JIT_SAVE))
    surplus = len(complete) - max(limit, len(kept))
    for *_, path in sorted(complete):
        if surplus <= 0:
            break
        if path.resolve() not in kept:
            log.info("Deleting the older checkpoint %s because of save_total_limit", path)
            forget_state(path)
            delete_checkpoint(path)
            surplus -= 1


def _is_checkpoint(path: Path) -> bool:
    return is_committed(path) or is_stock(path)


def _verify(path: Path) -> None:
    """Raise unless there is a whole checkpoint at ``path``, ours or the stock Trainer's."""
    if not is_stock(path):
        verify_checkpoint(path)
        if has_stock_files(path):
            raise CorruptCheckpointError(
                f"{path} was saved with DCPCallback, and then the stock Trainer saved another checkpoint into it:"
                f" expected files of one of them. Delete .metadata and *.distcp to take the stock Trainer's"
            )
        return
    state = path / TRAINER_STATE_NAME
    try:
        json.loads(read_regular(path, TRAINER_STATE_NAME))
    except ValueError as exc:
        raise CorruptCheckpointError(f"{state} is damaged: {exc}") from exc


def _holds(path: Path, patterns: Iterable[str]) -> bool:
    return any(True for pattern in patterns for _ in path.glob(pattern))


def _is_newest_name(path: Path, output_dir: Path) -> bool:
    if not path.is_dir() or not output_dir.is_dir() or path.parent.resolve() != output_dir.resolve():
        return False
    steps = [NAMES.step_of(other.name) or 0 for other in output_dir.iterdir() if other.is_dir()]
    return NAMES.step_of(path.name) == max(steps)
