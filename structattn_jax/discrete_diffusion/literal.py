"""The sampler in its literal form: probabilities of all states, any graph.

Lou, Meng, Ermon 2024, Algs. 2 and 3; SEDD `sampling.py` @ 0605786d. Each step
draws every token from

  analytic  staggered_score(s, dsigma) * transp_transition(x, dsigma)
  euler     onehot(x) + dt rate(t) reverse_rate(x, s)

both tracks of the joint mode from the same call. It replays recorded draws;
`absorbing` draws from the same distribution with less work.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from structattn_jax.discrete_diffusion import graph as graph_lib
from structattn_jax.discrete_diffusion import noise as noise_lib
from structattn_jax.discrete_diffusion import schedule
from structattn_jax.discrete_diffusion.schedule import Predictor, SamplerConfig

Tokens = Mapping[str, jax.Array]


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


def sample_from_uniform(
  network: Callable[[Tokens, jax.Array], Tokens],
  graphs: Mapping[str, graph_lib.Graph],
  start: Tokens,
  uniforms: Tokens,
  denoiser_uniforms: Tokens | None = None,
  *,
  noise: noise_lib.Noise = noise_lib.DEFAULT,
  sampler: SamplerConfig = schedule.DEFAULT,
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
  return run_literal(
    network,
    graphs,
    start,
    uniforms,
    denoiser_uniforms,
    jnp.asarray(schedule.make_schedule(noise, sampler).sigma),
    categorical_from_uniform,
    noise,
    sampler,
    fixed or {},
  )


def run_literal(
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
  plan = schedule.make_schedule(noise, sampler)
  amounts = plan.dsigma if sampler.predictor == 'analytic' else plan.rate
  shape = {'temperature': sampler.temperature, 'top_p': sampler.top_p}

  def project(tokens):
    return {
      track: schedule.put_back(ids, fixed.get(track))
      for track, ids in tokens.items()
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
  logits = schedule.sharpened(logits, temperature, top_p)
  new = jnp.where(mass > 0, mass * jax.nn.softmax(logits), 0)
  return jnp.where(own, probabilities, new)
