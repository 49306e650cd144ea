"""Which tokens stay clean, and what the loss and the bounds count."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from structattn_jax import discrete_diffusion, training
from structattn_jax.network.sedd import dual_track as sedd_dual_track
from structattn_jax.training import objective

BATCH = sedd_dual_track.ProteinLigand(
  protein=np.array([[0, 5, 6, 2, 1], [0, 7, 2, 1, 1]], np.int32),
  protein_mask=np.array([[True] * 4 + [False], [True] * 3 + [False] * 2]),
  ligand=np.array([[0, 5, 1, 2], [0, 6, 7, 1]], np.int32),
  ligand_mask=np.ones((2, 4), bool),
)


@pytest.mark.parametrize(
  ('options', 'protein', 'ligand'),
  [
    ({}, [{0, 3}, {0, 2}], [{0}, {0}]),
    ({'learn_ligand_length': False}, [{0, 3}, {0, 2}], [{0, 3}, {0, 3}]),
    ({'keep_ends': False}, [set(), set()], [set(), set()]),
  ],
)
def test_ends_stay_clean_where_they_are_known(options, protein, ligand):
  ends = objective.num_ends(training.DataConfig(**options))
  fixed = objective.fixed_ends(ends, BATCH)
  for track, expected in (('protein', protein), ('ligand', ligand)):
    mask = fixed.get(track, np.zeros((2, 1), bool))
    assert [set(np.flatnonzero(row)) for row in mask] == expected


def test_corruption_and_bound_leave_fixed_tokens_out():
  config = sedd_dual_track.DualTrackConfig(
    hidden_size=16, num_head=2, num_block=1, cond_dim=8, ligand_vocab=12
  )
  clean = sedd_dual_track.ProteinLigand(
    **jax.tree.map(jnp.asarray, vars(BATCH))
  )
  ends = objective.num_ends(training.DataConfig())
  fixed = objective.fixed_ends(ends, BATCH)
  noised = discrete_diffusion.corrupt(
    config, jax.random.key(0), clean, jnp.ones(2), fixed=fixed
  )
  np.testing.assert_array_equal(
    noised.ligand == config.ligand_vocab - 1, ~fixed['ligand']
  )
  params = sedd_dual_track.transform_sedd_dual_track(config).init(
    jax.random.key(0), clean.protein[0], clean.ligand[0], jnp.ones(())
  )

  def bound(fixed):
    return discrete_diffusion.perplexity_bound(
      config, params, jax.random.key(1), clean, num_times=2000, fixed=fixed
    )

  part, whole = bound(fixed), bound(None)
  assert (part.protein_tokens, whole.protein_tokens) == (3, 7)
  assert (part.ligand_tokens, whole.ligand_tokens) == (6, 8)
  # The first logits are 0: every token costs log(V - 1) nats.
  for found in (part, whole):
    for track, states in (('protein', 36), ('ligand', 11)):
      nats = np.log(found.perplexity(track))
      np.testing.assert_allclose(nats, np.log(states), rtol=0.1)


def test_noise_curriculum_starts_with_little_noise(tiny):
  config = dataclasses.replace(tiny, noise_curriculum=10)
  loss_fn = objective.make_loss(config, 'joint')
  params = objective.init_params(config)
  batch = training.make_batches(config, training.load_data(config).train).batch(
    0
  )
  # At first all logits are 0, and a row costs the same at every time on
  # average; its spread tells the times apart.
  losses = {
    step: [
      float(loss_fn(params, jax.random.key(i), batch, jnp.int32(step))[0])
      for i in range(3)
    ]
    for step in (0, 10, 1000)
  }
  assert losses[0] != losses[10]
  assert losses[10] == losses[1000]
