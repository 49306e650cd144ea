"""Recognises a checkpoint by its content and converts a part of it."""

import hashlib
import os
import pathlib
from collections.abc import Callable
from typing import Any, Literal, get_args

import haiku as hk

from structattn_jax import checkpoint
from structattn_jax.checkpoint import CheckpointError
from structattn_jax.common import base_config
from structattn_jax.convert import alphafold2

Part = Literal['ipa', 'structure_module']
PARTS: tuple[Part, ...] = get_args(Part)

_ZSTANDARD = b'\x28\xb5\x2f\xfd'
_LOADERS: dict[Part, Callable[[checkpoint.Path], tuple[Any, hk.Params]]] = {
  'ipa': alphafold2.load_ipa,
  'structure_module': alphafold2.load_structure_module,
}


def detect_format(path: checkpoint.Path) -> str:
  """Names the format of a checkpoint that can be converted.

  Returns:
    'alphafold2', the only one so far.

  Raises:
    CheckpointError: if the file cannot be read, or is of another format; the
      message says which if it is known.
  """
  start = checkpoint.first_bytes(path, 9)
  found = 'of an unknown format'
  if not start:
    found = 'empty'
  elif checkpoint.is_zip(path):
    names = checkpoint.npz_names(path)
    if any(name.startswith('alphafold/') for name in names):
      return 'alphafold2'
    if checkpoint.METADATA in names:
      found = 'converted already'
    else:
      found = 'an npz file without AlphaFold 2 parameters (alphafold/...)'
  elif start.startswith(_ZSTANDARD):
    found = 'compressed with zstandard, as AlphaFold 3 parameters are'
  elif start[8:] == b'{':
    found = 'a safetensors file'
  elif start.startswith(b'\x80'):
    found = 'a pickle, which is never read'
  raise CheckpointError(
    f'{path}: {found}; `convert` reads AlphaFold 2 params_model_*.npz'
  )


def convert_file(
  source: checkpoint.Path,
  target: checkpoint.Path,
  part: Part = 'structure_module',
) -> checkpoint.Checkpoint:
  """Converts a published checkpoint into one file of ours.

  The target is written at once, after everything has been checked.

  Args:
    source: published checkpoint.
    target: `.safetensors` or `.npz` file to write.
    part: what to take.

  Returns:
    What was written.

  Raises:
    CheckpointError: if the source cannot be used.
    ValueError: if the target's suffix is neither of the two.
    OSError: if the target cannot be written.
    ImportError: if safetensors is asked for and not installed.
  """
  checkpoint.check_suffix(target)
  name = detect_format(source)
  if pathlib.Path(target).exists() and os.path.samefile(source, target):
    raise CheckpointError(f'{target}: would replace the source')
  config, params = _LOADERS[part](source)
  provenance = {
    'converter': f'structattn_jax {_version()}',
    'part': part,
    'source_file': pathlib.Path(source).name,
    'source_format': name,
    'source_sha256': _sha256(source),
  }
  checkpoint.save(target, params, config, provenance=provenance)
  return checkpoint.Checkpoint(params, config, provenance)


def describe(content: checkpoint.Checkpoint) -> str:
  """One paragraph about parameters, their configuration and their origin."""
  arrays = [
    array for values in content.params.values() for array in values.values()
  ]
  values = sum(array.size for array in arrays)
  return (
    f'{len(arrays)} arrays with {values:,} parameters '
    f'({", ".join(sorted({array.dtype.name for array in arrays}))}).\n'
    f'{type(content.config).__name__}: {_settings(content.config)}.\n'
    + ', '.join(f'{key}: {text}' for key, text in content.provenance.items())
  )


def _settings(config: base_config.BaseConfig) -> str:
  return ', '.join(f'{key}={value}' for key, value in config.to_dict().items())


def _sha256(path: checkpoint.Path) -> str:
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def _version() -> str:
  import structattn_jax  # Imports this package, directly or not.

  return structattn_jax.__version__
