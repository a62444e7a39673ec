"""Fill-in-the-middle prompts: text, ids, stop ids and the mark of the command line."""

import functools
import pathlib
import tempfile

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prompt_samples import ADDED, TEMPLATE, native_tokenizer, write_tokenizer

from qwen_jax.prompt.chat import ChatTemplate
from qwen_jax.prompt.fim import encode_fim, fim_prompt, fim_stop_ids, split_fill
from qwen_jax.prompt.tokenizer import Tokenizer

FILES = {"lib/a.py": "A = 1\n", "b.py": "import a"}


@functools.cache
def small() -> Tokenizer:
    with tempfile.TemporaryDirectory() as directory:
        return Tokenizer.from_dir(write_tokenizer(pathlib.Path(directory)))


def test_a_file_prompt_is_prefix_suffix_middle():
    text = fim_prompt("def f(", "):\n    pass")
    assert text == "<|fim_prefix|>def f(<|fim_suffix|>):\n    pass<|fim_middle|>"


def test_a_repository_prompt_is_laid_out_as_published():
    text = fim_prompt("x = ", "\n", path="src/c.py", repo="demo", files=FILES)
    assert text == (
        "<|repo_name|>demo\n"
        "<|file_sep|>lib/a.py\nA = 1\n\n"
        "<|file_sep|>b.py\nimport a\n"
        "<|file_sep|>src/c.py\n<|fim_prefix|>x = <|fim_suffix|>\n<|fim_middle|>"
    )
    pairs = list(FILES.items())
    assert fim_prompt("x = ", "\n", path="src/c.py", repo="demo", files=pairs) == text
    assert fim_prompt("x", "", path="c.py") == (
        "<|file_sep|>c.py\n<|fim_prefix|>x<|fim_suffix|><|fim_middle|>"
    )


def test_raw_ids_are_those_of_the_text():
    text = fim_prompt("the (", ") the", path="c.py", repo="demo", files=FILES)
    ids = encode_fim(small(), "the (", ") the", path="c.py", repo="demo", files=FILES)
    assert ids == native_tokenizer().encode(text, add_special_tokens=False).ids


def test_wrapped_ids_are_a_user_turn_of_the_template():
    template = ChatTemplate(TEMPLATE)
    text = template.render(
        [
            {"role": "system", "content": "You are a code completion assistant."},
            {"role": "user", "content": fim_prompt("the (", ")\n")},
        ]
    )
    ids = encode_fim(small(), "the (", ")\n", template=template)
    assert ids == native_tokenizer().encode(text, add_special_tokens=False).ids


TEXT = st.lists(st.sampled_from([*ADDED, "<|fim_", "middle|>", "x", "\n", " "]), max_size=6)


@given(TEXT.map("".join), TEXT.map("".join), st.booleans())
def test_code_cannot_smuggle_special_tokens(prefix, suffix, wrap):
    template = ChatTemplate(TEMPLATE) if wrap else None
    ids = encode_fim(small(), prefix, suffix, template=template)
    empty = encode_fim(small(), "", "", template=template)
    tokens = set(small().added.values())
    assert [id for id in ids if id in tokens] == [id for id in empty if id in tokens]
    text = small().decode(ids, skip_special_tokens=False)
    assert fim_prompt(prefix, suffix) in text


def test_paths_and_names_cannot_smuggle_special_tokens():
    ids = encode_fim(
        small(), "", "", path="<|fim_middle|>", repo="<|file_sep|>", files={"<|im_end|>": ""}
    )
    middle, separator = small().id("<|fim_middle|>"), small().id("<|file_sep|>")
    assert ids.count(middle) == 1
    assert ids.count(separator) == 2
    assert ids[-1] == middle


def test_stop_ids_are_those_of_the_family():
    names = [small().token(id) for id in fim_stop_ids(small())]
    assert names == [
        "<|fim_prefix|>",
        "<|fim_suffix|>",
        "<|fim_pad|>",
        "<|repo_name|>",
        "<|file_sep|>",
        "<|endoftext|>",
        "<|im_end|>",
    ]


def test_published_stop_ids(shared_data):
    tokenizer = Tokenizer.from_dir(shared_data / "tokenizer")
    expected = (151659, 151661, 151662, 151663, 151664, 151643, 151645)
    assert fim_stop_ids(tokenizer) == expected
    assert encode_fim(tokenizer, "", "") == [151659, 151661, 151660]


def test_the_fill_mark_splits_once():
    assert split_fill("a = <FILL>\nb") == ("a = ", "\nb")
    for text, count in (("no mark", 0), ("<FILL><FILL>", 2)):
        with pytest.raises(ValueError, match=f"has {count} marks '<FILL>', needs exactly one"):
            split_fill(text)


@pytest.mark.parametrize("options", [{"repo": "r"}, {"files": {"a": ""}}])
def test_a_repository_prompt_needs_the_path(options):
    with pytest.raises(ValueError, match="needs path"):
        fim_prompt("", "", **options)


@pytest.mark.parametrize("options", [{"path": "a\nb"}, {"path": ""}, {"path": "p", "repo": "a\r"}])
def test_names_are_one_line(options):
    with pytest.raises(ValueError, match="must be one line and not empty"):
        fim_prompt("", "", **options)


def test_a_tokenizer_without_fim_tokens_is_named(tmp_path):
    native = native_tokenizer()
    native.save(str(tmp_path / "tokenizer.json"))
    text = (tmp_path / "tokenizer.json").read_text(encoding="utf-8")
    (tmp_path / "tokenizer.json").write_text(text.replace("fim_middle", "other"), encoding="utf-8")
    tokenizer = Tokenizer.from_dir(tmp_path)
    with pytest.raises(ValueError, match=r"no token <\|fim_middle\|>"):
        encode_fim(tokenizer, "", "")


def test_a_template_that_hides_the_user_is_refused():
    with pytest.raises(ValueError, match="does not show a user's message exactly once"):
        encode_fim(small(), "a", "b", template=ChatTemplate("nothing"))
