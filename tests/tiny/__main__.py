"""Writes a tiny random checkpoint with a tokenizer and a chat template, to try the program with.

PYTHONPATH=tests python -m tiny DIR                   a mixture-of-experts checkpoint
PYTHONPATH=tests python -m tiny DIR --variant moe_fp8
"""

import argparse

from tiny import VARIANTS, write_text_model


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tiny",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory")
    parser.add_argument("--variant", choices=list(VARIANTS), default="moe")
    args = parser.parse_args(argv)
    write_text_model(args.directory, args.variant)
    print(f"wrote {args.directory}: random weights, so what it says means nothing")


if __name__ == "__main__":
    main()
