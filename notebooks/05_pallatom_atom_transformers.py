# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Pallatom: sparse atom transformers
#
# The atom encoder and decoders of an all-atom diffusion model of proteins
# (seed document 002, github.com/tmatteso/diffusion @ 39c8d25a): atoms see the
# atoms of 31 residues around them. This notebook runs the encoder and three
# chained decoders on a real protein, shows who sees whom, and what the sparse
# pair tensors cost, and what is left of that when they are never made.
#
# Parameters are random: nothing here is a prediction.

# %%
# %matplotlib inline
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import structattn_jax as sa
from structattn_jax import data
from structattn_jax.reference import pallatom as oracle
from structattn_jax.verification import systems

# Parity with float64 means little through TF32 units.
jax.config.update('jax_default_matmul_precision', 'highest')

BLUE, LIGHT, ORANGE, GREY = '#2f6db3', '#a9c8e8', '#c4501b', '#8a8f98'

# %% [markdown]
# ## 1. What the featuriser makes
#
# Every residue has five atoms, N, CA, C, O and CB, and the same alanine
# conformer, whatever its type; CB counts as an unknown element. What differs
# between residues are the noisy positions. The protein is human dihydrofolate
# reductase from 1S3V; a glycine's CB sits on its CA here.

# %%
path, ligand_path = data.example('1s3v')
structure = data.load_structure(path, ligand=ligand_path)
names = ('N', 'CA', 'C', 'O', 'CB')
conformer = np.array(
  [
    [-0.525, 1.363, 0],
    [0, 0, 0],
    [1.526, 0, 0],
    [0.627, 1.062, 0],
    [-0.529, -0.774, -1.205],
  ]
)
element = np.eye(4)[[0, 1, 1, 2, 3]]

positions = []
for residue in np.flatnonzero(structure.residue_kind == 'protein'):
  rows = np.flatnonzero(structure.atom_residue == residue)
  own = dict(
    zip(structure.atom_name[rows], structure.position[rows], strict=True)
  )
  own.setdefault('CB', own['CA'])
  positions.append([own[name] for name in names])
positions = np.array(positions)
n_token = len(positions)
n_atom = 5 * n_token
tok_idx = np.repeat(np.arange(n_token, dtype=np.int32), 5)
print(n_token, 'residues,', n_atom, 'atoms')

# %%
rng = np.random.default_rng(0)
sigma_data, noise_level = 16.0, 8.0
crystal = positions.reshape(-1, 3) - positions.mean((0, 1))
noisy = crystal + noise_level * rng.standard_normal(crystal.shape)


def normal(*shape):
  return rng.standard_normal(shape, np.float32)


inputs = {
  'ref_pos': np.tile(conformer, (n_token, 1)).astype(np.float32),
  'ref_element': np.tile(element, (n_token, 1)).astype(np.float32),
  'ref_space_uid': np.zeros(n_atom, np.int32),
  's_input': normal(n_token, 64),
  'z_input': normal(n_token, n_token, 32),
  'r_scaled': (noisy / np.hypot(sigma_data, noise_level)).astype(np.float32),
}

# %% [markdown]
# ## 2. Who sees whom
#
# `build_sparse_pairs` lists for every atom the atoms of its window: residues
# less than 16 apart, so 31 of them. The published code compares all atoms with
# all; here two binary searches do, with the same result. Rows at both ends have
# fewer neighbours; their spare slots hold the last atom and are masked.

# %%
neighbours, valid = sa.pallatom.build_sparse_pairs(tok_idx)
by_definition = np.abs(tok_idx[:, None] - tok_idx) < 16
listed = np.zeros_like(by_definition)
listed[np.nonzero(valid)[0], neighbours[valid]] = True
assert np.array_equal(listed, by_definition)
print('neighbour slots:', neighbours.shape, f'used: {valid.mean():.0%}')

# %% [markdown]
# Atoms are sorted by residue, so a row's neighbours are one range of atoms, and
# a block of rows needs one window of atoms. `plan_neighbours` cuts the atoms
# into such blocks, of whole residues. The windows are as wide as the lists, but
# for the two residues that a block of three adds.

# %%
plan = sa.pallatom.plan_neighbours(tok_idx)
print(plan.sizes)
figure, axes = plt.subplots(1, 2, figsize=(11, 5), layout='constrained')
axes[0].imshow(by_definition, cmap='Blues', interpolation='nearest')
axes[0].set_title(f'neighbours: {by_definition.mean():.0%} of all pairs')
shown = by_definition[:150, :250]
axes[1].imshow(shown, cmap='Blues', interpolation='nearest', aspect='auto')
for block in range(150 // plan.sizes.n_query):
  start, key = plan.atom_start[block], plan.key_start[block]
  axes[1].add_patch(
    plt.Rectangle(
      (key - 0.5, start - 0.5),
      plan.sizes.n_key,
      plan.sizes.n_query,
      fill=False,
      color=ORANGE,
    )
  )
axes[1].set_xlim(-1, 250)
axes[1].set_title('query blocks and their windows, first atoms')
for ax in axes:
  ax.set_xlabel('atom m')
  ax.set_ylabel('atom l')
plt.show()

# %% [markdown]
# ## 3. Encoder and three chained decoders
#
# The encoder pools atoms to residues (`s_i`) and leaves skips for the decoders.
# Each of these updates positions and hands its context on. In the whole model a
# trunk changes `s` and `z` between decoders; there is none here.
#
# The default implementation, *blocked*, never makes the pair tensor: `p_skip` is a
# `PairSkip`, a few vectors per atom, and the last decoder makes `p` because it
# is asked to.

# %%
encoder_config = sa.pallatom.AtomFeatureEncoderConfig(
  c_atom=32, c_pair=8, c_out=64
)
decoder_config = sa.pallatom.AtomAttentionDecoderConfig()
encoder = sa.pallatom.transform_atom_feature_encoder(encoder_config)
decoder = sa.pallatom.transform_atom_attention_decoder(decoder_config)
keys = jax.random.split(jax.random.key(0), 4)
params = encoder.init(keys[0], **inputs, tok_idx=tok_idx)


def decoder_inputs(features, context):
  return {
    'q_skip': features.q_skip,
    'p_skip': features.p_skip,
    'c_skip': features.c_skip,
    'c': context,
    's': features.s_i,
    'z': jnp.asarray(inputs['z_input']),
  }


first = jax.jit(encoder.apply)(params, **inputs, tok_idx=tok_idx, plan=plan)
units = [
  decoder.init(key, **decoder_inputs(first, first.c_l), tok_idx=tok_idx)
  for key in keys[1:]
]


@jax.jit
def chain(params, units, r_scaled):
  features = encoder.apply(
    params, **inputs | {'r_scaled': r_scaled}, tok_idx=tok_idx
  )
  context, queries, updates = features.c_l, [], []
  for unit in units:
    out = decoder.apply(
      unit,
      **decoder_inputs(features, context),
      tok_idx=tok_idx,
      return_pair=unit is units[-1],
    )
    context = out.c_out
    queries.append(out.q)
    updates.append(out.r_update)
  return features, out, jnp.stack(queries), jnp.stack(updates)


features, last, queries, updates = chain(params, units, inputs['r_scaled'])
for name in ('s_i', 'q_skip', 'c_skip', 'c_l'):
  print(name.ljust(10), getattr(features, name).shape)
print(
  'p_skip'.ljust(10),
  {
    name: getattr(features.p_skip, name).shape
    for name in ('query', 'key', 'position', 'inverse_square')
  },
)
for name in ('q', 'p', 'r_update', 'c_out'):
  print(name.ljust(10), getattr(last, name).shape)
print('sum of updates'.ljust(10), updates.sum(0).shape)

# %% [markdown]
# The same in float64, by loops over atoms in NumPy, for the encoder and the
# first decoder. The largest difference relative to the largest value:

# %%
reference = oracle.atom_feature_encoder(
  systems.torch_names(params, 'atom_feature_encoder'),
  **{
    name: x.astype(np.float64) if x.dtype == np.float32 else x
    for name, x in inputs.items()
  },
  tok_idx=tok_idx,
  num_block=encoder_config.num_block,
  num_head=encoder_config.num_head,
)
dense_skip = features.p_skip.dense(neighbours, valid)
found = features._replace(p_skip=dense_skip)
for name, got, want in zip(found._fields, found, reference, strict=True):
  error = np.abs(np.asarray(got, np.float64) - want).max()
  print(f'{name:8} {error / np.abs(want).max():.0e}')
s_i, q_skip, c_skip, p_skip, c_l = reference
reference = oracle.atom_attention_decoder(
  systems.torch_names(units[0], 'atom_attention_decoder'),
  q_skip,
  p_skip,
  c_skip,
  c_l,
  s_i,
  inputs['z_input'].astype(np.float64),
  tok_idx,
  num_block=decoder_config.num_block,
  num_head=decoder_config.num_head,
)
error = np.abs(np.asarray(updates[0], np.float64) - reference[2]).max()
print(f'r_update {error / np.abs(reference[2]).max():.0e}')

# %% [markdown]
# ## 4. A published peculiarity: how far noise travels
#
# Keys and values come from the context `c`, and queries are never keys. In the
# encoder `c` knows the residue and nothing of the noisy positions: `q_skip` of
# an atom depends on its own noise alone. The pooled `s_i` brings the first
# decoder the noise of the own residue. Only from the second decoder on, whose
# context contains `s_i`, do residues hear of their neighbours (and through the
# trunk, which is missing here). The library keeps this: published parameters
# were trained with it.

# %%
window = slice(450, 480)


def own_rows(r_scaled):
  features, _, queries, _ = chain(params, units, r_scaled)
  stages = (features.q_skip, queries[0], queries[1])
  return [x[window].sum(-1) for x in stages]


jacobians = jax.jacrev(own_rows)(jnp.asarray(inputs['r_scaled']))
figure, axes = plt.subplots(3, 1, figsize=(11, 4.5), layout='constrained')
titles = ('encoder', 'first decoder', 'second decoder')
for ax, jacobian, title in zip(axes, jacobians, titles, strict=True):
  depends = np.linalg.norm(jacobian, axis=-1) > 0
  count = depends.sum(1)
  ax.imshow(depends[:, 300:640], cmap='Blues', aspect='auto', vmax=1.3)
  ax.set_xticks(np.arange(0, 340, 50), np.arange(300, 640, 50))
  ax.set_yticks((0, 29), (450, 479))
  ax.set_title(f'{title}: q depends on the noise of {count.max()} atoms')
  ax.set_ylabel('atom')
axes[-1].set_xlabel('noisy atom')
plt.show()

# %%
counts = [
  int((np.linalg.norm(jacobian, axis=-1) > 0).sum(1).max())
  for jacobian in jacobians
]
assert counts == [1, 5, 31 * 5]

# %% [markdown]
# ## 5. Memory
#
# Bytes of temporaries of the compiled encoder, at the channels of the published
# main trunk and 5 atoms per residue. *published* is upstream's form; it grows by
# what tensors over atoms and neighbours take. *blocked* keeps one block of them.

# %%
SIZES = (500, 1000, 2000, 4000)


def temporaries(n_atom, form, training):
  n_token = n_atom // 5
  tok_idx = np.repeat(np.arange(n_token, dtype=np.int32), 5)
  encoder = sa.pallatom.transform_atom_feature_encoder(
    sa.pallatom.AtomFeatureEncoderConfig(implementation=form)
  )

  def shape(*sizes, dtype=np.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)

  floats = {
    'ref_pos': shape(n_atom, 3),
    'ref_element': shape(n_atom, 4),
    's_input': shape(n_token, 256),
    'z_input': shape(n_token, n_token, 128),
    'r_scaled': shape(n_atom, 3),
  }
  uid = shape(n_atom, dtype=np.int32)

  def forward(params, floats, uid):
    out = encoder.apply(params, **floats, ref_space_uid=uid, tok_idx=tok_idx)
    return out.s_i, out.q_skip

  def loss(*arguments):
    return sum(jnp.mean(x**2) for x in forward(*arguments))

  params = jax.eval_shape(
    lambda floats, uid: encoder.init(
      jax.random.key(0), **floats, ref_space_uid=uid, tok_idx=tok_idx
    ),
    floats,
    uid,
  )
  fn = jax.value_and_grad(loss) if training else forward
  compiled = jax.jit(fn).lower(params, floats, uid).compile()
  return compiled.memory_analysis().temp_size_in_bytes


measured = {
  (form, training): [temporaries(n, form, training) for n in SIZES]
  for form in ('published', 'blocked')
  for training in (False, True)
}

# %%
figure, ax = plt.subplots(figsize=(6, 4), layout='constrained')
for (form, training), values in measured.items():
  ax.loglog(
    SIZES,
    np.array(values) / 1e6,
    marker='o',
    color=GREY if form == 'published' else BLUE,
    ls='--' if training else '-',
    label=f'{form}, {"with gradient" if training else "forward"}',
  )
ax.set_xlabel('atoms')
ax.set_ylabel('temporaries, MB')
ax.set_xticks(SIZES, map(str, SIZES))
ax.minorticks_off()
ax.legend(frameon=False)
plt.show()
for training in (False, True):
  ratio = (
    measured['published', training][-1] / measured['blocked', training][-1]
  )
  kind = 'with gradient' if training else 'forward'
  print(f'{SIZES[-1]} atoms, {kind}: {ratio:.0f} times less')

# %% [markdown]
# What to remember:
#
# * Plan on the host, once per index vector; give plans of several proteins the
#   same sizes (`PlanSizes.union`) and they share a compilation.
# * Tokens in any order, or parity with published tensors:
#   `implementation='published'`.
# * `atom_mask` is for padding; the published model has none.
