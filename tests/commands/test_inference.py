"""eval, predict and export of finished runs, T5 and Llama."""

import json
import shutil

import pytest
import short_runs
import torch
from command_line import command, refused
from short_runs import files_of, read_rows, task_files, write_rows

from aimmerging.run import generation

pytestmark = pytest.mark.slow
KINDS = ("t5", "llama")


@pytest.fixture(scope="session", params=KINDS)
def trained(request, tmp_path_factory):
    return short_runs.trained(tmp_path_factory, request.getfixturevalue(f"tiny_{request.param}"), request.param)


# --- eval ------------------------------------------------------------------------------------------------------------


def test_eval_gives_the_scores_of_the_last_column(trained):
    before = files_of(trained.run)
    result = command("eval", trained.run, "--json").json
    last = {name: row[-1] for name, row in zip(trained.scores["tasks"], trained.scores["matrix"], strict=True)}
    assert result == {"after": "beta", "scores": last, "rows": {"alpha": 4, "beta": 4}, "cut": trained.scores["cut"]}
    assert any(last.values())
    assert files_of(trained.run) == before


def test_eval_on_rows_that_were_learned_says_so(tmp_path_factory, tiny_t5, tmp_path):
    run = short_runs.trained(tmp_path_factory, tiny_t5, "t5").run
    kept = read_rows(run / "stages/01-alpha/memory/rows.jsonl")
    rows = [{"input": row["input"], "output": row["output"]} for row in kept]
    told = command("eval", run, "--task", write_rows(tmp_path / "mine.jsonl", rows)).err
    assert f"{len(kept)} of {len(kept)} rows stand again in the training rows of task 'alpha'" in told
    assert "stand again" not in command("eval", run, "--task", run / "stages/01-alpha/test/01.jsonl").err


def test_eval_of_another_task(trained, tmp_path):
    """A folder's test rows, or all rows of a file; the letter of the learned task is right for three of four."""
    last = json.loads(trained.result.out)["matrix"]
    best = max(("alpha", "beta"), key=lambda name: last[("alpha", "beta").index(name)][-1])
    folder = task_files(tmp_path, best)
    for path in (folder, folder / "test.jsonl"):
        result = command("eval", trained.run, "--task", path, "--json").json
        assert (result["rows"], result["scores"]) == ({best: 4}, {best: 75.0})
    named = command(
        "eval", trained.run, "--task", folder / "train.jsonl", "--name", "other", "--metric", "token_f1", "--json"
    )
    assert named.json["rows"] == {"other": 16}
    assert "did you mean 'rouge_l'?" in refused(
        "eval", trained.run, "--task", folder / "test.jsonl", "--metric", "rougel"
    )
    assert "nowhere" in refused("eval", trained.run, "--task", tmp_path / "nowhere")


def test_eval_without_a_learned_task(trained, tmp_path):
    (tmp_path / "run").mkdir()
    shutil.copy(trained.run / "config.yaml", tmp_path / "run")
    for words in (["eval"], ["predict"], ["export"]):
        extra = {"eval": [], "predict": ["x"], "export": ["--to", tmp_path / "new"]}[words[0]]
        assert "has no learned task yet" in refused(*words, tmp_path / "run", *extra)


# --- predict ---------------------------------------------------------------------------------------------------------


def test_predict_answers_as_the_evaluation_did(trained):
    last = trained.run / "stages/02-beta"
    kept = read_rows(last / "predictions/02-beta.jsonl")
    lines = command("predict", trained.run, "--input", last / "test/01.jsonl").out.splitlines()
    answers = [json.loads(line) for line in lines]
    assert [(answer["id"], answer["prediction"]) for answer in answers] == [
        (row["id"], row["prediction"]) for row in kept
    ]
    text = command("predict", trained.run, answers[0]["input"])
    assert text.out == answers[0]["prediction"] + "\n"
    record = command("predict", trained.run, answers[0]["input"], "--json").json
    assert record == {"id": "text", "input": answers[0]["input"], "prediction": answers[0]["prediction"]}


def test_predict_says_which_answers_were_cut(trained, monkeypatch):
    """Where one token is allowed, the answers of one letter are there and their end is not."""
    question, whole = "beta 1?", generation.generation_config
    assert "cut" not in command("predict", trained.run, question).err
    monkeypatch.setattr(generation, "generation_config", lambda base, codec, limit=None: whole(base, codec, 1))
    assert "1 of 1 answers were cut at 4 tokens" in " ".join(command("predict", trained.run, question).err.split())


def test_run_and_eval_say_how_many_answers_were_cut(tmp_path, tiny_t5, monkeypatch):
    whole, config = generation.generation_config, short_runs.config_file(tmp_path, tiny_t5, method="sequential")
    monkeypatch.setattr(generation, "generation_config", lambda base, codec, limit=None: whole(base, codec, 1))
    run, said = tmp_path / "run", "4 of 4 answers to alpha, 4 of 4 answers to beta were cut at 4 tokens"
    assert said in " ".join(command("run", config, "--out", run).err.split())
    last, counts = json.loads((run / "stages/02-beta/stage.json").read_text()), {"alpha": 4, "beta": 4}
    assert last["cut"] == json.loads((run / "scores.json").read_text())["cut"] == counts
    assert said in last["warnings"][-1]
    assert said in (run / "report.html").read_text()
    assert all(row["cut"] for row in read_rows(run / "stages/02-beta/predictions/01-alpha.jsonl"))
    scored = command("eval", run, "--json")
    assert scored.json["cut"] == counts
    assert said in " ".join(scored.err.split())


def test_only_answers_that_were_cut_are_counted(trained):
    for place, task in ((1, "alpha"), (2, "beta")):
        rows = read_rows(trained.run / f"stages/02-beta/predictions/{place:02d}-{task}.jsonl")
        cut = [row for row in rows if "cut" in row]
        assert len(cut) == trained.scores["cut"].get(task, 0)
        assert all(row["score"] == 0 for row in cut), "the right ones end"
    assert "beta" not in trained.scores["cut"]


def test_predict_needs_no_answers_in_the_file(trained, tmp_path):
    path = write_rows(tmp_path / "in.jsonl", [{"id": "one", "input": "beta 1?"}, {"input": "β"}])
    answers = [json.loads(line) for line in command("predict", trained.run, "--input", path).out.splitlines()]
    assert [answer["id"] for answer in answers] == ["one", "in-1"]
    assert answers[1]["input"] == "β"


def test_predict_on_chats_needs_a_template(trained, tmp_path):
    path = write_rows(tmp_path / "in.jsonl", [{"messages": [{"role": "user", "content": "beta 1?"}]}])
    assert "no chat template" in refused("predict", trained.run, "--input", path)
    run, base = trained.copy(tmp_path), tmp_path / "base"
    config = (run / "config.yaml").read_text()
    [model] = [line.split(": ", 1)[1] for line in config.splitlines() if line.startswith("  name: /")]
    shutil.copytree(model, base)
    (base / "chat_template.jinja").write_text("{% for turn in messages %}{{ turn.content }}{% endfor %}")
    (run / "config.yaml").write_text(config.replace(model, str(base)))
    # the run was not trained with that template: its answers would be to other prompts than it has learned
    assert "chat template of the base model" in refused("predict", run, "--input", path)


def test_predict_wants_one_of_text_and_file(trained, tmp_path):
    for words in ([], ["text", "--input", tmp_path / "in.jsonl"]):
        assert "give either a TEXT or --input FILE" in refused("predict", trained.run, *words)
    assert "none.jsonl" in refused("predict", trained.run, "--input", tmp_path / "none.jsonl")
    assert "not a run directory" in refused("predict", tmp_path, "text")


def test_damaged_adapter_is_named(trained, tmp_path):
    run = trained.copy(tmp_path)
    path = run / "stages/02-beta/adapter/adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    assert f"{path} does not match its hash" in refused("predict", run, "x")
    whole = (trained.run / "stages/02-beta/adapter/adapter_model.safetensors").read_bytes()
    path.write_bytes(whole[:-100] + bytes(100))
    assert f"{path} does not match its hash" in refused("predict", run, "x")
    path.unlink()
    assert f"{path} was committed and is gone" in refused("predict", run, "x")


# --- export ----------------------------------------------------------------------------------------------------------


def reloaded(trained, folder, *, merged):
    """The export as a user loads it, with nothing of ours."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    kind = AutoModelForSeq2SeqLM if "t5" in trained.folder.name else AutoModelForCausalLM
    base = json.loads((trained.run / "manifest.json").read_text())["base_model"]["name"]
    model = kind.from_pretrained(folder if merged else base)
    return (model if merged else PeftModel.from_pretrained(model, folder)).eval(), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("merged", [False, True])
def test_export_answers_as_the_run_does(trained, tmp_path, merged):
    to = tmp_path / "deep/export"
    result = command("export", trained.run, "--to", to, "--json", *["--merged"] * merged).json
    assert result["kind"] == ("merged model" if merged else "adapter")
    assert result["logit_gap"]["rows"] == 8
    assert result["logit_gap"]["relative"] < 1e-4
    assert not any("bin" in path.suffix for path in to.iterdir())
    assert [path.name for path in to.parent.iterdir()] == ["export"]
    model, tokenizer = reloaded(trained, to, merged=merged)
    for row in read_rows(trained.run / "stages/02-beta/predictions/02-beta.jsonl"):
        question = next(
            test["input"] for test in read_rows(trained.run / "stages/02-beta/test/01.jsonl") if test["id"] == row["id"]
        )
        ids = tokenizer(question, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            out = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)[0]
        fresh = out if "t5" in trained.folder.name else out[ids.shape[1] :]
        assert tokenizer.decode(fresh, skip_special_tokens=True).strip() == row["prediction"]


def test_export_prints_the_gap(trained, tmp_path):
    result = command("export", trained.run, "--to", tmp_path / "new")
    assert "largest logit gap" in result.out
    assert str(tmp_path / "new") in result.out


def test_export_takes_the_place_of_nothing(trained, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("kept")
    (tmp_path / "file").write_text("kept")
    for name in ("full", "file"):
        assert "exists and is not empty; give a new folder" in refused("export", trained.run, "--to", tmp_path / name)
    assert "cannot be written" in refused("export", trained.run, "--to", tmp_path / "file/new")
    assert files_of(tmp_path) == {"full/file": b"kept", "file": b"kept"}


def test_export_into_the_empty_folder_one_stands_in(trained, tmp_path, monkeypatch):
    (tmp_path / "new").mkdir()
    (tmp_path / ".new.tmp").mkdir()
    monkeypatch.chdir(tmp_path / "new")
    command("export", trained.run, "--to", ".")
    assert (tmp_path / "new/adapter_model.safetensors").exists()
    assert not (tmp_path / ".new.tmp").exists()


@pytest.mark.parametrize("wrong", [1.0, float("nan")])
def test_export_that_answers_otherwise_is_not_kept(trained, tmp_path, monkeypatch, wrong):
    from aimmerging.commands import export

    inner = export._reload

    def spoilt(*args, **options):
        model = inner(*args, **options)
        next(value for name, value in model.named_parameters() if "lora_B" in name).data += wrong
        return model

    monkeypatch.setattr(export, "_reload", spoilt)
    assert "nothing was kept" in refused("export", trained.run, "--to", tmp_path / "new")
    assert list(tmp_path.iterdir()) == []
