"""Lines of a batch: what they may hold, what answers them, and the files that survive a crash."""

import asyncio
import json

import pytest

from qwen_jax import durable
from qwen_jax.openai.batch_lines import (
    Batch,
    answer_line,
    came_before,
    has_failed,
    parse_line,
    read_request,
    refuse_line,
)
from qwen_jax.openai.batch_results import Results, read_results
from qwen_jax.openai.errors import ApiError, encode

GOOD = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}}
BATCH = Batch("b", 0, 1234)


def refused(call, *args):
    with pytest.raises(ApiError) as caught:
        call(*args)
    return caught.value


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"{", "is not JSON"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": "\xff"}', "is not JSON"),
        (b"{\x00}\x00", "is not JSON"),  # no guess at UTF-16
        (b"[" * 100_000, "nested too deep"),
        (b"[1]", "not a JSON object"),
        (b"null", "not a JSON object"),
    ],
)
def test_a_line_that_is_no_object_is_refused(raw, said):
    error = refused(parse_line, raw)
    assert (error.status, error.code) == (400, "invalid_json_line")
    assert said in error.message


@pytest.mark.parametrize(
    ("changes", "code", "said"),
    [
        ({"custom_id": None}, "missing_required_parameter", "1 to 512 characters"),
        ({"custom_id": ""}, "missing_required_parameter", "1 to 512"),
        ({"custom_id": "x" * 513}, "missing_required_parameter", "1 to 512"),
        ({"custom_id": 7}, "missing_required_parameter", "custom_id must be a text"),
        ({"method": "GET"}, "invalid_method", "POST"),
        ({"url": "/v1/embeddings"}, "mismatched_url", "/v1/chat/completions or /v1/completions"),
        ({"body": "x"}, "invalid_body", "JSON object"),
        ({"bodi": {}}, "unknown_field", "did you mean 'body'"),
        ({"zzz": 1}, "unknown_field", "a line has custom_id, method, url, body"),
    ],
)
def test_a_wrong_field_is_named(changes, code, said):
    error = refused(read_request, {**GOOD, **changes})
    assert error.code == code
    assert said in error.message


def answered(answer, batch=BATCH):
    return asyncio.run(answer_line(answer, read_request(GOOD), batch))


async def reply(request, given):
    return {"prompt": request.body["prompt"], "seed": given.seed, "id": given.request_id}


def test_an_answer_is_the_same_whenever_it_is_given():
    line = answered(reply)
    assert line == answered(reply)
    assert line["custom_id"] == "a"
    assert line["response"]["status_code"] == 200
    assert line["error"] is None
    assert not has_failed(line)
    other = answered(reply, Batch("other", 0, 1234))
    assert other["id"] != line["id"]
    assert other["response"]["body"]["seed"] == line["response"]["body"]["seed"]
    assert (
        answered(reply, Batch("b", 1, 1234))["response"]["body"]["seed"]
        != (line["response"]["body"]["seed"])
    )


def test_a_seed_is_the_lines_own():
    seeds = {BATCH.given(id).seed for id in ("a", "b", "ab", "a\ud800")}
    assert len(seeds) == 4
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ApiError(400, "too long", param="prompt"), 400, "too long"),
        (ApiError(503, "slow", code="timeout"), 503, "slow"),
        (ZeroDivisionError("ours"), 500, "internal error"),
    ],
)
def test_what_is_wrong_with_one_request_is_its_answer(error, status, said):
    async def answer(request, given):
        raise error

    line = answered(answer)
    assert has_failed(line)
    assert line["response"]["status_code"] == status
    assert line["response"]["body"]["error"]["message"] == said


@pytest.mark.parametrize("status", [429, 503])
def test_what_is_no_matter_of_the_request_is_no_answer(status):
    async def answer(request, given):
        raise ApiError(status, "later")

    with pytest.raises(ApiError, match="later"):
        answered(answer)


def test_a_refused_line_says_where_it_is():
    line = refuse_line(BATCH, "a", came_before("a", "in.jsonl", 3), file="in.jsonl", line=7)
    assert has_failed(line)
    assert (line["file"], line["line"], line["custom_id"]) == ("in.jsonl", 7, "a")
    assert line["error"]["code"] == "duplicate_custom_id"
    assert "came before in line 3 of in.jsonl" in line["error"]["message"]
    other = refuse_line(BATCH, None, came_before("a"), file="in.jsonl", line=8)
    assert other["id"] != line["id"]


# ---- files ---------------------------------------------------------------------------------------


def write(paths, lines):
    async def go():
        async with Results(paths) as results:
            await asyncio.gather(*(results.add(line) for line in lines))

    asyncio.run(go())


def some_lines(count):
    good = [{"id": f"{i}", "custom_id": f"ü{i}", "response": {"status_code": 200}, "error": None}
            for i in range(count)]  # fmt: skip
    return [*good, refuse_line(BATCH, None, came_before("a"), line=1)]


def test_answers_and_errors_go_to_their_files_and_are_appended(tmp_path):
    paths = (tmp_path / "out", tmp_path / "errors")
    first, second = some_lines(3), some_lines(1)
    write(paths, first)
    write(paths, second)
    assert list(read_results(paths[0])) == [*first[:3], second[0]]
    assert list(read_results(paths[1])) == [first[3], second[1]]
    assert list(read_results(tmp_path / "none")) == []


def test_nothing_follows_a_line_that_could_not_be_written(tmp_path, monkeypatch):
    paths, lines = (tmp_path / "out", tmp_path / "errors"), some_lines(3)

    def full(file):
        file.flush()
        raise OSError(28, "No space left on device")

    async def go():
        async with Results(paths) as results:
            await results.add(lines[0])
            with monkeypatch.context() as patch:
                patch.setattr(durable, "sync", full)
                with pytest.raises(OSError, match="No space left"):
                    await results.add(lines[1])
            with pytest.raises(OSError, match="No space left"):
                await results.add(lines[2])

    asyncio.run(go())
    assert list(read_results(paths[0])) == lines[:2]


def test_a_file_torn_at_any_byte_keeps_its_whole_lines(tmp_path):
    path = tmp_path / "out"
    lines = [{"custom_id": x, "response": {}, "error": None} for x in ("a", "ü")]
    data = b"".join(encode(line) + b"\n" for line in lines)
    ends = [data.index(b"\n") + 1, len(data)]
    for size in range(len(data) + 1):
        path.write_bytes(data[:size])
        whole = [end for end in ends if end <= size]
        assert list(read_results(path)) == lines[: len(whole)]
        assert path.read_bytes() == data[: max(whole, default=0)]


def test_what_a_disk_without_power_leaves_is_cut_off(tmp_path):
    path = tmp_path / "out"
    write((path, tmp_path / "errors"), some_lines(2))
    data = path.read_bytes()
    for tail in (b"\0" * 100, b"\0" * 10 + b"\n" + b"\0" * 10, b'{"id":"2","cus\0\0\0\n', b"{}\n"):
        path.write_bytes(data + tail)
        assert len(list(read_results(path))) == 2
        assert path.read_bytes() == data


def test_a_spoiled_line_among_whole_ones_is_not_cut_off(tmp_path):
    path = tmp_path / "out"
    write((path, tmp_path / "errors"), some_lines(2))
    data = path.read_bytes()
    lines = data.splitlines(keepends=True)
    path.write_bytes(lines[0] + b"spoiled\n" + lines[1])
    with pytest.raises(ValueError, match="line 2 is no answer of a batch"):
        list(read_results(path))
    assert json.loads(path.read_bytes().splitlines()[2])["custom_id"] == "ü1"
