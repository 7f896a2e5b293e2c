"""The documents say what the code does."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import aimmerging

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src" / "aimmerging").rglob("*.py"))
CORE = ("signals", "controller", "fusion", "memory", "metrics")


def test_configuration_page_is_up_to_date():
    spec = importlib.util.spec_from_file_location("make_configuration", ROOT / "docs" / "make_configuration.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == module.render(), "run python docs/make_configuration.py"


def test_list_of_methods_is_up_to_date():
    spec = importlib.util.spec_from_file_location("make_methods", ROOT / "docs" / "make_methods.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert text == module.page(text), "run python docs/make_methods.py"


def test_evidence_is_that_of_the_committed_comparisons():
    spec = importlib.util.spec_from_file_location("make_evidence", ROOT / "docs" / "make_evidence.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = module.PAGE.read_text(encoding="utf-8")
    assert text == module.page(text), "run make evidence"
    found = module.picture([module.read(name) for name in module.SHOWN])
    assert module.PICTURE.read_text(encoding="utf-8") == found, "run make evidence"


def test_architecture_names_every_module_of_a_room():
    """Each room's line names its files; `methods/` and `benchmarks/` have lists of their own."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = text.split("## The rooms")[1]
    package = ROOT / "src" / "aimmerging"
    lines = {line.split("`")[1].rstrip("/"): line for line in table.splitlines() if line.startswith("| `")}
    missing = []
    for path in SOURCES:
        room = path.relative_to(package).parts[0]
        if path.stem.startswith("__") or room in ("methods", "benchmarks"):
            continue
        line = table if path.parent == package else lines.get(room, "")
        if f"`{path.stem}`" not in line:
            missing.append(str(path.relative_to(package)))
    assert missing == []


def test_every_file_that_a_rooms_line_names_is_there():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    gone, streams = [], {"skills15", "skills50"}
    for line in text.split("## The rooms")[1].splitlines():
        room = ROOT / "src" / "aimmerging" / line.split("`")[1] if line.startswith("| `") else ROOT / "none"
        if room.is_dir():
            names = set(re.findall(r"`([a-z_0-9]+)/?`", line.split("|")[2])) - streams
            gone += [
                f"{room.name}/{name}" for name in sorted(names) if not [*room.glob(f"{name}.py"), *room.glob(name)]
            ]
    assert gone == []


def test_links_between_documents_lead_somewhere():
    broken = []
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
            if "://" not in target and not (page.parent / target).exists():
                broken.append(f"{page.name}: {target}")
    assert not broken


def test_every_public_name_can_be_imported():
    for name in aimmerging.__all__:
        assert getattr(aimmerging, name) is not None


@pytest.mark.parametrize("module", CORE)
def test_core_needs_neither_transformers_nor_peft(module):
    code = (
        f"import sys, aimmerging.core.{module};"
        "print([name for name in ('transformers', 'peft') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_files_are_rooms_of_one_purpose():
    long = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert {name: lines for name, lines in long.items() if lines > 450} == {}


def test_a_method_written_as_the_page_shows_learns_and_rehearses(tmp_path, tiny_t5):
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    namespace: dict = {}
    exec(re.search(r"```python\n(.*?)```", page, re.DOTALL).group(1), namespace)

    from transformers import TrainingArguments

    from aimmerging.config import ModelConfig
    from aimmerging.data.tasks import Row
    from aimmerging.training.encoding import Codec, Collator
    from aimmerging.training.models import LoraSection, _attach, _load_base
    from aimmerging.training.rehearsal_settings import RehearsalSettings
    from aimmerging.training.trainer import ContinualTrainer

    base, tokenizer = _load_base(ModelConfig(name=str(tiny_t5)), str(tiny_t5))
    codec = Codec(tokenizer, True, 32, 8)
    rows = [Row(str(number), f"say {number}", "yes") for number in range(16)]
    trainer = ContinualTrainer(
        model=_attach(base, LoraSection(), None),
        args=TrainingArguments(
            str(tmp_path), per_device_train_batch_size=4, max_steps=8, use_cpu=True, report_to="none", disable_tqdm=True
        ),
        train_dataset=codec.examples(rows),
        data_collator=Collator(tokenizer.pad_token_id),
        method=namespace["HalfWayBack"](interval=4),
        memory={"old": codec.examples(rows[:4])},
        rehearsal=RehearsalSettings(batch_size=4, micro_batch_size=4),
    )
    trainer.train()
    assert trainer.session.costs.memory_updates == 2
    assert trainer.method.state() == {"anchor": []}


def test_every_page_has_its_place_in_the_site():
    """A page that the navigation lacks is built and found by nobody."""
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    named = set(re.findall(r"[\w/]+\.md", json.dumps(site["nav"])))
    assert named == {path.name for path in (ROOT / "docs").glob("*.md")}
