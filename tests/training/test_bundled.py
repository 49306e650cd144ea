"""The small model learns the bundled set, and which ligand goes with what."""

import pathlib
import time

import jax
import numpy as np
import pytest

pytest.importorskip('orbax.checkpoint')

from structattn_jax import data, discrete_diffusion, training
from structattn_jax.apps import generate

CONFIG = (
  pathlib.Path(__file__).parents[2] / 'configs/sedd_protein_ligand_small.toml'
)


@pytest.mark.slow
def test_small_model_learns_the_bundled_pairs_within_minutes(tmp_path):
  config = training.TrainConfig.from_toml(CONFIG)
  start = time.perf_counter()
  result = training.train(config, tmp_path)
  # On two cores of their own; CI machines may be slower.
  assert time.perf_counter() - start < 1200
  bounds = result.bounds
  # A uniform guess among the tokens has a perplexity of 42 for ligands.
  uniform = config.model.ligand_vocab - 1
  assert bounds['ligand_only'] < uniform / 4
  assert bounds['ligand_given_protein'] < uniform / 8
  assert bounds['ligand_given_protein'] < 0.7 * bounds['ligand_only']
  # 20 amino acids and about as many SMILES tokens that are common.
  assert bounds['joint'] < uniform / 2

  # Sampled ligands of a protein are its own, which ligands without one are not.
  model = generate.load_model(tmp_path)
  pairs = [p for p in data.bundled_pairs() if p.sequence]
  sampler = discrete_diffusion.SamplerConfig(steps=64)
  tokenizer = model.smiles_tokenizer

  def likeness(samples, ligands):
    """Mean share of a ligand's tokens that the best sample has in place."""

    def one(sample, ligand):
      a, b = tokenizer.split(sample), tokenizer.split(ligand)
      same = sum(x == y for x, y in zip(a, b, strict=False))
      return same / max(len(a), len(b))

    return np.mean([max(one(s, ligand) for ligand in ligands) for s in samples])

  given, alone = [], []
  lone = generate.generate(
    model, jax.random.key(1), mode='ligand_only', num=16, sampler=sampler
  ).ligand
  for sequence in dict.fromkeys(p.sequence for p in pairs):
    if len(sequence) + 2 > max(config.data.protein_buckets):
      continue
    ligands = [p.smiles for p in pairs if p.sequence == sequence]
    found = generate.generate(
      model,
      jax.random.key(2),
      mode='ligand_given_protein',
      protein=sequence,
      num=16,
      sampler=sampler,
    )
    given.append(likeness(found.ligand, ligands))
    alone.append(likeness(lone, ligands))
  assert len(given) == 4
  assert np.mean(given) > 1.5 * np.mean(alone)
