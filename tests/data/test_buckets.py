"""Buckets and padding."""

import dataclasses

import jax
import numpy as np
import pytest

from structattn_jax import data


@pytest.fixture
def features(pdb, write):
  pdb.residue('ALA', 1).residue('GLY', 2, names=('N', 'CA', 'C', 'O'))
  pdb.atom('ZN', 'ZN', 9, (9, 9, 9), element='ZN', hetero=True)
  return data.featurise(data.load_structure(write(pdb)))


def test_choose_bucket_takes_the_smallest_sufficient():
  assert data.choose_bucket(5, (16, 4, 8)) == 8
  assert data.choose_bucket(8, (16, 4, 8)) == 8
  assert data.choose_bucket(0, (16, 4, 8)) == 4
  with pytest.raises(ValueError, match='bucket >= 17'):
    data.choose_bucket(17, (16, 4, 8))


def test_default_buckets_rise_and_atoms_fill_windows():
  for buckets in (data.DEFAULT_TOKEN_BUCKETS, data.DEFAULT_ATOM_BUCKETS):
    assert list(buckets) == sorted(set(buckets))
  assert all(bucket % 32 == 0 for bucket in data.DEFAULT_ATOM_BUCKETS)


def test_padding_keeps_real_rows_and_fills_the_rest(features):
  padded = data.pad_features(features, n_token=7, n_atom=16)
  assert (padded.n_token, padded.n_atom) == (7, 16)
  for name, size in (('tokens', 3), ('atoms', 10)):
    before, after = getattr(features, name), getattr(padded, name)
    for field in dataclasses.fields(before):
      old = getattr(before, field.name)
      new = getattr(after, field.name)
      assert new.dtype == old.dtype
      np.testing.assert_array_equal(new[:size], old)
      if field.name == 'rotation':
        np.testing.assert_array_equal(new[size:], [np.eye(3)] * 4)
      elif field.name == 'token_index':
        np.testing.assert_array_equal(new[size:], 6)
      else:
        assert not new[size:].any(), field.name
  assert padded.metadata is features.metadata
  assert (np.diff(padded.atoms.token_index) >= 0).all()


def test_padding_leaves_the_input_unchanged(features):
  before = jax.tree.map(np.copy, features)
  data.pad_features(features, n_token=3, n_atom=12)
  for a, b in zip(
    jax.tree.leaves(before), jax.tree.leaves(features), strict=True
  ):
    np.testing.assert_array_equal(a, b)


def test_padding_twice_equals_padding_once(features):
  once = data.pad_features(features, n_token=9, n_atom=32)
  twice = data.pad_features(
    data.pad_features(features, n_token=5, n_atom=16), n_token=9, n_atom=32
  )
  for a, b in zip(jax.tree.leaves(once), jax.tree.leaves(twice), strict=True):
    np.testing.assert_array_equal(a, b)


def test_padding_uses_buckets_by_default(features):
  padded = data.pad_features(features)
  assert (padded.n_token, padded.n_atom) == (128, 512)
  padded = data.pad_features(features, token_buckets=(4,), atom_buckets=(64,))
  assert (padded.n_token, padded.n_atom) == (4, 64)


@pytest.mark.parametrize(
  ('options', 'match'),
  [
    ({'n_token': 2}, 'n_token >= 3'),
    ({'n_atom': 9}, 'n_atom >= 10'),
    ({'token_buckets': (2,)}, 'n_token >= 3'),
    ({'atom_buckets': ()}, 'n_atom >= 10'),
  ],
)
def test_padding_too_small_says_the_number_needed(features, options, match):
  with pytest.raises(ValueError, match=match):
    data.pad_features(features, **options)
