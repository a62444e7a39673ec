"""What transformers says of the pictures, sizes and prompts of vision_samples."""

import types

import numpy as np
import torch
import transformers
import vision_samples as samples
from transformers import vision_utils
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as image_side
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

# By their full name: the package itself hands out stand-ins where torchvision is missing.
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as video_resize
from transformers.video_utils import VideoMetadata

VERSION = transformers.__version__
HALF = [0.5, 0.5, 0.5]
PATCHES = {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2}


def pixel_values(picture, low: int = 65536, high: int = 16777216):
    """float32 [U, 1536] and the grid of one picture, by the processor that runs on Pillow."""
    processor = image_side.Qwen2VLImageProcessorPil(
        size={"shortest_edge": low, "longest_edge": high},
        image_mean=HALF,
        image_std=HALF,
        **PATCHES,
    )
    layout = {"input_data_format": "channels_last"} if isinstance(picture, np.ndarray) else {}
    out = processor(picture, **layout)
    return out["pixel_values"], tuple(int(n) for n in out["image_grid_thw"][0])


def image_size(height: int, width: int, low: int, high: int) -> tuple[int, int]:
    return image_side.smart_resize(height, width, 32, low, high)


def video_size(frames: int, height: int, width: int, low: int, high: int) -> tuple[int, int]:
    return video_resize(frames, height, width, 2, 32, low, high)


def sample_indices(total: int, fps: float, rate: float | None, count: int | None) -> np.ndarray:
    defaults = types.SimpleNamespace(fps=2, min_frames=4, max_frames=768)
    return Qwen3VLVideoProcessor.sample_frames(
        defaults, VideoMetadata(total, fps=fps), num_frames=count, fps=rate
    )


def timestamps(indices: list[int], fps: float) -> list[float]:
    return Qwen3VLProcessor._calculate_timestamps(None, list(indices), fps, 2)


def video_patches(frames: np.ndarray) -> tuple[np.ndarray, tuple[int, int, int]]:
    """uint8 [U, 1536] and the grid of frames [frames, rows, columns, 3] that need no resizing."""
    planes = torch.from_numpy(frames.transpose(0, 3, 1, 2).copy())[None]
    patches, *grid = Qwen3VLVideoProcessor.patchify(None, planes, 16, 2, 2)
    return patches[0].numpy(), tuple(grid)


def rope_index(mix: samples.Mix) -> tuple[np.ndarray, int]:
    """int [3, T] and the delta of a prompt."""
    model = types.SimpleNamespace(
        config=types.SimpleNamespace(vision_config=types.SimpleNamespace(spatial_merge_size=2)),
        get_vision_position_ids=lambda *a, **k: Qwen3VLModel.get_vision_position_ids(None, *a, **k),
    )
    positions, deltas = Qwen3VLModel.get_rope_index(
        model,
        torch.tensor([mix.ids]),
        torch.tensor([mix.kinds]),
        torch.tensor(mix.images) if mix.images else None,
        torch.tensor(mix.videos) if mix.videos else None,
    )
    return positions[:, 0].numpy(), int(deltas[0, 0])


def tower_inputs(grids: list[tuple[int, int, int]]) -> dict[str, np.ndarray]:
    """Row and column, learned positions and their weights, and segment borders."""
    grid = torch.tensor(grids)
    taps, weights = vision_utils.get_vision_interpolation_indices_and_weights(
        grid, num_grid_per_side=48, align_corners=True, spatial_merge_size=2
    )
    return {
        "coordinates": vision_utils.get_vision_position_ids(grid, 2).numpy(),
        "taps": taps.numpy().T,
        "tap_weights": weights.numpy().T,
        "segment_starts": vision_utils.get_vision_cu_seqlens(grid).numpy(),
    }
