"""All stages in a folder an adapter, ranks that a server takes, and answers that come as they are made."""

import json

import pytest
import short_runs
from command_line import command, refused
from short_runs import files_of

from aimmerging.commands import inference
from aimmerging.data.tasks import Row
from aimmerging.training.progress import Progress

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_t5):
    return short_runs.trained(tmp_path_factory, tiny_t5, "t5")


def test_every_stage_is_a_folder_that_peft_loads(trained, tmp_path):
    result = command("export", trained.run, "--all-stages", tmp_path / "all", "--json").json
    assert result["ranks"] == {"01-alpha": 8, "02-beta": 8}
    for name in result["ranks"]:
        written = files_of(tmp_path / "all" / name)
        assert written.pop("README.md").startswith(b"---\n")
        assert written == files_of(trained.run / "stages" / name / "adapter")
        settings = json.loads((tmp_path / "all" / name / "adapter_config.json").read_text())
        base = json.loads((trained.run / "manifest.json").read_text())["base_model"]["name"]
        assert (settings["peft_type"], settings["base_model_name_or_path"]) == ("LORA", base)
    assert "is not empty" in refused("export", trained.run, "--all-stages", tmp_path / "all")


def test_a_rank_that_the_server_does_not_take_is_named_and_nothing_is_written(trained, tmp_path):
    for words in (["--all-stages", tmp_path / "all"], ["--to", tmp_path / "one"]):
        said = refused("export", trained.run, *words, "--max-lora-rank", 4)
        assert "02-beta 8" in said
        assert "of at least 8" in said
    assert list(tmp_path.iterdir()) == []
    command("export", trained.run, "--all-stages", tmp_path / "all", "--max-lora-rank", 8)


def test_one_place_is_named(trained, tmp_path):
    assert "either --to DIR or --all-stages DIR" in refused("export", trained.run)
    words = ("--all-stages", tmp_path / "all", "--merged")
    assert "leave --merged, --dtype and --stage out" in refused("export", trained.run, *words)


def test_answers_come_a_batch_at_a_time(trained, tmp_path, monkeypatch):
    run = trained.copy(tmp_path)
    path = run / "config.yaml"
    text = path.read_text().replace("evaluation:\n  split: test\n  batch_size: 64", "evaluation:\n  batch_size: 2")
    path.write_text(text)
    made = []
    inner = inference.answers

    def counted(model, codec, rows, *rest):
        made.append(len(rows))
        return inner(model, codec, rows, *rest)

    monkeypatch.setattr(inference, "answers", counted)
    rows = [Row(str(place), f"beta {place}?", "") for place in range(5)]
    answers = inference.answer(run, rows, Progress())
    assert next(answers)["id"] == "0"
    assert made == [2]
    assert [record["id"] for record in answers] == ["1", "2", "3", "4"]
    assert made == [2, 2, 1]
