"""Short versions of `tests.reliability.kill` and `tests.reliability.torn`; their full figures: docs/reliability.md."""

import kill
import pytest
import torn
from sampling import sampled

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("case", sampled([("t5", "default"), ("llama", "paper")], [("t5", "default")]))
def test_five_kills_end_as_no_kill_at_all(tmp_path, case):
    kind, preset = case
    results = kill.run_kills(5, 3, tmp_path, kinds=(kind,), presets=(preset,))
    assert sum(result.kills for result in results) == 5
    assert [result.differences for result in results if result.differences] == []


def test_torn_writes_do_no_harm(tmp_path):
    faults = torn.inject(tmp_path)
    assert len(faults) >= 200
    assert [fault for fault in faults if fault.wrong] == []
