"""Files of an attacker: nothing is run, nothing is fetched, nothing escapes the page or the folder."""

import ast
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import bad_folders
import pytest
import short_runs
import yaml
from command_line import command, refused

import aimmerging

SOURCES = sorted(Path(aimmerging.__file__).parent.rglob("*.py"))
SCRIPT = "<script>alert(1)</script>"
TEXTS = (SCRIPT, "</script><img src=x onerror=alert(2)>", "{{ 7654321 * 7 }}", "javascript:alert(3)",
         '"><svg onload=alert(4)>', "&lt;b&gt;", "<!--", "]]>", "'\"`", "\u202egnp.exe", "\x1b[2J")  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_t5):
    """A run over one task whose rows are hostile texts."""
    folder = tmp_path_factory.mktemp("hostile")
    for split, count in (("train", 12), ("test", 11)):
        rows = [
            {"input": f"{split} {i} {TEXTS[i % len(TEXTS)]}", "output": TEXTS[i % len(TEXTS)]} for i in range(count)
        ]
        (folder / "alpha").mkdir(exist_ok=True)
        short_runs.write_rows(folder / "alpha" / f"{split}.jsonl", rows)
    values = short_runs.settings(tiny_t5, ("alpha",))
    values["training"]["epochs"] = 1
    values["tasks"][0]["name"] = SCRIPT.replace("/", "")
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    command("run", folder / "config.yaml", "--out", folder / "run")
    return folder / "run"


class Page(HTMLParser):
    """Tags with their attributes, and the text outside of scripts and styles."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags, self.text, self.inside = [], "", ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.inside = tag
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside not in ("script", "style"):
            self.text += data


def test_hostile_rows_and_names_are_text_in_the_report(trained):
    page = Page(trained / "report.html")
    names = [tag for tag, _ in page.tags]
    assert "img" not in names
    assert not [attributes for _, attributes in page.tags if any(key.startswith("on") for key in attributes)]
    assert "<script>alert(1)" in page.text
    assert "7654321 * 7" in page.text
    assert str(7654321 * 7) not in page.text  # a product that no count, time or digest of the page can be
    scripts = [attributes for tag, attributes in page.tags if tag == "script"]
    assert all("src" not in attributes for attributes in scripts)
    assert sum(attributes.get("type") != "application/json" for attributes in scripts) == 2  # plotly's and ours


def test_the_report_names_no_place_in_the_network(trained):
    page = Page(trained / "report.html")
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form"), tag
        for key in ("src", "href", "action", "data", "poster", "srcset"):
            assert not re.match(r"\s*([a-z]+:|//)", attributes.get(key) or "", re.IGNORECASE), (tag, attributes)
    policy = next(a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none'")
    assert "connect-src" not in policy


def test_memory_and_predictions_hold_the_texts_unchanged(trained):
    kept = short_runs.read_rows(next((trained / "stages").glob("*/memory/rows.jsonl")))
    asked = [row["reference"] for row in short_runs.read_rows(next((trained / "stages").glob("*/predictions/*.jsonl")))]
    assert {row["output"] for row in kept} <= set(TEXTS)
    assert set(asked) == set(TEXTS)


# --- models and adapters ---------------------------------------------------------------------------------------------


def start(folder: Path, base: Path, **model):
    """The configuration of a run over alpha with another base or a first adapter."""
    config = short_runs.config_file(folder, base, ("alpha",), model={"name": str(base), **model})
    return ["run", config, "--out", folder / "run"]


def test_a_pickled_adapter_is_refused_with_the_reason_and_never_unpickled(trained, tmp_path, tiny_t5):
    adapter = Path(shutil.copytree(next((trained / "stages").glob("*/adapter")), tmp_path / "adapter"))
    bad_folders.ADAPTERS["pickled weights only"](adapter)
    message = refused(*start(tmp_path, tiny_t5, adapter=str(adapter)))
    assert "loading it would run code" in message
    assert not (tmp_path / "canary").exists()
    bad_folders.Canary(tmp_path / "canary").__reduce__()[0](tmp_path / "canary", "w").close()
    assert (tmp_path / "canary").exists()  # the canary would have told


@pytest.mark.parametrize("kind", ["pickled weights only", "custom model code", "custom tokenizer code"])
def test_code_that_comes_with_a_base_is_never_run(kind, tmp_path, tiny_t5, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question on the terminal"))
    base = Path(shutil.copytree(tiny_t5, tmp_path / "base"))
    bad_folders.BASES[kind](base)
    words = start(tmp_path, base)
    if kind == "custom tokenizer code":  # transformers takes the plain tokenizer of tokenizer.json instead
        command("doctor", words[1])
    else:
        assert "never run" in refused(*words)
    assert not (tmp_path / "canary").exists()


def test_code_that_an_adapter_names_is_never_imported(trained, tmp_path, tiny_t5, monkeypatch):
    (tmp_path / "canary_code.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    adapter = Path(shutil.copytree(next((trained / "stages").glob("*/adapter")), tmp_path / "adapter"))
    named = {"auto_mapping": {"base_model_class": "X", "parent_library": "canary_code"}}
    bad_folders.change_json(adapter / "adapter_config.json", named)
    command(*start(tmp_path, tiny_t5, adapter=str(adapter)))  # PEFT writes this key too, and never reads it here
    bad_folders.change_json(
        adapter / "adapter_config.json", {"megatron_config": {"a": 1}, "megatron_core": "canary_code"}
    )
    assert "megatron_config" in refused("run", tmp_path / "config.yaml", "--out", tmp_path / "other")
    assert not (tmp_path / "canary").exists()


def test_weights_that_are_missing_are_not_made_up(tmp_path, tiny_t5):
    base = Path(shutil.copytree(tiny_t5, tmp_path / "base"))
    bad_folders.change_json(base / "config.json", {"num_layers": 3, "num_decoder_layers": 3})
    assert "do not hold" in refused(*start(tmp_path, base))


# --- paths -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../../x", "..", "/etc/passwd", "a/b", "a\\b", "\0", "\u202ex", ""])
def test_a_task_name_leads_nowhere(name, tmp_path, tiny_t5):
    config = short_runs.config_file(tmp_path, tiny_t5, ("alpha",))
    values = yaml.safe_load(config.read_text())
    values["tasks"][0]["name"] = name
    config.write_text(json.dumps(values))
    before = short_runs.files_of(tmp_path)
    refused("run", config, "--out", tmp_path / "run")
    assert short_runs.files_of(tmp_path) == before


def test_memory_behind_a_link_is_not_deleted(trained, tmp_path):
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    memory = next((run / "stages").glob("*/memory"))
    (task,) = (entry["task"] for entry in command("memory", "show", run, "--json").json)
    memory.rename(tmp_path / "elsewhere")
    memory.symlink_to(tmp_path / "elsewhere")
    before = short_runs.files_of(tmp_path / "elsewhere")
    assert "link" in refused("memory", "drop", run, "--task", task)
    assert short_runs.files_of(tmp_path / "elsewhere") == before


def test_a_page_takes_the_place_of_no_device(trained, tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe")
    assert "not a file" in refused("report", trained, "--out", tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()


# --- the code itself -------------------------------------------------------------------------------------------------

FORBIDDEN = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_MODULES = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "subprocess", "pty"}


def calls(tree: ast.AST):
    """Every call with its dotted name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(SOURCES[0].parent)))
def test_source_runs_no_text_and_unpickles_nothing(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for name, node in calls(tree):
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        assert name not in FORBIDDEN, (name, node.lineno)
        assert name not in ("os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "yaml.full_load"), node.lineno
        if name == "torch.load":
            assert ast.unparse(keywords["weights_only"]) == "True", node.lineno
        if name.endswith(".from_pretrained") and name.split(".")[0] not in ("PeftModel", "GenerationConfig"):
            # said, not left open: transformers would ask on the terminal; `**options` is looked at by the tests above
            assert "trust_remote_code" in keywords or None in keywords, (name, node.lineno)
        for keyword, value in keywords.items():
            assert (keyword, ast.unparse(value)) not in (("shell", "True"), ("trust_remote_code", "True")), node.lineno
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    assert not {name.split(".")[0] for name in imported} & FORBIDDEN_MODULES


def test_templates_switch_no_escaping_off():
    for template in (SOURCES[0].parent / "templates").glob("*.j2"):
        text = template.read_text(encoding="utf-8")
        assert "|safe" not in text.replace(" ", ""), template.name
        assert "autoescape false" not in text, template.name
