"""`qwen-jax chat` about picture and video files, on a small model with eyes."""

import io
import json

import numpy as np
import pytest
import vision_model
import vision_samples as samples

from qwen_jax import cli
from qwen_jax.requests import SamplingParams

Image = pytest.importorskip("PIL.Image", reason="needs the extra 'vision'")

GREEDILY = ("--temperature=0", "--max-tokens=6")
GREEDY = SamplingParams(temperature=0.0, max_tokens=6)
QUESTION = "What is in this picture?"


@pytest.fixture(autouse=True)
def few_shapes(process_as_before):
    with vision_model.few_shapes():
        yield


@pytest.fixture
def call(capsys):
    """`qwen-jax chat` on the small model; returns its status, stdout and stderr."""

    def call(*argv):
        options = ["--model", str(vision_model.directory("vl_moe")), "--mesh=tensor=1"]
        options += ["--max-model-len=128", "--page-size=16", "--max-num-seqs=4"]
        status = cli.main(["chat", *options, "--compilation-cache=off", *argv])
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "a b.png"
    Image.fromarray(samples.noise(64, 96, 3, seed=0)).save(path)
    return path


@pytest.fixture
def video(tmp_path):
    pytest.importorskip("av", reason="needs the extra 'video'")
    from test_video_files import written

    path = tmp_path / "b.mp4"
    path.write_bytes(written(samples.noise(4, 64, 64, 3, seed=20), rate=2))
    return path


def answer(*content) -> str:
    """What Python says to the same parts."""
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": QUESTION}]}]
    (result,) = vision_model.shared_llm().chat(messages, GREEDY, use_tqdm=False)
    return result.outputs[0].text


def test_an_answer_about_a_picture_file_is_the_one_that_python_gives(call, picture):
    status, out, err = call("--prompt", QUESTION, "--image", str(picture), *GREEDILY)
    assert (status, out.rstrip("\n")) == (0, answer({"type": "image", "image": picture}))
    other = np.zeros((64, 96, 3), np.uint8)
    assert out.rstrip("\n") != answer({"type": "image", "image": other})
    assert "Generation: 6 tokens" in err.splitlines()[-1]


def test_an_answer_about_a_video_file_streams(call, video, monkeypatch):
    written = []

    class Stdout(io.StringIO):
        def write(self, text):
            written.append(text)
            return super().write(text)

    monkeypatch.setattr("sys.stdout", Stdout())
    status, *_ = call("--prompt", QUESTION, "--video", str(video), *GREEDILY)
    assert status == 0
    assert "".join(written).rstrip("\n") == answer({"type": "video", "video": video})
    assert len([text for text in written if text.strip()]) > 1


def test_json_counts_the_tokens_and_pixels_of_pictures_and_videos(call, picture, video):
    given = ("--image", str(picture), "--image", str(picture), "--video", str(video))
    status, out, _ = call("--prompt", QUESTION, *given, *GREEDILY, "--json")
    metrics = json.loads(out)["metrics"]
    assert status == 0
    assert metrics["picture_tokens"] == 2 * 6 + 2 * 4
    assert metrics["picture_pixels"] == 2 * 64 * 96 + 4 * 64 * 64


def test_a_picture_named_in_a_conversation_goes_with_the_next_question(call, picture, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"/image {picture}\n{QUESTION}\n/exit\n"))
    status, out, err = call(*GREEDILY)
    assert (status, out.rstrip("\n")) == (0, answer({"type": "image", "image": picture}))
    assert f"{picture} goes with the next question" in err


@pytest.mark.parametrize("kind", ["image", "video"])
def test_a_file_that_cannot_be_read_is_named_and_nothing_is_answered(call, tmp_path, kind):
    broken = tmp_path / "broken"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n no picture")
    for path, problem in ((broken, "broken"), (tmp_path / "none.x", "none.x")):
        status, out, err = call("--prompt", QUESTION, f"--{kind}", str(path), *GREEDILY)
        assert (status, out) == (2, "")
        last = err.splitlines()[-1]
        assert last.startswith("qwen-jax: error: ")
        assert problem in last
