"""What compile_kernels.py found, small enough to keep: counts, reasons, and each exception by name.

    python scripts/tabulate_kernels.py v6e.jsonl h200.jsonl --out scripts/results/kernels.json

A row for each device, operation and model. Of a program that was compiled again the last line
counts. Spills and failures are listed program by program, refusals by reason.
"""

import argparse
import collections
import json
import pathlib
import sys
from collections.abc import Iterable


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=pathlib.Path, help="of compile_kernels.py --out")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="JSON file for the table")
    args = parser.parse_args(argv)
    lines = [json.loads(line) for file in args.files for line in file.read_text().splitlines()]
    args.out.write_text(json.dumps(table(lines), indent=1) + "\n")


def table(lines: Iterable[dict]) -> dict:
    """Totals, and a row per device, operation and model, of lines of compile_kernels.py."""
    last = {(line["device"], line["name"]): line for line in lines}
    groups = collections.defaultdict(list)
    for (device, name), line in sorted(last.items()):
        op, model = name.split("/")[:2]
        groups[device, op, model if op != "segment_attention" else "towers"].append(line)
    rows = [
        {"device": device, "op": op, "model": model, **counted(each)}
        for (device, op, model), each in groups.items()
    ]
    kinds = ("compiled", "skipped", "failed", "seconds")
    return {
        "command": "python scripts/compile_kernels.py --out FILE; " + " ".join(sys.argv),
        "compilers": sorted({line["compiler"] for line in last.values()}),
        "sources": sorted(
            {
                f"{device} {op} {line['source']}"
                for (device, op, _), each in groups.items()
                for line in each
            }
        ),
        "total": {kind: round(sum(row[kind] for row in rows), 1) for kind in kinds},
        "programs": rows,
    }


def counted(lines: list[dict]) -> dict:
    """How many were compiled, skipped and failed, and what is to be said of them."""
    refused = collections.Counter(line["refused"] for line in lines if "refused" in line)
    failed = {line["name"]: line["error"].splitlines()[0] for line in lines if "error" in line}
    kernels = {line["name"]: line.get("kernels", []) for line in lines}
    spills = {name: sum(k["spilled"] for k in each) for name, each in kernels.items()}
    serialized = [name for name, each in kernels.items() if any(k["serialized"] for k in each)]
    found = {
        "compiled": len(lines) - refused.total() - len(failed),
        "skipped": refused.total(),
        "failed": len(failed),
        "seconds": round(sum(line["seconds"] for line in lines), 1),
    }
    more = {
        "refused": dict(refused),
        "errors": failed,
        "spilled_bytes": {name: n for name, n in spills.items() if n},
        "serialized": serialized,
        "shared_bytes": max((k["shared"] for each in kernels.values() for k in each), default=0),
    }
    return found | {name: value for name, value in more.items() if value}


if __name__ == "__main__":
    main()
