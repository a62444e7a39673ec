"""Measured tile sizes: found by device and key, and never by anything near."""

import json

import pytest

from pallas_kernels import tuning
from pallas_kernels.device import Device

V6E = Device("tpu", "TPU v6 lite")


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A directory in place of the package, with one measured entry."""
    entry = {"tiles": {"rows": 16}, "measured": {"us": 41.2, "command": "a command"}}
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "f.json").write_text(json.dumps({V6E.kind: {"8x8": entry}}))
    monkeypatch.setattr(tuning.resources, "files", lambda package: tmp_path)
    tuning._table.cache_clear()
    yield
    tuning._table.cache_clear()


def test_an_entry_is_found_by_device_and_key(table):
    assert tuning.lookup("f", V6E, "8x8") == {"rows": 16}
    assert tuning.lookup("f", V6E, "8x16") is None
    assert tuning.lookup("f", Device("tpu", "TPU v5 lite"), "8x8") is None
    assert tuning.lookup("g", V6E, "8x8") is None, "an operation that nobody measured"


def test_sizes_of_one_bucket_round_to_its_power_of_two():
    assert [tuning.bucket(n) for n in (0, 1, 2, 3, 4, 5, 100)] == [1, 1, 2, 4, 4, 8, 128]
