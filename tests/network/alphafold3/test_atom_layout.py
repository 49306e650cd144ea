"""Atom layouts: upstream's gathers, and windows over flat atoms."""

import dataclasses
import pathlib

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from structattn_jax import verification as replay
from structattn_jax.network.alphafold3 import atom_layout, window_plan
from structattn_jax.verification.golden import Golden

GOLDENS = pathlib.Path(__file__).parents[2] / 'goldens'
GOLDENS /= 'af3_atom_cross_attention'
GATHERS = [field.name for field in dataclasses.fields(atom_layout.AtomCrossAtt)]


def golden_batch(case: str) -> dict[str, np.ndarray]:
  golden = Golden.read(GOLDENS / f'{case}.npz', case)
  return golden.part('inputs')


@pytest.mark.parametrize(
  'case',
  ['diffusion_mixed', 'evoformer_conditioning', 'tiny_padded', 'tiny_unpadded'],
)
def test_gathers_from_the_dense_mask_equal_upstreams(case):
  batch = golden_batch(case)
  # Padded tokens have no conformer.
  num_real = int(np.flatnonzero(batch['pred_dense_atom_mask'].any(1))[-1]) + 1
  built = atom_layout.AtomCrossAtt.build(
    batch['pred_dense_atom_mask'], num_real_tokens=num_real
  ).to_batch()
  read = atom_layout.AtomCrossAtt.from_batch(batch).to_batch()
  assert len(built) == 3 * len(GATHERS)
  for name, value in built.items():
    np.testing.assert_array_equal(value, batch[name], err_msg=name)
    np.testing.assert_array_equal(read[name], batch[name], err_msg=name)


def test_windows_golden_is_replayed_exactly():
  rows = replay.run(Golden.read(GOLDENS / 'windows.npz', 'windows'))
  assert len(rows) == 65
  assert all(row.ok and row.max_error == 0 for row in rows)


def brute_force_starts(num_atoms, n_window, num_queries, num_keys):
  starts = []
  for window in range(n_window):
    start = window * num_queries + num_queries // 2 - num_keys // 2
    if start < 0:
      start = 0
    elif start + num_keys - 1 > num_atoms - 1:
      start = num_atoms - num_keys
    starts.append(start)
  return starts


@hypothesis.given(
  st.sampled_from([(32, 128), (16, 64), (8, 24), (4, 4), (8, 4), (6, 20)]),
  st.integers(1, 200),
  st.integers(0, 3),
)
def test_windows_of_any_size_hold_the_atoms_of_upstreams_rule(sizes, n, extra):
  num_queries, num_keys = sizes
  blocks = -(-max(n, num_keys) // num_queries) + extra
  plan = window_plan.build_window_plan(
    np.arange(n),
    np.arange(n),
    num_queries=num_queries,
    num_keys=num_keys,
    n_atom=blocks * num_queries,
  )
  atoms = np.where(plan.atom_mask, np.arange(plan.n_atom), -1)
  found = np.asarray(window_plan.atom_windows(plan, jnp.asarray(atoms)))
  n_real = -(-n // num_queries)
  starts = brute_force_starts(n, n_real, num_queries, num_keys)
  for window in range(n_real):
    start = max(starts[window], 0)  # Else padding comes first: another order.
    assert plan.key_start[window] == start
    np.testing.assert_array_equal(
      found[window], atoms[start : start + num_keys]
    )
  assert plan.key_start.min() >= 0
  assert plan.key_start.max() <= plan.n_atom - num_keys


def test_windows_along_another_axis_and_their_gradient_are_the_same():
  plan = window_plan.build_window_plan(
    np.arange(75), np.arange(75), num_queries=8, num_keys=24
  )
  index = plan.key_start[:, None] + np.arange(24)
  x = np.random.default_rng(0).standard_normal((plan.n_atom, 3), np.float32)
  x[75:] = 0
  n_real = -(-75 // 8)

  def loss(x, windows):
    return jnp.sum(jnp.sin(windows(x))[:n_real])

  got = jax.grad(loss)(x, lambda x: window_plan.atom_windows(plan, x))
  want = jax.grad(loss)(x, lambda x: x[index])
  np.testing.assert_allclose(got, want, rtol=1e-5)
  moved = window_plan.atom_windows(plan, jnp.asarray(x.T), axis=-1)
  np.testing.assert_array_equal(
    jnp.moveaxis(moved, 0, -1)[:n_real], x[index][:n_real]
  )


@pytest.mark.parametrize('case', ['diffusion_mixed', 'tiny_unpadded'])
def test_token_pairs_of_all_windows_are_listed(case):
  plan = window_plan.plan_from_batch(golden_batch(case), n_pair=2000)
  n_token = plan.num_tokens
  queries = np.asarray(window_plan.query_blocks(plan, plan.token_index))
  keys = np.asarray(window_plan.atom_windows(plan, plan.token_index))
  offset, stride = plan.pair_offset[:, None], plan.pair_stride[:, None]
  row = (offset + stride * queries)[:, :, None] + keys[:, None]
  found = row if plan.pair_index is None else None
  if found is None:
    inside = np.clip(row, 0, len(plan.pair_index) - 1)
    found = plan.pair_index[inside]
  want = queries[:, :, None] * n_token + keys[:, None]
  real = window_plan.query_blocks(plan, plan.atom_mask)[:, :, None]
  real = real & window_plan.atom_windows(plan, plan.atom_mask)[:, None]
  assert (plan.pair_index is None) == (case == 'tiny_unpadded')
  np.testing.assert_array_equal(found[real], want[real])


def test_structures_of_one_bucket_share_one_compilation():
  @jax.jit
  @chex.assert_max_traces(n=1)
  def windows(plan, x):
    return window_plan.atom_windows(plan, x)

  for n in (1060, 1071, 1088):
    token = np.arange(n) // 8
    plan = window_plan.build_window_plan(token, np.arange(140), n_pair=4096)
    found = windows(plan, jnp.arange(plan.n_atom))
    assert plan.n_atom == 1088
    last = (n - 1) // 32
    np.testing.assert_array_equal(found[last], np.arange(n - 128, n))


def test_plan_of_flat_atoms_equals_the_plan_of_the_dense_batch():
  batch = golden_batch('diffusion_mixed')
  mask = batch['pred_dense_atom_mask']
  token, slot = np.nonzero(mask)
  want = window_plan.plan_from_batch(batch)
  got = window_plan.build_window_plan(
    token.astype(np.int32),
    batch['ref_space_uid'][:, 0],
    dense_slot=slot,
    n_atom=want.n_atom,
  )
  chex.assert_trees_all_equal(got, want)


def test_dense_batch_survives_the_way_to_flat_atoms_and_back():
  batch = golden_batch('tiny_padded')
  dense = atom_layout.DenseBatch.from_batch(batch)
  flat = jax.tree.map(
    lambda x: atom_layout.atoms_from_dense(dense.plan, x), dense.ref
  )
  back = jax.tree.map(lambda x: atom_layout.atoms_to_dense(dense.plan, x), flat)
  chex.assert_trees_all_equal(back, jax.tree.map(jnp.asarray, dense.ref))
  written = dense.to_batch()
  assert set(written) < set(batch)
  for name, value in written.items():
    np.testing.assert_array_equal(value, batch[name], err_msg=name)
  positions = atom_layout.atoms_from_dense(dense.plan, batch['ref_pos'])
  assert not np.any(positions[int(dense.plan.num_atoms) :])


def test_gathers_are_made_if_the_batch_has_none():
  batch = golden_batch('tiny_padded')
  bare = {name: value for name, value in batch.items() if ':' not in name}
  dense = atom_layout.DenseBatch.from_batch(bare)
  np.testing.assert_array_equal(
    dense.atom_cross_att.queries_to_keys.gather_idxs,
    batch['queries_to_keys:gather_idxs'],
  )


@pytest.mark.parametrize('wrap', [lambda f: f, jax.jit])
def test_convert_of_another_layout_is_an_error_also_under_jit(wrap):
  """The mistake of public issue 730."""
  gathers = atom_layout.AtomCrossAtt.from_batch(golden_batch('tiny_unpadded'))
  uid = np.zeros((9, 24), np.int32)

  def run(uid):
    dense = atom_layout.Arranged(uid, 'token_atoms')
    return atom_layout.convert(gathers.queries_to_keys, dense)

  with pytest.raises(ValueError, match=r"layout 'queries'.*got 'token_atoms'"):
    wrap(run)(uid)


def test_convert_of_another_shape_is_an_error():
  gathers = atom_layout.AtomCrossAtt.from_batch(golden_batch('tiny_unpadded'))
  with pytest.raises(ValueError, match=r'expected shape \(9, 24\).*\(9, 23\)'):
    atom_layout.convert(
      gathers.token_atoms_to_queries,
      atom_layout.Arranged(jnp.zeros((9, 23, 2)), 'token_atoms'),
    )


def test_official_uid_of_keys_is_that_of_another_token():
  token = np.arange(60) // 2
  plan = window_plan.build_window_plan(token, np.arange(100, 130))
  real = np.asarray(plan.official_key_space_uid)[:60]
  np.testing.assert_array_equal(real, 100 + np.arange(60) // 24)
  # Padded keys have that of the last token.
  assert set(np.asarray(plan.official_key_space_uid)[60:]) == {129}
  np.testing.assert_array_equal(plan.space_uid[:60], 100 + token)


def test_padded_size_is_on_a_ladder():
  sizes = [window_plan.padded_size(n, 32) for n in range(1, 20000, 7)]
  assert all(size % 32 == 0 for size in sizes)
  assert sizes == sorted(sizes)
  for n, size in zip(range(1, 20000, 7), sizes, strict=True):
    assert n <= size <= max(n + 31, 1.0625 * n + 32)
    assert window_plan.padded_size(size, 32) == size
  assert len(set(sizes)) < 120


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'token_index': [1, 0]}, 'token_index: .* sort the atoms by token'),
    (
      {'token_index': [0, 3]},
      r'token_index: .* \[0, 3\), got 3 at position 1; token_space',
    ),
    ({'token_index': [], 'token_space_uid': []}, 'at least one token'),
    ({'num_queries': 0}, 'num_queries: expected at least 1'),
    ({'num_keys': -4}, 'num_keys: expected at least 1'),
    (
      {'token_index': [1, 1], 'dense_slot': [3, 3]},
      'dense_slot: .* 2 atoms in slot 3 of token 1',
    ),
    ({'n_atom': 96}, 'give n_atom=128'),
    ({'n_atom': 130}, 'give n_atom=128'),
    ({'atom_mask': np.array([False, True])}, 'atom_mask: .* atom 0'),
    ({'dense_slot': np.array([0, 24])}, 'give num_slots >= 25'),
    (
      {'token_index': [0] * 4 + [1] * 4, 'n_pair': 2, 'num_keys': 32},
      'give n_pair >= 4',
    ),
  ],
)
def test_plan_with_wrong_values_says_what_to_do(options, message):
  arguments = {'token_index': [0, 1], 'token_space_uid': [0, 1, 2], **options}
  for name in ('token_index', 'token_space_uid'):
    arguments[name] = np.asarray(arguments[name], int)
  with pytest.raises(ValueError, match=message):
    window_plan.build_window_plan(**arguments)


def test_proteins_with_one_number_of_atoms_share_a_compilation():
  rng = np.random.default_rng(0)
  shapes = set()
  for _ in range(8):
    counts = rng.choice([4, 5, 6, 7, 8, 9, 11, 12], 62)
    plan = window_plan.build_window_plan(
      np.repeat(np.arange(62), counts), np.arange(96), n_atom=640
    )
    shapes.add(tuple(x.shape for x in jax.tree.leaves(plan)))
  assert len(shapes) == 1


@pytest.mark.parametrize('num_real_tokens', [-1, 2, 9])
def test_number_of_real_tokens_that_leaves_out_atoms_is_an_error(
  num_real_tokens,
):
  mask = np.zeros((5, 3), bool)
  mask[[0, 2], 0] = True
  with pytest.raises(ValueError, match='num_real_tokens: expected 3 to 5'):
    atom_layout.AtomCrossAtt.build(mask, num_real_tokens=num_real_tokens)


def test_dense_batch_names_what_is_missing_and_makes_what_can_be_made():
  batch = dict(golden_batch('tiny_padded'))
  want = atom_layout.DenseBatch.from_batch(batch)
  for name in ('tokens_to_keys', 'queries_to_keys'):
    gathers = {k: v for k, v in batch.items() if not k.startswith(name)}
    made = atom_layout.DenseBatch.from_batch(
      gathers, num_queries=want.plan.num_queries, num_keys=want.plan.num_keys
    )
    keys = made.atom_cross_att.queries_to_keys.gather_idxs
    assert keys.shape[-1] == want.plan.num_keys
  for name in ('ref_pos', 'pred_dense_atom_mask'):
    rest = {k: v for k, v in batch.items() if k != name}
    with pytest.raises(ValueError, match=f"batch: expected .* '{name}'"):
      atom_layout.DenseBatch.from_batch(rest)
  with pytest.raises(ValueError, match='ref_pos: expected shape'):
    atom_layout.DenseBatch.from_batch({**batch, 'ref_pos': np.ones((2, 24, 3))})
  mask = batch['pred_dense_atom_mask'].astype(np.float32)
  with pytest.raises(TypeError, match='pred_dense_atom_mask: expected bool'):
    atom_layout.DenseBatch.from_batch({**batch, 'pred_dense_atom_mask': mask})


def test_pad_atoms_of_another_structure_is_an_error():
  plan = window_plan.build_window_plan([0, 0, 1], [0, 1])
  assert window_plan.pad_atoms(plan, np.ones((3, 2))).sum() == 6
  with pytest.raises(ValueError, match='n_atom >= 200'):
    window_plan.pad_atoms(plan, np.ones(200))
  with pytest.raises(ValueError, match='expected 3 to 128 rows'):
    window_plan.pad_atoms(plan, np.ones(2))
