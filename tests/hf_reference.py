"""What transformers computes, in float32 with its plainest implementations.

The only place in the tests that runs torch: import it behind ``importorskip("transformers")``.
Knows transformers' modules and their attribute names (5.23.0); knows nothing of qwen_jax.
"""

import contextlib
import importlib
import pathlib
from collections.abc import Iterator
from unittest import mock

import numpy as np
import torch
import transformers
from torch import nn

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

PLAIN = {"attn_implementation": "eager", "experts_implementation": "eager"}


def load(directory: pathlib.Path) -> nn.Module:
    """A text checkpoint as transformers reads it; a block-FP8 one dequantised to float32.

    Raises:
        ValueError: transformers found a tensor missing, or of another shape.
    """
    config = transformers.AutoConfig.from_pretrained(directory)
    quantised = getattr(config, "quantization_config", None)
    plain = dict(PLAIN)
    if quantised:
        plain["quantization_config"] = transformers.FineGrainedFP8Config(
            dequantize=True, modules_to_not_convert=quantised["modules_to_not_convert"]
        )
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True, **plain
    )
    wrong = {k: v for k, v in report.items() if k in ("missing_keys", "mismatched_keys") and v}
    if wrong:
        raise ValueError(f"{directory}: {wrong}")
    return model.eval()


def random_model(config: transformers.PreTrainedConfig, seed: int) -> nn.Module:
    """A model with transformers' own random weights, and norms that are not all ones."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight"):
                weight.normal_(1.0, 0.2)
    return model


def logits(model: nn.Module, tokens: np.ndarray) -> np.ndarray:
    """Logits of every position: int32 [T] -> float32 [T, V]."""
    with torch.no_grad():
        return model(_batch(tokens)).logits[0].float().numpy()


def greedy(model: nn.Module, tokens: np.ndarray, count: int) -> np.ndarray:
    """The next ``count`` tokens by transformers' own cached generate, past any end of text."""
    model.generation_config = transformers.GenerationConfig()
    with torch.no_grad():
        ids = _batch(tokens)
        mask = torch.ones_like(ids)
        out = model.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False)
    return out[0, len(tokens) :].numpy().astype(np.int32)


def rope(model: nn.Module, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of positions 0..length-1: float32 [T, H] each."""
    with torch.no_grad():
        tables = model.model.rotary_emb(torch.zeros(1, 1, 1), torch.arange(length)[None])
    return tables[0][0].numpy(), tables[1][0].numpy()


def ladder(model: nn.Module, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """What passes through every layer, by "layer{l}.name", without the batch axis.

    Names: input, attn_norm, q and k (after norm and rope) and v [T, heads, H], attn (behind its
    output projection), ffn_norm, router_probs [T, E] and expert_weights, expert_ids [T, A] (layers
    with experts), ffn, output.
    """
    found: dict[str, np.ndarray] = {}
    with torch.no_grad(), contextlib.ExitStack() as stack:
        for index, layer in enumerate(model.model.layers):
            _watch_layer(found, stack, f"layer{index}.", layer)
        stack.enter_context(_watch_attention(found, model))
        model(_batch(tokens))
    return found


def routing_gap(ladder: dict[str, np.ndarray]) -> float:
    """How far the nearest routing decision is from a tie, in log probability (inf: no experts)."""
    nearest = np.inf
    for name, probs in ladder.items():
        if name.endswith("router_probs"):
            chosen = ladder[name.replace("router_probs", "expert_ids")].shape[-1]
            ordered = np.sort(np.log(probs.astype(np.float64)), axis=-1)[:, ::-1]
            nearest = min(nearest, (ordered[:, chosen - 1] - ordered[:, chosen]).min())
    return float(nearest)


def _batch(tokens: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.asarray(tokens, np.int64))[None]


def _watch_layer(
    found: dict[str, np.ndarray], stack: contextlib.ExitStack, at: str, layer: nn.Module
) -> None:
    def keep(name: str, module: nn.Module) -> None:
        def hook(_module, _args, out):
            out = out[0] if isinstance(out, tuple) else out
            found[at + name] = out[0].numpy()

        stack.callback(module.register_forward_hook(hook).remove)

    def keep_input(_module, args):
        found[f"{at}input"] = args[0][0].numpy()

    def keep_router(_module, _args, out):
        scores, weights, ids = out
        found[f"{at}router_probs"] = torch.softmax(scores.float(), -1).numpy()
        found[f"{at}expert_weights"] = weights.numpy()
        found[f"{at}expert_ids"] = ids.numpy().astype(np.int32)

    stack.callback(layer.register_forward_pre_hook(keep_input).remove)
    keep("attn_norm", layer.input_layernorm)
    keep("attn", layer.self_attn)
    keep("ffn_norm", layer.post_attention_layernorm)
    keep("ffn", layer.mlp)
    keep("output", layer)
    if hasattr(layer.mlp, "gate"):
        stack.callback(layer.mlp.gate.register_forward_hook(keep_router).remove)


@contextlib.contextmanager
def _watch_attention(found: dict[str, np.ndarray], model: nn.Module) -> Iterator[None]:
    """Sees q, k, v where they enter the attention product, behind norm and rope."""
    module = importlib.import_module(type(model).__module__)
    real = module.eager_attention_forward

    def seen(attention, query, key, value, *args, **kwargs):
        at = f"layer{attention.layer_idx}."
        for name, x in (("q", query), ("k", key), ("v", value)):
            found[at + name] = x[0].transpose(0, 1).contiguous().numpy()
        return real(attention, query, key, value, *args, **kwargs)

    with mock.patch.object(module, "eager_attention_forward", seen):
        yield
