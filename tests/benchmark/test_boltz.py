import jax
import numpy as np
import pytest

from structattn_jax.benchmark import boltz, harness


@pytest.mark.parametrize('mode', ['forward', 'step, 5 samples'])
def test_boltz_candidates_match_float64(mode):
  args = boltz.inputs(mode, 64)
  want = boltz.expected(mode, args)
  for candidate in ('cached', 'published'):
    with jax.default_matmul_precision('highest'):
      got = jax.jit(boltz.function(mode, candidate))(*args)
    assert harness.max_relative_error(got, want) < 5e-6, candidate


def test_boltz_gradients_leave_out_what_the_softmax_cancels():
  args = boltz.inputs('forward+backward', 32)
  function = boltz.function('forward+backward', 'cached')
  _, by_params, *_ = jax.eval_shape(function, *args)
  scope = 'atom_attention_encoder/atom_encoder/diffusion_transformer/layers_0'
  module = f'{scope}/pair_bias_attn/proj_z_0'
  assert list(by_params[module]) == ['scale']
  assert np.prod(
    by_params['atom_attention_encoder/r_to_q_trans']['weights'].shape
  )
