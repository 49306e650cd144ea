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
# # Boltz's atom encoder: windows, attention, a cached denoising step
#
# Boltz follows Suppl. Algs. 5 to 7 of Abramson et al. (2024) with windows of its
# own, and computes much of a denoising step again and again. This notebook
# shows what a window sees at the ends of the atom list against AlphaFold 3's
# rule, where atoms of 1S3V look, and what a step costs when everything that
# samples share is computed once.
#
# The parameters are random, as no published ones are distributed here: the maps
# show what the geometry and the windows allow, not what a trained model does.
# `structattn convert --part score_model boltz1_conf.ckpt out.safetensors` takes
# the published ones out of their checkpoint.

# %%
# %matplotlib inline
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import structattn_jax as sa
from structattn_jax import data
from structattn_jax.common import numerics
from structattn_jax.components import parameters as pm
from structattn_jax.components import windows
from structattn_jax.network.boltz import transformers as bt

# Parity with float64 means little through TF32 units.
jax.config.update('jax_default_matmul_precision', 'highest')

BLUE, LIGHT, ORANGE, GREY = '#2f6db3', '#a9c8e8', '#c4501b', '#d7d9dd'

# %% [markdown]
# The complex is human dihydrofolate reductase with the inhibitor TQD. One token
# per amino acid, one per atom of the ligand; the atoms are padded to whole
# windows of 32.

# %%
path, ligand_path = data.example('1s3v')
structure = data.load_structure(path, ligand=ligand_path)
features = data.featurise(structure)
atoms = data.boltz_atom_features(features)
n_atom, n_padded = features.n_atom, len(atoms.atom_mask)
print(f'{features.n_token} tokens, {n_atom} atoms, padded to {n_padded}')

# %% [markdown]
# ## 1. What a window sees at the ends
#
# Window $k$ has the 32 query atoms $32k \ldots 32k+31$ and 128 keys centred on
# them, $32k - 48 \ldots 32k + 79$. Boltz, like the paper, leaves the keys beyond
# the ends empty. AlphaFold 3's code moves the whole window inward until all of
# its keys are atoms. The first and last window of Boltz therefore see 80 atoms
# or fewer, AlphaFold 3's always 128.

# %%

boltz_keys = (
  np.asarray(windows.key_windows(jnp.arange(1, n_padded + 1), 32, 128)) - 1
)
boltz_keys = np.where(atoms.atom_mask[boltz_keys], boltz_keys, -1)
n_window = len(boltz_keys)
n_real = -(-n_atom // 32)
shifted = np.clip(32 * np.arange(n_window) - 48, 0, n_atom - 128)
seen = {
  'Boltz: empty beyond the ends': [set(row[row >= 0]) for row in boltz_keys],
  'AlphaFold 3: moved inward': [set(range(s, s + 128)) for s in shifted],
}
figure, axes = plt.subplots(2, 2, figsize=(11, 4.4), layout='constrained')
for row, (title, keys) in zip(axes, seen.items(), strict=True):
  for ax, shown, span in (
    (row[0], range(4), (-60, 190)),
    (row[1], range(n_window - 4, n_window), (n_atom - 190, n_padded + 60)),
  ):
    for y, k in enumerate(shown):
      own = np.array(sorted(keys[k]))
      ax.barh(
        y, own.max() - own.min() + 1, left=own.min(), color=LIGHT, height=0.7
      )
      ax.barh(y, 32, left=32 * k, color=BLUE, height=0.35)
      ax.text(span[0] + 3, y, f'{len(own)} keys', va='center', fontsize=8)
    ax.axvspan(span[0], 0, color=GREY, alpha=0.5, lw=0)
    ax.axvspan(n_atom, span[1], color=GREY, alpha=0.5, lw=0)
    ax.set_xlim(span)
    ax.set_yticks(range(4), [f'window {k}' for k in shown])
    ax.invert_yaxis()
  row[0].set_title(title + ' (dark: queries)', fontsize=10)
  row[1].set_title('the last windows', fontsize=10)
for ax in axes[1]:
  ax.set_xlabel('atom')
plt.show()

# %% [markdown]
# A padded query in the last window still attends, but nothing reads it: padding
# belongs to no token. Rows whose keys are all padding attend to nothing here;
# upstream subtracts $10^6$ from all of their logits instead, which in float32
# rounds those logits to sixteenths.
#
# ## 2. Where atoms look
#
# An encoder with random parameters, made large enough that attention is not
# flat. `precompute` takes everything that does not depend on noisy positions.

# %%
config = sa.boltz.Boltz1AtomAttentionConfig(token_s=64, token_z=32)
functions = sa.boltz.cached_atom_attention(config)
rng = np.random.default_rng(0)
params = jax.tree.map(
  lambda x: (
    x + 0.6 * x.shape[0] ** -0.5 * rng.standard_normal(x.shape, np.float32)
  ),
  functions.init(jax.random.key(0)),
)
n_token = features.n_token
single = jnp.asarray(rng.standard_normal((n_token, 64), np.float32))
pair = jnp.asarray(rng.standard_normal((n_token, n_token, 32), np.float32))
context = jax.jit(functions.precompute)(params, atoms, single, pair)
print(
  'biases of a layer:',
  context.encoder.biases[0].shape,
  '(window, head, query, key)',
)

# %% [markdown]
# The weights of the first layer, from its parts: the adaptive layer norm whose
# scale and shift are in the context, queries and keys once per atom, windows of
# keys as slices, the pair bias.

# %%
stack = pm.below(
  params, 'atom_attention_encoder/atom_encoder/diffusion_transformer/'
)
layer = bt.layers(stack)[0]
terms = context.encoder.terms[0]


@jax.jit
def attention_weights(positions):
  weights = params['atom_attention_encoder/r_to_q_trans']['weights']
  q = context.queries + positions @ weights
  x = terms.attention_scale * numerics.layer_norm(q) + terms.attention_shift
  own = pm.below(layer, 'pair_bias_attn/')
  query = bt.linear(own, 'proj_q', x).reshape(n_window, 32, 4, 32)
  key = windows.key_windows(bt.linear(own, 'proj_k', x), 32, 128)
  key = key.reshape(n_window, 128, 4, 32)
  logits = jnp.einsum('wqhd,wkhd->whqk', query, key) * 32**-0.5
  is_key = windows.key_windows(context.atom_mask, 32, 128)
  return numerics.masked_softmax(
    logits + context.encoder.biases[0], is_key[:, None, None]
  )


sigma = 4.0
position = np.zeros((n_padded, 3), np.float32)
position[:n_atom] = features.atoms.position - features.atoms.position.mean(0)
noisy = position + sigma * rng.standard_normal(position.shape, np.float32)
scaled = jnp.asarray(noisy / np.sqrt(sigma**2 + 16.0**2))
attention = np.asarray(attention_weights(scaled))

# %%
is_ligand = features.tokens.is_ligand[features.atoms.token_index]
ligand_window = int(np.flatnonzero(is_ligand)[0] // 32)
uid = np.asarray(atoms.ref_space_uid)
figure, axes = plt.subplots(2, 4, figsize=(13, 5), layout='constrained')
for row, k in zip(axes, (0, ligand_window), strict=True):
  keys = 32 * k - 48 + np.arange(128)
  outside = (keys < 0) | (keys >= n_atom)
  for head, ax in enumerate(row):
    shown = np.ma.masked_array(attention[k, head], np.tile(outside, (32, 1)))
    image = ax.imshow(
      shown,
      aspect='auto',
      cmap='Blues',
      vmin=0,
      vmax=0.2,
      extent=(keys[0] - 0.5, keys[-1] + 0.5, 32 * k + 31.5, 32 * k - 0.5),
      interpolation='nearest',
    )
    ax.set_facecolor(GREY)
    borders = np.flatnonzero(np.diff(uid[32 * k : 32 * k + 32])) + 32 * k + 0.5
    ax.hlines(borders, keys[0], keys[-1], color=ORANGE, lw=0.4, alpha=0.7)
    ax.set_title(f'window {k}, head {head}', fontsize=9)
  row[0].set_ylabel('query atom')
for ax in axes[1]:
  ax.set_xlabel('key atom')
figure.colorbar(image, ax=axes, label='weight (cut at 0.2)', shrink=0.8)
plt.show()

# %% [markdown]
# Grey keys do not exist. Orange lines separate residues; in the second row the
# inhibitor begins in the last rows. The rectangles are pairs of tokens: what
# comes from the trunk's pair is the same for all atoms of two tokens, and for
# the ligand, whose atoms are tokens, another for each atom. Only atoms of one
# residue share a reference conformer, so only they know a distance. With random
# parameters a head gives them about as much as it would if it were flat:

# %%
block = uid[:n_atom, None] == uid[None, :n_atom]
share = []
for k in range(n_real):
  keys = 32 * k - 48 + np.arange(128)
  inside = (keys >= 0) & (keys < n_atom)
  queries = np.arange(32 * k, min(32 * k + 32, n_atom))
  same = block[np.ix_(queries, keys[inside])]
  weights = attention[k][:, : len(queries), inside]
  share.append((weights * same).sum(-1).mean(1))
  assert np.allclose(weights.sum(-1), 1, atol=1e-5)
print(
  'weight on atoms of the own residue, by head:', np.mean(share, 0).round(2)
)
print(
  'the same if attention were flat:', np.round(block.sum(1).mean() / 128, 2)
)

# %% [markdown]
# ## 3. A cached denoising step
#
# Of a step, only the noisy positions and the token activations are new. The
# context holds the rest: pair biases of all six layers and what their adaptive
# norms and gates take from the conditioning. Samples share it:
# `jax.vmap(encode, (None, None, 0))`.


# %%
@jax.jit
def step(params, context, positions, token_act):
  def one(positions, token_act):
    encoded = functions.encode(params, context, positions)
    update = functions.decode(params, context, token_act, encoded.atoms)
    return encoded.tokens, update

  return jax.vmap(one)(positions, token_act)


@jax.jit
def uncached(params, atoms, single, pair, positions, token_act):
  context = functions.precompute(params, atoms, single, pair)
  return step(params, context, positions, token_act)


samples = 3
many = jnp.stack([scaled + 0.01 * i for i in range(samples)])
token_act = jnp.asarray(
  rng.standard_normal((samples, n_token, 128), np.float32)
)
cached = step(params, context, many, token_act)
whole = uncached(params, atoms, single, pair, many, token_act)
for got, want in zip(cached, whole, strict=True):
  assert np.abs(got - want).max() < 1e-5 * np.abs(want).max()
print('tokens', cached[0].shape, 'updates', cached[1].shape)


# %%
def cpu_milliseconds(function, *arguments):
  jax.block_until_ready(function(*arguments))
  times = []
  for _ in range(5):
    start = time.process_time()
    jax.block_until_ready(function(*arguments))
    times.append(time.process_time() - start)
  return 1e3 * min(times)


one = (many[:1], token_act[:1])
rows = {
  'precompute, once': cpu_milliseconds(
    jax.jit(functions.precompute), params, atoms, single, pair
  ),
  'step, everything anew': cpu_milliseconds(
    uncached, params, atoms, single, pair, *one
  ),
  'step, cached': cpu_milliseconds(step, params, context, *one),
  f'step, cached, {samples} samples': cpu_milliseconds(
    step, params, context, many, token_act
  ),
}
for name, milliseconds in rows.items():
  print(f'{name:28s} {milliseconds:7.1f} ms of CPU')

# %%
figure, ax = plt.subplots(figsize=(7, 2.2), layout='constrained')
ax.barh(list(rows), list(rows.values()), color=[LIGHT, ORANGE, BLUE, BLUE])
ax.invert_yaxis()
ax.set_xlabel(f'CPU ms, {n_padded} atoms (this machine; `make bench` has more)')
plt.show()

# %% [markdown]
# The positions of a sample move along
# $x = c_{skip} x_{noisy} + c_{out} \, r_{update}$ with
# $c_{skip} = \sigma_d^2 / (\sigma^2 + \sigma_d^2)$ and
# $c_{out} = \sigma \sigma_d / \sqrt{\sigma^2 + \sigma_d^2}$. With random
# parameters this leads nowhere, which is the point of not showing it.
