"""Padding to a few fixed sizes, so that few shapes are compiled.

Shapes: n_token tokens; n_atom atoms, both including padding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from structattn_jax.data.feature_types import ComplexFeatures

# AF3's command line uses these token buckets, preceded by 128.
DEFAULT_TOKEN_BUCKETS: tuple[int, ...] = (
  *(128, 256, 384, 512, 768, 1024, 1280, 1536, 2048, 2560),
  *(3072, 3584, 4096, 4608, 5120),
)
# Multiples of 32, the number of query atoms in a window.
DEFAULT_ATOM_BUCKETS: tuple[int, ...] = (
  *(512, 1024, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 24576),
  *(32768, 49152, 65536),
)


def choose_bucket(size: int, buckets: Sequence[int]) -> int:
  """The smallest bucket that holds `size`.

  Args:
    size: number of real rows.
    buckets: sizes in any order.

  Returns:
    One of `buckets`.

  Raises:
    ValueError: if no bucket is large enough, saying which number to give.
  """
  sufficient = [bucket for bucket in buckets if bucket >= size]
  if not sufficient:
    largest = max(buckets, default=0)
    raise ValueError(
      f'buckets: the largest is {largest}, but {size} rows need room; give a '
      f'bucket >= {size}'
    )
  return min(sufficient)


def pad_features(
  features: ComplexFeatures,
  *,
  n_token: int | None = None,
  n_atom: int | None = None,
  token_buckets: Sequence[int] = DEFAULT_TOKEN_BUCKETS,
  atom_buckets: Sequence[int] = DEFAULT_ATOM_BUCKETS,
) -> ComplexFeatures:
  """Pads tokens and atoms at the end.

  Padded rows are zero and their masks False, with two exceptions: rotations
  are the identity, and `atoms.token_index` is n_token - 1, the last token, so
  that the ids stay sorted and in range.

  Args:
    features: features of a complex, also padded ones.
    n_token: exact number of tokens; None takes the smallest bucket.
    n_atom: exact number of atoms; None takes the smallest bucket.
    token_buckets: sizes to choose `n_token` from.
    atom_buckets: sizes to choose `n_atom` from.

  Returns:
    NumPy features of the new sizes, `metadata` unchanged.

  Raises:
    ValueError: if a size or every bucket is too small, with the size needed.
  """
  n_token = _target(
    'n_token', n_token, features.n_token, 'tokens', token_buckets
  )
  n_atom = _target('n_atom', n_atom, features.n_atom, 'atoms', atom_buckets)
  real_tokens, real_atoms = features.n_token, features.n_atom
  tokens = _pad_rows(features.tokens, n_token)
  tokens.rotation[real_tokens:] = np.eye(3, dtype=np.float32)
  atoms = _pad_rows(features.atoms, n_atom)
  # Atoms padded earlier move on to the new last token.
  padded = ~atoms.mask
  padded[:real_atoms] &= atoms.token_index[:real_atoms] == real_tokens - 1
  atoms.token_index[padded] = n_token - 1
  return dataclasses.replace(features, tokens=tokens, atoms=atoms)


def _target(
  argument: str,
  given: int | None,
  needed: int,
  what: str,
  buckets: Sequence[int],
) -> int:
  if given is None:
    try:
      return choose_bucket(needed, buckets)
    except ValueError as error:
      raise ValueError(
        f'{argument}: no bucket holds {needed} {what}; give {argument} >= '
        f'{needed} or a larger bucket'
      ) from error
  if given < needed:
    raise ValueError(
      f'{argument}={given}: the complex has {needed} {what}; give {argument} '
      f'>= {needed}'
    )
  return given


def _pad_rows(rows, size: int):
  """Copies a dataclass of arrays, each with `size` rows, zeros at the end."""
  padded = {}
  for field in dataclasses.fields(rows):
    values = np.asarray(getattr(rows, field.name))
    result = np.zeros((size, *values.shape[1:]), dtype=values.dtype)
    result[: len(values)] = values
    padded[field.name] = result
  return type(rows)(**padded)
