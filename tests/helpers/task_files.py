"""Rows and files for the tests of loading."""

import csv
import json
from pathlib import Path

import pytest

from aimmerging.data.loading import load_rows
from aimmerging.errors import DataError


def plain(count, start=0, **extra):
    return [{"input": f"question {i}", "output": f"answer {i % 3}"} | extra for i in range(start, start + count)]


def chat(count, start=0):
    return [
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": f"question {i}"},
                {"role": "assistant", "content": f"answer {i}"},
            ]
        }
        for i in range(start, start + count)
    ]


def write(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def folder(path: Path, train=None, test=None, ending=".jsonl") -> Path:
    write(path / f"train{ending}", train or plain(10))
    write(path / f"test{ending}", test or plain(3, start=100))
    return path


def problems_of(call) -> list[str]:
    with pytest.raises(DataError) as caught:
        call()
    return list(caught.value.problems)


def file_problems(tmp_path: Path, name: str, content: str | bytes) -> list[str]:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    found = problems_of(lambda: load_rows(path))
    assert all(problem.startswith(str(path)) for problem in found)
    return [problem.removeprefix(str(path)) for problem in found]
