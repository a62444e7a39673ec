"""Trains the demo checkpoint from nothing but this repository and Python's standard library.

Everything it learns from is generated, or is the standard library's own source. The run resumes
where it was last saved when the same command is given again; ctrl-C saves it.

Examples:
    python scripts/train_demo.py --out demo-checkpoint                # 90 minutes on two cores
    python scripts/train_demo.py --out demo-checkpoint --minutes 60   # resumed: 60 more from now
    python scripts/train_demo.py --out trial --minutes 8 --lessons pictures
    python scripts/train_demo.py --out again --steps 20000            # the same weights every time

The checkpoint in the package was made by these, in 65 minutes on two cores:
    python scripts/train_demo.py --out demo-checkpoint --steps 12000
    python scripts/train_demo.py --out demo-checkpoint --again 1200
"""

import argparse
import pathlib
import signal
import sys
import threading

from demo import exam, lessons, run
from demo.schedule import Schedule

from qwen_jax.llm import LLM


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=pathlib.Path, required=True, help="directory to write")
    parser.add_argument(
        "--minutes", type=float, help="of training (default: 90); of a resumed run: from now on"
    )
    parser.add_argument("--steps", type=int, help="a number of steps instead of minutes")
    parser.add_argument(
        "--again", metavar="STEPS", type=int, help="a run that is over goes on, from a lower rate"
    )
    parser.add_argument(
        "--lessons", nargs="+", choices=lessons.LESSONS, help="only these (default: all)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lines", type=int, default=8, help="of 256 tokens, in a batch")
    parser.add_argument("--questions", type=int, default=200, help="of each subject in the exam")
    args = parser.parse_args(argv)

    if (args.out / "training" / "run.json").exists():
        running = run.resume(args.out)
        if args.minutes is not None:
            running.schedule = running.schedule.prolonged(running.seconds, args.minutes)
        if args.again is not None:
            running.schedule = running.schedule.again(args.again)
        print(f"resuming {args.out} at step {running.step}", flush=True)
    else:
        schedule = Schedule.of_steps(args.steps) if args.steps else Schedule(args.minutes or 90.0)
        running = run.begin(
            args.out,
            seed=args.seed,
            lines=args.lines,
            schedule=schedule,
            only=tuple(args.lessons or ()),
        )
    log = args.out / "training" / "log.txt"
    stopped = threading.Event()
    signal.signal(signal.SIGINT, lambda *_: stopped.set())
    for line in run.train(running, stop=stopped.is_set):
        print(line, flush=True)
        with log.open("a") as file:
            file.write(line + "\n")
    if not running.schedule.is_over(running.step):
        print("stopped and saved; the same command goes on from here")
        return
    scores = exam.examine(LLM(str(args.out), max_num_seqs=32), count=args.questions)
    for subject, share in scores.items():
        print(f"{subject:10s} {share:.1%}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
