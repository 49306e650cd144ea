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
# # Invariant point attention, line by line
#
# Suppl. Alg. 22 of Jumper et al. (2021) in AF2's monomer form, written out in a
# few lines and compared with the library; what each of its three logit terms
# sees; its symmetry; what it costs in memory; and a small fit.
#
# The protein is chain A of 1S3V, human dihydrofolate reductase. Weights are
# random until the last section, so the pictures show what the formulas do, and
# nothing here is a prediction.

# %%
# %matplotlib inline
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import structattn_jax as sa
from structattn_jax import data
from structattn_jax.reference.alphafold2 import (
  invariant_point_attention as oracle,
)

# Parity with float64 means little through TF32 units.
jax.config.update('jax_default_matmul_precision', 'highest')

BLUE, ORANGE, GREY = '#2f6db3', '#c4501b', '#8a8f98'

# %% [markdown]
# ## 1. Inputs
#
# One frame per residue, $T_i = (R_i, t_i)$, from its N, CA and C atoms. AF2
# measures translations inside the structure module in units of 10 angstrom, and
# so does this notebook. The single representation is the residue type, the pair
# representation the distance along the chain, clipped at 32, both as one-hot
# vectors scaled to a mean square of 1, the size that a layer norm would give.

# %%
UNIT = 10.0  # angstrom


def load(name):
  path, ligand_path = data.example(name)
  structure = data.load_structure(path, ligand=ligand_path)
  return data.protein_only(data.featurise(structure))


protein = load('1s3v')
assert protein.frame_mask.all()
n_res = len(protein.mask)
rotation = jnp.asarray(protein.rotation)
translation = jnp.asarray(protein.translation)  # angstrom
single = 21**0.5 * jax.nn.one_hot(protein.residue_type, 21)
index = protein.author_index
offset = np.clip(index[None] - index[:, None], -32, 32) + 32
pair = 65**0.5 * jax.nn.one_hot(offset, 65)
print(n_res, 'residues; single', single.shape, 'and pair', pair.shape)

# %% [markdown]
# A fresh AF2 module ends in a layer of zeros. `zero_init=False` gives it random
# numbers instead, else the output would be zero whatever happens before.

# %%
config = sa.alphafold2.InvariantPointAttentionConfig(
  num_head=4, zero_init=False
)
init, apply = sa.alphafold2.transform_ipa(config)
params = init(jax.random.key(0), single, pair, rotation, translation / UNIT)

# %% [markdown]
# ## 2. AF2's monomer parameterisation
#
# Parameters have the names and shapes of the released model, so a checkpoint
# loads without renaming. Scalar keys and values share a projection, per head
# keys first. Coordinates of points are stored as all x, then all y, then all z.

# %%
for module, values in params.items():
  for name, value in values.items():
    print(f'{module}/{name}'.ljust(58), value.shape)

# %% [markdown]
# ## 3. The algorithm
#
# **Lines 1 to 3.** Linear maps of $s_i$ give for each head $h$ scalar queries,
# keys and values $q, k, v$ and points $\vec q_{hp}, \vec k_{hp}, \vec v_{hp}$
# in the local frame of each residue. The frame takes them to global
# coordinates, $T_i \circ \vec x = R_i \vec x + t_i$.

# %%
own = {
  module.removeprefix('invariant_point_attention/'): jax.tree.map(
    lambda x: np.asarray(x, np.float64), dict(values)
  )
  for module, values in params.items()
}
s, z, r, t = (
  np.asarray(x, np.float64)
  for x in (single, pair, rotation, translation / UNIT)
)
q, k, v, *local_points = oracle.project(
  own,
  s,
  parameterisation='monomer',
  num_head=config.num_head,
  num_scalar_qk=config.num_scalar_qk,
  num_point_qk=config.num_point_qk,
)
q_point, k_point, v_point = (
  np.einsum('nij,nhpj->nhpi', r, x) + t[:, None, None] for x in local_points
)
print('scalars', q.shape, k.shape, v.shape)
print('points ', q_point.shape, k_point.shape, v_point.shape)

# %% [markdown]
# **Lines 4 to 7.** The logits are a sum of three terms,
#
# $$l_{hij} =
# \underbrace{\sqrt{\tfrac{1}{3 c}}\; q_{hi} \cdot k_{hj}}_{\text{scalar}}
# \;\underbrace{-\,\tfrac{1}{2} \gamma_h \sqrt{\tfrac{2}{27 P}}
# \sum_p \left\| T_i \circ \vec q_{hpi} - T_j \circ \vec k_{hpj} \right\|^2}_{
# \text{point}}
# + \underbrace{\sqrt{\tfrac13}\; b_{hij}}_{\text{pair}},
# \qquad b_{ij} = W_b z_{ij},$$
#
# and $a_{hij}$ is their softmax over $j$. For unit normal queries and keys each
# term has a variance of about one third. $\gamma_h$ is the softplus of a
# parameter.

# %%
gamma = np.logaddexp(
  0, own['invariant_point_attention']['trainable_point_weights']
)
c, p = config.num_scalar_qk, config.num_point_qk
delta = q_point[:, None] - k_point[None]  # query, key, head, point, xyz
terms = {
  'scalar': np.sqrt(1 / (3 * c)) * np.einsum('ihc,jhc->hij', q, k),
  'point': np.einsum(
    'h,ijhpx->hij', -0.5 * gamma * np.sqrt(2 / (27 * p)), delta**2
  ),
  'pair': np.sqrt(1 / 3)
  * np.einsum('ijc,ch->hij', z, own['attention_2d']['weights']),
}
logits = sum(terms.values())
attention = np.exp(logits - logits.max(-1, keepdims=True))
attention /= attention.sum(-1, keepdims=True)

# %% [markdown]
# **Lines 8 to 11.** Values are averaged with these weights. Averaged points
# return to the local frame of the query, where a global motion cannot be seen,
#
# $$\vec o_{hpi} = T_i^{-1} \circ \sum_j a_{hij} \left(T_j \circ \vec
# v_{hpj}\right),$$
#
# and a last linear map takes scalars, points, lengths of points and averages of
# the pair to the update of $s_i$.

# %%
o_point = np.einsum('hij,jhpx->ihpx', attention, v_point) - t[:, None, None]
o_point = np.einsum('iyx,ihpy->ihpx', r, o_point)  # R transposed
blocks = [
  np.einsum('hij,jhc->ihc', attention, v),
  *np.moveaxis(o_point, -1, 0),  # all x, all y, all z
  np.sqrt(np.sum(o_point**2, -1) + 1e-8),
  np.einsum('hij,ijc->ihc', attention, z),
]
merged = np.concatenate([x.reshape(n_res, -1) for x in blocks], -1)
last = own['output_projection']
by_hand = merged @ last['weights'] + last['bias']

result = jax.jit(apply, static_argnames='return_attention')(
  params,
  single,
  pair,
  rotation,
  translation / UNIT,
  return_attention=True,
)


def relative_error(x, y):
  return float(np.abs(x - y).max() / np.abs(y).max())


error = relative_error(result.single, by_hand)
print(f'update:    relative error {error:.1e}')
print(
  f'attention: largest difference '
  f'{np.abs(result.attention - attention).max():.1e}'
)
assert error < 1e-4

# %% [markdown]
# The library computes the same in float32 and never makes the array `delta`: it
# multiplies the square out, so that all three terms need one matrix product.

# %% [markdown]
# ## 4. What each term sees
#
# One head. The scalar term depends on the two residue types alone, hence the
# plaid. The point term falls with distance in space: what is dark far from the
# diagonal are parts of the chain that meet in the fold. The pair term depends on
# the distance along the chain, hence the bands. Each map has its own range of
# colours.

# %%
head = 0
figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), layout='constrained')
for ax, (name, term) in zip(axes, terms.items(), strict=True):
  image = ax.imshow(term[head], cmap='Blues', interpolation='nearest')
  ax.set_title(f'{name} term of the logits')
  ax.set_xlabel('key residue')
  figure.colorbar(image, ax=ax, shrink=0.8, label='logit')
axes[0].set_ylabel('query residue')
plt.show()

# %%
for name, term in terms.items():
  spread = term[head].std(-1).mean()
  print(f'{name:6} term: spread over the keys of one query {spread:.2f}')

# %% [markdown]
# The softmax of a sum is the product of the softmaxes, normalised again. So the
# attention of the same head splits into the weights that each term alone would
# give, and the last map is the product of the other three:


# %%
def softmax(x):
  weights = np.exp(x - x.max(-1, keepdims=True))
  return weights / weights.sum(-1, keepdims=True)


parts = {name: softmax(term[head]) for name, term in terms.items()}
product = np.prod(list(parts.values()), axis=0)
product /= product.sum(-1, keepdims=True)
print(
  f'product of the parts: off by {np.abs(product - attention[head]).max():.1e}'
)
assert np.allclose(product, attention[head], atol=1e-12)

figure, axes = plt.subplots(
  1, 4, figsize=(15, 4.2), layout='constrained', sharey=True
)
parts = {f'{name} part': x for name, x in parts.items()}
for ax, (name, weights) in zip(
  axes, {**parts, 'all three': attention[head]}.items(), strict=True
):
  image = ax.imshow(
    np.log10(np.maximum(weights, 1e-30)),
    cmap='Blues',
    interpolation='nearest',
    vmin=-4,
    vmax=0,
  )
  ax.set_title(f'attention, {name}')
  ax.set_xlabel('key residue')
axes[0].set_ylabel('query residue')
figure.colorbar(image, ax=axes, shrink=0.8, label='log10 weight')
plt.show()

# %% [markdown]
# ## 5. Invariance
#
# With $T_i \to T T_i$ for one motion $T$ all distances stay, and $T$ cancels in
# $(T T_i)^{-1} T T_j$. The testing tool draws random motions, moves the frames
# in float64, rounds them, and returns the error relative to the largest output.


# %%
@jax.jit
def ipa_of_frames(rotation, translation):
  return apply(params, single, pair, rotation, translation / UNIT)


for shift in (1.0, 100.0, 1_000.0, 10_000.0):
  error = sa.testing.assert_se3_invariant(
    ipa_of_frames,
    rotation,
    translation,
    key=jax.random.key(1),
    shift=shift,
    tolerance=1e-3,
  )
  print(f'moved by {shift:8,.0f} angstrom: relative error {error:.1e}')

# %% [markdown]
# What remains at 10,000 angstrom is the rounding of the moved coordinates to
# float32, whose step there is 0.001 angstrom.
#
# A test that cannot fail shows nothing. Here the frame of one residue stays
# behind while all others move, near and far:


# %%
@jax.jit
def one_stays_behind(moved_rotation, moved_translation):
  moved_rotation = moved_rotation.at[90].set(rotation[90])
  moved_translation = moved_translation.at[90].set(translation[90])
  return ipa_of_frames(moved_rotation, moved_translation)


for shift in (1.0, 10_000.0):
  caught = None
  try:
    sa.testing.assert_se3_invariant(
      one_stays_behind,
      rotation,
      translation,
      key=jax.random.key(1),
      shift=shift,
      tolerance=1e-3,
    )
  except AssertionError as error:
    caught = error
  print(f'moved by {shift:8,.0f} angstrom: AssertionError:', caught)
  assert caught is not None

# %% [markdown]
# ## 6. Many poses of one sequence
#
# `vmap` over the frames alone. Ten poses, in each the frame origins are moved
# by independent Gaussian noise, and each pose is then turned as a whole. Pose 0
# has no noise: it is turned only, and its update is the one from before.

# %%
noise = np.linspace(0, 4.5, 10, dtype=np.float32)  # angstrom
key_noise, key_turn = jax.random.split(jax.random.key(2))
moved = translation + noise[:, None, None] * jax.random.normal(
  key_noise, (len(noise), n_res, 3)
)
turns = sa.geometry.random_rotation(key_turn, (len(noise), 1))
shape = (len(noise), n_res)
poses = sa.Rigid(turns, jnp.zeros((len(noise), 1, 3))) @ sa.Rigid(
  jnp.broadcast_to(rotation, (*shape, 3, 3)), moved
)
many = jax.jit(jax.vmap(ipa_of_frames))
updates = many(poses.rotation, poses.translation)
print(updates.shape)
change = jnp.linalg.norm(updates - result.single, axis=(-1, -2))
change /= jnp.linalg.norm(result.single)
print(f'pose 0, turned only: relative change {float(change[0]):.1e}')

figure, ax = plt.subplots(figsize=(5.2, 3.4), layout='constrained')
ax.plot(noise, change, 'o-', color=BLUE)
ax.set_xlabel('noise of each coordinate, angstrom')
ax.set_ylabel('relative change of the update')
plt.show()

# %% [markdown]
# ## 7. Memory
#
# `'dense'` holds all logits, `n_res * n_head * n_res` numbers, and for the
# gradient several arrays of that size. `'blocked'` holds those of a few queries
# at a time and computes them again in the backward pass. What the compiler says
# about temporary memory, without running anything; 12 heads, 8 pair channels,
# the gradient with respect to the parameters:


# %%
def temporary_bytes(implementation, n, gradient):
  config = sa.alphafold2.InvariantPointAttentionConfig(
    implementation=implementation, query_block=16, zero_init=False
  )
  init, apply = sa.alphafold2.transform_ipa(config)
  inputs = [
    jax.ShapeDtypeStruct(shape, jnp.float32)
    for shape in ((n, 32), (n, n, 8), (n, 3, 3), (n, 3))
  ]
  params = jax.eval_shape(init, jax.random.key(0), *inputs)

  def loss(params, *inputs):
    return jnp.sum(apply(params, *inputs) ** 2)

  fn = jax.grad(loss) if gradient else apply
  compiled = jax.jit(fn).lower(params, *inputs).compile()
  return compiled.memory_analysis().temp_size_in_bytes


sizes = (64, 128, 256, 512)
memory = {
  (implementation, gradient): [
    temporary_bytes(implementation, n, gradient) / 2**20 for n in sizes
  ]
  for implementation in ('dense', 'blocked')
  for gradient in (False, True)
}
print('temporary memory, MiB, for', *sizes, 'residues')
for (implementation, gradient), values in memory.items():
  label = f'{implementation} {"gradient" if gradient else "forward"}'
  print(label.ljust(17), *(f'{value:8.2f}' for value in values))

# %%
figure, ax = plt.subplots(figsize=(5.8, 4), layout='constrained')
for (implementation, gradient), values in memory.items():
  ax.loglog(
    sizes,
    values,
    'o--' if gradient else 'o-',
    color=ORANGE if implementation == 'dense' else BLUE,
    label=f'{implementation}, {"gradient" if gradient else "forward"}',
  )
ax.set_xticks(sizes, [str(n) for n in sizes])
ax.set_yticks([1, 3, 10, 30], ['1', '3', '10', '30'])
ax.minorticks_off()
ax.set_xlabel('number of residues')
ax.set_ylabel('temporary memory, MiB')
ax.legend(frameon=False)
plt.show()
assert all(
  memory['blocked', gradient][-1] < memory['dense', gradient][-1]
  for gradient in (False, True)
)

# %% [markdown]
# ## 8. A small fit
#
# Can the parameters learn something about the frames? The target is the number
# of CA atoms within 10 angstrom, a measure of burial, shifted and scaled to
# mean 0 and variance 1. Every residue gets the *same* single representation and
# there is no pair, so nothing but the frames can tell residues apart, and no
# sequence can be learned by heart.
#
# A softmax averages and cannot count. But the mean of the neighbours lies near
# a buried residue and to one side of an exposed one, and the norms of the
# output points measure that.
#
# The module starts with its usual last layer of zeros, so the loss starts at
# the variance of the target, 1.


# %%
def neighbours(protein):
  ca = protein.translation
  distance = np.linalg.norm(ca[:, None] - ca, axis=-1)
  return (distance < 10).sum(-1) - 1


count = neighbours(protein)
mean, spread = count.mean(), count.std()
print(f'{mean:.1f} neighbours on average, from {count.min()} to {count.max()}')
target = jnp.asarray((count - mean) / spread, jnp.float32)

fit_config = sa.alphafold2.InvariantPointAttentionConfig(
  num_head=4, num_channel=1
)
fit_init, fit_apply = sa.alphafold2.transform_ipa(fit_config)


def predict(params, protein):
  same = jnp.ones((len(protein.mask), 4))
  return fit_apply(
    params, same, None, protein.rotation, protein.translation / UNIT
  )[:, 0]


def fit_loss(params):
  return jnp.mean((predict(params, protein) - target) ** 2)


fit_params = fit_init(
  jax.random.key(3),
  jnp.ones((n_res, 4)),
  None,
  rotation,
  translation / UNIT,
)
optimiser = optax.adam(3e-3)


@jax.jit
def train(params):
  def step(carry, _):
    params, state = carry
    loss, gradient = jax.value_and_grad(fit_loss)(params)
    update, state = optimiser.update(gradient, state)
    return (optax.apply_updates(params, update), state), loss

  carry = params, optimiser.init(params)
  (params, _), losses = jax.lax.scan(step, carry, None, length=300)
  return params, losses


fit_params, losses = train(fit_params)
print(f'loss: first {losses[0]:.3f}, last {losses[-1]:.3f}')
assert losses[-1] < 0.5 * losses[0]

# %%
figure, ax = plt.subplots(figsize=(5.2, 3.4), layout='constrained')
ax.semilogy(losses, color=BLUE)
ax.set_xlabel('step')
ax.set_ylabel('mean squared error')
plt.show()

# %% [markdown]
# That is a fit of 186 numbers. The same parameters on 1TQH, a larger esterase
# that the fit has not seen, still rank residues by burial, but the values are
# off by about as much as the target varies: one protein is too little to learn
# from, and this shows the mechanism only.

# %%
unseen = load('1tqh')
assert unseen.frame_mask.all()
figure, axes = plt.subplots(
  1, 2, figsize=(8.6, 4), layout='constrained', sharex=True, sharey=True
)
for ax, name, one in (
  (axes[0], '1S3V, fitted', protein),
  (axes[1], '1TQH, not seen', unseen),
):
  truth = neighbours(one)
  fitted = np.asarray(predict(fit_params, one)) * spread + mean
  correlation = np.corrcoef(truth, fitted)[0, 1]
  off = np.sqrt(np.mean((truth - fitted) ** 2))
  print(
    f'{name}: correlation {correlation:.2f}, root mean square error '
    f'{off:.1f} neighbours (spread {truth.std():.1f})'
  )
  ax.plot(truth, fitted, 'o', ms=3, color=BLUE, alpha=0.6)
  ax.axline((mean, mean), slope=1, color=GREY, lw=1)
  ax.set_title(name)
  ax.set_xlabel('CA atoms within 10 angstrom')
axes[0].set_ylabel('output of the fitted module')
plt.show()
