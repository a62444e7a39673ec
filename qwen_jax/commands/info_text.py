"""What `qwen-jax info` found, as lines for people. Knows the report's keys only."""

from typing import Any

from qwen_jax.commands.output import size


def lines(report: dict[str, Any]) -> str:
    """A line per fact, names on the left."""
    r = report
    sizes = {name: n for name, n in r["bytes"].items() if name not in ("total", "from")}
    by_dtype = ", ".join(f"{name} {size(n)}" for name, n in sizes.items())
    rows = [
        ("model", f"{r['model']} ({r['form']})"),
        ("architecture", f"{r['architecture']}: {r['kind']}"),
        ("layers", _layers(r)),
        (
            "attention",
            f"{r['heads']} heads, {r['kv_heads']} for keys and values, of {r['head_dim']}; "
            f"width {r['hidden_size']:,}",
        ),
        *_vision(r["vision"]),
        ("parameters", f"{r['parameters']['total']:,}"),
        ("active", f"{r['parameters']['active']:,} per token, the embedding not counted"),
        ("bytes", f"{size(r['bytes']['total'])} ({by_dtype}; by {r['bytes']['from']})"),
        ("quantisation", _stored(r["quantization"])),
        (
            "context",
            f"{r['context']['max_position_embeddings']:,} tokens, rope {r['context']['rope']}, "
            f"theta {r['context']['rope_theta']:,.0f}",
        ),
        ("vocabulary", f"{r['vocab_size']:,}{', head tied' if r['tied_embeddings'] else ''}"),
        *_text_rows(r),
        *_machine_rows(r["machine"]),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows)


def _layers(r: dict[str, Any]) -> str:
    if not r["experts"]:
        return str(r["layers"])
    return (
        f"{r['layers']}, {r['sparse_layers']} of them with {r['experts']} experts, "
        f"{r['experts_per_token']} per token"
    )


def _vision(tower: dict[str, Any] | None) -> list[tuple[str, str]]:
    if tower is None:
        return []
    return [("vision tower", f"{tower['depth']} blocks of width {tower['hidden_size']:,}")]


def _stored(quant: dict[str, Any] | None) -> str:
    if quant is None:
        return "none"
    block = "per channel" if quant["block"] is None else "x".join(map(str, quant["block"]))
    return f"{quant['form']}, scales {block} in {quant['scale_dtype']}"


def _machine_rows(machine: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [
        (
            "here",
            f"{machine['devices']} x {machine['device']}, {machine['dtype']}, "
            f"KV {machine['kv_dtype']} ({machine['kv_bytes_per_token']:,} bytes per token)",
        ),
        ("kernels", ", ".join(f"{op}: {name}" for op, name in machine["kernels"].items())),
    ]
    if not machine["fits"]:
        return [*rows, ("does not fit", machine["problem"])]
    fits = (
        f"weights {size(machine['weights'])} per device, then KV for "
        f"{machine['kv_tokens']:,} tokens; contexts up to {machine['max_model_len']:,}"
    )
    return [*rows, ("fits", fits)]


def _text_rows(r: dict[str, Any]) -> list[tuple[str, str]]:
    if r["form"] == "preset":
        return [("tokenizer", "not known of a preset: its files are not read")]
    tokenizer, template = "none: token ids only", "none: generate only"
    if r["tokenizer"]:
        ids, special = r["tokenizer"]["size"], r["tokenizer"]["special"]
        tokenizer = f"{ids:,} ids, {special} of them special"
    if r["chat_template"]:
        template = f"yes, tool calls: {r['tool_format'] or 'none'}"
    rows = [("tokenizer", tokenizer), ("chat template", template)]
    if r["generation_config"]:
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "do_sample")
        own = {n: r["generation_config"][n] for n in names if n in r["generation_config"]}
        rows.append(("sampling", ", ".join(f"{n} {value}" for n, value in own.items())))
    return rows
