"""Batches from files to files with a scripted model: what is written, and what is not."""

import asyncio
import json
import random
import re

import pytest
from batch_samples import contents, echo, line, read, without_times, write_batch
from fake_llm import FakeLLM

import qwen_jax as qj
from qwen_jax import durable


def texts(lines):
    return {
        x["custom_id"]: x["response"]["body"]["choices"][0]["message"]["content"] for x in lines
    }


@pytest.fixture(scope="module")
def llm():
    return FakeLLM(echo)


@pytest.fixture
def files(tmp_path):
    return write_batch(tmp_path)


@pytest.fixture(scope="module")
def whole(llm, tmp_path_factory):
    """What an uninterrupted run writes."""
    files = write_batch(tmp_path_factory.mktemp("whole"))
    qj.run_batch(llm, *files[:2])
    return contents(*files[1:])


def test_every_line_is_answered_or_refused(llm, files):
    summary = qj.run_batch(llm, *files[:2])
    assert (summary.total, summary.completed, summary.failed, summary.left) == (33, 30, 3, 0)
    answers, errors = read(files[1]), read(files[2])
    assert texts(answers) == {f"id-{i}": f"item {i}" for i in range(30)}
    assert all(x["error"] is None and "line" not in x for x in answers)
    errors = {x["line"]: x for x in errors}
    assert {n: (x["file"], x["custom_id"]) for n, x in errors.items()} == {
        31: ("in.jsonl", None), 32: ("in.jsonl", "id-3"), 33: ("in.jsonl", "id-x"),
    }  # fmt: skip
    assert errors[31]["error"]["code"] == "invalid_json_line"
    assert "in line 4 of in.jsonl" in errors[32]["error"]["message"]
    assert errors[33]["response"]["status_code"] == 400
    assert errors[33]["response"]["body"]["error"]["param"] == "messages"
    assert len({x["id"] for x in [*answers, *errors.values()]}) == 33


def test_two_runs_say_the_same(llm, files, whole):
    qj.run_batch(llm, *files[:2])
    assert contents(*files[1:]) == whole


def test_an_output_is_never_overwritten(llm, files):
    qj.run_batch(llm, *files[:2])
    before = [path.read_bytes() for path in files[1:]]
    with pytest.raises(FileExistsError, match="has been begun: --resume"):
        qj.run_batch(llm, *files[:2])
    other = files[1].with_name("other.jsonl")
    other.write_text("mine\n")
    for resume in (False, True):
        with pytest.raises(FileExistsError, match="exists and is not of a batch"):
            qj.run_batch(llm, files[0], other, resume=resume)
    assert other.read_text() == "mine\n"
    assert [path.read_bytes() for path in files[1:]] == before


def test_resume_begins_a_batch_too_and_does_nothing_twice(files):
    llm = FakeLLM(echo)
    assert qj.run_batch(llm, *files[:2], resume=True).resumed == 0
    before, asked = contents(*files[1:]), len(llm.engine.jobs)
    summary = qj.run_batch(llm, *files[:2], resume=True)
    assert (summary.completed, summary.failed, summary.resumed, summary.left) == (30, 3, 33, 0)
    assert contents(*files[1:]) == before
    assert len(llm.engine.jobs) == asked == 30


def test_whatever_a_crash_left_is_gone_on_with(llm, files, whole):
    qj.run_batch(llm, *files[:2])
    full = [path.read_bytes() for path in files[1:]]
    rng = random.Random(0)
    for round in range(12):
        for path, data in zip(files[1:], full, strict=True):
            size = rng.choice([0, len(data), rng.randrange(len(data))])
            path.write_bytes(data[:size])
        left = [path.read_bytes().count(b"\n") for path in files[1:]]
        summary = qj.run_batch(llm, *files[:2], resume=True)
        assert summary.resumed == sum(left), round
        assert contents(*files[1:]) == whole


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 1}, "another seed (0, now 1)"),
        ({"model_names": ["x"]}, "another model_names (['tiny'], now ['x'])"),
    ],
)
def test_other_options_are_refused(llm, files, changes, said):
    qj.run_batch(llm, *files[:2])
    with pytest.raises(ValueError, match=re.escape(said)):
        qj.run_batch(llm, *files[:2], resume=True, **changes)


def test_another_input_or_model_is_refused(llm, files, tmp_path):
    qj.run_batch(llm, *files[:2])
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    same = moved / "in.jsonl"
    same.write_bytes(files[0].read_bytes())
    assert qj.run_batch(llm, same, files[1], resume=True).resumed == 33
    other = FakeLLM(echo)
    other.max_model_len = 1000
    with pytest.raises(ValueError, match="another max_model_len \\(2048, now 1000\\)"):
        qj.run_batch(other, *files[:2], resume=True)
    with files[0].open("ab") as file:
        file.write(json.dumps(line(99)).encode())
    with pytest.raises(ValueError, match=r"another input .*in\.jsonl"):
        qj.run_batch(llm, *files[:2], resume=True)


@pytest.mark.parametrize(
    ("added", "said"),
    [
        ("id-1000", "answers 'id-1000', which the input does not ask for"),
        ("id-5", "answers what another line answers"),
    ],
)
def test_answers_that_cannot_be_are_refused(llm, files, added, said):
    qj.run_batch(llm, *files[:2])
    with files[1].open("a") as file:
        file.write(json.dumps({**read(files[1])[0], "custom_id": added}) + "\n")
    with pytest.raises(ValueError, match=said):
        qj.run_batch(llm, *files[:2], resume=True)


def test_shards_make_up_the_whole(llm, files, whole):
    names = [files[1].with_name(f"out-0000{i}-of-00003.jsonl") for i in range(3)]
    for i in range(3):
        qj.run_batch(llm, *files[:2], shard=f"{i}/3")
    errors = [path.with_name(path.name.replace("out-", "out.errors-")) for path in names]
    assert [len(read(path)) for path in names] == [10, 10, 10]
    assert without_times(read(*names)) == whole[0]
    assert {(x["file"], x["line"]): x for x in read(*errors)} == whole[1]
    assert not files[1].exists()
    names[1].rename(names[0])
    with pytest.raises(ValueError, match="line 1 is of another shard"):
        qj.run_batch(llm, *files[:2], shard="0/3", resume=True)


def test_the_engine_is_kept_full_but_not_more(files):
    llm, running = FakeLLM(echo, pause=0.002), []
    submit = llm.engine.submit

    def counted(*args, **options):
        running.append(sum(not job.done for job in llm.engine.jobs) + 1)
        return submit(*args, **options)

    llm.engine.submit = counted
    qj.run_batch(llm, *files[:2], in_flight=5)
    assert max(running) == 5
    assert sorted(running)[len(running) // 2] >= 4
    llm.engine.max_rows = 3
    running.clear()
    qj.run_batch(llm, files[0], files[1].with_name("b.jsonl"))
    assert max(running) == 6


def test_a_full_queue_is_waited_for(files):
    summary = qj.run_batch(FakeLLM(echo, most=2), *files[:2])
    assert (summary.completed, summary.failed) == (30, 3)


def test_two_jobs_do_not_write_one_file(llm, files):
    with durable.lock_file(files[1]), pytest.raises(ValueError, match="in use by another process"):
        qj.run_batch(llm, *files[:2])


def test_it_runs_where_an_event_loop_runs(llm, files):
    async def notebook():
        return qj.run_batch(llm, *files[:2])

    assert asyncio.run(notebook()).completed == 30


def test_progress_is_told(files):
    told = []
    qj.run_batch(FakeLLM(echo, pause=0.02), *files[:2], in_flight=1, progress=told.append)
    assert told[0].left > told[-1].left == 0
    middle = next(x for x in told if 0 < x.left < 33)
    assert middle.eta == pytest.approx(
        middle.seconds * middle.left / (middle.completed + middle.failed)
    )
    assert re.match(r"\d+/33 lines \(\d failed\), \d+ tok/s, 0:00:0\d so far, ", str(middle))
