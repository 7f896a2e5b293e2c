"""The model card that every export carries, and the upload to the hub, whose own functions are replaced here."""

import json
from pathlib import Path

import huggingface_hub
import pytest
import short_runs
import yaml
from command_line import command, refused
from huggingface_hub import ModelCard
from short_runs import read_rows

from aimmerging.commands.model_card import Kind, model_card
from aimmerging.store import records
from aimmerging.store.records import Gate
from aimmerging.store.run_directory import RunDirectory

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_t5):
    return short_runs.trained(tmp_path_factory, tiny_t5, "t5")


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("card") / "adapter"
    command("export", trained.run, "--to", folder, "--license", "apache-2.0")
    return folder


def of_stage(run, place, **changes):
    opened = RunDirectory.open(run)
    if changes:
        stage = opened.stages[place - 1]
        records.write(stage.path / "stage.json", stage.record.model_copy(update=changes))
        (stage.path / "COMMITTED").write_text("1\n")
        opened = RunDirectory.open(run)
    kind = Kind(merged=False, dtype="float32", encoder_decoder=True)
    return model_card(opened, opened.stages[place - 1], kind)


def test_the_card_says_what_was_learned_how_and_how_well(exported, trained):
    card = ModelCard.load(exported / "README.md")
    assert card.data.to_dict() == {
        "library_name": "peft",
        "license": "apache-2.0",
        "tags": ["aimmerging", "continual-learning", "lora", "adapter"],
    }
    text = card.text
    assert "- Method: aim, preset default" in text
    assert "- Stage: 2, beta, no gate judged it" in text
    assert text.index("| 1 | alpha | exact\\_match | 16 |") < text.index("| 2 | beta | exact\\_match | 16 |")
    for name, row in zip(trained.scores["tasks"], trained.scores["matrix"], strict=True):
        assert f"| {name} | " + " | ".join("" if value is None else f"{value:.1f}" for value in row) + " |" in text
    assert f"- Overall performance: {trained.scores['summary']['op']:.1f} " in text
    assert "Policy coverage, at most 25.00% of a task's training rows, each with its 32 largest logits" in text
    assert "| alpha | 4 | kept |" in text
    assert "apache-2.0, as stated by who exported it." in text


def test_the_configuration_is_the_runs_and_no_place_of_the_machine_is_in_the_card(exported, trained):
    text = (exported / "README.md").read_text()
    found = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    own = yaml.safe_load((trained.run / "config.yaml").read_text())
    assert found.pop("model") == own.pop("model") | {"name": Path(own_name(trained)).name}
    assert found == own
    assert str(Path(own_name(trained)).parent) not in text
    assert str(trained.folder) not in text


def own_name(trained):
    return yaml.safe_load((trained.run / "config.yaml").read_text())["model"]["name"]


def test_an_earlier_stage_speaks_of_what_it_had_learned(trained):
    text = of_stage(trained.run, 1)
    assert "beta" not in text.split("## Exact configuration")[0]
    assert f"| alpha | {trained.scores['matrix'][0][0]:.1f} | {trained.scores['matrix'][0][1]:.1f} |" in text
    assert "license" not in ModelCard(text).data.to_dict()
    assert "Not stated." in text


def test_gate_changed_values_general_ability_and_dropped_memory_are_said(trained, tmp_path):
    run = trained.copy(tmp_path)
    command("memory", "drop", run, "--task", "alpha")
    gate = Gate(promoted=False, policy={}, tasks=())
    text = of_stage(run, 2, gate=gate, changed={"training.epochs": 3}, general={"world|x": 41.5})
    assert "beta, did not pass its gate" in text
    assert "beta was learned with training.epochs=3." in text
    assert "| world\\|x |  |  | 41.5 |" in text
    assert "| alpha | 0 | dropped on request |" in text


def test_a_base_on_the_hub_is_named_for_the_hub(trained, tmp_path):
    run = trained.copy(tmp_path)
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace(own_name(trained), "org/base"))
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["base_model"] |= {"name": "org/base", "sha256": None, "revision": "abc123"}
    (run / "manifest.json").write_text(json.dumps(manifest))
    card = ModelCard(of_stage(run, 2))
    assert card.data.base_model == "org/base"
    assert "org/base (abc123)" in card.text


def test_every_kind_of_export_has_its_card(trained, tmp_path):
    command("export", trained.run, "--to", tmp_path / "merged", "--merged", "--dtype", "bfloat16")
    card = ModelCard.load(tmp_path / "merged/README.md")
    assert card.data.library_name == "transformers"
    assert "The full model in bfloat16" in card.text
    command("export", trained.run, "--all-stages", tmp_path / "all", "--license", "mit")
    cards = [ModelCard.load(tmp_path / "all" / name / "README.md") for name in ("01-alpha", "02-beta")]
    assert [card.data.license for card in cards] == ["mit", "mit"]
    assert ["after 1 task" in cards[0].text, "after 2 tasks" in cards[1].text] == [True, True]


@pytest.mark.parametrize("merged", [[], ["--merged"]])
def test_no_row_of_memory_or_tests_is_in_any_file(trained, tmp_path, merged):
    command("export", trained.run, "--to", tmp_path / "out", *merged)
    kept = [row for path in trained.run.glob("stages/*/*/*.jsonl") for row in read_rows(path)]
    inputs = {row["input"] for row in kept if "input" in row}
    assert len(inputs) > 8
    for path in (tmp_path / "out").rglob("*"):
        content = path.read_bytes()
        assert not [text for text in inputs if text.encode() in content], path


# --- the hub ---------------------------------------------------------------------------------------------------------


class Hub:
    """Takes the place of the hub's own functions; keeps what is asked of them."""

    def __init__(self, monkeypatch, *, token="hf_x", offline=False, refuses=None):
        self.asked, self.refuses = [], refuses
        monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
        monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: offline)
        monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", self.create_repo)
        monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", self.upload_folder)

    def create_repo(self, repo_id, **options):
        self.asked.append(("create", repo_id, options))
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(self, **options):
        if self.refuses is not None:
            raise self.refuses
        files = sorted(path.name for path in Path(options["folder_path"]).rglob("*"))
        self.asked.append(("upload", options["repo_id"], files))


def test_the_upload_is_what_was_exported(trained, tmp_path, monkeypatch):
    hub = Hub(monkeypatch)
    words = ("--push-to-hub", "org/name", "--private")
    said = command("export", trained.run, "--to", tmp_path / "out", *words, "--json")
    result = said.json
    assert "who loads the adapter has to give its own base" in said.err.replace("\n", " ")
    assert result["hub"] == "https://huggingface.co/org/name"
    files = ["README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert hub.asked == [
        ("create", "org/name", {"private": True, "exist_ok": True}),
        ("upload", "org/name", files),
    ]


@pytest.mark.parametrize(
    ("hub", "repo", "said"),
    [
        ({"token": None}, "org/name", "needs a token that may write: give `hf auth login` once, or set HF_TOKEN"),
        ({"offline": True}, "org/name", "HF_HUB_OFFLINE is set"),
        ({}, "a b/c", "Give the name as OWNER/NAME"),
        ({}, "a/b/c", "Give the name as OWNER/NAME"),
    ],
)
def test_what_cannot_be_uploaded_is_refused_before_anything_is_written(trained, tmp_path, monkeypatch, hub, repo, said):
    found = Hub(monkeypatch, **hub)
    assert said in refused("export", trained.run, "--to", tmp_path / "out", "--push-to-hub", repo).replace("\n", " ")
    assert list(tmp_path.iterdir()) == found.asked == []


def test_an_upload_that_fails_leaves_the_export_and_says_how_to_go_on(trained, tmp_path, monkeypatch):
    Hub(monkeypatch, refuses=ConnectionError("403 Forbidden: you may not write to org/name"))
    said = refused("export", trained.run, "--to", tmp_path / "out", "--push-to-hub", "org/name")
    assert "403 Forbidden" in said
    assert f"hf upload org/name {tmp_path / 'out'}" in said.replace("\n", " ")
    assert (tmp_path / "out/adapter_model.safetensors").exists()


@pytest.mark.parametrize("words", [["--all-stages", "all", "--push-to-hub", "org/name"], ["--to", "x", "--private"]])
def test_options_of_the_upload_go_together(trained, words):
    assert "--push-to-hub uploads what --to DIR wrote" in refused("export", trained.run, *words)
