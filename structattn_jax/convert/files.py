"""Recognises a checkpoint by its content and converts a part of it."""

import dataclasses
import hashlib
import os
import pathlib
import re
from collections.abc import Callable, Iterable
from typing import Any

from structattn_jax import checkpoint
from structattn_jax.checkpoint import CheckpointError
from structattn_jax.common import base_config
from structattn_jax.convert import (
  alphafold2,
  alphafold3,
  boltz,
  pallatom,
  record_file,
  sedd,
  state_dicts,
  torch_file,
)
from structattn_jax.convert.state_dicts import Loaded, Weights


@dataclasses.dataclass(frozen=True)
class Format:
  """A kind of published checkpoint.

  Attributes:
    title: what it is, for people.
    parts: what can be taken from it; the first one is the default. N stands
      for a number.
    name: how names of its parameters begin, by which it is recognised.
    read: takes a file, one of the parts, which weights, and perhaps
      `allow_nan`.
  """

  title: str
  parts: tuple[str, ...]
  name: str
  read: Callable[..., Loaded]

  def has(self, part: str) -> bool:
    """Whether it has such a part."""
    known = [re.escape(known).replace('N', r'\d{1,3}') for known in self.parts]
    return any(re.fullmatch(pattern, part) for pattern in known)


def _read_alphafold2(
  path: checkpoint.Path,
  part: str,
  weights: Weights | None,
  allow_nan: bool = False,
) -> Loaded:
  if weights == 'ema':
    raise CheckpointError(f'{path}: has no moving averages')
  load = {
    'structure_module': alphafold2.load_structure_module,
    'ipa': alphafold2.load_ipa,
  }[part]
  return Loaded(*load(path, allow_nan=allow_nan))


def _read_alphafold3(
  path: checkpoint.Path,
  part: str,
  weights: Weights | None,
  allow_nan: bool = False,
) -> Loaded:
  if weights == 'ema':
    raise CheckpointError(f'{path}: has no moving averages of its own')
  if part == 'diffusion_head':
    return Loaded(*alphafold3.load_diffusion_head(path, allow_nan=allow_nan))
  if part == 'diffusion_transformer':
    return Loaded(*alphafold3.load_transformer(path, allow_nan=allow_nan))
  copy: alphafold3.Copy = (
    'diffusion' if part == 'atom_diffusion' else 'evoformer_conditioning'
  )
  loaded = alphafold3.load_atom_cross_att(path, copy, allow_nan=allow_nan)
  return Loaded(*loaded, {'parameter_prefix': copy})


FORMATS: dict[str, Format] = {
  'alphafold2': Format(
    'AlphaFold 2 params_model_*.npz',
    ('structure_module', 'ipa'),
    r'alphafold/',
    _read_alphafold2,
  ),
  'alphafold3': Format(
    'AlphaFold 3 *.bin.zst, its shards or folder',
    (
      'atom_diffusion',
      'atom_conditioning',
      'diffusion_transformer',
      'diffusion_head',
    ),
    r'diffuser/',
    _read_alphafold3,
  ),
  # Before Boltz-1, whose names it has too.
  'boltz2': Format(
    'Boltz-2 .ckpt',
    tuple(boltz.BOLTZ2_PARTS),
    r'(diffusion_conditioning|input_embedder\.atom_enc(oder|_proj_z))\.',
    boltz.read,
  ),
  'boltz1': Format(
    'Boltz-1 .ckpt',
    tuple(boltz.BOLTZ1_PARTS),
    r'(structure_module\.score_model|input_embedder)\.',
    boltz.read,
  ),
  'pallatom': Format(
    'Pallatom .pt',
    ('atom_encoder', 'atom_decoders.N'),
    r'atom_(encoder|decoders)\.',
    pallatom.read,
  ),
  'sedd': Format(
    'SEDD .pth or .safetensors',
    ('sedd',),
    r'vocab_embed\.',
    lambda path, part, weights, allow_nan=False: sedd.read_sedd(
      path, weights=weights, allow_nan=allow_nan
    ),
  ),
  'sedd_protein_ligand': Format(
    'protein_lig_sedd .pth',
    ('dual_track',),
    r'(transformer\.)?protein_embed\.',
    lambda path, part, weights, allow_nan=False: sedd.read_dual_track(
      path, weights=weights, allow_nan=allow_nan
    ),
  ),
}


def detect_format(path: checkpoint.Path) -> str:
  """Names the format of a checkpoint that can be converted.

  Returns:
    A key of `FORMATS`.

  Raises:
    CheckpointError: if the file cannot be read, or is of another format; the
      message says which if it is known.
    ImportError: if it is a safetensors file and the package is not installed.
  """
  if record_file.is_model(path):
    return 'alphafold3'
  start = checkpoint.first_bytes(path, 16)
  found = 'of an unknown format'
  if not start:
    found = 'empty'
  elif checkpoint.is_zip(path) and not torch_file.is_torch_file(path):
    names = checkpoint.npz_names(path)
    if checkpoint.METADATA in names:
      found = 'converted already'
    elif kind := _kind_of(names):
      return kind
    else:
      found = 'an npz file without parameters of a known model'
  elif torch_file.is_legacy(start):
    found = 'a file of PyTorch before 1.6; save it again with a later PyTorch'
  elif start.startswith(b'\x80'):
    found = 'a pickle, which is never read'
  elif start[8:9] == b'{' and checkpoint.read_safetensors(path)[1] is not None:
    found = 'converted already'
  elif checkpoint.is_zip(path) or start[8:9] == b'{':
    if kind := _kind_of(state_dicts.model_of(state_dicts.read(path))):
      return kind
    found = 'without parameters of a known model'
  known = ', '.join(kind.title for kind in FORMATS.values())
  raise CheckpointError(f'{path}: {found}; `convert` reads {known}')


def _kind_of(names: Any) -> str | None:
  """The format that has such names."""
  if not isinstance(names, list | dict):
    return None
  for kind, known in FORMATS.items():
    # What training wraps around modules.
    pattern = re.compile(rf'((module|_orig_mod)\.)*{known.name}')
    if any(isinstance(name, str) and pattern.match(name) for name in names):
      return kind
  return None


def convert_file(
  source: checkpoint.Path,
  target: checkpoint.Path,
  part: str | None = None,
  *,
  weights: Weights | None = None,
  allow_nan: bool = False,
) -> checkpoint.Checkpoint:
  """Converts a published checkpoint into one file of ours.

  The target is written at once, after everything has been checked.

  Args:
    source: published checkpoint.
    target: `.safetensors` or `.npz` file to write.
    part: what to take; None takes the first part of the format, see `FORMATS`.
    weights: 'model' or 'ema', for formats with moving averages; None takes what
      upstream itself runs with.
    allow_nan: whether values may be infinite or no numbers.

  Returns:
    What was written.

  Raises:
    CheckpointError: if the source cannot be used, or has no such part.
    ValueError: if the target's suffix is neither of the two.
    OSError: if the target cannot be written.
    ImportError: if safetensors is asked for and not installed.
  """
  checkpoint.check_suffix(target)
  name = detect_format(source)
  kind = FORMATS[name]
  part = kind.parts[0] if part is None else part
  if not kind.has(part):
    raise CheckpointError(
      f'{source}: {kind.title}: there is no part {part!r}, only '
      f'{", ".join(kind.parts)}'
    )
  if pathlib.Path(target).exists() and os.path.samefile(source, target):
    raise CheckpointError(f'{target}: would replace the source')
  loaded = kind.read(source, part, weights, allow_nan=allow_nan)
  files = [pathlib.Path(source)]
  if name == 'alphafold3':
    files = record_file.find_model_files(source).files
  provenance = {
    'converter': f'structattn_jax {_version()}',
    'part': part,
    'source_file': ', '.join(file.name for file in files),
    'source_format': name,
    'source_sha256': _sha256(files),
    **loaded.notes,
  }
  provenance = dict(sorted(provenance.items()))  # As in the file.
  checkpoint.save(target, loaded.params, loaded.config, provenance=provenance)
  return checkpoint.Checkpoint(loaded.params, loaded.config, provenance)


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


def _sha256(paths: Iterable[pathlib.Path]) -> str:
  """Of several files as if they were one."""
  digest = hashlib.sha256()
  for path in paths:
    with open(path, 'rb') as file:
      hashlib.file_digest(file, lambda: digest)
  return digest.hexdigest()


def _version() -> str:
  import structattn_jax  # Imports this package, directly or not.

  return structattn_jax.__version__
