"""SEDD on one and on two tracks: networks, losses, gradients, training."""

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, cast

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax

from structattn_jax.discrete_diffusion import graph as graph_lib
from structattn_jax.discrete_diffusion import losses
from structattn_jax.discrete_diffusion import noise as noise_lib
from structattn_jax.network import sedd
from structattn_jax.network.sedd import blocks, dual_track, embeddings
from structattn_jax.verification import torch_names
from structattn_jax.verification.golden import Comparison, Golden, GoldenError

_BLOCKS = {
  'block/plain': (),
  'block/cross': ('context', 'context_mask'),
  'block/cross_selfmask': ('self_mask', 'context', 'context_mask'),
}
_TRACKS = ('protein', 'ligand')
# Adam divides small gradients by their size.
_TRAINED = 5e-5


class Place(NamedTuple):
  """Where a torch parameter is among ours; `index` of the stacked layer."""

  module: str
  name: str
  index: int | None
  transposed: bool


def place(torch_name: str) -> Place:
  """Our place of a parameter of SEDD, of V100 or of the dual track."""
  path = torch_name.removeprefix('transformer.')
  index = None
  block = re.fullmatch(r'(blocks(?:_prot|_lig)?)\.(\d+)\.(.*)', path)
  if block:
    outer = 'sedd' if block[1] == 'blocks' else 'dual_track'
    path = f'{outer}.{blocks.LAYER_STACK}.{block[1]}.{block[3]}'
    index = int(block[2])
  path = path.replace('mlp.fc1.', 'mlp.0.').replace('mlp.fc2.', 'mlp.2.')
  path = path.replace('output_layer.norm.', 'output_layer.norm_final.')
  if path == 'vocab_embed.weight':
    path = 'vocab_embed.embedding'
  path = re.sub(r'mlp\.(\d)', r'mlp_\1', path)
  path = path.removesuffix('.weight') if 'embedding' in path else path
  *scope, kind = path.split('.')
  if scope and scope[-1].startswith('norm'):
    kind = {'weight': 'scale', 'bias': 'offset'}[kind]
  is_matrix = kind == 'weight'
  kind = 'weights' if is_matrix else kind
  return Place('/'.join(scope), kind, index, is_matrix)


def haiku_params(state: Mapping[str, np.ndarray]) -> hk.Params:
  """A whole state dict as our parameters; buffers are left out."""
  layers: dict[tuple[str, str], dict[int | None, np.ndarray]] = {}
  for torch_name, value in state.items():
    if torch_name.endswith('inv_freq'):
      continue
    module, name, index, transposed = place(torch_name)
    value = value.T if transposed else value
    layers.setdefault((module, name), {})[index] = value
  params: dict[str, dict[str, np.ndarray]] = {}
  for (module, name), found in layers.items():
    value = found.get(None)
    if value is None:
      value = np.stack([found[i] for i in range(len(found))])
    params.setdefault(module, {})[name] = value
  return cast(hk.Params, params)


def torch_value(params: Any, torch_name: str) -> np.ndarray:
  """One parameter, or its gradient, in torch's orientation."""
  module, name, index, transposed = place(torch_name)
  value = np.asarray(params[module][name])
  if index is not None:
    value = value[index]
  return value.T if transposed else value


def dual_config(golden: Golden) -> sedd.DualTrackConfig:
  """Sizes of a golden of the dual track."""
  config = golden.meta['config']
  model, data = config['model'], config['data']
  extra = int(config['graph']['type'] == 'absorb')
  return sedd.DualTrackConfig(
    hidden_size=model['hidden_size'],
    num_head=model['n_heads'],
    num_block=model['n_blocks'],
    cond_dim=model['cond_dim'],
    protein_vocab=data['vocab_size_protein'] + extra,
    ligand_vocab=data['vocab_size_ligand'] + extra,
  )


def single_config(golden: Golden) -> sedd.SeddConfig:
  """Sizes of a golden of a single track."""
  config = golden.meta['config']
  model = config['model']
  v100 = 'n_blocks' not in model
  return sedd.SeddConfig(
    hidden_size=model['hidden_size'],
    num_head=model['n_heads'],
    num_block=model['n_blocks_prot' if v100 else 'n_blocks'],
    cond_dim=model['cond_dim'],
    vocab=config['tokens'] + int(config['graph']['type'] == 'absorb'),
    variant='v100' if v100 else 'sedd',
  )


def tokens_of(golden: Golden, kind: str) -> sedd.ProteinLigand:
  """The recorded 'indices', or the clean tokens 'x0', with their masks."""
  inputs: dict[str, Any] = golden.part('inputs')
  return sedd.ProteinLigand(
    inputs[f'protein_{kind}'],
    inputs[f'ligand_{kind}'],
    inputs.get('protein_mask'),
    inputs.get('ligand_mask'),
  )


def graph_of(golden: Golden, dim: int) -> graph_lib.Graph:
  """The forward process of a golden with `dim` states."""
  config = golden.meta['config']
  if config['graph']['type'] == 'uniform':
    return graph_lib.Uniform(dim)
  scaled = config['model'].get('scale_by_sigma', True)
  return graph_lib.Absorbing(dim, scale_by_sigma=scaled)


def noise_of(golden: Golden) -> noise_lib.Noise:
  """The schedule of a golden."""
  options = golden.meta['config'].get('noise', {'type': 'loglinear'})
  if options['type'] == 'loglinear':
    return noise_lib.LogLinearNoise(eps=options.get('eps', 1e-3))
  return noise_lib.make_noise(
    options['type'],
    sigma_min=options['sigma_min'],
    sigma_max=options['sigma_max'],
  )


def transition_from_uniform(
  graph: graph_lib.Graph,
  uniform: Any,
  tokens: Any,
  sigma: Any,
  replacement: Callable[[], Any],
) -> jax.Array:
  """Noised tokens; `replacement()` gives those of the uniform graph."""
  if isinstance(graph, graph_lib.Absorbing):
    return graph.sample_transition_from_uniform(uniform, tokens, sigma)
  return graph.sample_transition_from_uniform(
    uniform, tokens, sigma, replacement()
  )


def dual_modes(golden: Golden) -> Iterator[Comparison]:
  """Log scores of all modes; the joint loss and its gradients."""
  config, noise = dual_config(golden), noise_of(golden)
  params = haiku_params(dual_params(golden))
  inputs: dict[str, Any] = golden.part('inputs')
  recorded = golden.outputs()
  sigma = noise.total(inputs['t'])
  masked = tokens_of(golden, 'indices')
  graphs = {
    track: graph_of(golden, getattr(config, f'{track}_vocab'))
    for track in _TRACKS
  }
  modes = {
    name.partition('/')[0] for name in recorded if name.endswith('_log_score')
  }
  for case in sorted(modes):
    mode = cast(dual_track.Mode, case.removesuffix('_nomask'))
    tokens = masked
    if case != mode:
      tokens = sedd.ProteinLigand(masked.protein, masked.ligand)

    @jax.jit
    def run(params, tokens, sigma, mode=mode):
      logits = losses.batched_logits(config, params, tokens, sigma, mode=mode)
      return {
        track: graphs[track].log_score(
          getattr(logits, track), getattr(tokens, track), sigma[:, None]
        )
        for track in dual_track.tracks_of(mode).generated
      }

    for track, got in run(params, tokens, sigma).items():
      name = f'{case}/{track}_log_score'
      if name in recorded:
        yield golden.value(name, got)
  if 'loss/joint' not in recorded:
    return

  clean = sedd.ProteinLigand(inputs['protein_x0'], inputs['ligand_x0'])

  @jax.jit
  def step(params):
    def loss(params):
      found = losses.dual_track_loss(
        config,
        params,
        clean,
        masked,
        inputs['t'],
        noise=noise,
        graphs=graphs,
        # The published training averages over padding, too.
        reduction='positions',
      )
      return found.loss, found

    return jax.value_and_grad(loss, has_aux=True)(params)

  (loss, found), gradient = step(params)
  yield golden.value('loss/joint', loss)
  for track in _TRACKS:
    if f'loss/{track}_weighted' in recorded:
      got = getattr(found, f'{track}_weighted')
      yield golden.value(f'loss/{track}_weighted', got)
  yield from _gradients(golden, gradient)


def _gradients(golden: Golden, gradient: Any) -> Iterator[Comparison]:
  for name in golden.outputs('grad/'):
    got = torch_value(gradient, name.removeprefix('grad/'))
    yield golden.gradient(name, got)


def dual_params(golden: Golden) -> dict[str, np.ndarray]:
  """Stored parameters, or those of the recipe in `meta`.

  The recipe, for each name in sorted order of one RandomState(seed) stream:
  z = float32(standard_normal(shape)); vectors: 1 + 0.2 z for weights of norms,
  else 0.1 z; `embed` 0.5 z; matrices z / sqrt(shape[1]), with 0.5 z for adaLN.
  """
  stored = golden.part('params')
  if stored:
    return stored
  shapes = golden.meta['param_shapes']
  random = np.random.RandomState(golden.meta['seed'])
  params = {}
  for name in sorted(shapes):
    z = random.standard_normal(shapes[name]).astype(np.float32)
    if z.ndim == 1:
      is_scale = 'norm' in name.split('.')[-2] and name.endswith('weight')
      value = 1 + np.float32(0.2) * z if is_scale else np.float32(0.1) * z
    elif 'embed' in name:
      value = np.float32(0.5) * z
    else:
      scaled = np.float32(0.5) * z if 'adaLN' in name else z
      value = scaled.astype(np.float64) / np.sqrt(z.shape[1])
    params[name] = value.astype(np.float32)
    wanted = golden.meta.get('param_checksum', {}).get(name)
    if wanted is not None:
      wide = params[name].astype(np.float64)
      if not np.allclose([wide.sum(), (wide**2).sum()], wanted, 1e-9, 1e-9):
        raise GoldenError(f'{golden.case}: the recipe gives another {name}')
  return {name: golden.cast(value) for name, value in params.items()}


def single(golden: Golden) -> Iterator[Comparison]:
  """Original SEDD: intermediates, loss, gradients and training steps."""
  config, noise = single_config(golden), noise_of(golden)
  graph = graph_of(golden, config.vocab)
  params = haiku_params(golden.part('params'))
  inputs: dict[str, Any] = golden.part('inputs')
  recorded = golden.outputs()
  t, noised = inputs['t'], inputs['xt']
  sigma = noise.total(t)
  yield golden.value('sigma', sigma)
  yield golden.value('dsigma', noise.rate(t))

  found = jax.jit(_single_intermediates(config))(params, noised, sigma)
  found['log_score'] = graph.log_score(
    found['raw_logits'], noised, sigma[:, None]
  )
  for name, got in found.items():
    if name in recorded:
      yield golden.value(name, got)

  def loss(params, clean, noised, t):
    return losses.sedd_loss(
      config, params, clean, noised, t, noise=noise, graph=graph
    )

  step = jax.jit(jax.value_and_grad(loss, has_aux=True))
  (total, weighted), gradient = step(params, inputs['x0'], noised, t)
  yield golden.value('loss', total)
  yield golden.value('loss_per_sample', jnp.sum(weighted, -1))
  yield golden.value('score_entropy', weighted / noise.rate(t)[:, None])
  yield from _gradients(golden, gradient)
  if 'train/loss' in recorded:
    yield from _trained(golden, params, noise, graph, step)


def _single_intermediates(
  config: sedd.SeddConfig,
) -> Callable[..., dict[str, jax.Array]]:
  """Embedding, condition, states after each block, and logits of a batch."""

  def run(params, tokens, sigma):
    scope = f'sedd/{blocks.LAYER_STACK}'
    embedding = functools.partial(
      sedd.TokenEmbedding,
      config.vocab,
      config.hidden_size,
      normalise=False,
      name='vocab_embed',
    )
    timestep = functools.partial(
      sedd.TimestepEmbedder, config.cond_dim, variant=config.variant
    )
    block = functools.partial(sedd.DDiTBlock, config, name='blocks')
    x = _batched(embedding, params, tokens)
    condition = _batched(timestep, params, sigma)
    found = {'embed': x, 'cond': condition}
    for i in range(config.num_block):
      own = {
        path.removeprefix(f'{scope}/'): {k: v[i] for k, v in values.items()}
        for path, values in params.items()
        if path.startswith(scope)
      }
      found[f'block_{i}'] = x = _batched(block, own, x, condition)
    apply = sedd.transform_sedd(config).apply
    found['raw_logits'] = jax.vmap(apply, (None, 0, 0))(params, tokens, sigma)
    return found

  return run


def _batched(
  make: Callable[[], Any], params: Any, *arguments: Any
) -> jax.Array:
  """A module over a batch of arguments."""
  apply = hk.without_apply_rng(hk.transform(lambda *xs: make()(*xs))).apply
  return jax.vmap(apply, (None, *[0] * len(arguments)))(params, *arguments)


def _trained(
  golden: Golden,
  params: hk.Params,
  noise: noise_lib.Noise,
  graph: graph_lib.Graph,
  step: Callable[..., Any],
) -> Iterator[Comparison]:
  """SEDD's optimiser: warm-up, clipped AdamW, moving average."""
  options = golden.meta['config']['optim']
  decay = golden.meta['config']['training']['ema']
  inputs: dict[str, Any] = golden.part('inputs/train')
  steps = len(inputs['x0'])
  rates = [
    options['lr'] * min((i + 1) / options['warmup'], 1) for i in range(steps)
  ]
  adam = optax.chain(
    optax.scale_by_adam(options['beta1'], options['beta2'], options['eps']),
    optax.add_decayed_weights(options['weight_decay']),
  )
  state, average = adam.init(params), params
  found = []
  for i, rate in enumerate(rates):
    t = losses.times_from_uniform(inputs['t_uniform'][i])
    noised = transition_from_uniform(
      graph,
      inputs['transition_uniform'][i],
      inputs['x0'][i],
      noise.total(t)[:, None],
      lambda i=i: inputs['transition_randint'][i],
    )
    (loss, _), gradient = step(params, inputs['x0'][i], noised, t)
    found.append(loss)
    scale = 1 / (optax.tree.norm(gradient) + 1e-6)
    scale = jnp.minimum(options['grad_clip'] * scale, 1)
    gradient = jax.tree.map(lambda g, scale=scale: g * scale, gradient)
    updates, state = adam.update(gradient, state, params)
    params = jax.tree.map(lambda p, u, rate=rate: p - rate * u, params, updates)
    keep = min(decay, (2 + i) / (11 + i))
    average = jax.tree.map(
      lambda s, p, keep=keep: s - (1 - keep) * (s - p), average, params
    )
  yield golden.value('train/loss', np.stack(found))
  yield golden.value('train/lr', np.array(rates))
  for kind, tree in (('params', params), ('ema', average)):
    for name in golden.outputs(f'train/{kind}/'):
      got = torch_value(tree, name.removeprefix(f'train/{kind}/'))
      yield golden.value(name, got, floor=relative(golden, name, _TRAINED))


def single_v100(golden: Golden) -> Iterator[Comparison]:
  """The network whose parameters the seed document counts."""
  config = single_config(golden)
  params = haiku_params(golden.part('params'))
  inputs: dict[str, Any] = golden.part('inputs')
  apply = jax.vmap(sedd.transform_sedd(config).apply, (None, 0, 0))
  logits = jax.jit(apply)(params, inputs['indices'], inputs['sigma'])
  got = graph_of(golden, config.vocab).log_score(
    logits, inputs['indices'], inputs['sigma'][:, None]
  )
  yield golden.value('log_score', got)


def relative(golden: Golden, name: str, absolute: float) -> float:
  """An absolute tolerance as a part of the largest value."""
  single, double = (f'{prefix}/{name}' for prefix in ('outputs', 'outputs64'))
  truth = golden.arrays[double if double in golden.arrays else single]
  largest = np.abs(truth.astype(np.float64)).max()
  return float(absolute / max(largest, 1e-30))


def dual_components(golden: Golden) -> Iterator[Comparison]:
  """Timestep, embedding, rotary tables, cross-attention and blocks."""
  model = golden.meta['config']['model']
  inputs, params = golden.part('inputs'), golden.part('params')
  embedding = params['transformer.protein_embed.embedding.weight']
  config = sedd.DualTrackConfig(
    hidden_size=model['hidden_size'],
    num_head=model['n_heads'],
    num_block=1,
    cond_dim=model['cond_dim'],
    protein_vocab=len(embedding),
  )
  recorded = set(golden.outputs())

  def run(scope: str, path: str, make: Callable[[], Any], *arguments: Any):
    """A module with the golden's parameters over the batch."""
    prefix = f'transformer.{path}.'
    own = {
      name.removeprefix(prefix): value
      for name, value in params.items()
      if name.startswith(prefix)
    }
    batched = jax.jit(functools.partial(_batched, make))
    return batched(torch_names.haiku_params(own, scope), *arguments)

  if 'timestep/embedding' in recorded:
    got = jax.jit(jax.vmap(embeddings.timestep_embedding))(inputs['sigma'])
    yield golden.value('timestep/embedding', got)
  if 'timestep/mlp' in recorded:
    got = run(
      'sigma_map',
      'sigma_map',
      lambda: sedd.TimestepEmbedder(config.cond_dim),
      inputs['sigma'],
    )
    # Upstream applies the last SiLU outside of the module.
    yield golden.value('timestep/mlp', got, convert=_silu)
  if 'embed' in recorded:
    got = run(
      'protein_embed',
      'protein_embed',
      lambda: sedd.TokenEmbedding(*embedding.shape, name='protein_embed'),
      inputs['indices'],
    )
    yield golden.value('embed', got)
  yield from _rotary(golden, recorded)
  if 'final' in recorded:
    got = run(
      'protein_output',
      'protein_output',
      lambda: sedd.FinalLayer(config, len(embedding), name='protein_output'),
      inputs['x'],
      inputs['cond'],
    )
    yield golden.value('final', got)

  block = 'blocks_prot.0'
  for name, masked in (('nomask', False), ('mask', True)):
    if f'cross_attn/{name}' in recorded:
      arguments = [inputs['x'], inputs['context']]
      arguments += [inputs['context_mask']] * masked
      got = run(
        'cross_attn',
        f'{block}.cross_attn',
        lambda: sedd.CrossAttention(config),
        *arguments,
      )
      # Upstream's module adds the residual itself.
      yield golden.value(f'cross_attn/{name}', inputs['x'] + np.asarray(got))
  for name, masks in _BLOCKS.items():
    if name in recorded:

      def make(masks=masks):
        module = sedd.DDiTBlock(config, name='block')

        def call(x, condition, *rest):
          given = {
            key.removeprefix('self_'): value
            for key, value in zip(masks, rest, strict=True)
          }
          return module(x, condition, **given)

        return call

      arguments = (inputs[key] for key in ('x', 'cond', *masks))
      got = run('block', block, make, *arguments)
      yield golden.value(name, got)


def _rotary(golden: Golden, recorded: set[str]) -> Iterator[Comparison]:
  rotate = jax.jit(jax.vmap(embeddings.rotate_half))
  if 'rotary/qkv_out' in recorded:
    # [batch, n, 3, n_head, d_head]: queries, keys and values.
    is_wide = golden.is_float64 and golden.has_float64()
    qkv = golden.part('outputs64' if is_wide else 'outputs')['rotary/qkv_in']
    got = [rotate(qkv[:, :, 0]), rotate(qkv[:, :, 1]), qkv[:, :, 2]]
    yield golden.value('rotary/qkv_out', np.stack(got, axis=2))
  for name in ('rotary/cos', 'rotary/sin'):
    if name in recorded:
      # Rotating (1, 0) shows the tables themselves, which occur twice.
      _, n, _, d_head = golden.arrays[f'outputs/{name}'].shape
      dtype = golden.part('inputs')['x'].dtype
      unit = np.zeros((1, n, 1, d_head), dtype)
      unit[..., : d_head // 2] = 1
      cos, sin = np.split(np.asarray(rotate(unit)), 2, -1)
      table = cos if name == 'rotary/cos' else sin
      yield golden.value(name, np.concatenate([table, table], -1))


def _silu(x: np.ndarray) -> np.ndarray:
  return x / (1 + np.exp(-x))
