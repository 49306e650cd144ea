"""SEDD: graphs, noise schedules, and whole trajectories of samplers."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from structattn_jax.discrete_diffusion import graph as graph_lib
from structattn_jax.discrete_diffusion import literal, losses, schedule
from structattn_jax.discrete_diffusion import noise as noise_lib
from structattn_jax.network import sedd as network
from structattn_jax.network.sedd import dual_track
from structattn_jax.verification import sedd
from structattn_jax.verification.golden import Comparison, Golden

# Absolute; upstream computes differences of sigma in float32.
_PROBABILITIES = {'analytic': 5e-5, 'euler': 2e-6}


def graph_noise(golden: Golden) -> Iterator[Comparison]:
  """Schedules, and all of both graphs."""
  inputs = golden.part('inputs')
  for name in golden.outputs('noise/'):
    _, kind, what = name.split('/')
    noise = _named_noise(kind)
    t = inputs['noise/t']
    got = jax.jit(noise.total if what == 'sigma' else noise.rate)(t)
    yield golden.value(name, got)
  for kind, make in (
    ('absorb', graph_lib.Absorbing),
    ('uniform', graph_lib.Uniform),
  ):
    own = golden.part(f'inputs/{kind}')
    if not own:
      continue
    found = jax.jit(_graph_outputs(make(own['log_score'].shape[-1])))(own)
    for name in golden.outputs(f'{kind}/'):
      got = found[name.removeprefix(f'{kind}/')]
      if name.partition('/')[2].startswith('sample_'):
        yield golden.exact(name, got)
      else:
        yield golden.value(name, got)


def _named_noise(name: str) -> noise_lib.Noise:
  kind, _, eps = name.partition('_')
  if kind == 'loglinear':
    return noise_lib.LogLinearNoise(eps=float(eps.replace('e', 'e-') or 1e-3))
  smallest, largest = {'geometric': (1e-4, 20.0), 'cosine': (1e-3, 1.0)}[kind]
  # Recorded with a float32 constant.
  return noise_lib.make_noise(
    kind, sigma_min=float(np.float32(smallest)), sigma_max=largest
  )


def _graph_outputs(graph: graph_lib.Graph) -> Callable[..., dict[str, Any]]:
  """All of one graph, under the names of the golden."""

  def run(inputs):
    clean, tokens = inputs['x0'], inputs['i']
    sigma, dsigma = inputs['sigma'], inputs['dsigma']
    score = jnp.exp(inputs['log_score'])
    reverse = graph.reverse_rate(tokens, score)
    probabilities = literal.step_probabilities(
      graph, inputs['log_score'], tokens, dsigma
    )
    euler = literal.step_probabilities(
      graph,
      inputs['log_score'],
      tokens,
      jnp.float32(0.05),
      predictor='euler',
    )
    return {
      'rate': graph.rate(tokens),
      'transp_rate': graph.transp_rate(tokens),
      'transition': graph.transition(tokens, sigma),
      'transp_transition': graph.transp_transition(tokens, dsigma),
      'staggered_score': graph.staggered_score(score, dsigma),
      'reverse_rate': reverse,
      'score_entropy': graph.score_entropy(
        inputs['log_score'], sigma, tokens, clean
      ),
      'analytic_probs': probabilities,
      'sample_transition': sedd.transition_from_uniform(
        graph,
        inputs['move_uniform'],
        clean,
        sigma,
        lambda: inputs['move_randint'],
      ),
      'sample_categorical': literal.categorical_from_uniform(
        probabilities, inputs['cat_uniform']
      ),
      'sample_rate': literal.categorical_from_uniform(
        euler, inputs['rate_uniform']
      ),
    }

  return run


def sampler(golden: Golden) -> Iterator[Comparison]:
  """Whole trajectories of a single track."""
  config = sedd.single_config(golden)
  params = sedd.haiku_params(golden.part('params'))
  inputs: dict[str, Any] = golden.part('inputs')
  apply = jax.vmap(network.transform_sedd(config).apply, (None, 0, None))

  @jax.jit
  def run(tokens, sigma):
    return {'only': apply(params, tokens['only'], sigma)}

  for case in sorted({name.partition('/')[0] for name in golden.outputs()}):
    predictor = case.removesuffix('_cond')
    fixed = None
    if case != predictor:
      shape = golden.arrays[f'outputs/{case}/states'].shape[1:]
      mask = np.isin(np.arange(shape[-1]), inputs['cond/locs'])
      values = np.zeros(shape, np.int32)
      values[:, inputs['cond/locs']] = inputs['cond/ids']
      fixed = {'only': (values, mask)}
    yield from _trajectory(
      golden, case, run, {'only': config.vocab}, predictor, fixed
    )


def dual_sampler(golden: Golden) -> Iterator[Comparison]:
  """Whole trajectories of the dual track: conditional, and joint."""
  config = sedd.dual_config(golden)
  params = sedd.haiku_params(sedd.dual_params(golden))
  given = sedd.tokens_of(golden, 'indices')
  predictors = golden.meta['predictor']
  modes = {name.partition('/')[0] for name in golden.outputs()}
  for mode in cast(list[dual_track.Mode], sorted(modes)):

    @jax.jit
    def run(tokens, sigma, mode=mode):
      batch = dataclasses.replace(given, **dict(tokens))
      sigmas = jnp.full(len(next(iter(tokens.values()))), sigma)
      logits = losses.batched_logits(config, params, batch, sigmas, mode=mode)
      return {track: getattr(logits, track) for track in tokens}

    vocab = {
      track: getattr(config, f'{track}_vocab')
      for track in dual_track.tracks_of(mode).generated
    }
    kind = 'joint' if mode == 'joint' else 'conditional'
    yield from _trajectory(
      golden, mode, run, vocab, predictors[kind].split()[0]
    )


def _trajectory(
  golden: Golden,
  case: str,
  network: Callable[..., Any],
  vocab: Mapping[str, int],
  predictor: str,
  fixed: Any = None,
) -> Iterator[Comparison]:
  """States and results exactly; probabilities where they are recorded."""
  inputs: dict[str, Any] = golden.part('inputs')
  graphs = {track: sedd.graph_of(golden, dim) for track, dim in vocab.items()}
  # Only what has two tracks names them.
  names = {track: track if len(vocab) > 1 else '' for track in vocab}
  prefixes = {
    track: f'{case}/{name}_' if name else f'{case}/'
    for track, name in names.items()
  }
  start: dict[str, Any] = {}
  for track, graph in graphs.items():
    state = golden.arrays[f'outputs/{prefixes[track]}states'][0]
    if isinstance(graph, graph_lib.Absorbing):
      state = np.full_like(state, graph.absorbing)
    start[track] = state.astype(np.int32)

  def uniforms(kind: str) -> dict[str, Any]:
    return {
      track: inputs['_'.join(filter(None, (f'{case}/{kind}', name)))]
      for track, name in names.items()
    }

  found = literal.sample_from_uniform(
    network,
    graphs,
    start,
    uniforms('uniform'),
    uniforms('uniform_denoise'),
    noise=sedd.noise_of(golden),
    sampler=schedule.SamplerConfig(
      steps=golden.meta['steps'],
      eps=golden.meta['eps'],
      predictor=cast(schedule.Predictor, predictor),
    ),
    fixed=fixed,
  )
  for track, prefix in prefixes.items():
    for name, values in (('states', found.states), ('final', found.tokens)):
      if f'outputs/{prefix}{name}' in golden.arrays:
        yield golden.exact(f'{prefix}{name}', values[track])
    for name, chances, kind in (
      ('probs', found.probabilities, predictor),
      ('probs_denoise', found.denoiser_probabilities, 'analytic'),
    ):
      output = f'{prefix}{name}'
      if f'outputs/{output}' in golden.arrays:
        floor = sedd.relative(golden, output, _PROBABILITIES[kind])
        yield golden.value(output, (chances or {}).get(track), floor=floor)
