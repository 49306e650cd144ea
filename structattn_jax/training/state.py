"""Training state and optimiser step, as SEDD's `losses.get_step_fn` does it.

lr_k = lr min(k / warmup, 1),  k from 1
g   <- g min(1, clip / (|g| + 1e-6))
p   <- p (1 - lr_k wd) - lr_k m / (sqrt(v) + eps)     bias-corrected moments
ema <- ema - (1 - d) (ema - p),  d = min(decay, (1 + k) / (10 + k))
"""

import dataclasses
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import optax

from structattn_jax.training import config as config_lib


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Everything that changes from step to step.

  Attributes:
    step: [] int32, number of optimiser steps made.
    params: parameters.
    ema: moving average of the parameters.
    opt_state: optax state.
  """

  step: jax.Array
  params: hk.Params
  ema: hk.Params
  opt_state: optax.OptState


def make_optimizer(
  config: config_lib.OptimizerConfig,
) -> optax.GradientTransformation:
  """Clipping, AdamW and warm-up in SEDD's order."""

  def learning_rate(count):
    return config.learning_rate * warmup_factor(config, count + 1)

  return optax.chain(
    _clip(config.clip),
    optax.adamw(
      learning_rate,
      b1=config.b1,
      b2=config.b2,
      eps=config.eps,
      weight_decay=config.weight_decay,
    ),
  )


def warmup_factor(
  config: config_lib.OptimizerConfig, step: jax.Array | int
) -> jax.Array:
  """Share of the learning rate at a step, counted from 1."""
  return jnp.minimum(jnp.asarray(step, jnp.float32) / max(config.warmup, 1), 1)


def init_state(
  params: hk.Params, optimizer: optax.GradientTransformation
) -> TrainState:
  """The state before the first step.

  Args:
    params: initial parameters; the moving average starts as a copy.
    optimizer: from `make_optimizer`.

  Returns:
    The state at step 0.
  """
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    # A copy: a step takes the state's buffers for itself.
    ema=jax.tree.map(jnp.copy, params),
    opt_state=optimizer.init(params),
  )


def apply_gradients(
  state: TrainState,
  gradients: Any,
  optimizer: optax.GradientTransformation,
  ema_decay: float,
) -> TrainState:
  """One optimiser step and one step of the moving average."""
  updates, opt_state = optimizer.update(
    gradients, state.opt_state, state.params
  )
  params: Any = optax.apply_updates(state.params, updates)
  step = state.step + 1
  count = step.astype(jnp.float32)
  decay = jnp.minimum(ema_decay, (1 + count) / (10 + count))
  ema = jax.tree.map(
    lambda average, p: average - (1 - decay) * (average - p), state.ema, params
  )
  return TrainState(step=step, params=params, ema=ema, opt_state=opt_state)


def _clip(maximum: float) -> optax.GradientTransformation:
  """Torch's `clip_grad_norm_`, whose 1e-6 optax's own does not have."""

  def update(updates, state, params=None):
    del params
    factor = jnp.minimum(1, maximum / (optax.tree.norm(updates) + 1e-6))
    return jax.tree.map(lambda g: g * factor, updates), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
