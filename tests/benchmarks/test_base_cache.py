"""The cache of tiny base models goes by a version number and the settings."""

import hashlib
import json
from dataclasses import replace
from itertools import islice
from random import Random

from aimmerging.benchmarks import lessons, tiny_base

RECIPE = tiny_base.RECIPES["t5"]


def test_the_key_follows_version_and_settings_alone(monkeypatch):
    key = tiny_base._fingerprint("t5", RECIPE)
    assert tiny_base._fingerprint("t5", RECIPE) == key
    others = {tiny_base._fingerprint("llama", RECIPE), tiny_base._fingerprint("t5", replace(RECIPE, seed=1))}
    monkeypatch.setattr(tiny_base, "VERSION", tiny_base.VERSION + 1)
    others.add(tiny_base._fingerprint("t5", RECIPE))
    assert len(others | {key}) == 4


def test_lessons_that_change_need_a_new_version():
    """Where this fails: raise tiny_base.VERSION, then put the new pair here."""
    texts = [*islice(tiny_base._text(RECIPE), 2000), *islice(lessons.draw(Random(0)), 2000)]
    digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
    assert (tiny_base.VERSION, digest) == (1, "b2665fb54fee10ad6621b7d7ffa1c52839a4bb7f176b14bd6d94edf76e2fb55f")
