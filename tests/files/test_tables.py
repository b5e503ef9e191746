"""python -m pytest tests/files/test_tables.py"""

from __future__ import annotations

from pathlib import Path

import pytest

from lmm_qa.errors import ManifestError, ResultsError
from lmm_qa.files.tables import Column, read_lines, read_rows, read_table, write_rows

COLUMNS = (Column("clip", ("clip", "video")), Column("mos", ("mos",)), Column("group", ("group",), required=False))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", "\ufeffVideo, MOS \r\na.mp4,1\r\n\r\n,\r\nb.mp4,2"),
        ("t.tsv", "video\tclip\tmos\nx\ta.mp4\t1\ny\tb.mp4\t2\n"),
        ("t.jsonl", '\ufeff{"clip": "a.mp4", "mos": 1}\r\n\n{"mos": 2, "clip": "b.mp4"}'),
    ],
)
def test_columns_are_found_by_name(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_bytes(text.encode())
    rows = list(read_table(tmp_path / name, COLUMNS))
    assert [(row["clip"], float(row["mos"]), row["group"]) for _, row in rows] == [
        ("a.mp4", 1, None),
        ("b.mp4", 2, None),
    ]
    assert rows[0][0] == f"{tmp_path / name}:{1 if name == 't.jsonl' else 2}"


def test_parquet_tables_are_read_in_batches(tmp_path: Path) -> None:
    write_rows(tmp_path / "t.parquet", [{"Clip": f"{number}.mp4", "mos": number} for number in range(600)])
    rows = list(read_table(tmp_path / "t.parquet", COLUMNS))
    assert [row["mos"] for _, row in rows] == list(range(600))
    assert rows[-1][0] == f"{tmp_path / 't.parquet'}:600"


def test_all_missing_columns_are_named(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("id,score\n1,2\n")
    with pytest.raises(
        ManifestError, match=r"t.csv: no column is named clip or video; no .* mos; the columns are: id, "
    ):
        list(read_table(tmp_path / "t.csv", COLUMNS))


def test_the_class_of_errors_is_chosen_by_the_caller(tmp_path: Path) -> None:
    for read in (
        lambda: list(read_table(tmp_path / "t.csv", COLUMNS, ResultsError)),
        lambda: read_rows(tmp_path / "t.csv"),
    ):
        with pytest.raises(ResultsError, match=r"cannot read .*t.csv: No such file"):
            read()


def test_an_incomplete_last_row_is_an_error_in_a_table_of_a_user_only(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"clip": "a", "mos": 1}\n{"clip": "b')
    assert read_rows(tmp_path / "t.jsonl") == [{"clip": "a", "mos": 1}]
    with pytest.raises(ManifestError, match=r"t.jsonl:2: expected a JSON object"):
        list(read_table(tmp_path / "t.jsonl", COLUMNS))


def test_lines_have_numbers(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes("\ufeffa\r\n\r\n b ".encode())
    assert list(read_lines(tmp_path / "t.txt")) == [(f"{tmp_path / 't.txt'}:1", "a"), (f"{tmp_path / 't.txt'}:3", "b")]
