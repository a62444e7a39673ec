"""What transformers computes of a Qwen3-VL checkpoint, in float32.

Import it behind ``importorskip("transformers")``. Takes prompts with their patches as the library
made them (patches and prompts have parity tests of their own); knows no array of the model's.
"""

import pathlib
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

PLAIN = {"attn_implementation": "eager", "experts_implementation": "eager"}


def load(directory: pathlib.Path) -> nn.Module:
    """A checkpoint as transformers reads it.

    Raises:
        ValueError: transformers found a tensor missing, unexpected or of another shape.
    """
    transformers.logging.disable_progress_bar()
    model, report = transformers.AutoModelForImageTextToText.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True, **PLAIN
    )
    wrong = {k: v for k, v in report.items() if v}
    if wrong:
        raise ValueError(f"{directory}: {wrong}")
    return model.eval()


def inputs(prompt: Any, config: Any) -> dict[str, torch.Tensor]:
    """A prompt with its pictures, as the keyword arguments of a model."""
    ids = np.array(prompt.token_ids)
    kinds = np.select([ids == config.image_token_id, ids == config.video_token_id], [1, 2], 0)
    found = {
        "input_ids": torch.from_numpy(ids)[None],
        "attention_mask": torch.ones(1, len(ids), dtype=torch.int64),
        "mm_token_type_ids": torch.from_numpy(kinds)[None],
    }
    names = {"image": "pixel_values", "video": "pixel_values_videos"}
    for kind, name in names.items():
        mine = [p for p in (prompt.vision.pictures if prompt.vision else ()) if p.kind == kind]
        if mine:
            pixels = np.concatenate([p.patches for p in mine]).astype(np.float32)
            found[name] = torch.from_numpy((pixels / 255 - 0.5) / 0.5)
            found[f"{kind}_grid_thw"] = torch.tensor([p.grid for p in mine])
    return found


def logits(model: nn.Module, given: dict[str, torch.Tensor]) -> np.ndarray:
    """float32 [T, V] of every position."""
    with torch.no_grad():
        return model(**given).logits[0].numpy()


def greedy(model: nn.Module, given: dict[str, torch.Tensor], count: int) -> np.ndarray:
    """The next ``count`` tokens by transformers' own cached generate, past any end of text."""
    model.generation_config = transformers.GenerationConfig()
    with torch.no_grad():
        out = model.generate(**given, max_new_tokens=count, do_sample=False)
    return out[0, given["input_ids"].shape[1] :].numpy().astype(np.int32)


def tower(model: nn.Module, given: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """What passes through the tower for the images of a prompt, by name.

    Names: patches (embedded) and positions (learned, interpolated) [U, D], block0 and block3, its
    output [U, D], rows [U / 4, O], level0 to level2 [U / 4, O].
    """
    found: dict[str, np.ndarray] = {}
    visual = model.model.visual

    def keep(name: str, module: nn.Module):
        def hook(_module, _args, out):
            found[name] = (out[0] if isinstance(out, tuple) else out).detach().numpy()

        return module.register_forward_hook(hook)

    def keep_input(_module, args):
        found["embedded"] = args[0].detach().numpy()

    handles = [
        keep("patches", visual.patch_embed),
        visual.blocks[0].register_forward_pre_hook(keep_input),
        *(keep(f"block{i}", block) for i, block in enumerate(visual.blocks)),
        keep("rows", visual.merger),
        *(keep(f"level{j}", m) for j, m in enumerate(visual.deepstack_merger_list)),
    ]
    with torch.no_grad():
        visual(given["pixel_values"], grid_thw=given["image_grid_thw"])
    for handle in handles:
        handle.remove()
    patches = found.pop("patches")
    found["positions"] = found.pop("embedded") - patches
    return {"patches": patches, **found}
