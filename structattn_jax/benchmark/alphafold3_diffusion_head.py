"""AlphaFold 3's diffusion head at its released sizes, random parameters.

24 blocks of 768 channels and 16 heads over tokens, 3 + 3 blocks over atoms, 384
single and 128 pair channels. A protein with about 8 atoms per token.
Candidates:
  cached: `cached_diffusion_head`, its `precompute` done before.
  jit: the published form, mapped over the samples and compiled; what does not
    depend on the sample is then computed once per step.
  recomputed: the published form for one sample after the other: everything is
    computed per sample and step. The baseline.

'step' is one denoising step of 5 samples. 'training' is the loss of two noise
levels of one structure and its gradient with respect to parameters and
embeddings, with 'cached' from `precompute` on, by the number of blocks: 'remat'
keeps one array per block, 'kept' everything.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from structattn_jax.benchmark import alphafold3, harness
from structattn_jax.network.alphafold3 import atom_cross_attention as atoms
from structattn_jax.network.alphafold3 import cached_diffusion as cdh
from structattn_jax.network.alphafold3 import diffusion_head as dh
from structattn_jax.network.alphafold3 import transformer_parameters as tp

Mode = Literal['step', 'training']
CANDIDATES: dict[Mode, tuple[str, ...]] = {
  'step': ('cached', 'jit', 'recomputed'),
  'training': ('remat', 'kept'),
}
SIZES, QUICK_SIZES = (256, 768), (16,)
# Number of tokens and of blocks.
TRAINING_SIZES = ((128, 8), (128, 16), (128, 24))
QUICK_TRAINING_SIZES = ((16, 2), (16, 4))
_SAMPLES = 5

Arguments = tuple[Any, ...]


def run(
  *,
  quick: bool = False,
  rss: bool = True,
  report: Callable[[harness.Table], None] = lambda table: None,
) -> list[harness.Table]:
  """Measures both modes; arguments as `segment.run`.

  Args:
    quick: small sizes, few repeats.
    rss: also measure the peak resident set, a new process for each row.
      Skipped off CPU, where arrays are not in host memory.
    report: called with each table as soon as it is there.

  Returns:
    One table per mode.
  """
  rss = rss and jax.default_backend() == 'cpu'
  steps = [(n_token, 24) for n_token in SIZES]
  if quick:
    steps = [(n_token, 2) for n_token in QUICK_SIZES]
  training = QUICK_TRAINING_SIZES if quick else TRAINING_SIZES
  tables = []
  for mode, sizes in (('step', steps), ('training', training)):
    rows: list[harness.Measurement] = []
    for n_token, n_block in sizes:
      case = f'{n_token} tokens, {n_block} blocks'
      options = (mode, n_token, n_block, quick)
      args = inputs(*options)
      want = None
      if mode == 'step':
        baseline = function(CANDIDATES[mode][-1], *options)
        want = jax.tree.map(np.asarray, jax.jit(baseline)(*args))
      measured = harness.compare(
        {name: function(name, *options) for name in CANDIDATES[mode]},
        args,
        case=case,
        want=want,
        repeats=3 if quick else 10,
        budget_seconds=20.0,
      )
      del args, want
      if rss:
        measured = [
          harness.with_peak_rss(row, build, row.candidate, *options)
          for row in measured
        ]
      rows += measured
    tables.append(
      harness.Table(
        title=f'AF3 diffusion head, {mode}',
        baseline=CANDIDATES[mode][-1],
        rows=tuple(rows),
      )
    )
    report(tables[-1])
  return tables


def build(
  candidate: str, mode: Mode, n_token: int, n_block: int, quick: bool
) -> tuple[Callable[..., Any], Sequence[Any]]:
  """The function of a candidate and its arguments, for a new process."""
  options = (mode, n_token, n_block, quick)
  return function(candidate, *options), inputs(*options)


def config(n_block: int, quick: bool, remat: bool) -> dh.DiffusionHeadConfig:
  """The released sizes, or small ones, with so many blocks over tokens."""
  transformer = tp.TransformerConfig(
    num_blocks=n_block,
    super_block_size=min(4, n_block),
    block_remat=remat,
  )
  if not quick:
    return dh.DiffusionHeadConfig(transformer=transformer)
  return dh.DiffusionHeadConfig(
    seq_channel=16,
    pair_channel=8,
    atoms=atoms.AtomCrossAttConfig(
      per_token_channels=32,
      per_atom_channels=16,
      per_atom_pair_channels=4,
      atom_transformer=tp.CrossAttTransformerConfig(
        num_blocks=1,
        attention=tp.CrossAttentionConfig(key_dim=16, value_dim=16),
      ),
    ),
    transformer=transformer,
  )


def inputs(mode: Mode, n_token: int, n_block: int, quick: bool) -> Arguments:
  """params, batch, embeddings, conditioning, positions, level: all the same."""
  rng = np.random.default_rng(0)
  number = np.arange(1, n_token + 1, dtype=np.int32)
  one = np.ones(n_token, np.int32)
  batch = dh.DiffusionHeadBatch.from_batch(
    {
      **alphafold3.features('protein', n_token, rng),
      'token_index': number,
      'residue_index': number,
      **dict.fromkeys(('asym_id', 'entity_id', 'sym_id', 'seq_mask'), one),
    }
  )

  def normal(*shape: int) -> jax.Array:
    return jnp.asarray(rng.standard_normal(shape, np.float32))

  embeddings = dh.TrunkEmbeddings(
    single=normal(n_token, 384),
    pair=normal(n_token, n_token, 128),
    target_feat=normal(n_token, 447),
  )
  head = cdh.cached_diffusion_head(config(n_block, quick, True))
  # Nothing is left at zero.
  params = jax.tree.map(
    lambda x: x + 0.02 * normal(*x.shape),
    jax.jit(head.init)(jax.random.key(0), batch, embeddings),
  )
  conditioning = None
  if mode == 'step':
    conditioning = jax.jit(head.precompute)(params, batch, embeddings)
  n_sample = _SAMPLES if mode == 'step' else 2
  shape = batch.atoms.pred_dense_atom_mask.shape
  batch = jax.tree.map(jnp.asarray, batch)
  positions = 16 * normal(n_sample, *shape, 3)
  return (params, batch, embeddings, conditioning, positions, jnp.float32(16))


def function(
  candidate: str, mode: Mode, n_token: int, n_block: int, quick: bool
) -> Callable[..., Any]:
  """A candidate as a function of `inputs`."""
  del n_token
  own = config(n_block, quick, candidate != 'kept')
  if candidate == 'kept':
    own = dataclasses.replace(
      own, atoms=dataclasses.replace(own.atoms, remat=False)
    )
  head = cdh.cached_diffusion_head(own)

  def step(params, batch, embeddings, conditioning, positions, level):
    def one(x):
      return dh.diffusion_head(params, x, level, batch, embeddings, config=own)

    if candidate == 'cached':
      return head.denoise(params, conditioning, positions, level)
    if candidate == 'jit':
      return jax.vmap(one)(positions)
    return jax.lax.map(one, positions)

  def training(params, batch, embeddings, conditioning, positions, level):
    def loss(params, embeddings):
      shared = head.precompute(params, batch, embeddings)
      levels = jnp.stack([level, level / 4])
      found = jax.vmap(
        lambda x, t: head.denoise(params, shared, x[None], t)[0]
      )(positions, levels)
      return jnp.mean(jnp.sin(found))

    return jax.value_and_grad(loss, (0, 1))(params, embeddings)

  return step if mode == 'step' else training
