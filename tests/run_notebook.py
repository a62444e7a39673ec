"""Runs a notebook's source as a program, keeps its figures, and prints some of its values.

python -m run_notebook NOTEBOOK.py FIGURES NAME …: writes one JSON object of the named values to
stdout, and each figure that the notebook shows to FIGURES/0.png, 1.png … Knows matplotlib and JSON;
what a notebook should say is the test's matter.
"""

import contextlib
import json
import pathlib
import runpy
import sys

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt


def main(argv: list[str]) -> None:
    notebook, figures, *names = argv
    folder = pathlib.Path(figures)
    shown = []

    def show() -> None:
        for number in plt.get_fignums():
            plt.figure(number).savefig(folder / f"{len(shown)}.png", dpi=80)
            shown.append(number)
        plt.close("all")

    plt.show = show
    with contextlib.redirect_stdout(sys.stderr):
        found = runpy.run_path(notebook)
    print(json.dumps({"figures": len(shown), **{name: found[name] for name in names}}))


if __name__ == "__main__":
    main(sys.argv[1:])
