"""A plan as a picture: bytes on a device against its limit, and what bounds each step.

Knows the keys of a report (`plan.report`) and matplotlib; knows no model.

    | weights ###### cache #### temp # |limit          decode   memory      ########## 5.2 ms
                                                                arithmetic  # 0.3 ms
"""

from typing import Any

from qwen_jax.commands.output import size

_PARTS = {"weights": "#4c72b0", "cache": "#55a868", "temporary": "#dd8452"}
_LIMITING, _OTHER, _LIMIT = "#c44e52", "#b8b8c0", "#222222"
_RESOURCES = {"memory": "memory bandwidth", "arithmetic": "arithmetic", "links": "interconnect"}
_NARROW = 0.12  # of the axis: what is narrower has its number in the legend only


def figure(model: str, report: dict[str, Any]) -> Any:
    """A matplotlib figure of a plan, and of the proposal beside it where the plan does not fit.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "a plot needs matplotlib: install the extra 'plot', or leave out --plot"
        ) from error
    picture = Figure(figsize=(11, 4.6), layout="constrained")
    axes = picture.subplot_mosaic([["memory", "decode"], ["memory", "prefill"]])
    picture.suptitle(f"{model} on {_where(report)}", fontsize=11)
    _memory(axes["memory"], [report] + [report["proposal"]] * (report["proposal"] is not None))
    for step in ("decode", "prefill"):
        _bound(axes[step], step, report)
    return picture


def _where(report: dict[str, Any]) -> str:
    mesh = ",".join(f"{axis}={n}" for axis, n in report["mesh"].items())
    load = report["load"]
    return (
        f"{report['topology']} ({mesh}; {report['strategy']}), "
        f"{_rows(load)} of {load['context']:,} tokens"
    )


def _rows(load: dict[str, Any]) -> str:
    return f"{load['batch']:,} row{'s' * (load['batch'] > 1)}"


def _memory(axis: Any, reports: list[dict[str, Any]]) -> None:
    """A bar of parts for each report, with a mark where its limit is."""
    most = max(max(r["bytes_per_device"][x] for x in ("peak", "limit")) for r in reports) / 1e9
    for y, report in enumerate(reports):
        held, left = report["bytes_per_device"], 0.0
        for part, color in _PARTS.items():
            gb = held[part] / 1e9
            label = f"{part} {size(held[part])}" if len(reports) == 1 else part if y == 0 else None
            axis.barh(y, gb, left=left, height=0.5, color=color, label=label)
            if gb > _NARROW * most:
                axis.text(left + gb / 2, y, f"{gb:.1f}", ha="center", va="center", color="white")
            left += gb
        limit = held["limit"] / 1e9
        axis.plot([limit, limit], [y - 0.36, y + 0.36], color=_LIMIT, linewidth=2)
        axis.text(limit, y - 0.4, f"limit {limit:.1f}", ha="center", va="bottom", fontsize=9)
    axis.set_yticks(range(len(reports)), [_verdict(r) for r in reports])
    axis.set_ylim(len(reports) - 0.3, -0.7)
    axis.set_xlim(0, 1.12 * most)
    axis.set_xlabel("GB on each device")
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, frameon=False, fontsize=9)


def _verdict(report: dict[str, Any]) -> str:
    lines = [report["topology"]]
    if report["load"]["quantization"]:
        lines.append(report["load"]["quantization"])
    if report["load"]["kv_dtype"] != "auto":
        lines.append(f"KV {report['load']['kv_dtype']}")
    lines.append("fits" if report["fits"] else f"{size(report['excess'])}\ntoo much")
    return "\n".join(lines)


def _bound(axis: Any, step: str, report: dict[str, Any]) -> None:
    """Milliseconds of each resource; the one that limits is marked."""
    bound = report["bound"]
    ms = {name: bound[f"{step}_seconds"][key] * 1e3 for key, name in _RESOURCES.items()}
    slowest = max(ms, key=lambda name: ms[name])
    colors = [_LIMITING if name == slowest else _OTHER for name in ms]
    axis.barh(range(len(ms)), list(ms.values()), color=colors, height=0.62)
    for y, (name, value) in enumerate(ms.items()):
        limits = ", the limit" if name == slowest else ""
        axis.text(value, y, f" {value:.3g} ms{limits}", va="center", fontsize=9)
    axis.set_yticks(range(len(ms)), list(ms))
    axis.invert_yaxis()
    axis.set_xlim(0, 1.45 * ms[slowest])
    load = report["load"]
    what = _rows(load) if step == "decode" else f"{load['chunk']:,} tokens"
    rate = bound[f"{step}_tokens_per_s"]
    axis.set_title(f"{step} of {what}: at most {rate:,.0f} tokens/s", fontsize=10)
    axis.set_xlabel("least time of a step, ms")
