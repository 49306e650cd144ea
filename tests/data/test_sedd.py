"""Batches as a function of the step: coverage, order, buckets, curriculum."""

import collections
import itertools

import numpy as np
import pytest

from structattn_jax import data


def pairs(protein_lengths, ligand_lengths):
  """Pair i holds the token 10 + i only, so that batches can be read."""

  def tokens(lengths):
    return tuple(np.full(n, 10 + i, np.int32) for i, n in enumerate(lengths))

  return data.EncodedPairs(
    names=tuple(map(str, range(len(protein_lengths)))),
    protein=tokens(protein_lengths),
    ligand=tokens(ligand_lengths),
    protein_pad=1,
    ligand_pad=2,
  )


def batches(encoded, **options):
  options = {
    'batch_size': 2,
    'modes': ('joint',),
    'protein_buckets': (4, 8),
    'ligand_buckets': (4,),
    'seed': 0,
    **options,
  }
  return data.PairBatches(encoded, **options)


def used(batch):
  track = batch.protein if batch.ligand is None else batch.ligand
  return (track[:, 0] - 10).tolist()


FIVE = pairs([3, 4, 4, 7, 8], [2, 3, 4, 4, 1])


def test_every_pair_is_used_once_per_epoch_and_batches_are_full():
  made = batches(FIVE)
  # Buckets of 3 and 2 pairs: 2 + 1 batches, of which one is filled up.
  for epoch in range(3):
    rows = [used(made.batch(3 * epoch + i)) for i in range(3)]
    assert all(len(row) == 2 for row in rows)
    counts = collections.Counter(itertools.chain(*rows))
    assert set(counts) == {0, 1, 2, 3, 4}
    assert sum(counts.values()) == 6


def test_batches_hold_one_bucket_and_the_tokens_of_their_pairs():
  made = batches(FIVE)
  for step in range(6):
    batch = made.batch(step)
    assert batch.protein.shape[1] == (8 if 3 in used(batch) else 4)
    for row, i in enumerate(used(batch)):
      length = len(FIVE.protein[i])
      assert batch.protein_mask[row].sum() == length
      assert (batch.protein[row, :length] == 10 + i).all()
      assert (batch.protein[row, length:] == 1).all()
      assert (batch.ligand[row] == 2).sum() == 4 - len(FIVE.ligand[i])


def test_order_follows_from_seed_and_step_alone():
  steps = [7, 0, 3, 11, 3]
  forward, again = batches(FIVE), batches(FIVE)
  for step in range(12):
    forward.batch(step)
  for step in steps:
    assert used(forward.batch(step)) == used(again.batch(step))
  other = batches(FIVE, seed=1)
  assert [used(forward.batch(s)) for s in range(12)] != [
    used(other.batch(s)) for s in range(12)
  ]


def test_epochs_are_shuffled_differently():
  encoded = pairs([4] * 16, [4] * 16)
  made = batches(encoded, batch_size=16)
  assert used(made.batch(0)) != used(made.batch(1))
  assert sorted(used(made.batch(1))) == list(range(16))


def test_modes_take_turns_and_see_the_pairs_that_serve_them():
  encoded = pairs([4, 4, 0], [4, 0, 3])
  modes = ('joint', 'ligand_only', 'ligand_only', 'protein_only')
  made = batches(encoded, modes=modes, batch_size=1)
  seen = collections.defaultdict(list)
  for step in range(16):
    mode, batch = made.mode(step), made.batch(step)
    assert mode == modes[step % 4]
    assert (batch.protein is None) == (mode == 'ligand_only')
    assert (batch.ligand_mask is None) == (mode == 'protein_only')
    seen[mode] += used(batch)
  assert seen['joint'] == [0] * 4
  # Epochs go on over the cycles: each pair equally often.
  assert collections.Counter(seen['ligand_only']) == {0: 4, 2: 4}
  assert collections.Counter(seen['protein_only']) == {0: 2, 1: 2}


def test_length_stages_admit_longer_pairs_later():
  made = batches(FIVE, length_stages=((4, 4, 3), (8, 8, 3)), batch_size=1)
  seen = [used(made.batch(step))[0] for step in range(18)]
  assert set(seen[:4]) == {0, 1}
  assert set(seen[4:8]) == {0, 1, 4}
  assert set(seen[8:13]) == {0, 1, 2, 3, 4}


def test_learned_length_makes_padding_data():
  made = batches(FIVE, learn_ligand_length=True)
  batch = made.batch(0)
  assert batch.ligand_mask.all()
  assert (batch.ligand == 2).any()
  assert not all(made.batch(s).protein_mask.all() for s in range(3))


def test_fingerprint_tells_data_and_settings_apart():
  same = batches(FIVE).fingerprint
  assert batches(FIVE).fingerprint == same
  assert batches(FIVE, seed=1).fingerprint != same
  assert batches(pairs([3] * 5, [2] * 5)).fingerprint != same


def test_shapes_lists_what_will_be_compiled():
  assert batches(FIVE, modes=('joint', 'ligand_only')).shapes == {
    'joint': {(4, 4), (8, 4)},
    'ligand_only': {(0, 4)},
  }


@pytest.mark.parametrize(
  ('options', 'match'),
  [
    ({'modes': ('both',)}, "'both' is none of joint"),
    ({'modes': ()}, 'modes: expected at least one'),
    ({'batch_size': 0}, 'batch_size: expected at least 1'),
    ({'protein_buckets': (4,)}, 'give a bucket >= 7'),
    ({'length_stages': ((4, 2, 2),)}, "no pair serves 'joint' up to"),
    ({'length_stages': ((4, 8, 8), (2, 8, 8))}, 'increasing steps'),
    (
      {'learn_ligand_length': True, 'ligand_buckets': (2, 4)},
      'expected one bucket',
    ),
  ],
)
def test_settings_that_cannot_work_are_reported(options, match):
  with pytest.raises(ValueError, match=match):
    batches(FIVE, **options)


def test_cover_holds_every_pair_once():
  made = list(
    data.cover_pairs(
      FIVE, 'joint', batch_size=2, protein_buckets=(4, 8), ligand_buckets=(4,)
    )
  )
  seen = [
    i
    for batch in made
    for i, mask in zip(used(batch), batch.ligand_mask, strict=True)
    if mask.any()
  ]
  assert sorted(seen) == [0, 1, 2, 3, 4]
  assert all(len(batch.protein) == 2 for batch in made)
  assert sum(batch.protein_mask.sum() for batch in made) == 3 + 4 + 4 + 7 + 8
