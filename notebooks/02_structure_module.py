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
# # Structure module: frames, atoms and FAPE
#
# Suppl. Algs. 20 to 28 of Jumper et al. (2021): how single and pair
# representations become coordinates, how frames and torsion angles become
# atoms, and how FAPE pulls frames to a known structure.
#
# No trained weights are used and nothing here is a prediction. The network has
# random parameters, and the descent at the end is *given* the answer: it shows
# that the loss and its gradients lead there.

# %%
# %matplotlib inline
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import structattn_jax as sa
from structattn_jax import data
from structattn_jax.network.alphafold2 import all_atom, residue_constants

# Parity with float64 means little through TF32 units.
jax.config.update('jax_default_matmul_precision', 'highest')

BLUE, ORANGE, GREY = '#2f6db3', '#c4501b', '#8a8f98'

# %% [markdown]
# The protein is human dihydrofolate reductase from 1S3V. Its frames have CA as
# origin, C on the x axis and N in the xy plane.

# %%
path, ligand_path = data.example('1s3v')
features = data.featurise(data.load_structure(path, ligand=ligand_path))
protein = data.protein_only(features)
assert protein.frame_mask.all()
n_res = len(protein.mask)
aatype = jnp.asarray(protein.residue_type)
mask = jnp.asarray(protein.mask)
target = sa.Rigid(
  jnp.asarray(protein.rotation), jnp.asarray(protein.translation)
)
print(n_res, 'residues')

# %% [markdown]
# ## 1. From single and pair to coordinates
#
# `transform_structure_module` gives two pure functions. A small module with
# random parameters on random inputs; `zero_init=False`, because a fresh AF2
# module leaves every residue at the origin.

# %%
config = sa.alphafold2.StructureModuleConfig(
  num_layer=4, num_channel=64, num_head=4, zero_init=False
)
init, apply = sa.alphafold2.transform_structure_module(config)
key_single, key_pair, key_init = jax.random.split(jax.random.key(0), 3)
single = jax.random.normal(key_single, (n_res, 32))
pair = jax.random.normal(key_pair, (n_res, n_res, 16))
params = init(key_init, single, pair, aatype)
output = jax.jit(apply)(params, single, pair, aatype)
for name in (
  'act',
  'traj',
  'angles_sin_cos',
  'atom_pos',
  'frames',
  'final_atom14_positions',
  'final_atom_positions',
  'final_atom_mask',
):
  print(name.ljust(24), getattr(output, name).shape)

# %% [markdown]
# `traj` holds the backbone frames after each of the 4 iterations. All start as
# the *black hole*, every residue at the origin with the same orientation. The
# loss of such frames against the crystal structure, in units of 10 angstrom
# with errors clamped at 10 angstrom, so that 1 is the worst:

# %%
frames = output.backbone_frames
for step in range(config.num_layer):
  radius = jnp.sqrt(jnp.mean(jnp.sum(frames.translation[step] ** 2, -1)))
  loss = sa.alphafold2.backbone_loss(frames[step : step + 1], target, mask)
  print(
    f'iteration {step + 1}: root mean square distance from the origin '
    f'{float(radius):5.1f} angstrom, FAPE {float(loss):.3f}'
  )

# %% [markdown]
# The chain of CA atoms after each iteration, and all atoms after the last. A
# random network has no reason to build a protein; what it returns is a
# structure nevertheless, residues with ideal bond lengths.

# %%
figure, axes = plt.subplots(
  1, config.num_layer + 1, figsize=(15, 3.4), layout='constrained'
)
for step, ax in enumerate(axes[:-1]):
  x, y, _ = np.asarray(frames.translation[step]).T
  ax.plot(x, y, '-', color=GREY, lw=0.5)
  ax.scatter(x, y, c=np.arange(n_res), s=6, cmap='viridis')
  ax.set_title(f'CA, iteration {step + 1}')
atoms = np.asarray(output.final_atom_positions)
atoms = atoms[np.asarray(output.final_atom_mask)]
axes[-1].scatter(atoms[:, 0], atoms[:, 1], s=2, color=BLUE)
axes[-1].set_title(f'{len(atoms)} atoms at the end')
for ax in axes:
  ax.set_aspect('equal')
  ax.set_xlabel('x, angstrom')
axes[0].set_ylabel('y, angstrom')
plt.show()

# %% [markdown]
# ## 2. From frames and torsion angles to atoms
#
# Alg. 24: a residue is at most 8 rigid groups. The backbone frame and 7 torsion
# angles place them, and tables of ideal geometry hold the atoms of each group.
# The atoms are built twice here: with all angles zero, and with the angles
# measured in the crystal structure.

# %%
tables = residue_constants.residue_tables()
atoms = features.atoms
row_of_token = np.full(features.n_token, -1)
row_of_token[protein.token_index] = np.arange(n_res)
slot_of_name = {name: slot for slot, name in enumerate(tables.atom_types)}
crystal = np.zeros((n_res, 37, 3))
known = np.zeros((n_res, 37), bool)
for token, codes, position, there in zip(
  atoms.token_index,
  atoms.ref_atom_name_chars,
  atoms.position,
  atoms.position_mask,
  strict=True,
):
  name = ''.join(chr(code + 32) for code in codes).strip()
  row = row_of_token[token]
  if row >= 0 and there and name in slot_of_name:
    crystal[row, slot_of_name[name]] = position
    known[row, slot_of_name[name]] = True
known &= tables.atom37_mask[protein.residue_type]
print(known.sum(), 'atoms of the protein')

# %% [markdown]
# No list of atoms per torsion angle is needed. Group $g$ is its default frame,
# turned by angle $g$ about its x axis. So the angle is the turn that brings the
# atoms of a group from where they are without it to where the crystal has them,
# seen in the plane across that axis. Groups are placed one after the other.
# Groups without atoms, omega and phi among them, stay at zero.

# %%
slots = np.asarray(tables.atom14_to_atom37)[protein.residue_type]
present = np.asarray(tables.atom14_mask)[protein.residue_type]
rows = np.arange(n_res)[:, None]
crystal14, known14 = crystal[rows, slots], known[rows, slots] & present
group14 = np.asarray(tables.atom14_group)[protein.residue_type]

build = jax.jit(
  lambda angles: all_atom.torsion_angles_to_frames(target, angles, aatype)
)
zero = np.zeros((n_res, 7, 2), np.float32)
zero[..., 1] = 1  # (sin, cos)
measured = zero.copy()
for group in range(3, 8):  # psi, chi1 to chi4
  placed = build(measured)[:, group]
  here = np.einsum(
    'nyx,nay->nax',
    placed.rotation,
    crystal14 - np.asarray(placed.translation)[:, None],
  )[..., 1:]
  ideal = tables.atom14_position[protein.residue_type][..., 1:]
  use = known14 & (group14 == group)
  cos = np.sum(use * np.sum(here * ideal, -1), -1)
  sin = here[..., 1] * ideal[..., 0] - here[..., 0] * ideal[..., 1]
  sin = np.sum(use * sin, -1)
  norm = np.hypot(sin, cos)
  fine = norm > 1e-3
  measured[fine, group - 1, 0] = (sin / np.where(fine, norm, 1))[fine]
  measured[fine, group - 1, 1] = (cos / np.where(fine, norm, 1))[fine]

error = {}
for name, angles in (('all angles zero', zero), ('measured', measured)):
  built = np.asarray(all_atom.frames_to_atom14(build(angles), aatype))
  error[name] = np.linalg.norm(built - crystal14, axis=-1)
  side = known14 & (group14 > 3)
  for part, chosen in (
    ('N, CA, C, CB', known14 & (group14 == 0)),
    ('O', known14 & (group14 == 3)),
    ('side chain', side),
  ):
    value = np.sqrt(np.mean(error[name][chosen] ** 2))
    print(f'{name:16} {part:13} {value:.2f} angstrom')

# %%
figure, ax = plt.subplots(figsize=(5.4, 3.4), layout='constrained')
bins = np.linspace(0, 8, 81)
for (name, value), colour in zip(error.items(), (ORANGE, BLUE), strict=True):
  ax.hist(value[side], bins, histtype='step', color=colour, label=name, lw=1.5)
ax.set_xlabel('distance from the crystal position, angstrom')
ax.set_ylabel('side chain atoms')
ax.legend(frameon=False)
plt.show()

# %% [markdown]
# What is left with measured angles is what the model takes to be ideal: bond
# lengths, bond angles and planes. The tail is a few residues that no torsion
# angle can reach: arginines whose NH1 and NH2 are named the other way round than
# the tables have it, and strained ones, such as Asn 107, whose angle at CB is
# 148 degrees in this file. The largest errors:

# %%
worst = np.where(side, error['measured'], 0).max(-1)
for row in np.argsort(-worst)[:8]:
  letter = residue_constants.RESTYPES[protein.residue_type[row]]
  print(f'{letter}{protein.author_index[row]}: {worst[row]:.1f} angstrom')

# %% [markdown]
# ## 3. FAPE
#
# Alg. 28 looks at every CA $x_j$ from every frame $T_i$:
#
# $$\mathcal{L} = \frac{1}{Z} \operatorname*{mean}_{i,j} \min\left(d_{clamp},
# \sqrt{\left\| T_i^{-1} \circ x_j - T_i^{*-1} \circ x_j^{*} \right\|^2
# + \epsilon}\right), \qquad Z = d_{clamp} = 10\ \text{angstrom}.$$
#
# It does not change when a whole structure is moved, so the two need not be
# superposed. It does change for the mirror image, which has the same distances:


# %%
def fape(frames, clamp_distance=10.0):
  return sa.alphafold2.backbone_loss(
    frames[None], target, mask, clamp_distance=clamp_distance
  )


turn = sa.geometry.random_rotation(jax.random.key(1))
motion = sa.Rigid(turn, jnp.array([30.0, -20.0, 10.0]))
mirror = jnp.array([1.0, 1.0, -1.0])
# The frames of reflected N, CA and C atoms, proper rotations again.
mirrored = sa.Rigid(
  mirror[:, None] * target.rotation * mirror, mirror * target.translation
)
for name, frames in (
  ('itself', target),
  ('itself, moved', motion[None] @ target),
  ('its mirror image', mirrored),
  ('the black hole', sa.Rigid.identity((n_res,))),
):
  print(f'FAPE to {name:17} {float(fape(frames)):.3f}')

# %% [markdown]
# A structure compared with itself gives $\sqrt\epsilon / Z = 0.001$, not zero.
#
# ## 4. Descent
#
# Free parameters, no network: a quaternion and a translation for each residue,
# which move a start of random orientations and CA atoms drawn from a Gaussian
# with 5 angstrom per coordinate, much smaller than the protein. (The structure
# module's own update $(1, b, c, d)$ cannot turn by half a circle in one step;
# four numbers, normalised, can.) Adam follows the gradient of FAPE, once
# clamped at 10 angstrom as published, once without a clamp.
#
# FAPE needs no superposition, the root mean square deviation (RMSD) does.


# %%
def superpose(moving, fixed):
  """`moving` moved onto `fixed` by the best rotation and shift (Kabsch)."""
  moving, fixed = (np.asarray(x, np.float64) for x in (moving, fixed))
  centre, to = moving.mean(0), fixed.mean(0)
  u, _, vh = np.linalg.svd((moving - centre).T @ (fixed - to))
  proper = np.diag([1, 1, np.sign(np.linalg.det(u @ vh))])
  return (moving - centre) @ (u @ proper @ vh) + to


def rmsd(moving, fixed):
  offset = superpose(moving, fixed) - np.asarray(fixed)
  return float(np.sqrt(np.mean(np.sum(offset**2, -1))))


key_turn, key_noise = jax.random.split(jax.random.key(2))
start = sa.Rigid(
  sa.geometry.random_rotation(key_turn, (n_res,)),
  5.0 * jax.random.normal(key_noise, (n_res, 3)),
)


def frames_of(parameters):
  """Frames [n_res] of quaternions and translations in 10 angstrom."""
  turned = sa.Rigid.from_quaternion(
    parameters['quaternion'], 10.0 * parameters['shift'], normalise=True
  )
  return sa.Rigid(
    sa.geometry.compose_rotations(start.rotation, turned.rotation),
    start.translation + turned.translation,
  )


n_step = 800
optimiser = optax.adam(optax.cosine_decay_schedule(0.05, n_step))


def descend(clamp_distance):
  """Loss [n_step] and CA positions [n_step, n_res, 3] along the descent."""

  def objective(parameters):
    frames = frames_of(parameters)
    return fape(frames, clamp_distance), frames.translation

  def step(carry, _):
    parameters, state = carry
    (loss, ca), gradient = jax.value_and_grad(objective, has_aux=True)(
      parameters
    )
    change, state = optimiser.update(gradient, state)
    return (optax.apply_updates(parameters, change), state), (loss, ca)

  parameters = {
    'quaternion': jnp.zeros((n_res, 4)).at[:, 0].set(1.0),
    'shift': jnp.zeros((n_res, 3)),
  }
  carry = parameters, optimiser.init(parameters)
  run = jax.jit(lambda carry: jax.lax.scan(step, carry, None, length=n_step))
  return run(carry)[1]


crystal_ca = np.asarray(target.translation)
descents = {}
for name, clamp_distance in (('10 angstrom', 10.0), ('none', None)):
  losses, trace = descend(clamp_distance)
  deviation = [rmsd(ca, crystal_ca) for ca in np.asarray(trace)]
  descents[name] = losses, deviation, np.asarray(trace)
  print(
    f'clamp: {name:11} FAPE {losses[0]:.3f} -> {losses[-1]:.4f}, '
    f'CA RMSD {deviation[0]:.1f} -> {deviation[-1]:.3f} angstrom'
  )
  assert deviation[-1] < 1.0

# %% [markdown]
# The loss ends at the floor of 0.001 that $\sqrt\epsilon$ leaves. Without a
# clamp it starts above 1.

# %%
figure, ax = plt.subplots(figsize=(5.4, 3.4), layout='constrained')
for (name, (losses, _, _)), colour in zip(
  descents.items(), (BLUE, ORANGE), strict=True
):
  ax.semilogy(losses, color=colour, label=f'clamp: {name}')
ax.set_xlabel('step')
ax.set_ylabel('FAPE, units of 10 angstrom')
ax.legend(frameon=False)
plt.show()

# %%
figure, ax = plt.subplots(figsize=(5.4, 3.4), layout='constrained')
for (name, (_, deviation, _)), colour in zip(
  descents.items(), (BLUE, ORANGE), strict=True
):
  ax.semilogy(deviation, color=colour, label=f'clamp: {name}')
ax.axhline(1, color=GREY, lw=1)
ax.set_xlabel('step')
ax.set_ylabel('CA RMSD after superposition, angstrom')
ax.legend(frameon=False)
plt.show()

# %% [markdown]
# The CA trace along the descent with the published clamp, superposed on the
# crystal structure (grey) and seen along one axis.

# %%
trace = descents['10 angstrom'][2]
shown = (0, 50, 150, n_step - 1)
figure, axes = plt.subplots(
  1, 4, figsize=(13, 3.7), layout='constrained', sharex=True, sharey=True
)
for ax, step in zip(axes, shown, strict=True):
  ca = superpose(trace[step], crystal_ca)
  ax.plot(*crystal_ca[:, :2].T, color=GREY, lw=3, alpha=0.5)
  ax.plot(*ca[:, :2].T, color=BLUE, lw=1)
  ax.set_title(f'step {step}: RMSD {rmsd(ca, crystal_ca):.2f} angstrom')
  ax.set_aspect('equal')
  ax.set_xlabel('x, angstrom')
axes[0].set_ylabel('y, angstrom')
plt.show()
