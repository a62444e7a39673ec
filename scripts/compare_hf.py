"""Holds a checkpoint's logits and greedy tokens against transformers, in float32 on this machine.

Both sides read the same directory, one after the other, so that one float32 model fits at a time.
Prompts are random token ids, or a text. Block-FP8 weights are dequantised by transformers and used
as they are by us. Ends with status 1 when an error exceeds the tolerance or a token differs.
"""

import argparse
import dataclasses
import gc
import json
import os
import pathlib
import sys
from collections.abc import Sequence

import numpy as np

PAGE_SIZE = 16


@dataclasses.dataclass(frozen=True)
class Side:
    """What one implementation makes of the prompts: logits [T, V] each, and tokens [new] each."""

    logits: list[np.ndarray]
    tokens: list[list[int]]


def transformers_side(model_dir: str, prompts: Sequence[np.ndarray], new_tokens: int) -> Side:
    """transformers' eager attention and experts. Needs the extra `parity`."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    options = {"attn_implementation": "eager", "experts_implementation": "eager"}
    quantised = json.loads((pathlib.Path(model_dir) / "config.json").read_text())
    if kept := (quantised.get("quantization_config") or {}).get("modules_to_not_convert"):
        options["quantization_config"] = transformers.FineGrainedFP8Config(
            dequantize=True, modules_to_not_convert=kept
        )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.float32, **options
    ).eval()
    model.generation_config = transformers.GenerationConfig()  # greedy, past any end of text
    found = Side([], [])
    with torch.no_grad():
        for prompt in prompts:
            ids = torch.from_numpy(prompt.astype(np.int64))[None]
            found.logits.append(model(ids).logits[0].numpy())
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False
            )
            found.tokens.append(out[0, len(prompt) :].tolist())
    return found


def our_side(model_dir: str, prompts: Sequence[np.ndarray], new_tokens: int) -> Side:
    """Each prompt as one step, and `qwen_jax.generate` behind all of them in one batch."""
    import jax

    import qwen_jax as qj
    from qwen_jax.model.cache import make_cache, pack
    from qwen_jax.model.step import jit_step
    from qwen_jax.sampling import RowSettings

    runtime = qj.Runtime.make(dtype="float32", page_size=PAGE_SIZE, devices=jax.devices()[:1])
    config, params, _ = qj.load(model_dir, runtime=runtime)
    found = Side([], [])
    for prompt in prompts:
        table = np.arange(-(-len(prompt) // PAGE_SIZE), dtype=np.int32)[None]
        cache = make_cache(config.text, runtime, table.size)
        batch = pack([prompt], [0], table, num_tokens=len(prompt))
        out = jit_step(params, config, runtime, batch, cache, logits="all")
        found.logits.append(np.asarray(out.logits))
    state = qj.generate(
        params,
        config,
        [prompt.tolist() for prompt in prompts],
        max_new_tokens=new_tokens,
        runtime=runtime,
        settings=RowSettings(temperature=0.0, stop_ids=()),
    )
    rows = np.asarray(state.tokens)[: len(prompts), :new_tokens]
    return Side(found.logits, rows.tolist())


def report(ours: Side, theirs: Side, tolerance: float) -> bool:
    """Prints one line per prompt; says whether all is within the tolerance."""
    print(
        f"{'tokens':>8}{'max error':>12}{'mean error':>12}{'spread':>9}{'best equal':>12}  greedy"
    )
    good = True
    for ours_TV, theirs_TV, ours_new, theirs_new in zip(
        ours.logits, theirs.logits, ours.tokens, theirs.tokens, strict=True
    ):
        error = np.abs(ours_TV - theirs_TV)
        best = np.mean(ours_TV.argmax(-1) == theirs_TV.argmax(-1))
        same = ours_new == theirs_new
        good &= same and bool(error.max() < tolerance)
        print(
            f"{len(error):8,}{error.max():12.1e}{error.mean():12.1e}{theirs_TV.std():9.2f}"
            f"{best:12.1%}  {'equal' if same else f'{theirs_new} became {ours_new}'}"
        )
    return good


def make_prompts(args: argparse.Namespace) -> list[np.ndarray]:
    """The text's ids, or random ones of the lengths asked for."""
    directory = pathlib.Path(args.model)
    if args.prompt is not None:
        from qwen_jax.prompt.tokenizer import Tokenizer

        return [np.array(Tokenizer.from_dir(directory).encode(args.prompt), np.int32)]
    vocab_size = json.loads((directory / "config.json").read_text())["vocab_size"]
    rng = np.random.default_rng(args.seed)
    return [rng.integers(0, vocab_size, length, np.int32) for length in args.tokens]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python scripts/compare_hf.py --model DIR --tokens 1 7 33 130 1000",
    )
    parser.add_argument("--model", required=True, help="local directory of a text checkpoint")
    parser.add_argument("--prompt", help="a text instead of random token ids")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 7, 33, 130], metavar="N")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--tolerance", type=float, default=2e-4, help="of any logit, absolute")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # float32 products are exact nowhere else
    prompts = make_prompts(args)
    theirs = transformers_side(args.model, prompts, args.new_tokens)
    gc.collect()
    ours = our_side(args.model, prompts, args.new_tokens)
    return 0 if report(ours, theirs, args.tolerance) else 1


if __name__ == "__main__":
    sys.exit(main())
