import re
from pathlib import Path

import pytest

from aimmerging.commands import demo
from aimmerging.compare.plan import load_spec, parse_spec, plan
from aimmerging.compare.results import Place
from aimmerging.config import resolve
from aimmerging.errors import ConfigError

EXAMPLE = Path(__file__).parents[2] / "examples" / "compare_skills.yaml"


def mistakes(**values):
    with pytest.raises(ConfigError) as caught:
        parse_spec({"methods": ["sequential", "aim"], "baseline": "aim", "config": {"benchmark": "skills"}, **values})
    return str(caught.value)


def test_short_and_long_forms_of_a_method():
    spec = parse_spec(
        {
            "methods": ["replay", "aim:reference", {"name": "mine", "method": "aim", "set": {"lora": {"rank": 4}}}],
            "baseline": "replay",
            "config": {"benchmark": "skills"},
        }
    )
    assert [(m.name, m.method, m.preset) for m in spec.methods] == [
        ("replay", "replay", "default"),
        ("aim:reference", "aim", "reference"),
        ("mine", "aim", "default"),
    ]
    assert spec.pairs == [("aim:reference", "replay"), ("mine", "replay")]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"methos": []}, "unknown key 'methos' (did you mean 'methods'?)"),
        ({"methods": [{"method": "aim", "pre": "paper"}]}, "(did you mean 'methods.0.preset'?)"),
        ({"methods": []}, "methods is []"),
        ({"methods": ["ami", "aim"]}, "unknown method 'ami' (did you mean 'aim'?)"),
        ({"methods": ["aim", "multi_task"]}, "unknown method 'multi_task'"),
        ({"methods": ["aim", "aim"]}, "the method 'aim' occurs twice"),
        (
            {"methods": ["aim:paper", {"name": "aim-paper", "method": "aim"}], "baseline": "aim:paper"},
            "folder of method",
        ),
        ({"methods": [{"name": "../aim", "method": "aim"}]}, "methods.0.name is '../aim'"),
        ({"baseline": "replay"}, "unknown method to compare 'replay'"),
        ({"baseline": None}, "nothing to compare with"),
        ({"comparisons": [["aim", "aim"]]}, "compared with itself"),
        ({"comparisons": [["aim", "sequential"]] * 2}, "occurs twice"),
        ({"seeds": [0, 0]}, "the seed 0 occurs twice"),
        ({"seeds": [-1]}, "seeds.0 is -1"),
        ({"protocol": "papers"}, "protocol is 'papers'"),
        ({"config": {"benchmark": "skills", "seed": 3}}, "config: seed is not set here"),
        ({"config": {"benchmark": "skills", "trainin": {}}}, "unknown key 'trainin' (did you mean 'training'?)"),
        ({"methods": [{"method": "aim", "set": {"tasks": []}}]}, "set of aim: tasks is not set here"),
        (
            {"methods": [{"method": "aim", "set": {"training": {"epochs": 0}}}]},
            "method 'aim': configuration: training.epochs",
        ),
    ],
)
def test_mistakes_are_named(values, said):
    assert said in mistakes(**values)


def test_all_mistakes_come_at_once():
    message = mistakes(methods=["ami"], seeds=[1, 1], config={"seed": 3})
    assert message.startswith("4 problems")


@pytest.mark.parametrize(
    ("orders", "said"),
    [
        ({"a": ["sentiment", "intnt"]}, "unknown task 'intnt' (did you mean 'intent'?)"),
        ({"a": ["sentiment", "intent"], "b": ["topic", "intent"]}, "do not hold the same tasks"),
        ({"a": ["sentiment", "sentiment"]}, "none twice"),
    ],
)
def test_orders_hold_the_tasks_there_are(orders, said, tmp_path):
    values = {"methods": ["aim"], "config": {"benchmark": "skills"}, "orders": orders}
    with pytest.raises(ConfigError, match=re.escape(said)):
        plan(parse_spec(values), tmp_path, Path())


def test_the_example_is_the_demos_setting():
    spec = load_spec(EXAMPLE)
    assert [method.name for method in spec.methods] == ["sequential", "replay", "aim"]
    assert (len(spec.orders), len(spec.seeds), spec.protocol) == (2, 2, "matched")
    cells = plan(spec, Path("out"), EXAMPLE.parent)
    assert len(cells) == 3 * 2 * 2 + 2 * 2
    for place, cell in cells.items():
        own = {"method": place.method, "seed": place.seed, "order": cell.config.order, "protocol": "matched"}
        assert cell.config == resolve({**demo.SPECIFICATION["config"], **own})


def test_pairs_differ_in_their_method_alone(tmp_path):
    # in the preset `default` aim has values of its own, see AIM_VALUES
    values = {"methods": ["replay:paper", "aim:paper"], "baseline": "replay:paper", "seeds": [0, 7]}
    spec = parse_spec(values | {"config": {"benchmark": "skills"}})
    cells = plan(spec, tmp_path, Path())
    for seed in (0, 7):
        left, right = (cells[Place(name, "given", seed)].config for name in values["methods"])
        assert left.model_copy(update={"method": "aim"}) == right
        assert left.seed == seed
    assert len({cell.out for cell in cells.values()}) == len({cell.name for cell in cells.values()}) == len(cells)
