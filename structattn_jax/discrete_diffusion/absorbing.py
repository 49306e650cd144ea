"""The sampler of absorbing graphs: two uniforms per position.

The same distribution as the literal form, with less work. For an absorbing
graph both predictors of `literal` leave clean tokens alone and replace an
absorbed one by v with probability

  p_v = k e^{logit_v} / (V - 1),  k = (e^dsigma - 1) / (e^sigma - 1)  analytic
                                  k = dt rate(t) / (e^sigma - 1)      euler

(k = dt / t for both with log-linear noise), and always if these sum to more
than 1. So two uniforms per position are enough: whether it is replaced, and by
what.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from structattn_jax.common import numerics
from structattn_jax.discrete_diffusion import noise as noise_lib
from structattn_jax.discrete_diffusion import schedule
from structattn_jax.discrete_diffusion.literal import Tokens
from structattn_jax.discrete_diffusion.program import BLOCK
from structattn_jax.discrete_diffusion.schedule import SamplerConfig

# The end of the network is compiled for so many parts of the positions, where
# there are enough of them.
_MOST_LEVELS = 4
_POSITIONS_PER_LEVEL = 8


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


def sample_absorbing_from_uniform(
  network: Callable[[Tokens, Any], Callable[..., Tokens]],
  dims: Mapping[str, int],
  uniforms: Tokens,
  conditions: Any,
  *,
  noise: noise_lib.Noise = noise_lib.DEFAULT,
  sampler: SamplerConfig = schedule.DEFAULT,
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
  plan = schedule.make_schedule(noise, sampler)
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
      track: schedule.put_back(ids, kept.get(track))
      for track, ids in tokens.items()
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
  distribution first over blocks of `program.BLOCK` tokens and then
  within one. No array of the size of the logits is kept.

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
  block = BLOCK
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
    logits = schedule.sharpened(logits, temperature, top_p)
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
