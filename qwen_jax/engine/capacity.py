"""How long a context can be, and how many pages the cache gets. Knows sizes and devices."""

import logging
import os

from qwen_jax.model.cache import page_bytes
from qwen_jax.runtime import Runtime
from qwen_jax.weights.config import ModelConfig

log = logging.getLogger(__name__)

_GIB = 2**30
_CPU_SHARE = 0.25  # of the host's free memory: the rest is for weights, activations and others


def plan_cache(
    config: ModelConfig,
    runtime: Runtime,
    *,
    max_model_len: int | None,
    max_num_seqs: int,
    hbm_utilization: float,
) -> tuple[int, int]:
    """Decides ``max_model_len`` and the number of pages, after the weights are in place.

    Returns:
        The longest context in tokens, and the pages of the cache.

    Raises:
        ValueError: the context asked for is longer than the model's, or its cache does not fit.
    """
    limit = config.text.max_position_embeddings
    if max_model_len is not None and not 1 < max_model_len <= limit:
        raise ValueError(
            f"max_model_len={max_model_len:,} is not in 2 .. {limit:,}, the model's "
            "max_position_embeddings (YaRN in config.json's rope_scaling extends it)"
        )
    if not 0 < hbm_utilization <= 1:
        raise ValueError(f"hbm_utilization={hbm_utilization} is not in (0, 1]")
    each = page_bytes(config.text, runtime)
    budget = _free_bytes(runtime, hbm_utilization)
    fits = budget // each * runtime.page_size
    wanted = max_model_len or limit
    if wanted > fits:
        if max_model_len is not None or fits < 2:
            raise ValueError(
                f"max_model_len={wanted:,} needs {wanted / runtime.page_size * each / _GIB:.2f} "
                f"GiB of cache, {budget / _GIB:.2f} GiB are free: {fits:,} tokens fit; lower "
                "max_model_len, or use kv_cache_dtype='int8' or more devices"
            )
        log.info(
            "max_model_len: %s instead of the model's %s, which fits", f"{fits:,}", f"{limit:,}"
        )
        wanted = fits
    pages_per_row = -(-wanted // runtime.page_size)
    pages = min(budget // each, pages_per_row * max_num_seqs)
    log.info(
        "cache: %s pages of %d tokens (%.2f GiB): %s tokens",
        f"{pages:,}",
        runtime.page_size,
        pages * each / _GIB,
        f"{pages * runtime.page_size:,}",
    )
    return wanted, pages


def _free_bytes(runtime: Runtime, utilization: float) -> int:
    """Bytes that the cache may take, over all devices of the mesh."""
    device = runtime.mesh.devices.flat[0]
    stats = device.memory_stats()
    if device.platform == "cpu" or not stats:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return int(free * _CPU_SHARE)
    per_device = stats["bytes_limit"] * utilization - stats["bytes_in_use"]
    ways = runtime.mesh.size if runtime.rules.axes("K") else 1
    return max(int(per_device * ways), 0)
