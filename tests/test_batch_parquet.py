"""Rows of Parquet files as lines of a batch."""

import json

import pytest
from batch_samples import ids, items, line, refusals, write_parquet

from qwen_jax.batch.inputs import Inputs


@pytest.mark.parametrize("form", ["text", "struct"])
def test_parquet_rows_are_lines(tmp_path, form):
    lines = [line(i) for i in range(7)]
    lines[2]["body"]["temperature"] = 0.5  # a column that the others leave null
    rows = lines if form == "struct" else [{**x, "body": json.dumps(x["body"])} for x in lines]
    found = Inputs([write_parquet(tmp_path / "in.parquet", rows, row_group_size=3)])
    assert ids(found) == [f"id-{i}" for i in range(7)]
    assert [item.request.body for item in items(found)] == [x["body"] for x in lines]
    assert found.place(4) == {"file": "in.parquet", "line": 5}
    assert list(found.find(["id-6", "id-0"])) == [6, 0]


def test_parquet_rows_may_be_wrong(tmp_path):
    rows = [
        {**line(0), "body": "{"}, {**line(1), "body": None}, {**line(2), "body": "{}"},
        {**line(2), "body": "{}"}, {**line(3), "custom_id": None, "body": "{}"},
    ]  # fmt: skip
    said = refusals(Inputs([write_parquet(tmp_path / "in.parquet", rows)]))
    assert sorted(said) == [1, 2, 4, 5]
    assert "the body is not JSON" in said[1]
    assert "body must be a JSON object" in said[2]
    assert "came before in line 3 of in.parquet" in said[4]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"custom_id": "a", "method": "POST", "url": "x"}], "the lines of a batch have"),
        ([{**line(0), "body": "{}", "more": 1}], "has the columns .* more;"),
        (None, "in.parquet"),
    ],
)
def test_a_parquet_file_of_other_columns_is_refused(tmp_path, rows, said):
    path = tmp_path / "in.parquet"
    if rows is None:
        path.write_bytes(b"no parquet")
    else:
        write_parquet(path, rows)
    with pytest.raises(ValueError, match=said):
        Inputs([path])
