"""The operations that decide the speed of a Qwen3 step, each with interchangeable implementations.

Knows arrays, scales and pages; knows no model, config, mesh or request, and imports nothing of
`qwen_jax`. Importing this package registers every implementation with `registry`:

    from pallas_kernels.ragged_dot import ragged_dot
    from pallas_kernels.paged_attention import paged_attention
    from pallas_kernels.segment_attention import segment_attention
"""

from pallas_kernels import paged_attention as paged_attention
from pallas_kernels import ragged_dot as ragged_dot
from pallas_kernels import registry as registry
from pallas_kernels import segment_attention as segment_attention
