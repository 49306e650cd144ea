"""Samplers: from all-absorbed (or uniform) tokens to clean ones.

Lou, Meng, Ermon 2024, Algs. 2 and 3; SEDD `sampling.py` @ 0605786d. On a grid
t_0 = 1 > ... > t_steps = eps each step calls the network once and draws every
token from

  analytic  staggered_score(s, dsigma) * transp_transition(x, dsigma)
  euler     onehot(x) + dt rate(t) reverse_rate(x, s)

and a last call at eps removes what noise is left (denoiser). Both tracks of the
joint mode are updated from the same call.

For an absorbing graph both predictors leave clean tokens alone and replace an
absorbed one by v with probability

  p_v = k e^{logit_v} / (V - 1),  k = (e^dsigma - 1) / (e^sigma - 1)  analytic
                                  k = dt rate(t) / (e^sigma - 1)      euler

(k = dt / t for both with log-linear noise), and always if these sum to more
than 1. So two uniforms per position are enough: whether it is replaced, and by
what. `sample` does that; `sample_from_uniform` is the literal form, which
replays recorded draws.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from structattn_jax.common import base_config, checks, numerics
from structattn_jax.discrete_diffusion import graph as graph_lib
from structattn_jax.discrete_diffusion import noise as noise_lib
from structattn_jax.discrete_diffusion import prepared_network as kernel
from structattn_jax.network.sedd import dual_track as network_lib

Predictor = Literal['analytic', 'euler']
Tokens = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplerConfig(base_config.BaseConfig):
  """How to sample.

  Attributes:
    steps: number of steps before the denoiser.
    predictor: 'analytic' or 'euler'.
    denoise: whether a last network call removes the noise left at `eps`.
    eps: time of the last step.
    temperature: of the choice among new tokens; not of whether to change one.
    top_p: the smallest set of most likely new tokens with at least this
      probability is kept; 1 keeps all.
  """

  steps: int = 64
  predictor: Predictor = 'analytic'
  denoise: bool = True
  eps: float = 1e-5
  temperature: float = 1.0
  top_p: float = 1.0

  def __post_init__(self) -> None:
    super().__post_init__()
    for name, ok, wanted in (
      ('steps', self.steps >= 1, 'at least 1'),
      ('eps', 0 < self.eps < 1, 'a time in (0, 1)'),
      ('temperature', self.temperature > 0, 'a number above 0'),
      ('top_p', 0 < self.top_p <= 1, 'a probability in (0, 1]'),
    ):
      if not ok:
        raise ValueError(
          f'SamplerConfig.{name}: expected {wanted}, got {getattr(self, name)}'
        )


_DEFAULT = SamplerConfig()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SampleOutput:
  """Samples; dictionaries by generated track ('only' for a single track).

  Attributes:
    tokens: [num_samples, n] int32.
    states: [steps + 1, num_samples, n] int32, tokens that enter each network
      call, the last one the denoiser's; None unless asked for.
    network_calls: [] int32, how often the network was run.
  """

  tokens: dict[str, jax.Array]
  states: dict[str, jax.Array] | None
  network_calls: jax.Array

  @property
  def protein(self) -> jax.Array | None:
    """Protein tokens; None if they were not generated."""
    return self.tokens.get('protein')

  @property
  def ligand(self) -> jax.Array | None:
    """Ligand tokens; None if they were not generated."""
    return self.tokens.get('ligand')


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Replay:
  """What `sample_from_uniform` went through; dictionaries by track.

  Attributes:
    tokens: [B, n] int32, the result.
    states: [steps + 1, B, n] int32, tokens that enter each network call.
    probabilities: [steps, B, n, V] float32, what each step drew from; values
      below 0 are never drawn, and rows need not sum to 1. None if not asked
      for.
    denoiser_probabilities: [B, n, V], or V - 1 for absorbing graphs.
  """

  tokens: dict[str, jax.Array]
  states: dict[str, jax.Array]
  probabilities: dict[str, jax.Array] | None
  denoiser_probabilities: dict[str, jax.Array] | None


class Schedule(NamedTuple):
  """Numbers of all steps, float32 in NumPy, computed in float64.

  Attributes:
    sigma: [steps + 1] at t_i.
    dsigma: [steps] sigma(t_i) - sigma(t_i - dt).
    rate: [steps] dt rate(t_i).
  """

  sigma: np.ndarray
  dsigma: np.ndarray
  rate: np.ndarray


def schedule(noise: noise_lib.Noise, sampler: SamplerConfig) -> Schedule:
  """The grid of a sampler: t from 1 to eps."""
  t = np.linspace(1, sampler.eps, sampler.steps + 1)
  dt = (1 - sampler.eps) / sampler.steps
  sigma = noise.total(t)
  return Schedule(
    *(
      x.astype(np.float32)
      for x in (
        sigma,
        sigma[:-1] - noise.total(t[:-1] - dt),
        dt * noise.rate(t[:-1]),
      )
    )
  )


def sample(
  config: network_lib.DualTrackConfig,
  params: hk.Params | kernel.Program,
  key: jax.Array,
  *,
  num_samples: int,
  mode: network_lib.Mode = 'joint',
  protein: jax.Array | int | None = None,
  ligand: jax.Array | int | None = None,
  protein_mask: jax.Array | None = None,
  ligand_mask: jax.Array | None = None,
  protein_fixed: jax.Array | None = None,
  ligand_fixed: jax.Array | None = None,
  sampler: SamplerConfig = _DEFAULT,
  noise: noise_lib.Noise = noise_lib.DEFAULT,
  graph: graph_lib.GraphKind = 'absorbing',
  return_states: bool = False,
) -> SampleOutput:
  """Draws proteins, ligands or both; the whole loop is one compiled scan.

    >>> config = network_lib.DualTrackConfig(
    ...   hidden_size=16, num_head=2, num_block=2, ligand_vocab=30
    ... )
    >>> protein = jnp.array([0, 4, 5, 6, 2])
    >>> params = network_lib.transform_sedd_dual_track(config).init(
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
      `kernels.sedd_dual_track.prepare` made of them, which saves that work in
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
  tracks = network_lib.tracks_of(mode)
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
  config: network_lib.SeddConfig,
  params: hk.Params | kernel.Program,
  key: jax.Array,
  *,
  num_samples: int,
  tokens: jax.Array | int,
  mask: jax.Array | None = None,
  fixed: jax.Array | None = None,
  sampler: SamplerConfig = _DEFAULT,
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
  given = {kernel.ONLY: (tokens, mask, fixed)}
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


def _vocab(config: network_lib.AnyConfig, track: str) -> int:
  if isinstance(config, network_lib.SeddConfig):
    return config.vocab
  return config.protein_vocab if track == 'protein' else config.ligand_vocab


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


def _sample(
  config: network_lib.AnyConfig,
  params: hk.Params | kernel.Program,
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
  if not isinstance(params, kernel.Program):
    params = _prepared(config, params, absorbing=graph == 'absorbing')
  run = _run_absorbing if graph == 'absorbing' else _run_uniform
  return run(
    params,
    key,
    masks,
    fixed,
    context,
    lengths=tuple(lengths.items()),
    num_samples=num_samples,
    sampler=sampler,
    noise=noise,
    return_states=return_states,
  )


_prepared = jax.jit(kernel.prepare, static_argnames=('config', 'absorbing'))
_STATIC = ('lengths', 'num_samples', 'sampler', 'noise', 'return_states')


@functools.partial(jax.jit, static_argnames=_STATIC)
def _run_absorbing(
  program: kernel.Program,
  key: jax.Array,
  masks: dict[str, jax.Array | None],
  fixed: dict[str, tuple[jax.Array, jax.Array] | None],
  context: dict[str, tuple[jax.Array, jax.Array | None]],
  *,
  lengths: tuple[tuple[str, int], ...],
  num_samples: int,
  sampler: SamplerConfig,
  noise: noise_lib.Noise,
  return_states: bool,
) -> SampleOutput:
  """The loop for absorbing graphs: two uniforms per position."""
  graphs = _graphs(program, 'absorbing')
  sizes = dict(lengths)
  sigma = schedule(noise, sampler).sigma[: sampler.steps + sampler.denoise]
  modulation = kernel.modulations(program, jnp.asarray(sigma))
  uniforms = {
    track: _sample_uniforms(key, track, num_samples, n, len(sigma))
    for track, n in sizes.items()
  }
  time_free = not program.config.time_conditioning
  encoded = None
  if time_free:
    # The same at all noise levels.
    first = {track: value[0] for track, value in modulation.items()}
    encoded = _encoded(program, first, context)

  def network(tokens, modulation):
    read = encoded if time_free else _encoded(program, modulation, context)
    return _begun(program, modulation, tokens, masks, read).logits

  return sample_absorbing_from_uniform(
    network,
    {track: graphs[track].dim for track in sizes},
    uniforms,
    modulation,
    noise=noise,
    sampler=sampler,
    fixed=fixed,
    time_free=time_free,
    return_states=return_states,
  )


def sample_absorbing_from_uniform(
  network: Callable[[Tokens, Any], Callable[..., Tokens]],
  dims: Mapping[str, int],
  uniforms: Tokens,
  conditions: Any,
  *,
  noise: noise_lib.Noise = noise_lib.DEFAULT,
  sampler: SamplerConfig = _DEFAULT,
  fixed: Mapping[str, tuple[jax.Array, jax.Array] | None] | None = None,
  time_free: bool = False,
  return_states: bool = False,
) -> SampleOutput:
  """The loop of `sample` with given draws; absorbing graphs.

  The same distribution as `sample_from_uniform` with two uniforms per position
  instead of V. The end of the network runs only at absorbed positions, which
  are gathered up to a number that is one of a few; nothing runs when no token
  is absorbed.

  Args:
    network: `network(tokens, condition)` does what needs all tokens [B, n] by
      track, and returns a function of `positions`, [B, k] by track or None for
      all, that gives logits [B, k or n, n_out] by track; see
      `replace_from_uniform` for n_out.
    dims: states by track, including the absorbing one.
    uniforms: [calls, B, n, 2] float in [0, 1) by track: whether and by what a
      token is replaced. calls = steps + 1, or steps without the denoiser.
    conditions: tree of [calls, ...], an entry for each network call.
    noise: schedule.
    sampler: how to sample.
    fixed: as in `sample_from_uniform`.
    time_free: whether logits depend on the tokens alone: then the network is
      called only after a token has changed, with the same result.
    return_states: whether to return the trajectory.

  Returns:
    The samples.
  """
  kept = fixed or {}
  plan = schedule(noise, sampler)
  # Chances relative to e^logit / (V - 1); the denoiser always replaces.
  amount = plan.rate.astype(np.float64)
  if sampler.predictor == 'analytic':
    amount = np.expm1(plan.dsigma.astype(np.float64))
  log_chance = np.log(amount / np.expm1(plan.sigma[:-1].astype(np.float64)))
  if sampler.denoise:
    log_chance = np.append(log_chance, np.inf)
  start = {
    track: jnp.full(draws.shape[1:3], dims[track] - 1, jnp.int32)
    for track, draws in uniforms.items()
  }
  longest = max(ids.shape[-1] for ids in start.values())
  num_levels = max(1, min(_MOST_LEVELS, longest // _POSITIONS_PER_LEVEL))

  def replaced(tokens, logits, log_chance, draws):
    return {
      track: replace_from_uniform(
        logits[track],
        ids,
        log_chance,
        draws[track],
        dim=dims[track],
        temperature=sampler.temperature,
        top_p=sampler.top_p,
      )
      for track, ids in tokens.items()
    }

  def absorbed(tokens):
    return {track: ids == dims[track] - 1 for track, ids in tokens.items()}

  def project(tokens):
    return {
      track: _put_back(ids, kept.get(track)) for track, ids in tokens.items()
    }

  def at_level(level, begun, tokens, log_chance, draws):
    """The end of one step at the first `level` parts of the positions."""
    if level == num_levels:
      return replaced(tokens, begun(None), log_chance, draws)
    positions = {
      track: jnp.argsort(~where, -1, stable=True)[
        :, : -(-where.shape[-1] * level // num_levels)
      ]
      for track, where in absorbed(tokens).items()
    }

    def take(values):
      return {
        track: jax.vmap(lambda x, i: x[i])(x, positions[track])
        for track, x in values.items()
      }

    new = replaced(take(tokens), begun(positions), log_chance, take(draws))
    return {
      track: jax.vmap(lambda x, i, y: x.at[i].set(y))(
        ids, positions[track], new[track]
      )
      for track, ids in tokens.items()
    }

  def step(carry, inputs):
    tokens, calls = carry
    condition, log_chance, draws = inputs
    tokens = project(tokens)
    part = jnp.max(
      jnp.stack(
        [
          jnp.max(jnp.sum(where, -1)) / where.shape[-1]
          for where in absorbed(tokens).values()
        ]
      )
    )

    def call(tokens):
      begun = network(tokens, condition)
      branches = [
        lambda tokens, level=level: at_level(
          level, begun, tokens, log_chance, draws
        )
        for level in range(1, num_levels + 1)
      ]
      level = jnp.ceil(part * num_levels).astype(jnp.int32)
      return jax.lax.switch(level - 1, branches, tokens)

    # Without anything absorbed nothing can change any more.
    new = jax.lax.cond(part > 0, call, dict, tokens)
    calls += (part > 0).astype(jnp.int32)
    return (new, calls), tokens if return_states else None

  def time_free_step(carry, inputs):
    tokens, logits, changed, calls = carry
    condition, log_chance, draws = inputs
    tokens = project(tokens)
    logits = jax.lax.cond(
      changed,
      lambda tokens: network(tokens, condition)(None),
      lambda tokens: logits,
      tokens,
    )
    new = replaced(tokens, logits, log_chance, draws)
    calls += changed.astype(jnp.int32)
    changed = jnp.any(
      jnp.stack([jnp.any(new[track] != ids) for track, ids in tokens.items()])
    )
    return (new, logits, changed, calls), tokens if return_states else None

  inputs = (conditions, jnp.asarray(log_chance, jnp.float32), dict(uniforms))
  calls = jnp.int32(0)
  if time_free:
    condition = jax.tree.map(lambda x: x[0], conditions)
    shapes = jax.eval_shape(
      lambda tokens: network(tokens, condition)(None), start
    )
    logits = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    carry = (start, logits, jnp.bool_(True), calls)
    (tokens, _, _, calls), states = jax.lax.scan(time_free_step, carry, inputs)
  else:
    (tokens, calls), states = jax.lax.scan(step, (start, calls), inputs)
  tokens = project(tokens)
  if return_states and not sampler.denoise:
    states = {
      track: jnp.concatenate([states[track], ids[None]])
      for track, ids in tokens.items()
    }
  return SampleOutput(tokens, states, calls)


# The end of the network is compiled for so many parts of the positions, where
# there are enough of them.
_MOST_LEVELS = 4
_POSITIONS_PER_LEVEL = 8


@functools.partial(jax.jit, static_argnames=_STATIC)
def _run_uniform(
  program: kernel.Program,
  key: jax.Array,
  masks: dict[str, jax.Array | None],
  fixed: dict[str, tuple[jax.Array, jax.Array] | None],
  context: dict[str, tuple[jax.Array, jax.Array | None]],
  *,
  lengths: tuple[tuple[str, int], ...],
  num_samples: int,
  sampler: SamplerConfig,
  noise: noise_lib.Noise,
  return_states: bool,
) -> SampleOutput:
  """The loop for the uniform graph: probabilities of all states."""
  graphs = _graphs(program, 'uniform')
  plan = schedule(noise, sampler)
  modulation = kernel.modulations(program, jnp.asarray(plan.sigma))
  calls = sampler.steps + sampler.denoise

  def keys(track):
    """[calls + 1, num_samples] keys; the first row draws the start."""
    each = _sample_keys(key, track, num_samples)
    return jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (None, 0))(
      each, jnp.arange(calls + 1)
    )

  def draw(probabilities, keys):
    uniform = jax.vmap(
      lambda key, p: jax.random.uniform(key, p.shape, p.dtype)
    )(keys, probabilities)
    return categorical_from_uniform(probabilities, uniform)

  def network(tokens, modulation):
    read = _encoded(program, modulation, context)
    return _begun(program, modulation, tokens, masks, read).logits()

  draws = {track: keys(track) for track, _ in lengths}
  start = {
    track: jax.vmap(
      lambda key, n=n, dim=graphs[track].dim: jax.random.randint(
        key, (n,), 0, dim
      )
    )(draws[track][0])
    for track, n in lengths
  }
  replay = _literal(
    network,
    graphs,
    start,
    {track: x[1 : sampler.steps + 1] for track, x in draws.items()},
    {track: x[-1] for track, x in draws.items()},
    modulation,
    draw,
    noise,
    sampler,
    fixed,
    with_probabilities=False,
  )
  return SampleOutput(
    replay.tokens, replay.states if return_states else None, jnp.int32(calls)
  )


def _graphs(
  program: kernel.Program, kind: graph_lib.GraphKind
) -> dict[str, graph_lib.Graph]:
  return {
    name: graph_lib.make_graph(kind, len(track.table))
    for name, track in program.tracks.items()
  }


def _encoded(
  program: kernel.Program,
  modulation: dict[str, jax.Array],
  context: dict[str, tuple[jax.Array, jax.Array | None]],
) -> kernel.Context | None:
  for track, (tokens, mask) in context.items():
    return kernel.encode_context(program, modulation, track, tokens, mask)
  return None


def _begun(
  program: kernel.Program,
  modulation: dict[str, jax.Array],
  tokens: dict[str, jax.Array],
  masks: dict[str, jax.Array | None],
  read: kernel.Context | None,
) -> kernel.Unfinished:
  if len(tokens) == 2:
    return kernel.joint(program, modulation, tokens, masks)
  ((track, ids),) = tokens.items()
  return kernel.one_track(program, modulation, track, ids, masks[track], read)


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


def replace_from_uniform(
  logits: jax.Array,
  tokens: jax.Array,
  log_chance: jax.Array | float,
  uniform: jax.Array,
  *,
  dim: int,
  temperature: float = 1.0,
  top_p: float = 1.0,
) -> jax.Array:
  """Replaces absorbed tokens; the update of a sampler in closed form.

  An absorbed token is replaced with probability

    min(1, chance / (dim - 1) sum_v e^{logit_v})

  by v with probability softmax(logits)_v, found by inverting the cumulative
  distribution first over blocks of `kernels.sedd_dual_track.BLOCK` tokens and
  then within one. No array of the size of the logits is kept.

  Args:
    logits: [..., V] float with V >= dim - 1; entries from dim - 1 on are not
      used, and must be -1e30 if V is a multiple of the block.
    tokens: [...] int32.
    log_chance: [] float, log of `chance`; infinite to replace always.
    uniform: [..., 2] float in [0, 1).
    dim: states of the graph, the absorbing one included.
    temperature: see `SamplerConfig`.
    top_p: see `SamplerConfig`.

  Returns:
    [...] int32.
  """
  logits = numerics.at_least_float32(logits)
  block = kernel.BLOCK
  if logits.shape[-1] % block:
    extra = -(dim - 1) % block
    logits = jnp.concatenate(
      [
        logits[..., : dim - 1],
        jnp.full((*tokens.shape, extra), -1e30, logits.dtype),
      ],
      -1,
    )
  absorbed = tokens == dim - 1
  mass = log_chance - np.log(dim - 1)
  if temperature != 1 or top_p != 1:
    mass += jax.nn.logsumexp(logits, -1)
    logits = sharpened(logits, temperature, top_p)
  blocks = logits.reshape(*tokens.shape, -1, block)
  largest = jnp.max(blocks, -1)
  top = jnp.max(largest, -1)
  sums = jnp.sum(jnp.exp(blocks - top[..., None, None]), -1)
  cumulated = jnp.cumsum(sums, -1)
  total = cumulated[..., -1]
  if temperature == 1 and top_p == 1:
    mass += top + jnp.log(total)
  replaced = absorbed & (jnp.log(uniform[..., 0]) < mass)

  target = uniform[..., 1] * total
  index = _first_above(cumulated, target, sums > 0)
  before = jnp.take_along_axis(cumulated - sums, index, -1)
  row = jnp.take_along_axis(blocks, index[..., None], -2)[..., 0, :]
  row = jnp.exp(row - top[..., None])
  column = _first_above(jnp.cumsum(row, -1), target - before[..., 0], row > 0)
  new = (index * block + column)[..., 0]
  return jnp.where(replaced, new, tokens).astype(jnp.int32)


def _first_above(
  cumulated: jax.Array, target: jax.Array, real: jax.Array
) -> jax.Array:
  """[..., 1] index of the first entry above `target`.

  Rounding must not lead to an entry without probability: then it is the last
  one that has some.
  """
  index = jnp.sum(cumulated <= target[..., None], -1, keepdims=True)
  number = jnp.arange(real.shape[-1])
  last = jnp.max(jnp.where(real, number, 0), -1, keepdims=True)
  index = jnp.minimum(index, last)
  return jnp.where(jnp.take_along_axis(real, index, -1), index, last)


def sample_from_uniform(
  network: Callable[[Tokens, jax.Array], Tokens],
  graphs: Mapping[str, graph_lib.Graph],
  start: Tokens,
  uniforms: Tokens,
  denoiser_uniforms: Tokens | None = None,
  *,
  noise: noise_lib.Noise = noise_lib.DEFAULT,
  sampler: SamplerConfig = _DEFAULT,
  fixed: Mapping[str, tuple[jax.Array, jax.Array]] | None = None,
) -> Replay:
  """Samples with given draws, in the literal form; any graph.

  Probabilities of all V states are computed at every position, and the drawn
  one is argmax_v p_v / (1e-10 - log(u_v + 1e-10)).

  Args:
    network: `network(tokens, sigma)` returns logits [B, n, V] by track, of
      tokens [B, n] by track and sigma [].
    graphs: by track; the names of the tracks are free.
    start: [B, n] int32 by track.
    uniforms: [steps, B, n, V] float in [0, 1) by track.
    denoiser_uniforms: [B, n, V - 1] by track for absorbing graphs, V for
      others; None if `sampler.denoise` is off.
    noise: schedule.
    sampler: how to sample.
    fixed: (tokens [B, n] or [n], mask likewise, True = keep) by track; these
      are put back before every network call and at the end.

  Returns:
    Result, states and probabilities.
  """
  if sampler.denoise and denoiser_uniforms is None:
    raise ValueError('denoiser_uniforms: needed by the denoiser, got None')
  return _literal(
    network,
    graphs,
    start,
    uniforms,
    denoiser_uniforms,
    jnp.asarray(schedule(noise, sampler).sigma),
    categorical_from_uniform,
    noise,
    sampler,
    fixed or {},
  )


def _literal(
  network: Callable[..., Tokens],
  graphs: Mapping[str, graph_lib.Graph],
  start: Tokens,
  draws: Tokens,
  final_draws: Tokens | None,
  conditions: Any,
  draw: Callable[[jax.Array, jax.Array], jax.Array],
  noise: noise_lib.Noise,
  sampler: SamplerConfig,
  fixed: Mapping[str, tuple[jax.Array, jax.Array] | None],
  *,
  with_probabilities: bool = True,
) -> Replay:
  """`sample_from_uniform` with any source of randomness.

  Args:
    network: `network(tokens, condition)` with an entry of `conditions`.
    graphs: by track.
    start: by track.
    draws: [steps, ...] by track.
    final_draws: by track.
    conditions: tree of [steps + 1, ...].
    draw: draws tokens from probabilities and an entry of `draws`.
    noise: schedule.
    sampler: how to sample.
    fixed: by track.
    with_probabilities: whether to return those of all steps.
  """
  plan = schedule(noise, sampler)
  amounts = plan.dsigma if sampler.predictor == 'analytic' else plan.rate
  shape = {'temperature': sampler.temperature, 'top_p': sampler.top_p}

  def project(tokens):
    return {
      track: _put_back(ids, fixed.get(track)) for track, ids in tokens.items()
    }

  def log_scores(tokens, condition, sigma):
    logits = network(tokens, condition)
    return {
      track: graphs[track].log_score(logits[track], ids, sigma)
      for track, ids in tokens.items()
    }

  def step(tokens, inputs):
    condition, sigma, amount, draws = inputs
    tokens = project(tokens)
    scores = log_scores(tokens, condition, sigma)
    found = {
      track: step_probabilities(
        graphs[track],
        scores[track],
        ids,
        amount,
        predictor=sampler.predictor,
        **shape,
      )
      for track, ids in tokens.items()
    }
    new = {track: draw(found[track], draws[track]) for track in tokens}
    return new, (tokens, found if with_probabilities else None)

  first, last = (
    jax.tree.map(lambda x, i=i: x[i], conditions) for i in (slice(None, -1), -1)
  )
  scanned = (first, plan.sigma[:-1], amounts, dict(draws))
  tokens, (states, found) = jax.lax.scan(step, dict(start), scanned)
  tokens = project(tokens)
  states = {
    track: jnp.concatenate([states[track], tokens[track][None]])
    for track in states
  }
  if not sampler.denoise or final_draws is None:
    return Replay(tokens, states, found, None)
  sigma = jnp.asarray(plan.sigma[-1])
  scores = log_scores(tokens, last, sigma)
  final = {
    track: denoiser_probabilities(
      graphs[track], scores[track], ids, sigma, **shape
    )
    for track, ids in tokens.items()
  }
  drawn = {track: draw(final[track], final_draws[track]) for track in final}
  return Replay(project(drawn), states, found, final)


def step_probabilities(
  graph: graph_lib.Graph,
  log_score: jax.Array,
  tokens: jax.Array,
  amount: jax.Array,
  *,
  predictor: Predictor = 'analytic',
  temperature: float = 1.0,
  top_p: float = 1.0,
) -> jax.Array:
  """Where tokens go in one reverse step.

  Args:
    graph: forward process with V states.
    log_score: [..., V] float.
    tokens: [...] integer.
    amount: float that broadcasts against `tokens`: dsigma for 'analytic', dt
      times the noise rate for 'euler'.
    predictor: which of the two.
    temperature: see `SamplerConfig`.
    top_p: see `SamplerConfig`.

  Returns:
    [..., V] float. Rows of 'analytic' sum to 1 for scores that belong to a
    distribution; a value below 0 stands for 0.
  """
  score = jnp.exp(log_score)
  if predictor == 'analytic':
    staggered = graph.staggered_score(score, amount)
    found = staggered * graph.transp_transition(tokens, amount)
  else:
    rate = graph.reverse_rate(tokens, score)
    one_hot = jax.nn.one_hot(tokens, graph.dim, dtype=score.dtype)
    found = one_hot + jnp.asarray(amount)[..., None] * rate
  return _reshaped(found, tokens, temperature, top_p)


def denoiser_probabilities(
  graph: graph_lib.Graph,
  log_score: jax.Array,
  tokens: jax.Array,
  sigma: jax.Array,
  *,
  temperature: float = 1.0,
  top_p: float = 1.0,
) -> jax.Array:
  """Where tokens go when all noise is removed.

  Args:
    graph: forward process with V states.
    log_score: [..., V] float.
    tokens: [...] integer.
    sigma: float that broadcasts against `tokens`, all the noise there is.
    temperature: see `SamplerConfig`.
    top_p: see `SamplerConfig`.

  Returns:
    [..., V] float, [..., V - 1] for absorbing graphs, not normalised there.
  """
  staggered = graph.staggered_score(jnp.exp(log_score), sigma)
  found = staggered * graph.transp_transition(tokens, sigma)
  found = _reshaped(found, tokens, temperature, top_p)
  return found[..., :-1] if isinstance(graph, graph_lib.Absorbing) else found


def categorical_from_uniform(
  probabilities: jax.Array, uniform: jax.Array
) -> jax.Array:
  """Draws argmax_v p_v / (1e-10 - log(u_v + 1e-10)), as SEDD's `catsample`.

  Args:
    probabilities: [..., V] float, need not sum to 1; below 0 is never drawn.
    uniform: [..., V] float in [0, 1).

  Returns:
    [...] int32.
  """
  exponential = 1e-10 - jnp.log(uniform + 1e-10)
  return jnp.argmax(probabilities / exponential, -1).astype(jnp.int32)


def _reshaped(
  probabilities: jax.Array, tokens: jax.Array, temperature: float, top_p: float
) -> jax.Array:
  """Sharpens the distribution among new tokens; the part that stays, stays."""
  if temperature == 1 and top_p == 1:
    return probabilities
  index = jnp.arange(probabilities.shape[-1], dtype=tokens.dtype)
  own = index == tokens[..., None]
  moving = jnp.where(own, 0, jnp.maximum(probabilities, 0))
  mass = jnp.sum(moving, -1, keepdims=True)
  logits = jnp.where(own, -jnp.inf, jnp.log(moving))
  logits = sharpened(logits, temperature, top_p)
  new = jnp.where(mass > 0, mass * jax.nn.softmax(logits), 0)
  return jnp.where(own, probabilities, new)


def sharpened(logits: jax.Array, temperature: float, top_p: float) -> jax.Array:
  """Logits after temperature and nucleus; -inf for what is cut off.

  Args:
    logits: [..., V] float; -inf is allowed.
    temperature: above 0; the logits are divided by it.
    top_p: in (0, 1]; then the most likely tokens are kept until their
      probability reaches this.

  Returns:
    [..., V] in the dtype of `logits`.
  """
  logits = logits / temperature
  if top_p == 1:
    return logits
  ordered = jnp.sort(logits, -1, descending=True)
  # The mass in front of each token: the first one is always kept.
  weights = jax.nn.softmax(ordered)
  before = jnp.cumsum(weights, -1) - weights
  count = jnp.sum(before < top_p, -1, keepdims=True)
  smallest = jnp.take_along_axis(ordered, count - 1, -1)
  return jnp.where(logits < smallest, -jnp.inf, logits)


def _put_back(
  tokens: jax.Array, fixed: tuple[jax.Array, jax.Array] | None
) -> jax.Array:
  if fixed is None:
    return tokens
  values, mask = fixed
  return jnp.where(mask, values, tokens).astype(tokens.dtype)
