"""Checkpoints of the training state, with orbax (extra `train`).

A checkpoint is a folder named after its step. Orbax writes it under another
name and renames it, so a crash leaves a whole checkpoint or none. Beside the
arrays lies a JSON record with a digest of all of them: a checkpoint that cannot
be read, or whose digest is another, is reported and the one before it is used.
"""

import hashlib
import logging
import pathlib
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from structattn_jax import checkpoint

_STATE = 'state'
_RECORD = 'record'
_DIGEST = 'digest'


class Checkpoints:
  """The checkpoints of one run.

  Close it, or use it as a context manager.
  """

  def __init__(self, folder: pathlib.Path, *, keep: int = 3):
    """Opens a folder, which is made if it is not there.

    Args:
      folder: where the checkpoints are.
      keep: number of checkpoints that stay.

    Raises:
      ImportError: if orbax is not installed, naming the extra.
    """
    orbax = _orbax()
    self._orbax = orbax
    self.folder = pathlib.Path(folder).absolute()
    self._manager = orbax.CheckpointManager(
      self.folder,
      options=orbax.CheckpointManagerOptions(
        max_to_keep=keep,
        create=True,
        # What a killed process has left.
        cleanup_tmp_directories=True,
        # A checkpoint is on disk when `save` returns.
        enable_async_checkpointing=False,
      ),
    )

  def __enter__(self) -> 'Checkpoints':
    """Returns itself."""
    return self

  def __exit__(self, *exception: object) -> None:
    """Closes it."""
    self.close()

  def close(self) -> None:
    """Releases orbax's resources."""
    self._manager.close()

  def steps(self) -> list[int]:
    """Steps with a checkpoint, the latest first."""
    return sorted(self._manager.all_steps(), reverse=True)

  def save(self, step: int, state: Any, record: Mapping[str, Any]) -> None:
    """Writes a checkpoint atomically; an older one of the step is replaced.

    Args:
      step: number of optimiser steps made.
      state: pytree of arrays that are the same on every device.
      record: JSON values that say what the state belongs to.
    """
    arrays = _flatten(state)
    content = {**record, _DIGEST: _digest(arrays)}
    if step in self._manager.all_steps():
      self._manager.delete(step)
    self._manager.save(
      step,
      args=self._orbax.args.Composite(
        **{
          _STATE: self._orbax.args.StandardSave(arrays),
          _RECORD: self._orbax.args.JsonSave(content),
        }
      ),
    )
    self._manager.wait_until_finished()

  def record(self, step: int) -> dict[str, Any]:
    """The record of a checkpoint.

    Raises:
      CheckpointError: if it cannot be read.
    """
    return self._read(step, _RECORD, self._orbax.args.JsonRestore())

  def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
    """Reads one checkpoint.

    Args:
      step: one of `steps()`.
      like: pytree of arrays or `jax.ShapeDtypeStruct` with the structure,
        shapes, dtypes and shardings wanted.

    Returns:
      The state and the record.

    Raises:
      CheckpointError: if it is damaged or holds other arrays.
    """
    record = self.record(step)
    wanted = _flatten(like)
    arrays = self._read(
      step,
      _STATE,
      self._orbax.args.StandardRestore(jax.tree.map(_abstract, wanted)),
    )
    if _digest(arrays) != record.pop(_DIGEST, None):
      raise checkpoint.CheckpointError(
        f'{self.folder / str(step)}: damaged: the arrays have another digest'
      )
    leaves = [arrays[name] for name in wanted]
    return jax.tree.unflatten(jax.tree.structure(like), leaves), record

  def restore_latest(
    self,
    like: Any,
    *,
    check: Callable[[Mapping[str, Any]], None] = lambda record: None,
    report: Callable[[str], None] = lambda message: None,
  ) -> tuple[int, Any, dict[str, Any]] | None:
    """Reads the latest checkpoint that is not damaged.

    Damaged ones are reported and removed, so that their steps can be written
    again.

    Args:
      like: see `restore`.
      check: raises if a record belongs to another run; its error is passed on.
      report: gets one sentence per damaged checkpoint.

    Returns:
      Step, state and record; None if there is no checkpoint.

    Raises:
      CheckpointError: if there are checkpoints and all are damaged.
    """
    found = self.steps()
    damaged = []
    for step in found:
      try:
        check(self.record(step))
        state, record = self.restore(step, like)
      except checkpoint.CheckpointError as error:
        damaged.append(step)
        report(f'{error}; trying the checkpoint before it')
        continue
      for bad in damaged:
        self._manager.delete(bad)
      return step, state, record
    if found:
      raise checkpoint.CheckpointError(
        f'{self.folder}: all checkpoints are damaged '
        f'({", ".join(map(str, found))}); remove the folder to start anew'
      )
    return None

  def _read(self, step: int, item: str, arguments: Any) -> Any:
    try:
      composite = self._orbax.args.Composite(**{item: arguments})
      return self._manager.restore(step, args=composite)[item]
    except Exception as error:  # Whatever orbax and tensorstore come up with.
      message = ' '.join(str(error).split()) or type(error).__name__
      raise checkpoint.CheckpointError(
        f'{self.folder / str(step)}: damaged: {message[:200]}'
      ) from error


def _orbax() -> types.ModuleType:
  try:
    import orbax.checkpoint as orbax
  except ImportError:
    raise ImportError(
      'training needs the package orbax-checkpoint: pip install '
      "'structattn-jax[train]'"
    ) from None
  # It announces every step of every save.
  logging.getLogger('absl').setLevel(logging.ERROR)
  return orbax


def _flatten(tree: Any) -> dict[str, Any]:
  """{readable name: leaf}; orbax takes '/' in a name for a folder."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  named = {
    jax.tree_util.keystr(path, simple=True, separator='.').replace(
      '/', '|'
    ): leaf
    for path, leaf in leaves
  }
  if len(named) != len(leaves):
    raise ValueError('state: two arrays have the same name')
  return named


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(
    leaf.shape, leaf.dtype, sharding=getattr(leaf, 'sharding', None)
  )


def _digest(arrays: Mapping[str, Any]) -> str:
  digest = hashlib.sha256()
  for name in sorted(arrays):
    # Replicated arrays: this process has all of each.
    array = arrays[name]
    if isinstance(array, jax.Array):
      array = array.addressable_data(0)
    array = np.asarray(array)
    digest.update(f'{name} {array.dtype} {array.shape}'.encode())
    digest.update(array.tobytes())
  return digest.hexdigest()
