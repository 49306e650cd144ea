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
# # Atom cross attention: windows, pooling, denoising
#
# Suppl. Algs. 5 to 7 and 23 to 26 of Abramson et al. (2024): how AlphaFold 3
# lists the atoms of a complex and lets them attend in windows, how atoms become
# tokens and tokens atoms, and a small encoder and decoder that learn to take
# noise off atom positions.
#
# The complex is 1S3V, human dihydrofolate reductase with the inhibitor TQD. No
# published parameters are used. The network at the end is fitted to this one
# structure, so what it does is no prediction; its limits are shown, too.

# %%
# %matplotlib inline
import dataclasses

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import structattn_jax as sa
from structattn_jax import data
from structattn_jax.components import functional
from structattn_jax.components import parameters as pm
from structattn_jax.network.alphafold3 import atom_layout, window_plan
from structattn_jax.network.alphafold3 import diffusion_transformer as dt
from structattn_jax.network.alphafold3 import transformer_parameters as tp

# Parity with float64 means little through TF32 units.
jax.config.update('jax_default_matmul_precision', 'highest')

BLUE, LIGHT, ORANGE, GREY = '#2f6db3', '#a9c8e8', '#c4501b', '#8a8f98'

# %% [markdown]
# ## 1. Tokens and atoms
#
# One token per amino acid, one per atom of the ligand. Atoms are listed token
# by token in the order of the chemical component dictionary. AF3's own layout
# is dense: 24 slots for every token, whatever it is.

# %%
path, ligand_path = data.example('1s3v')
structure = data.load_structure(path, ligand=ligand_path)
features = data.featurise_alphafold3(structure, seed=0)
tokens, atoms = features.tokens, features.atoms
batch = data.alphafold3_batch(features)
plan, ref = data.alphafold3_windows(features)
n_token, n_atom = features.n_token, features.n_atom
is_ligand = tokens.is_ligand[atoms.token_index]
published = batch['token_atoms_to_queries:gather_idxs'].size
print(f'{n_token} tokens, {n_atom} atoms ({is_ligand.sum()} of the ligand)')
print(f'rows of atoms: {published} as published, {plan.n_atom} here')

# %%
figure, ax = plt.subplots(figsize=(11, 2.6), layout='constrained')
slots = batch['pred_dense_atom_mask'].astype(int)
slots[tokens.is_ligand] *= 2
colours = plt.matplotlib.colors.ListedColormap(['#f1f1ee', BLUE, ORANGE])
ax.imshow(slots.T, aspect='auto', cmap=colours, interpolation='nearest')
ax.set_xlabel('token')
ax.set_ylabel('slot')
ax.set_title(f'dense layout: {100 * n_atom / slots.size:.0f} % of slots used')
plt.show()

# %% [markdown]
# ## 2. What a window sees
#
# The flat list is cut into windows of 32 query atoms. The keys of a window are
# the 128 atoms around it in the list. At both ends the keys are shifted so that
# they stay inside.

# %%
queries = np.arange(plan.n_atom).reshape(plan.n_window, plan.num_queries)
keys = plan.key_start[:, None] + np.arange(plan.num_keys)
figure, ax = plt.subplots(figsize=(11, 4), layout='constrained')
for window in range(plan.n_window):
  real = queries[window][queries[window] < n_atom]
  ax.barh(window, plan.num_keys, left=keys[window, 0], color=LIGHT, height=0.9)
  ax.barh(window, len(real), left=real[0], color=BLUE, height=0.9)
ax.axvspan(n_atom - is_ligand.sum(), n_atom, color=ORANGE, alpha=0.25, lw=0)
ax.invert_yaxis()
ax.set_xlabel('atom')
ax.set_ylabel('window')
ax.set_title('queries (dark) and keys (light); the ligand is shaded')
plt.show()

# %% [markdown]
# Near in the list is not near in space. A window of protein atoms sees its own
# stretch of chain. The window of the ligand sees the ligand and the last
# residues of the chain, wherever they are: what lies around the ligand reaches
# it through the tokens alone.

# %%
position = atoms.position - atoms.position.mean(0)
is_ca = (atoms.dense_slot == 1) & ~is_ligand
trace = position[is_ca]
ligand_window = plan.n_window - 1
protein_window = 20


def draw(ax, window):
  inside = keys[window][keys[window] < n_atom]
  own = queries[window][queries[window] < n_atom]
  ax.plot(*trace[:, :2].T, color=GREY, lw=1, alpha=0.6)
  ax.scatter(*position[is_ligand][:, :2].T, s=22, color=ORANGE, alpha=0.5)
  ax.scatter(*position[inside][:, :2].T, s=9, color=LIGHT)
  ax.scatter(*position[own][:, :2].T, s=12, color=BLUE)
  ax.set_aspect('equal')
  ax.set_xlabel('x, angstrom')


figure, axes = plt.subplots(
  1, 2, figsize=(11, 5), layout='constrained', sharey=True
)
draw(axes[0], protein_window)
draw(axes[1], ligand_window)
axes[0].set_title(f'window {protein_window}: a stretch of the chain')
axes[1].set_title(f'window {ligand_window}: the ligand')
axes[0].set_ylabel('y, angstrom')
plt.show()

distance = np.linalg.norm(
  position[is_ligand][:, None] - position[~is_ligand][None], axis=-1
)
near = distance.min(0) < 5.0
seen = np.isin(np.flatnonzero(~is_ligand), keys[ligand_window])
pocket = np.unique(tokens.author_index[atoms.token_index[~is_ligand][near]])
print(f'{near.sum()} protein atoms of {len(pocket)} residues are within')
print('5 angstrom of the ligand:', *pocket)
print(f'{(near & seen).sum()} of them are keys of window {ligand_window}')

# %% [markdown]
# ## 3. Reference conformers
#
# Positions of the structure are what the model is to find. What it is given is
# a conformer of each residue and ligand alone, generated from its bonds, turned
# and moved at random. Only offsets within one conformer mean anything, so the
# pair embedding uses them where `ref_space_uid` of query and key agree.
#
# The released code reads the uid of keys from the wrong layout (a public issue
# of its repository); the released parameters were trained that way, so this is
# the default, and `uid_rule='corrected'` the alternative.

# %%
query_uid = window_plan.query_blocks(plan, jnp.asarray(plan.space_uid))
query_real = window_plan.query_blocks(plan, jnp.asarray(plan.atom_mask))
both = (
  query_real[:, :, None]
  & window_plan.atom_windows(plan, plan.atom_mask)[:, None]
)
same = {}
for rule, key_uid in (
  ('corrected', plan.space_uid),
  ('official', plan.official_key_space_uid),
):
  key_uid = window_plan.atom_windows(plan, jnp.asarray(key_uid))
  same[rule] = both & (query_uid[:, :, None] == key_uid[:, None])
  print(f'{rule:10} {int(same[rule].sum()):6} pairs marked as one conformer')
right = int((same['official'] & same['corrected']).sum())
print(f'of which both mark {right}')

# %%
figure = plt.figure(figsize=(11, 3.6), layout='constrained')
crystal = position[is_ligand]
for i, (title, x) in enumerate(
  [('in the crystal', crystal)]
  + [
    (
      f'conformer, seed {seed}',
      data.featurise_alphafold3(structure, seed=seed).atoms.ref_pos[is_ligand],
    )
    for seed in (0, 1)
  ]
):
  ax = figure.add_subplot(1, 3, i + 1, projection='3d')
  length = np.linalg.norm(crystal[:, None] - crystal[None], axis=-1)
  for a, b in np.argwhere(np.triu((length > 0) & (length < 1.7))):
    ax.plot(*x[[a, b]].T, color=ORANGE, lw=2)
  ax.set_title(title)
  ax.set_axis_off()
plt.show()

# %% [markdown]
# ## 4. Encoder and decoder, in blocks and as published
#
# Parameters have upstream's names. `precompute` makes everything that is the
# same for all diffusion steps and samples, `encode` and `decode` the rest; all
# three are closures over one config. The published form is there as well, on
# its dense layout.

# %%
attention = tp.CrossAttentionConfig(num_head=4, key_dim=32, value_dim=32)
config = sa.alphafold3.AtomCrossAttConfig(
  per_atom_channels=32,
  per_atom_pair_channels=8,
  per_token_channels=64,
  atom_transformer=tp.CrossAttTransformerConfig(
    num_blocks=2, attention=attention
  ),
  final_init='linear',
  remat=False,  # Memory is no concern here.
)
# The trunk's single representation: here residue type and place in the chain.
place = np.arange(n_token)[:, None] / 200 ** (np.arange(12) / 12)
single = np.concatenate(
  [np.eye(31)[tokens.residue_type], np.sin(place), np.cos(place)], -1
)
single = jnp.asarray(single, jnp.float32)
table = sa.alphafold3.atom_cross_att_parameters(
  config, single_channels=single.shape[-1], pair_channels=None
)
atom_params = pm.init_parameters(table, jax.random.key(0))
print(len(table), 'modules, such as')
for name in list(table)[:3] + list(table)[-3:]:
  print(' ', name)

# %%
positions = window_plan.pad_atoms(plan, position)
_, precompute, encode, decode = sa.alphafold3.cached_atom_cross_att(config)
conditioning = precompute(atom_params, plan, ref, single)
encoding = encode(atom_params, conditioning, positions / 16)
update = decode(
  atom_params, conditioning, encoding.token_act, encoding.skip_connection
)
dense = atom_layout.DenseBatch.from_batch(batch)
as_published = sa.alphafold3.dense_atom_cross_att(
  dataclasses.replace(config, implementation='published')
)
dense_positions = atom_layout.atoms_to_dense(plan, positions / 16)
encoded = as_published.encode(atom_params, dense, dense_positions, single)
dense_update = as_published.decode(
  atom_params, dense, encoded.token_act, encoded
)
for name, got, want in (
  ('token_act', encoding.token_act, encoded.token_act),
  ('position_update', atom_layout.atoms_to_dense(plan, update), dense_update),
):
  error = float(jnp.abs(got - want).max() / jnp.abs(want).max())
  print(f'{name:16} against the published form: {error:.1e} of the largest')
  assert error < 1e-5

# %% [markdown]
# **Pooling** (Alg. 5, line 16): a token is the mean of a rectified projection
# of its atoms. **Broadcast** (Alg. 6, line 1): an atom gets the projection of
# its token. Neither is an attention. By hand, for one residue:

# %%
token = 100
rows = np.flatnonzero(atoms.token_index == token)
weights = atom_params['diffusion_project_atom_features_for_aggr']['weights']
pooled = jax.nn.relu(encoding.skip_connection[rows] @ weights).mean(0)
print(
  'pooling by hand:',
  bool(jnp.allclose(pooled, encoding.token_act[token], atol=1e-5)),
)
weights = atom_params['diffusion_project_token_features_for_broadcast'][
  'weights'
]
broadcast = (encoding.token_act @ weights)[atoms.token_index]
most = np.argsort(-np.asarray(encoding.token_act).std(0))[:32]
first = 1430
first_token = atoms.token_index[first]
first_ligand = n_atom - is_ligand.sum(), n_token - is_ligand.sum()
figure, axes = plt.subplots(1, 3, figsize=(11, 4.2), layout='constrained')
for ax, title, x, begin, line in (
  (
    axes[0],
    'atoms after the encoder',
    encoding.skip_connection[first:n_atom],
    first,
    first_ligand[0],
  ),
  (
    axes[1],
    'tokens: mean of their atoms',
    encoding.token_act[first_token:, most],
    first_token,
    first_ligand[1],
  ),
  (
    axes[2],
    'broadcast back to atoms',
    broadcast[first:n_atom],
    first,
    first_ligand[0],
  ),
):
  limit = float(jnp.abs(x).max())
  extent = (0, x.shape[1], begin + len(x), begin)
  ax.imshow(
    x, aspect='auto', cmap='RdBu_r', vmin=-limit, vmax=limit, extent=extent
  )
  ax.axhline(line, color='k', lw=1)
  ax.set_title(title)
  ax.set_xlabel('channel')
axes[0].set_ylabel('atom: the last residues, then the ligand')
axes[1].set_ylabel('token')
plt.show()

# %% [markdown]
# The ligand (below the line) has one token per atom: for it, pooling and
# broadcast change nothing but the projection.
#
# ## 5. Denoising
#
# As in AF3's diffusion module: positions with Gaussian noise of standard
# deviation $\sigma$ per coordinate go through the encoder, a transformer over
# tokens (Alg. 23, two blocks here) and the decoder, whose update $F$ enters
# with the scale of the data, $\sigma_d = 16$ angstrom:
#
# $$\hat x = \frac{\sigma_d^2}{\sigma^2 + \sigma_d^2}\, x_{noisy}
# + \frac{\sigma_d\, \sigma}{\sqrt{\sigma^2 + \sigma_d^2}}\, F(x_{noisy}).$$
#
# Plain functions of a parameter tree, with optax around them.

# %%
token_config = tp.TransformerConfig(
  attention=tp.SelfAttentionConfig(num_head=4, key_dim=32, value_dim=32),
  num_blocks=2,
  super_block_size=2,
)
n_single = single.shape[-1] + 1
tables = {
  'atoms': table,
  'tokens': tp.transformer_parameters(
    token_config, config.per_token_channels, n_single, None
  ),
  'single': {'project': pm.linear(n_single, config.per_token_channels)},
}
start = {
  name: pm.init_parameters(own, jax.random.key(i))
  for i, (name, own) in enumerate(tables.items())
}
data_scale = 16.0
target = jnp.asarray(positions)
there = jnp.asarray(plan.atom_mask)[:, None]


def denoise(params, noisy, sigma):
  """Positions [n_atom, 3] in angstrom without their noise."""
  total = jnp.sqrt(sigma**2 + data_scale**2)
  own = params['atoms']
  conditioning = precompute(own, plan, ref, single, cache_terms=False)
  encoding = encode(own, conditioning, noisy / total)
  level = jnp.full((n_token, 1), jnp.log(sigma / data_scale) / 4)
  condition = jnp.concatenate([single, level], -1)
  project = functional.linear(params['single'], 'project', condition)
  act = encoding.token_act + project
  act = dt.transformer(
    params['tokens'], act, jnp.ones(n_token, bool), condition
  )
  update = decode(own, conditioning, act, encoding.skip_connection)
  return (data_scale / total) ** 2 * noisy + data_scale * sigma / total * update


def add_noise(key, sigma):
  noise = sigma * jax.random.normal(key, target.shape)
  return jnp.where(there, target + noise, 0)


def loss(params, key):
  """Mean square error in units of what is to be found at this noise."""
  key_noise, key_sigma = jax.random.split(key)
  log_sigma = jax.random.uniform(key_sigma, (), maxval=jnp.log(8.0))
  sigma = jnp.exp(log_sigma)  # 1 to 8 angstrom.
  found = denoise(params, add_noise(key_noise, sigma), sigma)
  error = jnp.sum(jnp.where(there, found - target, 0) ** 2) / (3 * n_atom)
  return error * (sigma**2 + data_scale**2) / (sigma * data_scale) ** 2


n_step = 400
optimiser = optax.chain(
  optax.clip_by_global_norm(1.0),
  optax.adam(optax.warmup_cosine_decay_schedule(0.0, 8e-3, 20, n_step)),
)


@jax.jit
def step(params, state, key):
  value, gradient = jax.value_and_grad(loss)(params, key)
  change, state = optimiser.update(gradient, state)
  return optax.apply_updates(params, change), state, value


params, state = start, optimiser.init(start)
print(f'{sum(x.size for x in jax.tree.leaves(params)):,} parameters')
losses = []
for key in jax.random.split(jax.random.key(1), n_step):
  params, state, value = step(params, state, key)
  losses.append(value)
losses = np.asarray(losses)
print(f'loss: first {losses[0]:.2f}, last 50 {losses[-50:].mean():.3f}')

# %%
run = jax.jit(denoise)


def rmsd(x):
  return float(jnp.sqrt(jnp.sum(jnp.where(there, x - target, 0) ** 2) / n_atom))


figure, axes = plt.subplots(1, 2, figsize=(11, 3.6), layout='constrained')
axes[0].semilogy(losses, color=LIGHT, lw=0.8)
smooth = np.convolve(losses, np.ones(20) / 20, 'valid')
axes[0].semilogy(np.arange(19, n_step), smooth, color=BLUE)
axes[0].set_xlabel('step')
axes[0].set_ylabel('loss (dark: mean of 20)')
levels = np.array([0.5, 1, 2, 3, 4, 6, 8, 12])
# The best linear estimate from each coordinate alone, without a network.
spread = float(position.std())
curves = {'noisy': [], 'shrunk towards the centre': [], 'denoised': []}
for i, sigma in enumerate(levels):
  noisy = add_noise(jax.random.key(100 + i), sigma)
  curves['noisy'].append(rmsd(noisy))
  shrunk = noisy * spread**2 / (spread**2 + sigma**2)
  curves['shrunk towards the centre'].append(rmsd(shrunk))
  curves['denoised'].append(rmsd(run(params, noisy, sigma)))
for (name, values), colour in zip(
  curves.items(), (GREY, ORANGE, BLUE), strict=True
):
  axes[1].plot(levels, values, 'o-', color=colour, label=name, ms=4)
axes[1].axvspan(1, 8, color=LIGHT, alpha=0.2, lw=0)
axes[1].set_xlabel('noise per coordinate, angstrom (shaded: fitted)')
axes[1].set_ylabel('RMSD, angstrom')
axes[1].legend(frameon=False)
plt.show()
for sigma, before, after in zip(
  levels, curves['noisy'], curves['denoised'], strict=True
):
  print(f'noise {sigma:4.1f}: RMSD {before:5.2f} -> {after:.2f} angstrom')
middle = list(levels).index(4)
assert curves['denoised'][middle] < 0.35 * curves['noisy'][middle]

# %% [markdown]
# Noise that was never seen, 4 angstrom per coordinate, before and after. Bonds
# are drawn where the crystal structure has them.

# %%
noisy = add_noise(jax.random.key(104), 4.0)
denoised = run(params, noisy, 4.0)
found = np.asarray(denoised)[:n_atom]
length = np.linalg.norm(crystal[:, None] - crystal[None], axis=-1)
ligand_bonds = np.argwhere(np.triu((length > 0) & (length < 1.7)))


def draw_structure(ax, x, title):
  backbone = np.isin(atoms.dense_slot, (0, 1, 2)) & ~is_ligand
  ax.plot(*position[backbone][:, :2].T, color=GREY, lw=3, alpha=0.35)
  ax.plot(*x[backbone][:, :2].T, color=BLUE, lw=1)
  for a, b in ligand_bonds:
    ax.plot(*x[is_ligand][[a, b], :2].T, color=ORANGE, lw=2)
  ax.set_title(title)
  ax.set_aspect('equal')
  ax.set_xlabel('x, angstrom')


figure, axes = plt.subplots(
  1, 3, figsize=(11, 4.2), layout='constrained', sharex=True, sharey=True
)
before, after = rmsd(noisy), rmsd(denoised)
draw_structure(
  axes[0], np.asarray(noisy)[:n_atom], f'noisy: RMSD {before:.2f} angstrom'
)
draw_structure(axes[1], found, f'denoised: RMSD {after:.2f} angstrom')
draw_structure(axes[2], position, 'crystal structure')
axes[0].set_ylabel('y, angstrom')
plt.show()
for name, part in (('protein', ~is_ligand), ('ligand', is_ligand)):
  error = np.linalg.norm(found - position, axis=-1)[part]
  print(f'{name:8} RMSD {np.sqrt(np.mean(error**2)):.2f} angstrom')

# %% [markdown]
# What was learnt? The network knows each token's type and number, so it can
# know where that token belongs, *in this orientation*. The same complex turned
# by 90 degrees is new to it. AF3 is trained on random orientations of many
# complexes, which a few minutes do not allow.

# %%
turn = jnp.array([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
turned = run(params, noisy @ turn.T, 4.0) @ turn
print(f'as fitted: RMSD {after:.2f} angstrom, turned: {rmsd(turned):.2f}')
assert rmsd(turned) > 2 * after

# %% [markdown]
# ## 6. Attention maps
#
# The weights of the encoder's first block in the fitted network, from the
# published formula: queries and keys with their own adaptive layer norms
# (Alg. 26), the pair logits added (Alg. 24).


# %%
def attention_weights(params, noisy, sigma, window):
  """[n_head, num_queries, num_keys] of one window, first block."""
  own = params['atoms']
  conditioning = precompute(own, plan, ref, single)
  scaled = noisy / jnp.sqrt(sigma**2 + data_scale**2)
  act = conditioning.single + functional.linear(
    own, 'diffusion_atom_positions_to_features', scaled
  )
  scope = 'diffusion_atom_transformer_encoder'
  blocks = pm.below(own, f'{scope}/__layer_stack_with_per_layer/{scope}')
  block = jax.tree.map(lambda x: x[0], blocks)
  sides = []
  for side, rows in (('q', queries[window]), ('k', keys[window])):
    rows = np.minimum(rows, plan.n_atom - 1)
    x = dt.adaptive_layernorm(block, act[rows], conditioning.single[rows], side)
    sides.append(functional.linear(block, f'{side}_projection', x))
  q, k = sides
  logits = jnp.einsum('qhc,khc->hqk', q, k) * q.shape[-1] ** -0.5
  return jax.nn.softmax(logits + conditioning.encoder.biases[0][window])


# %%
names = [
  ''.join(chr(code + 32) for code in codes).strip()
  for codes in atoms.ref_atom_name_chars
]
figure, axes = plt.subplots(
  2, attention.num_head, figsize=(11, 4.6), layout='constrained'
)
for row, window in zip(axes, (protein_window, ligand_window), strict=True):
  weights = np.asarray(attention_weights(params, noisy, 4.0, window))
  np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-5)
  real = queries[window] < n_atom
  for head, ax in enumerate(row):
    image = ax.imshow(
      weights[head][real],
      aspect='auto',
      cmap='viridis',
      interpolation='nearest',
      extent=(keys[window, 0], keys[window, -1] + 1, real.sum(), 0),
      vmax=np.quantile(weights[:, real], 0.995),
    )
    ax.set_title(f'window {window}, head {head}', fontsize=10)
    if window == ligand_window:
      ax.axvline(n_atom - is_ligand.sum(), color='w', lw=1)
  row[0].set_ylabel('query atom of the window')
  figure.colorbar(image, ax=row[-1], label='weight')
for ax in axes[1]:
  ax.set_xlabel('key atom')
plt.show()

# %% [markdown]
# Below, right of the white line, the keys are the ligand's own atoms; left of
# it are the last residues of the chain. Where the weight goes, by kind of pair:

# %%
for name, window in (('protein', protein_window), ('ligand', ligand_window)):
  weights = np.asarray(attention_weights(params, noisy, 4.0, window))
  q, k = queries[window][queries[window] < n_atom], keys[window]
  weights = weights[:, : len(q)]
  same_residue = atoms.ref_space_uid[q][:, None] == atoms.ref_space_uid[k]
  to_ligand = np.broadcast_to(is_ligand[k], same_residue.shape)
  print(
    f'{name:8} window: own residue or ligand '
    + ' '.join(f'{w:.2f}' for w in (weights * same_residue).sum(-1).mean(1))
    + f' per head ({same_residue.mean():.2f} of the keys), any ligand atom '
    + ' '.join(f'{w:.2f}' for w in (weights * to_ligand).sum(-1).mean(1))
  )

# %% [markdown]
# Most of the weight falls on a few keys, much the same ones for all queries of
# a window, and an atom's own residue gets no more than its share. That is what
# 400 steps on one structure made of it; it says nothing about AF3 itself.
