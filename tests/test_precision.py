"""Products of float32 are asked for in full: no CPU shows what a TPU makes of the default."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import precision
from pallas_kernels.paged_attention import tpu_attend
from pallas_kernels.ragged_dot import tpu_product
from pallas_kernels.segment_attention import tpu as segment_tpu

DOTS = {
    "ragged_dot": tpu_product._dot,
    "paged_attention": lambda a, b: tpu_attend._dot(a, b, (1, 0)),
    "segment_attention": segment_tpu._dot,
    "xla": lambda a, b: jnp.matmul(a, b, precision=precision.exact(a)),
}


@pytest.mark.parametrize("op", DOTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_float32_is_multiplied_in_several_passes(op, dtype):
    x = jnp.ones((8, 8), dtype)
    (dot,) = (e for e in jax.make_jaxpr(DOTS[op])(x, x).eqns if e.primitive.name == "dot_general")
    passes = str(dot.params["precision"])
    assert ("HIGHEST" in passes) == (dtype == "float32")
