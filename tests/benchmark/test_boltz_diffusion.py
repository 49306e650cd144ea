import jax
import pytest

from structattn_jax.benchmark import boltz_diffusion, harness


@pytest.mark.parametrize('mode', boltz_diffusion.MODES)
def test_boltz_diffusion_candidates_agree(mode, monkeypatch):
  monkeypatch.setattr(boltz_diffusion, '_STEPS', 3)
  args = boltz_diffusion.inputs(mode, 64, 1)
  with jax.default_matmul_precision('highest'):
    cached, published = (
      jax.jit(boltz_diffusion.function(mode, 1, name))(*args)
      for name in ('cached', 'published')
    )
  assert harness.max_relative_error(cached, published) < 1e-4
