"""Samplers: from all-absorbed (or uniform) tokens to clean ones.

What a user calls: inputs are checked, the network is prepared, and the whole
loop is one compiled scan. `absorbing` and `literal` hold the loops, `schedule`
the options.
"""

import functools
from collections.abc import Mapping
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from structattn_jax.common import checks
from structattn_jax.discrete_diffusion import (
  absorbing,
  literal,
  prepared_network,
  schedule,
)
from structattn_jax.discrete_diffusion import graph as graph_lib
from structattn_jax.discrete_diffusion import noise as noise_lib
from structattn_jax.discrete_diffusion.absorbing import SampleOutput
from structattn_jax.discrete_diffusion.program import (
  ONLY,
  AnyConfig,
  Program,
)
from structattn_jax.discrete_diffusion.schedule import SamplerConfig
from structattn_jax.network.sedd import dual_track, single_track


def sample(
  config: dual_track.DualTrackConfig,
  params: hk.Params | Program,
  key: jax.Array,
  *,
  num_samples: int,
  mode: dual_track.Mode = 'joint',
  protein: jax.Array | int | None = None,
  ligand: jax.Array | int | None = None,
  protein_mask: jax.Array | None = None,
  ligand_mask: jax.Array | None = None,
  protein_fixed: jax.Array | None = None,
  ligand_fixed: jax.Array | None = None,
  sampler: SamplerConfig = schedule.DEFAULT,
  noise: noise_lib.Noise = noise_lib.DEFAULT,
  graph: graph_lib.GraphKind = 'absorbing',
  return_states: bool = False,
) -> SampleOutput:
  """Draws proteins, ligands or both; the whole loop is one compiled scan.

    >>> config = dual_track.DualTrackConfig(
    ...   hidden_size=16, num_head=2, num_block=2, ligand_vocab=30
    ... )
    >>> protein = jnp.array([0, 4, 5, 6, 2])
    >>> params = dual_track.transform_sedd_dual_track(config).init(
    ...   jax.random.key(0), protein, jnp.array([0, 7, 1]), jnp.array(0.5)
    ... )
    >>> out = sample(
    ...   config,
    ...   params,
    ...   jax.random.key(1),
    ...   num_samples=3,
    ...   mode='ligand_given_protein',
    ...   protein=protein,
    ...   ligand=8,
    ...   sampler=SamplerConfig(steps=4),
    ... )
    >>> out.tokens['ligand'].shape
    (3, 8)

  AdaLN vectors of all steps are computed before the loop; a context with a
  batch of one is encoded once per noise level for all samples. Sample i
  depends on `key` and i, not on `num_samples` or on padding.

  Args:
    config: sizes.
    params: of `transform_sedd_dual_track(config)`, or what
      `prepared_network.cached_sedd` made of them, which saves that work in
      each call.
    key: PRNG key.
    num_samples: number of samples B.
    mode: what is generated from what.
    protein: for a generated protein, its length, or [n] or [B, n] integer
      tokens, of which those at `protein_fixed` are kept; for a context [m] or
      [1, m] integer, the same for all samples, or [B, m].
    ligand: likewise.
    protein_mask: [n] or [B, n] bool, True = real token; None = all real. Those
      that are not real are hidden from the others; what is drawn there has no
      meaning.
    ligand_mask: likewise.
    protein_fixed: [n] or [B, n] bool, True where the tokens of a generated
      protein are given (inpainting); None = nowhere.
    ligand_fixed: likewise.
    sampler: how to sample.
    noise: schedule.
    graph: forward process.
    return_states: whether to return the trajectory.

  Returns:
    Tokens of the generated tracks.

  Raises:
    ValueError: on an unknown mode, missing or superfluous inputs, or a wrong
      shape.
    TypeError: on a wrong dtype.
  """
  given = {
    'protein': (protein, protein_mask, protein_fixed),
    'ligand': (ligand, ligand_mask, ligand_fixed),
  }
  tracks = dual_track.tracks_of(mode)
  context = {
    track: _context(track, _vocab(config, track), num_samples, *given[track])
    for track in tracks.context
  }
  for track in set(given) - {*tracks.generated, *tracks.context}:
    if any(value is not None for value in given[track]):
      raise ValueError(f'{track}: not used in the mode {mode!r}')
  return _sample(
    config,
    params,
    key,
    num_samples,
    {track: given[track] for track in tracks.generated},
    context,
    sampler,
    noise,
    graph,
    return_states,
  )


def sample_sedd(
  config: single_track.SeddConfig,
  params: hk.Params | Program,
  key: jax.Array,
  *,
  num_samples: int,
  tokens: jax.Array | int,
  mask: jax.Array | None = None,
  fixed: jax.Array | None = None,
  sampler: SamplerConfig = schedule.DEFAULT,
  noise: noise_lib.Noise = noise_lib.DEFAULT,
  graph: graph_lib.GraphKind = 'absorbing',
  return_states: bool = False,
) -> SampleOutput:
  """Draws sequences of the single-track network; see `sample`.

  Args:
    config: sizes.
    params: of `transform_sedd(config)`, or prepared.
    key: PRNG key.
    num_samples: number of samples B.
    tokens: the length, or [n] or [B, n] integer tokens, of which those at
      `fixed` are kept.
    mask: [n] or [B, n] bool, True = real token; None = all real.
    fixed: [n] or [B, n] bool; None = nowhere.
    sampler: how to sample.
    noise: schedule.
    graph: forward process.
    return_states: whether to return the trajectory.

  Returns:
    Tokens of the track 'only'.
  """
  given = {ONLY: (tokens, mask, fixed)}
  return _sample(
    config,
    params,
    key,
    num_samples,
    given,
    {},
    sampler,
    noise,
    graph,
    return_states,
  )


def _context(
  track: str, vocab: int, num_samples: int, tokens: Any, mask: Any, fixed: Any
) -> tuple[jax.Array, jax.Array | None]:
  """Tokens and mask of a context, with a batch of 1 or `num_samples`."""
  if tokens is None or isinstance(tokens, int):
    raise ValueError(f'{track}: the mode needs its tokens, got {tokens}')
  if fixed is not None:
    raise ValueError(f'{track}_fixed: the mode does not generate this track')
  tokens = _batched(track, tokens, num_samples, 'integer', vocab)
  if mask is not None:
    mask = _batched(f'{track}_mask', mask, num_samples, 'bool')
    checks.check_shapes(
      {'n': tokens.shape[1]}, **{f'{track}_mask': (mask[0], 'n')}
    )
    if mask.shape[0] > tokens.shape[0]:
      tokens = jnp.broadcast_to(tokens, mask.shape)
  return tokens, mask


def _batched(
  name: str, x: Any, num_samples: int, kind: str, vocab: int | None = None
) -> jax.Array:
  """[n] as [1, n]; [1, n] and [num_samples, n] as they are."""
  checks.check_dtypes(kind, **{name: x})
  if vocab is not None and checks.is_concrete(x) and np.size(x):
    smallest, largest = np.min(x), np.max(x)
    if smallest < 0 or largest >= vocab:
      raise ValueError(
        f'{name}: expected tokens in [0, {vocab}), got {smallest} to {largest}'
      )
  x = jnp.asarray(x)
  x = x[None] if x.ndim == 1 else x
  if x.ndim != 2 or x.shape[0] not in (1, num_samples):
    raise ValueError(
      f'{name}: expected shape [n], [1, n] or [{num_samples}, n], got {x.shape}'
    )
  return x


def _vocab(config: AnyConfig, track: str) -> int:
  if isinstance(config, single_track.SeddConfig):
    return config.vocab
  return config.protein_vocab if track == 'protein' else config.ligand_vocab


def _sample(
  config: AnyConfig,
  params: hk.Params | Program,
  key: jax.Array,
  num_samples: int,
  given: Mapping[str, tuple[Any, Any, Any]],
  context: dict[str, tuple[jax.Array, jax.Array | None]],
  sampler: SamplerConfig,
  noise: noise_lib.Noise,
  graph: graph_lib.GraphKind,
  return_states: bool,
) -> SampleOutput:
  """Checks and arranges the inputs of both public forms."""
  lengths, fixed, masks = {}, {}, {}
  for track, (tokens, mask, keep) in given.items():
    if tokens is None:
      raise ValueError(f'{track}: expected a length or tokens, got None')
    if isinstance(tokens, int):
      if keep is not None:
        raise ValueError(f'{track}_fixed: needs tokens, got a length')
      lengths[track], fixed[track] = tokens, None
    else:
      tokens = _batched(
        track, tokens, num_samples, 'integer', _vocab(config, track)
      )
      lengths[track] = tokens.shape[1]
      fixed[track] = None
      if keep is not None:
        keep = _batched(f'{track}_fixed', keep, num_samples, 'bool')
        fixed[track] = (tokens, keep)
    if mask is not None:
      mask = _batched(f'{track}_mask', mask, num_samples, 'bool')
    masks[track] = mask
    for name, x in (('mask', mask), ('fixed', keep)):
      if x is not None:
        checks.check_shapes(
          {'n': lengths[track]}, **{f'{track}_{name}': (x[0], 'n')}
        )
  if not isinstance(params, Program):
    params = _prepared(config, params, absorbing=graph == 'absorbing')
  elif params.config != config:
    raise ValueError(f'params: prepared for {params.config}, not for {config}')
  return _run(
    params,
    key,
    masks,
    fixed,
    context,
    lengths=tuple(lengths.items()),
    num_samples=num_samples,
    sampler=sampler,
    noise=noise,
    graph=graph,
    return_states=return_states,
  )


_prepared = jax.jit(
  prepared_network.prepare, static_argnames=('config', 'absorbing')
)


@functools.partial(
  jax.jit,
  static_argnames=(
    'lengths',
    'num_samples',
    'sampler',
    'noise',
    'graph',
    'return_states',
  ),
)
def _run(
  program: Program,
  key: jax.Array,
  masks: dict[str, jax.Array | None],
  fixed: dict[str, tuple[jax.Array, jax.Array] | None],
  context: dict[str, tuple[jax.Array, jax.Array | None]],
  *,
  lengths: tuple[tuple[str, int], ...],
  num_samples: int,
  sampler: SamplerConfig,
  noise: noise_lib.Noise,
  graph: graph_lib.GraphKind,
  return_states: bool,
) -> SampleOutput:
  """Draws all numbers, encodes contexts and runs the loop of the graph."""
  graphs = {
    track: graph_lib.make_graph(graph, len(program.tracks[track].table))
    for track, _ in lengths
  }
  calls = sampler.steps + sampler.denoise
  sigma = jnp.asarray(schedule.make_schedule(noise, sampler).sigma)
  is_time_free = not program.config.time_conditioning

  def encoded(modulation):
    for track, inputs in context.items():
      return prepared_network.encode_context(
        program, modulation, track, *inputs
      )
    return None

  def begun(tokens, modulation, read):
    return prepared_network.begin(program, modulation, tokens, masks, read)

  if graph == 'absorbing':
    modulation = prepared_network.modulations(program, sigma[:calls])
    # Without time the same at all noise levels.
    read = None
    if is_time_free:
      read = encoded(jax.tree.map(lambda x: x[0], modulation))
    return absorbing.sample_absorbing_from_uniform(
      lambda tokens, modulation: (
        begun(
          tokens, modulation, read if is_time_free else encoded(modulation)
        ).logits
      ),
      {track: each.dim for track, each in graphs.items()},
      {
        track: _sample_uniforms(key, track, num_samples, n, calls)
        for track, n in lengths
      },
      modulation,
      noise=noise,
      sampler=sampler,
      fixed=fixed,
      time_free=is_time_free,
      return_states=return_states,
    )

  def draw(probabilities, keys):
    uniform = jax.vmap(
      lambda key, p: jax.random.uniform(key, p.shape, p.dtype)
    )(keys, probabilities)
    return literal.categorical_from_uniform(probabilities, uniform)

  # [calls + 1, num_samples] keys; the first row draws the start.
  keys = {
    track: jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (None, 0))(
      _sample_keys(key, track, num_samples), jnp.arange(calls + 1)
    )
    for track, _ in lengths
  }
  replay = literal.run_literal(
    lambda tokens, modulation: begun(
      tokens, modulation, encoded(modulation)
    ).logits(),
    graphs,
    {
      track: jax.vmap(
        functools.partial(graphs[track].sample_limit, shape=(n,))
      )(keys[track][0])
      for track, n in lengths
    },
    {track: x[1 : sampler.steps + 1] for track, x in keys.items()},
    {track: x[-1] for track, x in keys.items()},
    prepared_network.modulations(program, sigma),
    draw,
    noise,
    sampler,
    fixed,
    with_probabilities=False,
  )
  return SampleOutput(
    replay.tokens, replay.states if return_states else None, jnp.int32(calls)
  )


def _sample_keys(key: jax.Array, track: str, num_samples: int) -> jax.Array:
  """One key per sample, which does not depend on how many there are."""
  key = jax.random.fold_in(key, track == 'ligand')
  return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(num_samples))


def _sample_uniforms(
  key: jax.Array, track: str, num_samples: int, n: int, steps: int
) -> jax.Array:
  """[steps, num_samples, n, 2] uniforms; more positions add, change nothing."""
  uniforms = jax.vmap(
    lambda key: jax.vmap(
      lambda i: jax.random.uniform(jax.random.fold_in(key, i), (steps, 2))
    )(jnp.arange(n))
  )(_sample_keys(key, track, num_samples))
  return jnp.moveaxis(uniforms, 2, 0)
