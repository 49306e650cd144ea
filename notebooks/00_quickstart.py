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
# # Quickstart: five attention systems on one real complex
#
# This is what `make run` does, step by step: a structure file becomes feature
# batches, each system is initialised and run under `jax.jit`, compared with its
# float64 oracle, checked for symmetry, and looked at.
#
# The complex is 1S3V: human dihydrofolate reductase with an inhibitor (TQD).
# The weights are random, so the pictures show what the *formulas* do, not what
# a trained model would.

# %%
# %matplotlib inline
import pathlib

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

import structattn_jax as sa
from structattn_jax import cli, data
from structattn_jax.apps import demo, figures

# Parity with float64 means little through TF32 units.
jax.config.update('jax_default_matmul_precision', 'highest')

# %% [markdown]
# ## 1. A structure file becomes features
#
# As in AlphaFold 3, residues are tokens and every heavy atom of the ligand is a
# token of its own. Reference conformers, elements and charges come from the
# chemical component dictionary.

# %%
path, ligand_path = data.example('1s3v')
structure = data.load_structure(path, ligand=ligand_path)
features = data.featurise(structure)
print(features.n_token, 'tokens,', features.n_atom, 'atoms')
print(features.metadata.sequences[0].sequence)

smiles = data.ligand_smiles(structure)[0].smiles
print(smiles)

# %% [markdown]
# Padding to a bucket lets structures of similar size share one compilation.

# %%
padded = data.pad_features(features)
print(padded.n_token, 'tokens,', padded.n_atom, 'atoms after padding')
print(int(padded.tokens.mask.sum()), 'tokens are real')

# %% [markdown]
# ## 2. One system by hand: invariant point attention
#
# `transform_ipa` gives two pure functions. Nothing about Haiku is needed to use
# them: `params` is a dictionary of arrays.

# %%
protein = data.protein_only(features)
n_res = len(protein.mask)
config = sa.alphafold2.InvariantPointAttentionConfig.seed(num_head=4)
init, apply = sa.alphafold2.transform_ipa(config)

key_single, key_pair, key_init = jax.random.split(jax.random.key(0), 3)
single = jax.random.normal(key_single, (n_res, 64))
pair = jax.random.normal(key_pair, (n_res, n_res, 32))
frames = (jnp.asarray(protein.rotation), jnp.asarray(protein.translation))
params = init(key_init, single, pair, *frames)

update = jax.jit(apply)(params, single, pair, *frames)
print(update.shape)

# %% [markdown]
# The output must not change when the whole protein is turned and moved. The
# testing tool draws random motions and returns the measured error; it works on
# any function of frames, yours included.


# %%
def ipa_of_frames(rotation, translation):
  return apply(params, single, pair, rotation, translation)


for shift in (100.0, 10_000.0):
  error = sa.testing.assert_se3_invariant(
    jax.jit(ipa_of_frames),
    *frames,
    key=jax.random.key(1),
    shift=shift,
    tolerance=1e-3,
  )
  print(f'moved by {shift:,.0f} angstrom: relative error {error:.1e}')

# %% [markdown]
# Many poses of one sequence: `vmap` over the frames alone. Projections of
# `single` and `pair` do not depend on the pose and are computed once.

# %%
turns = sa.geometry.random_rotation(jax.random.key(2), (8,))
turns = sa.Rigid(turns[:, None], jnp.zeros((8, 1, 3)))
poses = turns @ sa.Rigid(*frames)[None]
many = jax.vmap(apply, in_axes=(None, None, None, 0, 0))
updates = jax.jit(many)(params, single, pair, poses.rotation, poses.translation)
print(updates.shape)
print('largest difference between poses:', float(jnp.ptp(updates, 0).max()))

# %% [markdown]
# ## 3. Pooling atoms into tokens
#
# The map from atoms to tokens is a vector of ids, and no one-hot matrix of
# atoms by tokens is ever made.

# %%
atoms = features.atoms
centre = sa.segment_mean(
  jnp.asarray(atoms.position), atoms.token_index, features.n_token
)
back = sa.segment_broadcast(centre, atoms.token_index)
spread = jnp.linalg.norm(atoms.position - back, axis=-1)
print('mean distance of an atom from its token centre:', float(spread.mean()))

# %% [markdown]
# ## 4. All five systems, measured
#
# `demo.experiments` builds the inputs of every system from the features;
# `demo.run` initialises, compiles, times, compares with the oracle and checks.

# %%
experiments = demo.experiments(features, smiles)
params = demo.init_params(experiments, seed=0)
reports = list(demo.run(experiments, params))
print(cli.table(reports))

# %% [markdown]
# Errors are relative to the largest output. The SE(3) errors at 10,000 angstrom
# are those of rounding the coordinates themselves to float32: a step there is
# 0.001 angstrom.

# %% [markdown]
# ## 5. Pictures
#
# With head weights of 1, as the seed document has them, the squared distance
# dominates the logits: residues attend to themselves and their neighbours, and
# the strands of the beta sheet appear as lines beside the diagonal.

# %%
figures.ipa_attention(features, experiments, params)

# %% [markdown]
# Token-atom cross attention: every token attends to its own atoms.

# %%
figures.cross_attention(features, experiments, params)

# %% [markdown]
# Pallatom's sparse pairs: an atom sees the residues within its window, here
# restricted to one chain. Each row of slots is one contiguous range of atoms.

# %%
figures.sparse_pairs(features, experiments)

# %%
figures.window_layout(features, experiments)

# %% [markdown]
# ## 6. Inside your own Haiku model
#
# The modules are ordinary `hk.Module`s.


# %%
def model(atom_act, token_act, atom_to_token):
  """One round of token <-> atom exchange with residuals."""
  update = sa.seeds.token_atom_update(
    sa.seeds.TokenAtomAttentionConfig(num_head=2, d_head=16),
    atom_act,
    token_act,
    atom_to_token,
  )
  token_act = sa.LayerNorm(name='norm')(token_act + update.tokens)
  return hk.Linear(1)(token_act)


forward = hk.without_apply_rng(hk.transform(model))
inputs = (
  jnp.ones((features.n_atom, 32)),
  jnp.ones((features.n_token, 48)),
  atoms.token_index,
)
params = forward.init(jax.random.key(3), *inputs)
print(jax.jit(forward.apply)(params, *inputs).shape)
for path, values in params.items():
  print(path, {name: value.shape for name, value in values.items()})

# %%
# The pictures of the README.
folder = pathlib.Path('figures')
folder.mkdir(exist_ok=True)
for file in figures.draw_all(features, experiments, params, folder):
  print(file)
assert np.isfinite(updates).all()
