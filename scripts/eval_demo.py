"""Examines a demo checkpoint on held-out questions, whole and with a part broken on purpose.

Every answer comes through `LLM`, greedily. "prefix" is "gaps" without the code behind the gap: what
filling in the middle adds is the difference. With DeepStack or M-RoPE broken, questions about what
is where should fall to chance.

Example:
    python scripts/eval_demo.py --model demo-checkpoint --questions 200 --broken
"""

import argparse
import pathlib
import sys
import tempfile

from demo import exam

from qwen_jax.llm import LLM


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=pathlib.Path, required=True, help="its directory")
    parser.add_argument("--questions", type=int, default=200, help="of each subject")
    parser.add_argument("--seed", type=int, default=0, help="of the questions")
    parser.add_argument("--subjects", nargs="+", choices=exam.SUBJECTS, default=exam.SUBJECTS)
    parser.add_argument("--broken", action="store_true", help="also without DeepStack and M-RoPE")
    args = parser.parse_args(argv)

    with tempfile.TemporaryDirectory() as scratch:
        variants = {"whole": args.model}
        if args.broken:
            variants["no DeepStack"] = exam.break_deepstack(
                args.model, pathlib.Path(scratch) / "deepstack"
            )
            variants["no M-RoPE"] = exam.break_mrope(args.model, pathlib.Path(scratch) / "mrope")
        print(f"{'':14s}" + "".join(f"{subject:>10s}" for subject in args.subjects), flush=True)
        for name, directory in variants.items():
            shares = exam.examine(
                LLM(str(directory), max_num_seqs=32),
                count=args.questions,
                subjects=tuple(args.subjects),
                seed=args.seed,
            )
            cells = "".join(f"{shares[subject]:10.1%}" for subject in args.subjects)
            print(f"{name:14s}{cells}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
