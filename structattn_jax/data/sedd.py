"""Batches of protein-ligand pairs as a pure function of the step number.

Nothing is carried from one batch to the next: `batches.batch(step)` is the
same in every process and after every restart, so a run resumes from its step
number alone.

Shapes: n_batch pairs; n_protein and n_ligand tokens, the lengths of a bucket.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

from structattn_jax.data import buckets, protein_ligand
from structattn_jax.network.sedd.dual_track import ProteinLigand

# What each mode needs: (protein, ligand).
_NEEDS = {
  'joint': (True, True),
  'protein_only': (True, False),
  'ligand_only': (False, True),
  'ligand_given_protein': (True, True),
  'protein_given_ligand': (True, True),
}


class PairBatches:
  """Chooses, shuffles and pads the pairs of every step.

  Step s uses mode `modes[s % len(modes)]`: a mode that is listed twice is used
  twice as often. A batch holds pairs of one length bucket, so few shapes are
  compiled. Within a mode every pair is drawn once per epoch; the last batch of
  a bucket is filled up from its beginning, so that all batches have one size.
  """

  def __init__(
    self,
    pairs: protein_ligand.EncodedPairs,
    *,
    batch_size: int,
    modes: Sequence[str],
    protein_buckets: Sequence[int],
    ligand_buckets: Sequence[int],
    seed: int,
    length_stages: Sequence[tuple[int, int, int]] = (),
    learn_ligand_length: bool = False,
  ):
    """Sorts the pairs into buckets.

    Args:
      pairs: the data.
      batch_size: pairs per step over all devices.
      modes: cycle of modes.
      protein_buckets: padded lengths of proteins.
      ligand_buckets: padded lengths of ligands.
      seed: of the shuffling.
      length_stages: curriculum, `(step, max_protein, max_ligand)`: until that
        step only pairs up to these lengths are used; steps increase.
      learn_ligand_length: whether the <pad> tokens behind a ligand are data,
        so that the model learns when to stop. Needs one ligand bucket.

    Raises:
      ValueError: on an unknown mode, a bucket that is too small, a mode or
        stage without any pair, or unordered stages.
    """
    for name, value in (
      ('modes', modes),
      ('protein_buckets', protein_buckets),
      ('ligand_buckets', ligand_buckets),
    ):
      if not value:
        raise ValueError(f'{name}: expected at least one value')
    if batch_size < 1:
      raise ValueError(f'batch_size: expected at least 1, got {batch_size}')
    unknown = [mode for mode in modes if mode not in _NEEDS]
    if unknown:
      raise ValueError(f'modes: {unknown[0]!r} is none of {", ".join(_NEEDS)}')
    if learn_ligand_length and len(ligand_buckets) > 1:
      raise ValueError(
        'ligand_buckets: expected one bucket with learn_ligand_length, since '
        f'the choice among {len(ligand_buckets)} would give the length away'
      )
    steps = [stage[0] for stage in length_stages]
    if steps != sorted(set(steps)) or any(step < 1 for step in steps):
      raise ValueError(
        f'length_stages: expected increasing steps above 0, got {steps}'
      )
    self._pairs = pairs
    self._batch_size = batch_size
    self._modes = tuple(modes)
    self._seed = seed
    self._learn_ligand_length = learn_ligand_length
    self._starts = (0, *steps)
    limits = [stage[1:] for stage in length_stages]
    self._groups = [
      {
        mode: _group(pairs, mode, limit, protein_buckets, ligand_buckets)
        for mode in dict.fromkeys(modes)
      }
      for limit in (*limits, (np.inf, np.inf))
    ]
    digest = hashlib.sha256()
    settings = (
      *(batch_size, self._modes, seed, learn_ligand_length),
      *(tuple(protein_buckets), tuple(ligand_buckets), tuple(length_stages)),
    )
    digest.update(repr(settings).encode())
    for tokens in (*pairs.protein, *pairs.ligand):
      digest.update(repr(tokens.shape).encode() + tokens.tobytes())
    self._fingerprint = digest.hexdigest()
    self._plan = functools.lru_cache(maxsize=2 * len(_NEEDS))(self._make_plan)

  @property
  def fingerprint(self) -> str:
    """Digest of data and settings: equal means the same batches."""
    return self._fingerprint

  @property
  def shapes(self) -> dict[str, set[tuple[int, int]]]:
    """Per mode the (protein, ligand) buckets that occur."""
    found: dict[str, set[tuple[int, int]]] = {}
    for stage in self._groups:
      for mode, groups in stage.items():
        found.setdefault(mode, set()).update(groups)
    return found

  def mode(self, step: int) -> str:
    """The mode of a step."""
    return self._modes[step % len(self._modes)]

  def batch(self, step: int) -> ProteinLigand:
    """The batch of a step.

    Args:
      step: from 0.

    Returns:
      [batch_size, ...] NumPy arrays; the same for the same step.
    """
    stage = sum(step >= start for start in self._starts[1:])
    mode = self.mode(step)
    # How often the mode came before, in this stage.
    turn = self._count(mode, step) - self._count(mode, self._starts[stage])
    per_epoch = self._batches_per_epoch(stage, mode)
    plan = self._plan(stage, mode, turn // per_epoch)
    bucket, rows = plan[turn % per_epoch]
    return _pad(self._pairs, mode, bucket, rows, self._learn_ligand_length)

  def _count(self, mode: str, step: int) -> int:
    cycles, rest = divmod(step, len(self._modes))
    return cycles * self._modes.count(mode) + self._modes[:rest].count(mode)

  def _batches_per_epoch(self, stage: int, mode: str) -> int:
    groups = self._groups[stage][mode].values()
    return sum(-(-len(group) // self._batch_size) for group in groups)

  def _make_plan(self, stage: int, mode: str, epoch: int):
    """[(bucket, pair indices)] of an epoch, in order."""
    entropy = (self._seed, stage, list(_NEEDS).index(mode), epoch)
    rng = np.random.default_rng(entropy)
    plan = []
    for bucket, group in self._groups[stage][mode].items():
      order = rng.permutation(group)
      count = -(-len(group) // self._batch_size)
      filled = np.resize(order, count * self._batch_size)  # repeats
      plan += [(bucket, rows) for rows in filled.reshape(count, -1)]
    return [plan[i] for i in rng.permutation(len(plan))]


def cover_pairs(
  pairs: protein_ligand.EncodedPairs,
  mode: str,
  *,
  batch_size: int,
  protein_buckets: Sequence[int],
  ligand_buckets: Sequence[int],
  learn_ligand_length: bool = False,
) -> Iterator[ProteinLigand]:
  """Batches that hold every pair that serves a mode exactly once.

  Args:
    pairs: the data.
    mode: one of those of the dual-track network.
    batch_size: rows of every batch; the last ones of a bucket may be empty,
      with masks that are False.
    protein_buckets: padded lengths of proteins.
    ligand_buckets: padded lengths of ligands.
    learn_ligand_length: see `PairBatches`.

  Yields:
    NumPy batches, bucket by bucket.
  """
  no_limit = (np.inf, np.inf)
  groups = _group(pairs, mode, no_limit, protein_buckets, ligand_buckets)
  for bucket, group in groups.items():
    for start in range(0, len(group), batch_size):
      rows = group[start : start + batch_size]
      filled = rows + rows[:1] * (batch_size - len(rows))
      batch = _pad(pairs, mode, bucket, filled, learn_ligand_length)
      for mask in (batch.protein_mask, batch.ligand_mask):
        if isinstance(mask, np.ndarray):
          mask[len(rows) :] = False
      yield batch


def pad_tokens(
  tokens: Sequence[np.ndarray], length: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
  """Pads token ids to one length.

  Args:
    tokens: n_batch arrays [n_token] int32.
    length: padded length.
    pad_id: id behind the last token.

  Returns:
    [n_batch, length] int32 ids and bool mask, True for real tokens.

  Raises:
    ValueError: if `length` is too small, with the length needed.
  """
  longest = max(map(len, tokens))
  if longest > length:
    raise ValueError(f'length={length}: expected at least {longest}')
  ids = np.full((len(tokens), length), pad_id, np.int32)
  mask = np.zeros((len(tokens), length), bool)
  for row, values in enumerate(tokens):
    ids[row, : len(values)] = values
    mask[row, : len(values)] = True
  return ids, mask


def _group(
  pairs: protein_ligand.EncodedPairs,
  mode: str,
  limit: tuple[float, float],
  protein_buckets: Sequence[int],
  ligand_buckets: Sequence[int],
) -> dict[tuple[int, int], list[int]]:
  """{(protein bucket, ligand bucket): indices of pairs}; 0 = not needed."""
  needs = _NEEDS[mode]
  groups: dict[tuple[int, int], list[int]] = {}
  for i, tokens in enumerate(zip(pairs.protein, pairs.ligand, strict=True)):
    sizes = [len(t) * need for t, need in zip(tokens, needs, strict=True)]
    if any(need and not size for size, need in zip(sizes, needs, strict=True)):
      continue
    if any(size > most for size, most in zip(sizes, limit, strict=True)):
      continue
    protein, ligand = (
      buckets.choose_bucket(size, choice) if size else 0
      for size, choice in zip(
        sizes, (protein_buckets, ligand_buckets), strict=True
      )
    )
    groups.setdefault((protein, ligand), []).append(i)
  if not groups:
    up_to = '' if limit[0] == np.inf else f' up to the lengths {limit}'
    raise ValueError(f'modes: no pair serves {mode!r}{up_to}')
  return groups


def _pad(
  pairs: protein_ligand.EncodedPairs,
  mode: str,
  bucket: tuple[int, int],
  rows: Sequence[int] | np.ndarray,
  learn_ligand_length: bool,
) -> ProteinLigand:
  needs_protein, needs_ligand = _NEEDS[mode]
  protein = protein_mask = ligand = ligand_mask = None
  if needs_protein:
    protein, protein_mask = pad_tokens(
      [pairs.protein[i] for i in rows], bucket[0], pairs.protein_pad
    )
  if needs_ligand:
    ligand, ligand_mask = pad_tokens(
      [pairs.ligand[i] for i in rows], bucket[1], pairs.ligand_pad
    )
    if learn_ligand_length:
      ligand_mask[:] = True
  return ProteinLigand(protein, ligand, protein_mask, ligand_mask)
