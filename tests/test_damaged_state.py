"""State on the disk that something else has damaged: an error names the file and what to do, and
nothing is lost."""

import json

import pytest
from batch_samples import contents, echo, write_batch
from fake_llm import FakeLLM
from serving import settings

import qwen_jax as qj
from qwen_jax.server.app import make_app
from qwen_jax.server.batches import BatchStore
from qwen_jax.server.files import FileStore

DAMAGES = [
    (b"", "Expecting value"),
    (b'{"created": 17, "inp', "Unterminated string"),
    (b"[1, 2]", "it lacks an object"),
    (b"{}", "it lacks created"),
]


def tree(folder):
    """All that is in a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("data", "why"), DAMAGES)
def test_the_manifest_of_a_batch(tmp_path, data, why):
    files = write_batch(tmp_path)
    qj.run_batch(FakeLLM(echo), *files[:2])
    whole = contents(*files[1:])
    manifest = tmp_path / "out.jsonl.manifest.json"
    good = manifest.read_bytes()
    manifest.write_bytes(data)
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=f"{manifest} is damaged .{why}.*choose another output"):
        qj.run_batch(FakeLLM(echo), *files[:2], resume=True)
    assert tree(tmp_path) == before
    manifest.write_bytes(good)
    assert qj.run_batch(FakeLLM(echo), *files[:2], resume=True).resumed == 33
    assert contents(*files[1:]) == whole


def test_a_batch_of_the_server(tmp_path):
    store = BatchStore(tmp_path / "batches")
    kept, lost = (
        store.create(
            input_file_id="file-x", endpoint="/v1/completions", window="24h", seconds=9,
            metadata=None,
        )
        for _ in range(2)
    )  # fmt: skip
    for batch in (kept, lost):
        store.move(batch, "failed")
        store.results(batch)[0].write_text("{}\n")
    path = tmp_path / "batches" / f"{lost['id']}.json"
    good = path.read_text()
    path.write_text(good[:50])
    before = tree(tmp_path / "batches")
    with pytest.raises(ValueError, match=rf"{path} is damaged \(.*move it away: there is no such"):
        make_app(FakeLLM(), settings(state=tmp_path))
    path.write_text(json.dumps({"id": lost["id"]}))
    with pytest.raises(ValueError, match=rf"{path} is damaged \(it lacks created_at, input_file"):
        make_app(FakeLLM(), settings(state=tmp_path))
    path.rename(tmp_path / "away")
    assert [batch["id"] for batch in BatchStore(tmp_path / "batches").newest_first()] == [
        kept["id"]
    ]
    (tmp_path / "away").write_text(good)
    (tmp_path / "away").rename(path)
    assert len(BatchStore(tmp_path / "batches").newest_first()) == 2
    before[path] = good.encode()
    assert tree(tmp_path / "batches") == before


def test_a_file_of_the_server(tmp_path):
    store = FileStore(tmp_path)
    found = store.add([b"content"], filename="a.jsonl", purpose="batch")
    path = tmp_path / f"{found['id']}.json"
    good = path.read_bytes()
    path.write_bytes(good[:-1])
    with pytest.raises(ValueError, match=f"{path} is damaged .*together with {found['id']}, which"):
        FileStore(tmp_path)
    assert (tmp_path / found["id"]).read_bytes() == b"content"
    path.write_bytes(good)
    assert FileStore(tmp_path).newest_first() == [found]
