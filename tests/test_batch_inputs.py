"""The lines of a batch: files of all kinds, odd lines, duplicates, shards, and memory."""

import gzip
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from batch_samples import ids, items, line, refusals, write, write_parquet

from qwen_jax.batch import files, inputs, jsonl
from qwen_jax.batch.inputs import Inputs
from qwen_jax.batch.shard import Shard
from qwen_jax.openai.errors import ApiError

WHOLE = Shard()


# ---- JSON Lines ----------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_lines_are_found_however_they_end(tmp_path, end, last, mark):
    raw = [json.dumps(line(i)).encode() for i in range(3)]
    data = mark + end.join([raw[0], b"", b"  \t", raw[1], raw[2]]) + (end if last else b"")
    path = tmp_path / "in.jsonl"
    path.write_bytes(data)
    found = Inputs([path])
    assert ids(found) == ["id-0", "id-1", "id-2"]
    assert [found.place(item.k)["line"] for item in items(found)] == [1, 4, 5]
    assert found.count(WHOLE) == 3
    assert [item.request.body for item in items(found)] == [line(i)["body"] for i in range(3)]


def test_a_line_may_be_of_any_form(tmp_path):
    odd = {**line("a"), "custom_id": 'q"\\ü\n'}
    turned = dict(reversed(line("b").items()))
    nested = line("c")
    nested["body"]["custom_id"] = "inner"
    spaced = json.dumps(line("d"), indent=1).replace("\n", " ").encode()
    found = Inputs([write(tmp_path / "in.jsonl", [odd, turned, nested, spaced])])
    assert ids(found) == ['q"\\ü\n', "id-b", "id-c", "id-d"]
    assert list(found.find(['q"\\ü\n', "id-d", "id-b"])) == [0, 3, 1]
    with pytest.raises(KeyError, match="inner"):
        list(found.find(["inner"]))


def test_what_is_wrong_with_a_line_is_its_own_matter(tmp_path):
    lines = [
        line(0), b"nonsense", b'{"custom_id": "x', b"[]", {**line(1), "custom_id": 5},
        line(2, url="/v1/embeddings"), line(3, method="GET"), line(4, extra=1),
        b'{"custom_id": "\xff", "method": "POST"}', line(5),
        b'{"custom_id":"id-6","\\u0063ustom_id":"id-0","method":"POST","url":"/v1/completions",'
        b'"body":{}}',
    ]  # fmt: skip
    found = Inputs([write(tmp_path / "in.jsonl", lines)])
    said = refusals(found)
    assert sorted(said) == [2, 3, 4, 5, 6, 7, 8, 9, 11]
    assert "not JSON" in said[2]
    assert "not JSON" in said[3]
    assert "not a JSON object" in said[4]
    assert "custom_id" in said[5]
    assert "url must be" in said[6]
    assert "method" in said[7]
    assert "unknown field 'extra'" in said[8]
    assert "not JSON" in said[9]
    assert "custom_id is there twice" in said[11]
    assert ids(found)[5] == "id-2"  # it has one, though it is refused


def test_an_id_that_came_before_is_refused_with_its_place(tmp_path):
    lines = [line(0), line(1), line(0), {**line(2), "method": "GET"}, line(2), line(0), line(2)]
    paths = [write(tmp_path / "a.jsonl", lines), write(tmp_path / "b.jsonl", [line(9), line(1)])]
    found = Inputs(paths)
    wrong = [item for item in items(found) if isinstance(item.request, ApiError)]
    said = {item.k: item.request.message for item in wrong}
    assert sorted(said) == [2, 3, 5, 6, 8]
    assert "'id-0' came before in line 1 of a.jsonl" in said[2]
    assert "'id-0' came before in line 1 of a.jsonl" in said[5]
    assert "POST" in said[3]  # it is no request, so the next one with its id is
    assert "in line 5 of a.jsonl" in said[6]
    assert "in line 2 of a.jsonl" in said[8]
    assert list(found.find(["id-0", "id-1", "id-2", "id-9"])) == [0, 1, 4, 7]


def test_ids_with_one_hash_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "_hash", lambda id: 0 if id is None else 7 if id else 1)
    found = Inputs([write(tmp_path / "in.jsonl", [line(0), line(1), line(0), b"", line(2)])])
    assert list(refusals(found)) == [3]
    assert list(found.find(["id-2", "id-0", "id-1"])) == [4, 0, 1]
    with pytest.raises(KeyError, match="id-3"):
        list(found.find(["id-3"]))


def test_a_line_may_be_long_but_not_endless(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "MAX_LINE", 5_000_000)
    monkeypatch.setattr(jsonl, "_PIECE", 1 << 16)
    long, endless = line(0), line(1)
    long["body"]["messages"][0]["content"] = "x" * 4_900_000
    endless["body"]["messages"][0]["content"] = "x" * 5_000_000
    late = dict(reversed({**endless, "custom_id": "id-2"}.items()))
    found = Inputs([write(tmp_path / "in.jsonl", [long, endless, late, line(3)])])
    assert sorted(refusals(found)) == [2, 3]
    assert "exceeds 5,000,000" in refusals(found)[2]
    assert items(found)[0].request.body == long["body"]
    assert items(found)[3].request.custom_id == "id-3"


def test_a_packed_file_is_as_its_content(tmp_path):
    plain = write(tmp_path / "in.jsonl", [line(0), b"", b"nonsense", line(1)])
    packed = tmp_path / "in.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    found = Inputs([packed])
    assert ids(found) == ["id-0", None, "id-1"]
    assert found.place(3) == {"file": "in.jsonl.gz", "line": 4}


# ---- several files, shards -----------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "b.jsonl", [line(2), line(3)])
    write(tmp_path / "a.jsonl", [line(0), line(1)])
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "deep").mkdir()
    write_parquet(tmp_path / "deep" / "c.parquet", [line(4)])
    return tmp_path


def test_files_directories_and_patterns(folder):
    a, b, c = (folder / name for name in ("a.jsonl", "b.jsonl", "deep/c.parquet"))
    assert files.find_files([folder]) == [a, b]
    assert files.find_files([b, folder, a]) == [b, a]
    assert files.find_files([f"{folder}/**/*.[jp]*"]) == [a, b, c]
    found = Inputs([folder, c])
    assert found.files == ["a.jsonl", "b.jsonl", "deep/c.parquet"]
    assert ids(found) == [f"id-{i}" for i in range(5)]
    assert [found.at(**found.place(k)) for k in range(5)] == list(range(5))
    with pytest.raises(KeyError):
        found.at("a.jsonl", 3)
    with pytest.raises(KeyError):
        found.at("x.jsonl", 1)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("none.jsonl", "none.jsonl: no such file of lines"),
        ("notes.txt", "notes.txt: no such file of lines"),
        ("n*", "notes.txt: no such file"),
        ("x*.jsonl", "no such file"),
        ("empty", "no such file"),
    ],
)
def test_what_names_no_lines_is_refused(folder, given, said):
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match=said):
        files.find_files([folder / given])


def test_an_output_is_not_read(folder):
    with pytest.raises(ValueError, match="is among the files"):
        files.find_files([folder / "a.jsonl"], but_not=[folder / "a.jsonl"])
    with pytest.raises(ValueError, match="the next time"):
        files.find_files([folder], but_not=[folder / "new.jsonl"])
    assert files.find_files([folder / "a.jsonl"], but_not=[folder / "new.jsonl"])


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n"])
def test_a_file_without_a_line_is_refused(tmp_path, content):
    path = tmp_path / "in.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="there is no line in"):
        Inputs([path])


@pytest.mark.parametrize("count", [1, 2, 3, 7, 40])
def test_shards_have_each_line_once(tmp_path, count):
    lines = [b"" if i % 5 == 3 else line(i) for i in range(30)]
    found = Inputs([write(tmp_path / "in.jsonl", lines)])
    shards = [Shard(i, count) for i in range(count)]
    each = [ids(found, shard) for shard in shards]
    assert sorted(x for part in each for x in part) == sorted(ids(found))
    assert [len(part) for part in each] == [found.count(shard) for shard in shards]
    assert sum(found.count(shard.split(i, 2)) for shard in shards for i in (0, 1)) == 24


def test_a_shard_of_a_shard():
    whole = range(40)
    for i in range(3):
        inner = [Shard(1, 4).split(i, 3) for i in range(3)]
        assert sorted(k for s in inner for k in whole[s.index :: s.count]) == list(whole[1::4])
        assert list(whole[1::4][i::3]) == list(whole[inner[i].index :: inner[i].count])


def test_shards_are_named():
    assert Shard.parse("2/4") == Shard(2, 4)
    path = pathlib.Path("x/out.jsonl")
    assert Shard(0, 1).path(path) == path
    assert Shard(2, 4).path(path) == pathlib.Path("x/out-00002-of-00004.jsonl")
    for text in ("4/4", "1", "-1/4", "1/0", "a/b", ""):
        with pytest.raises(ValueError, match=r"shard .*(/|is not I/N)"):
            Shard.parse(text)


def test_done_lines_are_not_read(tmp_path, monkeypatch):
    found = Inputs([write(tmp_path / "in.jsonl", [line(i) for i in range(10)])])
    read = []
    parse = found._parse
    monkeypatch.setattr(found, "_parse", lambda k: (read.append(k), parse(k))[1])
    done = np.isin(np.arange(10), [0, 1, 2, 5, 8])
    assert ids(found, Shard(1, 2), done) == ["id-3", "id-7", "id-9"]
    assert read == [3, 7, 9]


# ---- size ----------------------------------------------------------------------------------------

PROGRAM = """
import itertools, pathlib, sys
import grain, numpy as np
from qwen_jax.batch.inputs import Inputs
from qwen_jax.batch.shard import Shard

def anonymous():  # of what is mapped from a file the system takes back what it needs
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith("RssAnon"))

before = anonymous()
found = Inputs([sys.argv[1]])
done = np.ones(len(found), bool)
done[-1000:] = False
assert len(list(found.find(f"id-{i}" for i in range(0, len(found), 100)))) == len(found) // 100
left = sum(1 for _ in found.items(Shard(), done))
print(left, len(found), anonymous() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_many_lines_take_little_memory(tmp_path):
    count = 200_000
    tail = json.dumps(line(0))[len('{"custom_id": "id-0"') :]
    with open(tmp_path / "in.jsonl", "w") as file:
        file.writelines(f'{{"custom_id": "id-{i}"{tail}\n' for i in range(count))
    said = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "in.jsonl")],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    left, lines, kib = map(int, said.split())
    print(f"{lines:,} lines of {(tmp_path / 'in.jsonl').stat().st_size:,} bytes: {kib:,} KiB more")
    assert (left, lines) == (1000, count)
    assert kib < 24 * 1024  # the file has 29 MB, its lines as Python objects 200
