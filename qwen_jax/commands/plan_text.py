"""What `qwen-jax plan` found, as lines for people. Knows the report's keys only."""

from typing import Any

from qwen_jax.commands.output import size


def lines(model: str, report: dict[str, Any]) -> str:
    """A line per fact, names on the left."""
    r, load, held = report, report["load"], report["bytes_per_device"]
    forms = [load["dtype"], f"KV {load['kv_dtype'].replace('auto', load['dtype'])}"]
    if load["quantization"]:
        forms.append(f"requantised to {load['quantization']}")
    bound = r["bound"]
    rows = [
        ("model", f"{model}, {', '.join(forms)}"),
        ("machine", f"{r['topology']}, {r['devices']} devices, {_mesh(r)}"),
        ("strategy", f"{r['strategy']}: {r['rules']}"),
        ("asked", f"{load['batch']:,} rows of {load['context']:,} tokens"),
        ("fits" if r["fits"] else "DOES NOT FIT", _held(held, r["source"])),
        *([] if r["fits"] else [("too much", f"{size(r['excess'])} per device")]),
        ("KV tokens", f"{r['kv_tokens']:,} would fit beside the weights"),
        ("decode", f"{_rate(bound['decode_tokens_per_s'])}, limited by {bound['limited_by']}"),
        (
            "prefill",
            f"{_rate(bound['prefill_tokens_per_s'])}, limited by {bound['prefill_limited_by']}",
        ),
        ("kernels", ", ".join(f"{op}: {name}" for op, name in r["kernels"].items())),
        ("experts", _imbalance(r["expert_imbalance"])),
        *_dispatch(r["dispatch"]),
        *_collectives(r["collectives"]),
    ]
    text = _table(rows)
    if r["fits"]:
        return text
    if r["proposal"] is None:
        return f"{text}\nNothing larger of this kind fits it either: ask for fewer or shorter rows."
    return f"{text}\n\nThe smallest that fits:\n{lines(model, r['proposal'])}"


def ranking(reports: list[dict[str, Any]]) -> str:
    """All plans of a search, a line each."""
    head = ("mesh", "strategy", "fits", "GB", "KV tokens", "decode/s", "prefill/s", "decode limit")
    body = [
        (
            _mesh(r),
            r["strategy"],
            "yes" if r["fits"] else "no",
            f"{r['bytes_per_device']['peak'] / 1e9:.1f}",
            f"{r['kv_tokens']:,}",
            f"{r['bound']['decode_tokens_per_s']:,.0f}",
            f"{r['bound']['prefill_tokens_per_s']:,.0f}",
            r["bound"]["limited_by"],
        )
        for r in reports
    ]
    widths = [max(len(row[i]) for row in (head, *body)) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (head, *body)
    )


def _mesh(report: dict[str, Any]) -> str:
    return ",".join(f"{axis}={n}" for axis, n in report["mesh"].items())


def _held(held: dict[str, int], source: str) -> str:
    parts = ", ".join(f"{name} {size(held[name])}" for name in ("weights", "cache", "temporary"))
    how = "by arithmetic" if source == "arithmetic" else "by the compiler"
    return f"{size(held['peak'])} of {size(held['limit'])} per device: {parts} ({how})"


def _rate(tokens_per_s: float) -> str:
    return f"at most {tokens_per_s:,.0f} tokens/s"


def _imbalance(factor: float) -> str:
    return f"the busiest device reads {factor:.2f} times the average of expert weights in decode"


def _dispatch(found: dict[str, Any]) -> list[tuple[str, str]]:
    """What each form of dispatch would send, those in use marked."""
    if not any(sent["prefill"] for sent in found["forms"].values()):
        return []
    uses = {step: found[step] for step in ("decode", "prefill")}
    rows = [
        ", ".join(
            f"{size(sent[step])} in {step}{' (in use)' * (uses[step] == form)}" for step in uses
        )
        for form, sent in found["forms"].items()
    ]
    return [
        ("" if i else "dispatch", f"{form}: a device sends {row}")
        for i, (form, row) in enumerate(zip(found["forms"], rows, strict=True))
    ]


def _collectives(found: list[dict[str, Any]]) -> list[tuple[str, str]]:
    if not found:
        return [("messages", "none")]
    return [
        (
            "messages" if i == 0 else "",
            f"{c['count']} x {c['op']} of {size(c['bytes'])} over {c['ways']} devices: "
            f"{c['where']}",
        )
        for i, c in enumerate(found)
    ]


def _table(rows: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows)
