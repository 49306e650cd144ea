"""One training step over a mesh of devices, with gradient accumulation.

The batch is split over the mesh axis `data`; parameters, moments and averages
are on every device. The compiler adds the sums over devices, so the code is
that of one device.
"""

from collections.abc import Callable, Mapping
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from structattn_jax.training import state as state_lib

DATA_AXIS = 'data'
# loss_fn(params, key, batch, step) -> loss, {name: scalar}. The loss must be a
# mean over the rows of the batch, so that parts of a batch can be averaged.
LossFn = Callable[
  [hk.Params, jax.Array, Any, jax.Array],
  tuple[jax.Array, Mapping[str, jax.Array]],
]
StepFn = Callable[
  [state_lib.TrainState, Any],
  tuple[state_lib.TrainState, dict[str, jax.Array]],
]


def make_mesh(devices: list[jax.Device] | None = None) -> Mesh:
  """A mesh with the one axis `data` over all devices of all processes.

  Args:
    devices: None takes `jax.devices()`.

  Returns:
    The mesh.
  """
  return Mesh(np.array(devices or jax.devices()), (DATA_AXIS,))


def make_step(
  loss_fn: LossFn,
  optimizer: optax.GradientTransformation,
  *,
  mesh: Mesh,
  seed: int,
  ema_decay: float,
  accumulate: int = 1,
) -> StepFn:
  """Compiles loss, gradient, optimiser and moving average into one function.

  The random key of step s is made from `seed` and s alone.

  Args:
    loss_fn: see `LossFn`.
    optimizer: from `state.make_optimizer`.
    mesh: from `make_mesh`.
    seed: of noise and dropout.
    ema_decay: largest decay of the moving average.
    accumulate: parts of a batch that are computed one after the other; their
      gradients are averaged.

  Returns:
    `step(state, batch) -> state, metrics` for arrays from `replicate` and
    `shard_batch`. The given state must not be used again. The metrics are the
    loss's own, `loss` and `gradient_norm` before clipping.
  """
  everywhere = NamedSharding(mesh, PartitionSpec())

  def gradient(params, key, batch, step):
    (loss, metrics), gradients = jax.value_and_grad(loss_fn, has_aux=True)(
      params, key, batch, step
    )
    return gradients, {'loss': loss, **metrics}

  def step(state, batch):
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    if accumulate == 1:
      result = gradient(state.params, key, batch, state.step)
    else:
      part_sharding = NamedSharding(mesh, PartitionSpec(None, DATA_AXIS))

      def cut(values):
        # Every part takes rows from every device, so that none has to move.
        parts = values.reshape(-1, accumulate, *values.shape[1:])
        parts = parts.swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(parts, part_sharding)

      def add_part(total, part):
        index, rows = part
        found = gradient(
          state.params, jax.random.fold_in(key, index), rows, state.step
        )
        return jax.tree.map(jnp.add, total, found), None

      parts = jax.tree.map(cut, batch)
      shapes = jax.eval_shape(
        gradient,
        state.params,
        key,
        jax.tree.map(lambda x: x[0], parts),
        state.step,
      )
      zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
      total, _ = jax.lax.scan(add_part, zeros, (jnp.arange(accumulate), parts))
      result = jax.tree.map(lambda x: x / accumulate, total)
    gradients, metrics = result
    metrics['gradient_norm'] = optax.tree.norm(gradients)
    state = state_lib.apply_gradients(state, gradients, optimizer, ema_decay)
    return state, metrics

  return jax.jit(step, donate_argnums=0, out_shardings=(everywhere, everywhere))


def replicate(tree: Any, mesh: Mesh) -> Any:
  """Puts the same arrays on every device of the mesh."""
  return _place(tree, NamedSharding(mesh, PartitionSpec()))


def shard_batch(batch: Any, mesh: Mesh) -> Any:
  """Splits the first axis of host arrays over the mesh.

  Every process gives the whole batch, which is a function of the step, and
  keeps the rows of its own devices.

  Args:
    batch: pytree of [n_batch, ...] NumPy arrays.
    mesh: from `make_mesh`.

  Returns:
    The same pytree of global arrays.

  Raises:
    ValueError: if the rows cannot be split evenly.
  """
  size = mesh.devices.size
  for leaf in jax.tree.leaves(batch):
    if len(leaf) % size:
      raise ValueError(
        f'batch_size: {len(leaf)} rows cannot be split over {size} devices; '
        f'give a multiple of {size}'
      )
  return _place(batch, NamedSharding(mesh, PartitionSpec(DATA_AXIS)))


def _place(tree: Any, sharding: NamedSharding) -> Any:
  def place(values):
    values = np.asarray(values)
    return jax.make_array_from_callback(
      values.shape, sharding, lambda index: values[index]
    )

  return jax.tree.map(place, tree)
