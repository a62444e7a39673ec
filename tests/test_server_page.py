"""The page at `/` in a real browser, for those who ask for it:

QWEN_JAX_BROWSER=chromium pytest tests/test_server_page.py
"""

import os
import shutil

import pytest
import vision_model
from browser import open_browser
from fake_llm import FakeLLM
from serving import running

PROGRAM = os.environ.get("QWEN_JAX_BROWSER")
pytestmark = pytest.mark.skipif(
    not PROGRAM or not shutil.which(PROGRAM), reason="set QWEN_JAX_BROWSER to a Chromium to drive"
)
ANSWERED = "!document.querySelector('#send').disabled && document.querySelectorAll('.turn').length"


def said(page):
    return page.run("[...document.querySelectorAll('.said')].map(e => e.textContent)")


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    return tmp_path_factory.mktemp("profile")


def test_a_conversation_streams_and_remembers(profile):
    llm = FakeLLM(lambda prompt, i: "<b>one</b>\n& two", pause=0.02)
    with running(llm, api_keys=("secret",)) as server, open_browser(PROGRAM, profile) as page:
        page.open(server.url)
        page.wait("document.querySelector('#model').textContent === 'tiny'")
        page.type("#text", "hello <i>you</i>")
        page.press("Enter")
        page.wait("document.querySelector('.error')")
        assert "API key" in page.run("document.querySelector('.error').textContent")
        page.click("#clear")
        page.type("#key", "secret")
        page.type("#text", "hello <i>you</i>")
        page.press("Enter")
        seen = set()
        while not page.run(ANSWERED):
            seen.update(said(page))
        assert len(seen) > 3, "it comes in pieces"
        assert said(page) == ["<b>one</b>\n& two"]
        assert page.run("document.querySelectorAll('.turn b, .turn i').length") == 0
        assert "tokens" in page.run("document.querySelector('#footer').textContent")
        page.type("#text", "again")
        page.click("#send")
        page.wait("document.querySelectorAll('.said').length === 2")
        page.wait(ANSWERED)
        prompt = llm.engine.jobs[-1].prompt.text
        assert "hello <i>you</i>" in prompt
        assert "<b>one</b>\n& two<|im_end|>" in prompt
        assert page.errors == []


def test_an_answer_can_be_stopped(profile):
    llm = FakeLLM(lambda prompt, i: "x" * 1500, pause=0.02)
    with running(llm) as server, open_browser(PROGRAM, profile) as page:
        page.open(server.url)
        page.type("#text", "hi")
        page.click("#send")
        page.wait("document.querySelector('.said')?.textContent.length > 3")
        page.click("#stop")
        page.wait(ANSWERED)
        assert 3 < len(said(page)[0]) < 1500
        page.wait("fetch('/health').then(r => r.json()).then(h => h.load.in_progress === 0)")
        assert llm.engine.jobs[0].cancelled
        assert page.errors == []


def test_a_picture_is_sent_and_shown(profile, tmp_path):
    from PIL import Image

    Image.new("RGB", (64, 96), "red").save(tmp_path / "red.png")
    llm = vision_model.shared_llm()
    with running(llm, request_timeout=600.0) as server, open_browser(PROGRAM, profile) as page:
        page.open(server.url)
        page.upload("#files", tmp_path / "red.png")
        page.type("#text", "what")
        page.run("document.querySelector('#tokens').value = 5")
        page.click("#send")
        page.wait(ANSWERED, seconds=300)
        assert page.run("document.querySelector('.turn img').naturalWidth") == 64
        assert page.run("document.querySelector('.error')?.textContent") is None
        assert page.run("document.querySelector('#footer').textContent").split()[2] == "5"
        assert page.errors == []
