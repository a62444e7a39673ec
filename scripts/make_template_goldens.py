"""Renders the conversations of tests/data/chat_cases.json with transformers, as goldens.

The renderings of the small template that lies beside them are kept as text; those of the published
templates (not in this repository) as SHA-256, by the path of the template below --shared-data.

Example:
    python scripts/make_template_goldens.py --shared-data ../shared/data
"""

import argparse
import hashlib
import json
import pathlib
import sys

import tokenizers
import transformers

DATA = pathlib.Path(__file__).resolve().parent.parent / "tests" / "data"


def render(template: str, case: dict) -> str:
    """One conversation as transformers' apply_chat_template renders it."""
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE()), chat_template=template
    )
    return tokenizer.apply_chat_template(
        case["messages"],
        tools=case.get("tools"),
        tokenize=False,
        **{"add_generation_prompt": True, **case.get("flags", {}), **case.get("kwargs", {})},
    )


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shared-data", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, default=DATA / "template_goldens.json")
    args = parser.parse_args(argv)
    cases = json.loads((DATA / "chat_cases.json").read_text(encoding="utf-8"))
    text_cases = {name: case for name, case in cases.items() if not case.get("parts")}
    own = (DATA / "chatml.jinja").read_text(encoding="utf-8")
    goldens = {
        "transformers": transformers.__version__,
        "chatml.jinja": {name: render(own, case) for name, case in text_cases.items()},
        "published": {},
    }
    for path in sorted(args.shared_data.glob("*/chat_template*.jinja")):
        template = path.read_text(encoding="utf-8")
        chosen = cases if "image_pad" in template else text_cases
        goldens["published"][str(path.relative_to(args.shared_data))] = {
            name: hashlib.sha256(render(template, case).encode()).hexdigest()[:16]
            for name, case in chosen.items()
        }
    text = json.dumps(goldens, ensure_ascii=False, indent=1)
    args.out.write_text(text + "\n", encoding="utf-8")
    print(f"{args.out}: {len(goldens['published'])} published templates, {len(cases)} cases")


if __name__ == "__main__":
    main(sys.argv[1:])
