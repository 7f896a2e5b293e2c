"""One thread, no network, reproducible property tests, and two tiny random models for everyone."""

import gc
import os
from collections import defaultdict

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

from pathlib import Path

import compatibility
import hypothesis
import pytest
import torch
from accelerate import PartialState
from tiny_models import save_llama, save_t5

torch.set_num_threads(1)
hypothesis.settings.register_profile("aimmerging", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("aimmerging")


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory) -> Path:
    """Folder of a random one-layer T5 and its tokenizer."""
    return save_t5(tmp_path_factory.mktemp("tiny-t5"))


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> Path:
    """Folder of a random one-layer Llama and its tokenizer, without a chat template."""
    return save_llama(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(autouse=True)
def any_device():
    """accelerate keeps the first device of a process; where there is a GPU, each test may take another one."""
    if torch.cuda.is_available():
        PartialState._reset_state()


@pytest.fixture
def covers(request):
    """Says which cells of docs/compatibility.md a test fills when it passes; called at its end or its start."""

    def note(*values, **options):
        request.node.user_properties.append((compatibility.KEY, compatibility.record(*values, **options)))

    return note


class _Compatibility:
    """Collects the reports; workers of xdist send theirs to the one process that writes."""

    def __init__(self):
        self.reports = []

    def pytest_runtest_logreport(self, report):
        self.reports.append(report)

    def pytest_sessionfinish(self, session):
        compatibility.keep(self.reports)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Of a test that runs on both tiny bases one is in every run of the tests, by turns; `make test-all` has both."""
    twins = defaultdict(list)
    for item in items:
        values = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if any(isinstance(value, str) and value in ("tiny_t5", "tiny_llama") for value in values):
            twins[item.path, item.originalname].append(item)
    for place, own in enumerate(twins.values()):
        left_out = ("tiny_t5", "tiny_llama")[place % 2]
        with_it = [item for item in own if left_out in item.callspec.params.values()]
        for item in with_it if len(with_it) < len(own) else ():
            item.add_marker(pytest.mark.exhaustive)


def pytest_collection_finish():
    # each training ends with a full collection, which would go through every object of every imported library
    gc.freeze()


def pytest_configure(config):
    if compatibility.asked() and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Compatibility())
