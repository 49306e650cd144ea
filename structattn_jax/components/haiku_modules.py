"""`Linear` and `LayerNorm` with AF2/AF3 parameter names and initialisers.

Mirrors alphafold `common_modules.Linear` @ c77e5d2 and alphafold3
`components/haiku_modules.py` @ c0f97ed: parameters `weights`, `bias`, `scale`,
`offset`, so that published checkpoints load without renaming.
"""

from collections.abc import Sequence
from typing import Literal

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from structattn_jax.common import numerics

Initializer = Literal[
  'linear', 'relu', 'zeros', 'normal', 'torch', 'xavier', 'embedding'
]

# Standard deviation of a unit normal cut at +-2: the factor that gives a
# truncated draw the variance asked for (AF2 and AF3 use this number).
TRUNCATED_NORMAL_STDDEV = 0.87962566103423978


def initializer(
  name: Initializer, fan_in: int, fan_out: int | None = None
) -> hk.initializers.Initializer:
  """Returns the weight initialiser called `name`.

  Args:
    name: 'linear' or 'relu': truncated normal of variance 1 / fan_in or
      2 / fan_in (AF2, AF3); 'zeros'; 'normal': normal of variance 1 / fan_in
      (the seed documents); 'torch': uniform in +-1/sqrt(fan_in) (torch's
      default); 'xavier': uniform in +-sqrt(6 / (fan_in + fan_out));
      'embedding': normal of standard deviation 0.02.
    fan_in: product of the contracted dimensions.
    fan_out: product of the output dimensions; needed for 'xavier' only.

  Raises:
    ValueError: on an unknown name.
  """
  if name == 'zeros':
    return hk.initializers.Constant(0.0)
  if name in ('linear', 'relu'):
    scale = {'linear': 1.0, 'relu': 2.0}[name]
    return hk.initializers.TruncatedNormal(
      float(np.sqrt(scale / fan_in) / TRUNCATED_NORMAL_STDDEV)
    )
  if name == 'normal':
    return hk.initializers.RandomNormal(float(fan_in**-0.5))
  if name == 'embedding':
    return hk.initializers.RandomNormal(0.02)
  if name == 'torch':
    bound = fan_in**-0.5
  elif name == 'xavier':
    if fan_out is None:
      raise ValueError("initializer: 'xavier' needs fan_out")
    bound = (6 / (fan_in + fan_out)) ** 0.5
  else:
    raise ValueError(f'initializer: unknown name {name!r}')
  return hk.initializers.RandomUniform(-bound, bound)


class Linear(hk.Module):
  """y[..., o...] = sum_c x[..., c] weights[c, o...] + bias[o...].

  Args of the constructor:
    num_output: output size, or sizes: (n_head, d_head) gives weights of shape
      [c, n_head, d_head], as AF3 stores its projections.
    initializer: see `initializer`.
    use_bias: whether to add a bias (initially zero).
    precision: matmul precision; coordinates need 'highest' on accelerators.
    name: module name.
  """

  def __init__(
    self,
    num_output: int | Sequence[int],
    *,
    initializer: Initializer = 'linear',
    use_bias: bool = True,
    precision: jax.lax.PrecisionLike = None,
    name: str = 'linear',
  ):
    super().__init__(name=name)
    self.output_shape = (
      (num_output,) if isinstance(num_output, int) else tuple(num_output)
    )
    self.initializer: Initializer = initializer
    self.use_bias = use_bias
    self.precision = precision

  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [..., c] to [..., *num_output] in the dtype of `x`."""
    fan_in = x.shape[-1]
    dtype = parameter_dtype(x)
    weights = hk.get_parameter(
      'weights',
      (fan_in, *self.output_shape),
      dtype,
      initializer(self.initializer, fan_in, int(np.prod(self.output_shape))),
    )
    y = jnp.tensordot(
      x, weights.astype(x.dtype), axes=1, precision=self.precision
    )
    if self.use_bias:
      bias = hk.get_parameter('bias', self.output_shape, dtype, jnp.zeros)
      y += bias.astype(x.dtype)
    return y


class LayerNorm(hk.Module):
  """Layer norm over the last axis with float32 statistics, epsilon 1e-5.

  Args of the constructor:
    create_scale: whether to multiply by a parameter `scale` (initially 1).
    create_offset: whether to add a parameter `offset` (initially 0).
    name: module name.
  """

  def __init__(
    self,
    *,
    create_scale: bool = True,
    create_offset: bool = True,
    name: str = 'layer_norm',
  ):
    super().__init__(name=name)
    self.create_scale = create_scale
    self.create_offset = create_offset

  def __call__(self, x: jax.Array) -> jax.Array:
    """Normalises [..., c]; returns the dtype of `x`."""
    scale, offset = self.parameters(x)
    y = numerics.layer_norm(numerics.at_least_float32(x))
    if scale is not None:
      y *= scale
    if offset is not None:
      y += offset
    return y.astype(x.dtype)

  @hk.name_like('__call__')
  def parameters(
    self, x: jax.Array
  ) -> tuple[jax.Array | None, jax.Array | None]:
    """Scale and offset for [..., c], if there are, to be applied elsewhere."""
    shape, dtype = x.shape[-1:], parameter_dtype(x)
    scale = offset = None
    if self.create_scale:
      scale = hk.get_parameter('scale', shape, dtype, jnp.ones)
    if self.create_offset:
      offset = hk.get_parameter('offset', shape, dtype, jnp.zeros)
    return scale, offset


def parameter_dtype(x: jax.Array) -> jnp.dtype:
  """Parameters are float32 (float64 for float64 activations), never bf16."""
  return jnp.promote_types(x.dtype, jnp.float32)
