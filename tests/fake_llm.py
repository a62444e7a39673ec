"""An LLM for tests of the server: a real tokenizer, template and grammars, and scripted texts.

It has what the server uses of `LLM`. Its engine answers on a thread of its own, a token at a time.
"""

import dataclasses
import pathlib
import tempfile
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import tiny

from qwen_jax.engine.events import Delta, EngineClosed, Failed, Finished, QueueFull
from qwen_jax.engine.totals import Totals
from qwen_jax.inputs import Inputs
from qwen_jax.picture_inputs import PictureInputs
from qwen_jax.prompt.chat import ChatTemplate
from qwen_jax.prompt.tokenizer import Tokenizer
from qwen_jax.requests import SamplingParams
from qwen_jax.results import CompletionOutput, Logprob, RequestOutput
from qwen_jax.runtime import Buckets
from qwen_jax.structured.forms import Forms
from qwen_jax.weights.hf_config import from_hf

VOCAB = tiny.TOKENIZER_VOCAB
MAX_LEN = 2048


@dataclasses.dataclass
class Job:
    prompt: object
    params: SamplingParams
    sink: Callable
    cancelled: bool = False
    done: bool = False

    def cancel(self):
        self.cancelled = True


class FakeEngine:
    """Says what ``say`` returns for (prompt text, index); ``pause`` seconds after each token.

    ``fails``: an exception that requests end with. ``most``: requests at once, else QueueFull.
    """

    def __init__(self, tokenizer, say, *, pause=0.0, fails=None, most=1000):
        self.tokenizer, self.say, self.pause = tokenizer, say, pause
        self.max_rows = 4
        self.fails, self.most = fails, most
        self.jobs = []
        self.closed = self.warm = self.shared = False

    def warmup(self, progress):
        progress(1, 1)
        self.warm = True

    def submit(self, prompt, params, sink, *, request_id=None, name=""):
        if self.closed:
            raise EngineClosed("closed")
        if sum(not job.done for job in self.jobs) >= self.most:
            raise QueueFull(f"{self.most} requests wait")
        job = Job(prompt, params, sink)
        self.jobs.append(job)
        threading.Thread(target=self._run, args=(job, request_id or "0"), daemon=True).start()
        return job

    def stats(self):
        running = sum(not job.done for job in self.jobs)
        return SimpleNamespace(
            running=running, waiting=0, pages_total=64, pages_used=2 * running, pages_cached=0,
            prompt_tokens=11, generated_tokens=7, prefix_hit_tokens=3, preemptions=1,
        )  # fmt: skip

    def drain(self, timeout):
        self.closed = True

    def close(self):
        self.closed = True

    def _run(self, job, request_id):
        try:
            outputs = [self._text(job, index) for index in range(job.params.n)]
            if self.fails is not None:
                job.sink(Failed(self.fails))
            elif not job.cancelled:
                known = job.params.prompt_logprobs
                prompt_logprobs = None
                if known is not None:
                    later = job.prompt.token_ids[1:]
                    prompt_logprobs = [None, *(self._entry(token, known) for token in later)]
                result = RequestOutput(
                    request_id,
                    job.prompt.text,
                    list(job.prompt.token_ids),
                    prompt_logprobs,
                    outputs,
                )
                job.sink(Finished(result))
        finally:
            job.done = True

    def _text(self, job, index):
        params, decoder = job.params, self.tokenizer.stream()
        output = CompletionOutput(index, "", [])
        output.logprobs = None if params.logprobs is None else []
        for token, last in self._tokens(job, index):
            text = decoder.push(token) + (decoder.finish() if last else "")
            entries = None
            if params.logprobs is not None:
                entries = [self._entry(token, params.logprobs)]
                output.logprobs += entries
            output.text += text
            output.token_ids.append(token)
            if last:
                output.finish_reason = last
            job.sink(Delta(index, text, [token], entries, last, None))
            time.sleep(self.pause)
            if job.cancelled or self.fails is not None:
                break
        return output

    def _tokens(self, job, index):
        """(token, finish reason with the last one)."""
        most = job.params.max_tokens or 10_000
        if job.params.structured_outputs is not None:
            yield from self._formed(job.params, index, most)
            return
        ids = self.tokenizer.encode(self.say(job.prompt.text, index))
        if len(ids) >= most:
            ids = ids[:most]
        else:
            ids.append(self.tokenizer.id("<|im_end|>"))
        for i, token in enumerate(ids):
            ends = i == len(ids) - 1
            yield token, ("length" if len(ids) == most else "stop") if ends else None

    def _formed(self, params, index, most):
        """Drawn at random under the grammar, and forced tokens as they are."""
        rng = np.random.default_rng([params.seed or 0, index])
        matcher = params.structured_outputs.matcher()
        ends = {self.tokenizer.id("<|im_end|>"), self.tokenizer.id("<|endoftext|>")}
        for count in range(1, most + 1):
            words = np.zeros((VOCAB + 31) // 32, np.uint32)
            matcher.mask(words)
            bits = np.unpackbits(words.view(np.uint8), bitorder="little")
            forced = matcher.forced()
            allowed = set(np.flatnonzero(bits).tolist())
            likes = (ends if ends & allowed else {self.tokenizer.id('"')}) & allowed
            pool = sorted(likes) if likes and rng.random() < 0.3 else sorted(allowed)
            token = forced[0] if forced else int(rng.choice(pool))
            if token in ends:
                yield token, "stop"
                return
            matcher.accept([token])
            if matcher.finished or count == most:
                yield token, "stop" if matcher.finished else "length"
                return
            yield token, None

    def _entry(self, token, count):
        others = [i for i in range(count + 1) if i != token][:count]
        best = {token: Logprob(-0.25, 1, self.tokenizer.token(token))}
        for rank, other in enumerate(others, 2):
            best[other] = Logprob(-float(rank), rank, self.tokenizer.token(other))
        return best


class FakeLLM:
    """What the server uses of an LLM."""

    def __init__(self, say=lambda prompt, index: "hello world", *, template=None, **engine):
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder)
            tiny.write_tokenizer(path)
            self.tokenizer = Tokenizer.from_dir(path, padded_size=VOCAB)
            self.template = ChatTemplate.from_dir(path) if template is None else template
        ends = [self.tokenizer.id("<|im_end|>"), self.tokenizer.id("<|endoftext|>")]
        raw = {**tiny.VARIANTS["dense"], "vocab_size": VOCAB, "eos_token_id": ends[0]}
        self.config = from_hf(raw)
        self.forms = Forms(self.tokenizer, self.template, ends)
        self.max_model_len = MAX_LEN
        self.runtime = SimpleNamespace(
            kernels=(("paged_attention", "xla"),),
            mesh=SimpleNamespace(devices=np.array([SimpleNamespace(process_index=0)])),
            dtype="float32",
            kv_dtype="float32",
        )
        self.name, self.params, self.totals = "tiny", {}, Totals()
        pictures = PictureInputs(
            self.config, self.tokenizer, None, options=None, video_form="transformers-4.57",
            buckets=Buckets(), max_model_len=MAX_LEN,
        )  # fmt: skip
        self.inputs = Inputs(
            self.tokenizer, self.template, pictures, vocab_size=VOCAB, max_model_len=MAX_LEN,
            most_tokens=MAX_LEN,
        )  # fmt: skip
        self.engine = FakeEngine(self.tokenizer, say, **engine)

    def get_default_sampling_params(self):
        return SamplingParams(temperature=0.6, top_k=20)
