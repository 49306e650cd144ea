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
# # SEDD for protein and ligand: noise, scores, training, samples
#
# Discrete diffusion (Lou, Meng, Ermon 2024) on two sequences at once: a protein
# and the SMILES of a ligand. Noise turns tokens into an absorbing state, called
# mask here; a network learns the ratios that turn time around; sampling fills
# masks in, token by token.
#
# The model is small and knows only the handful of pairs that comes with the
# package. It shows that the system works. It has learned these pairs, not how
# proteins bind: nothing it says about other proteins means anything.

# %%
# %matplotlib inline
import pathlib

import haiku as hk
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from structattn_jax import data, discrete_diffusion, training
from structattn_jax.apps import generate
from structattn_jax.network.sedd import blocks, dual_track, embeddings

BLUE, ORANGE, GREY = '#2f6db3', '#c4501b', '#8a8f98'

# %% [markdown]
# ## 1. Data
#
# Pairs from the Protein Data Bank, and ligands without a protein from the
# chemical component dictionary. Both become tokens with a start and an end.

# %%
config = training.TrainConfig.from_toml(
  pathlib.Path('../configs/sedd_protein_ligand_small.toml')
)
found = training.load_data(config)
print('\n'.join(found.messages))
pairs = {
  pair.name: pair
  for pair in data.bundled_pairs()
  if pair.name in found.train.names
}
paired = [pair for pair in pairs.values() if pair.sequence]
print(len(paired), 'pairs and', len(pairs) - len(paired), 'ligands alone')
for pair in paired:
  print(f'{pair.name:18} {pair.sequence[:14]}... {pair.smiles}')

# %% [markdown]
# ## 2. Forward: noise
#
# At time $t$ every token has become the mask with probability
# $1 - e^{-\sigma(t)}$, where $\sigma(t) = -\log(1 - (1 - \epsilon) t)$: the
# masked part grows linearly. A row is one time; grey is masked.

# %%
tokenizers = {
  'protein': found.protein_tokenizer,
  'ligand': found.smiles_tokenizer,
}
vocab = {
  'protein': config.model.protein_vocab,
  'ligand': config.model.ligand_vocab,
}


def draw_tokens(ax, track, rows, labels):
  """One line of text per row of ids; masked positions are grey boxes."""
  names = {i: t for t, i in tokenizers[track].vocabulary.items()}
  names |= {tokenizers[track].pad_id: '·', tokenizers[track].eos_id: '◂'}
  rows = np.asarray(rows)
  absorbed = rows == vocab[track] - 1
  ax.imshow(absorbed, cmap='Greys', vmin=0, vmax=3, aspect='auto')
  for y, row in enumerate(rows):
    for x, token in enumerate(row):
      if not absorbed[y, x]:
        text = names.get(int(token), '?')
        text = '▸' if text in ('<cls>', '<bos>') else text
        size = 7 if len(text) < 3 else 3.6
        ax.text(x, y, text, ha='center', va='center', fontsize=size)
  ax.set_yticks(range(len(labels)), labels, fontsize=7)
  ax.set_xticks([])
  ax.set_title(track, loc='left', fontsize=9)
  ax.spines[:].set_visible(False)


# A position keeps its fate: the same uniforms at every time.
noise = discrete_diffusion.make_noise(config.noise)
times = np.array([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], np.float32)
chosen = pairs['1s3v_A_TQD']
figure, axes = plt.subplots(2, 1, figsize=(11, 3.6), layout='constrained')
for ax, (track, text) in zip(
  axes, (('protein', chosen.sequence), ('ligand', chosen.smiles)), strict=True
):
  ids = jnp.asarray(tokenizers[track].encode(text)[:60])
  graph = discrete_diffusion.Absorbing(vocab[track])
  noised = [
    graph.sample_transition(jax.random.key(1), ids, noise.total(t))
    for t in times
  ]
  draw_tokens(ax, track, noised, [f't = {t:.1f}' for t in times])
plt.show()

# %% [markdown]
# ## 3. From logits to a step back
#
# The network returns logits $l_v$ per position. SEDD's output is the log score
#
# $$ s_v = l_v - \log(e^\sigma - 1) - \log(V - 1), \qquad
#    e^{s_v} \approx \frac{p_\sigma(v)}{p_\sigma(x)} , \qquad s_x = 0 : $$
#
# how much more probable the sequence would be with $v$ instead of the token $x$
# at this position. These are ratios, not probabilities. A step of size
# $\Delta\sigma$ back in time replaces a mask by $v$ with probability
#
# $$ p_v = \frac{e^{\Delta\sigma} - 1}{e^\sigma - 1} \, \frac{e^{l_v}}{V - 1} $$
#
# and leaves other tokens as they are. Below both ways to $p_v$: through the
# score and the transition matrix of the graph, and in closed form.

# %%
graph = discrete_diffusion.Absorbing(vocab['ligand'])
logits = jax.random.normal(jax.random.key(3), (1, vocab['ligand']))
masked = jnp.array([graph.absorbing])
t, dt = 0.7, 0.05
sigma = jnp.float32(noise.total(t))
dsigma = jnp.float32(noise.total(t) - noise.total(t - dt))
score = jnp.exp(graph.log_score(logits, masked, sigma))
literal = graph.staggered_score(score, dsigma) * graph.transp_transition(
  masked, dsigma
)
closed = jnp.expm1(dsigma) / jnp.expm1(sigma) * jnp.exp(logits)
closed = closed / (vocab['ligand'] - 1)
print('largest difference', float(jnp.abs(literal - closed)[0, :-1].max()))
print('factor', float(jnp.expm1(dsigma) / jnp.expm1(sigma)), '= dt / t', dt / t)

# %% [markdown]
# ## 4. Training
#
# The loss is the denoising score entropy; weighted by the noise rate it bounds
# $-\log p$ from above. The run takes turns: the ligand given its protein, the
# ligand alone, both. About eight minutes on two cores. A folder with a run that
# was stopped goes on, and one with a finished run is taken as it is.

# %%
folder = pathlib.Path('../out/sedd_protein_ligand_small')
result = training.train(config, folder, report=print, progress=False)
rows = training.read_metrics(folder / 'metrics.csv')
print(
  len(rows), 'steps,', f'{sum(r["seconds"] for r in rows) / 60:.1f} minutes'
)

# %%
colours = {
  'ligand_only': GREY,
  'ligand_given_protein': BLUE,
  'joint': ORANGE,
}
figure, (left, right) = plt.subplots(
  1, 2, figsize=(9.6, 3.6), layout='constrained'
)
for mode, colour in colours.items():
  steps = np.array([r['step'] for r in rows if r['mode'] == mode])
  losses = np.array([r['loss'] for r in rows if r['mode'] == mode])
  window = 25
  smooth = np.convolve(losses, np.ones(window) / window, 'valid')
  left.plot(steps, losses, color=colour, alpha=0.15, lw=0.6)
  left.plot(steps[window - 1 :], smooth, color=colour, label=mode)
left.set_ylim(0, 3.5)
left.set_xlabel('step')
left.set_ylabel('loss, nats per position')
left.legend(frameon=False)
evaluated = [r for r in rows if 'bound_joint' in r]
for mode, colour in colours.items():
  right.plot(
    [r['step'] for r in evaluated],
    [r[f'bound_{mode}'] for r in evaluated],
    'o-',
    color=colour,
  )
uniform = config.model.ligand_vocab - 1
right.axhline(uniform, color='black', lw=0.8, ls=':')
right.text(config.steps, uniform * 0.93, 'uniform', ha='right', va='top')
right.set_yscale('log')
right.set_yticks([1, 2, 5, 10, 20, 40], ['1', '2', '5', '10', '20', '40'])
right.set_xlabel('step')
right.set_ylabel('perplexity bound per token')
plt.show()
for mode, bound in result.bounds.items():
  print(f'{mode:22} {bound:6.2f}   (uniform: {uniform})')

# %% [markdown]
# The ligand costs fewer nats when its protein is given: that difference is what
# the model knows about which ligand belongs to which protein. All three bounds
# are of the same pairs.
#
# Start tokens are never masked (`keep_ends`). Rotary embeddings know distances
# alone: in a sequence of masks without any start all positions look the same,
# and the first tokens could only be drawn from the mixture of all positions.

# %% [markdown]
# ## 5. Backward: a ligand for a protein
#
# 64 steps from masks to a ligand, given human dihydrofolate reductase. The last
# rows are the result and the ligand in the crystal structure.

# %%
model = generate.load_model(folder)
sampler = discrete_diffusion.SamplerConfig(steps=64)
one = generate.generate(
  model,
  jax.random.key(0),
  mode='ligand_given_protein',
  protein=chosen.sequence,
  num=16,
  sampler=sampler,
  return_states=True,
)
truth, _ = data.pad_tokens(
  [tokenizers['ligand'].encode(chosen.smiles)],
  64,
  tokenizers['ligand'].pad_id,
)
states = one.states['ligand'][:, 0]
shown = [0, 4, 8, 12, 16, 24, 32, 40, 48, 56, 64]
figure, ax = plt.subplots(figsize=(11, 3.4), layout='constrained')
draw_tokens(
  ax,
  'ligand',
  [*states[shown], truth[0]],
  [*(f'step {i}' for i in shown), 'crystal'],
)
plt.show()

# %% [markdown]
# ## 6. Samples
#
# 16 ligands for each protein, and 16 without one. *Likeness* is the share of
# tokens in the right place, for the most similar ligand of that protein.

# %%
tokenizer = tokenizers['ligand']


def likeness(sample, ligands):
  def one(a, b):
    a, b = tokenizer.split(a), tokenizer.split(b)
    return sum(x == y for x, y in zip(a, b, strict=False)) / max(
      len(a), len(b), 1
    )

  return max(one(sample, ligand) for ligand in ligands)


alone = generate.generate(
  model, jax.random.key(1), mode='ligand_only', num=16, sampler=sampler
)
measured = generate.measure(alone, data.bundled_pairs())['ligand']
print(
  'without protein: '
  + ', '.join(
    f'{name} {measured[name]:.2f}'
    for name in ('validity', 'uniqueness', 'novelty')
  )
)
print('  ' + '\n  '.join(alone.ligand[:3]))
table = {}
for sequence in dict.fromkeys(pair.sequence for pair in paired):
  own = [pair for pair in paired if pair.sequence == sequence]
  given = generate.generate(
    model,
    jax.random.key(2),
    mode='ligand_given_protein',
    protein=sequence,
    num=16,
    sampler=sampler,
  )
  measured = generate.measure(given, data.bundled_pairs())['ligand']
  ligands = [pair.smiles for pair in own]
  name = own[0].name.split('_')[0]
  table[name] = [
    [likeness(text, ligands) for text in samples.ligand]
    for samples in (given, alone)
  ]
  exact = sum(text in ligands for text in given.ligand)
  print(
    f'given {name}: validity {measured["validity"]:.2f}, novelty '
    f'{measured["novelty"]:.2f}, {exact} of 16 are a ligand of this protein'
  )
  print('  ' + '\n  '.join(given.ligand[:3]))

# %%
figure, ax = plt.subplots(figsize=(6, 3.2), layout='constrained')
for i, (given, lone) in enumerate(table.values()):
  for shift, values, colour in ((-0.15, given, BLUE), (0.15, lone, GREY)):
    ax.plot([i + shift] * 16, values, 'o', ms=4, alpha=0.4, color=colour)
    ax.plot(
      [i + shift - 0.1, i + shift + 0.1],
      [np.mean(values)] * 2,
      color=colour,
      lw=2.5,
      label=('given the protein' if shift < 0 else 'alone') if i == 0 else None,
    )
ax.set_xticks(range(len(table)), table)
ax.set_ylabel('likeness to its ligand')
ax.set_ylim(0, 1.05)
ax.legend(frameon=False, loc='center left', bbox_to_anchor=(1, 0.5))
plt.show()
given, lone = (np.mean([t[i] for t in table.values()]) for i in (0, 1))
print(f'mean likeness: given the protein {given:.2f}, alone {lone:.2f}')

# %% [markdown]
# ## 7. What the ligand reads in the protein
#
# In the mode `ligand_given_protein` the protein runs through the first half of
# its blocks once; every ligand block reads that state by cross-attention. The
# layers are run one by one here, with the parameters of each cut out of the
# stack, and the inputs of the cross-attention are caught on the way.

# %%
SCOPE = f'dual_track/{blocks.LAYER_STACK}/'


def layer_params(track, layer):
  """Parameters of one block, named as if it stood alone."""
  prefix = f'{SCOPE}blocks_{track}'
  return {
    f'block{module.removeprefix(prefix)}': {
      name: value[layer] for name, value in values.items()
    }
    for module, values in model.params.items()
    if module.startswith(prefix)
  }


def run_block(track, layer, *inputs):
  """Output of a block, and the weights of its cross-attention if it has one."""
  caught = []

  def catch(call, arguments, options, context):
    is_cross = isinstance(context.module, blocks.CrossAttention)
    if is_cross and context.method_name == '__call__':
      caught.extend(arguments)
    return call(*arguments, **options)

  def forward(*inputs):
    with hk.intercept_methods(catch):
      return blocks.DDiTBlock(config.model, name='block')(*inputs)

  params = layer_params(track, layer)
  output = hk.without_apply_rng(hk.transform(forward)).apply(params, *inputs)
  if not caught:
    return output, None
  x, context = caught[:2]

  def project(y, norm, linear):
    mean, var = y.mean(-1, keepdims=True), y.var(-1, keepdims=True)
    p = params[f'block/cross_attn/{norm}']
    y = (y - mean) / jnp.sqrt(var + 1e-5) * p['scale'] + p['offset']
    y = y @ params[f'block/cross_attn/{linear}']['weights']
    return y.reshape(len(y), config.model.num_head, -1)

  q = project(x, 'norm_q', 'q_proj')
  k = project(context, 'norm_kv', 'k_proj')
  weights = jnp.einsum('qhd,khd->hqk', q, k) * q.shape[-1] ** -0.5
  return output, jax.nn.softmax(weights)


def cross_attention(protein, ligand, t):
  """[num_block, num_head, ligand tokens, protein tokens]."""

  def embed(protein, ligand, sigma):
    embedding = dual_track.embedding
    return (
      embedding(config.model, 'protein')(protein),
      embedding(config.model, 'ligand')(ligand),
      embeddings.TimestepEmbedder(config.model.cond_dim)(sigma),
    )

  sigma = jnp.float32(noise.total(t))
  state, x, condition = hk.without_apply_rng(hk.transform(embed)).apply(
    model.params, jnp.asarray(protein), jnp.asarray(ligand), sigma
  )
  for layer in range(config.model.num_block // 2):
    state, _ = run_block('prot', layer, state, condition)
  maps = []
  for layer in range(config.model.num_block):
    x, weights = run_block('lig', layer, x, condition, None, state, None)
    maps.append(weights)
  return np.asarray(maps)


ids = tokenizers['protein'].encode(chosen.sequence)
maps = cross_attention(ids, truth[0], 0.01)
length = len(tokenizer.encode(chosen.smiles))
figure, axes = plt.subplots(
  config.model.num_block, 1, figsize=(10, 9), layout='constrained', sharex=True
)
for layer, ax in enumerate(axes):
  image = maps[layer].mean(0)[:length]
  ax.imshow(image * image.shape[1], cmap='Blues', aspect='auto', vmin=0, vmax=6)
  ax.set_ylabel(f'layer {layer + 1}\nligand token', fontsize=8)
axes[-1].set_xlabel('protein token')
figure.suptitle('weights, mean of the heads; 1 would be uniform: colour 0 to 6')
plt.show()

# %% [markdown]
# Vertical stripes: most ligand tokens read the same residues, those by which
# this protein can be told from the others. These maps say how the model
# recognises a protein. They are not contacts: no coordinates ever entered.
#
# How concentrated are they? The entropy of the weights, as the number of
# residues that would be read evenly, for each layer and head:

# %%
entropy = -(maps * np.log(maps + 1e-20)).sum(-1)[:, :, :length].mean(-1)
print(f'{len(ids)} protein tokens')
for layer, values in enumerate(np.exp(entropy)):
  print(f'layer {layer + 1}:', ' '.join(f'{value:6.1f}' for value in values))
