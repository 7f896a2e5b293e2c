"""The toy language of the `skills` sequence: its words by meaning, and sentences that use them.

A sentence carries facets: what it is about, what its writer feels, and so on. The tasks of
:mod:`aimmerging.benchmarks.skills` ask for one facet; the pre-training of
:mod:`aimmerging.benchmarks.tiny_base` sees sentences only without them.
"""

from collections.abc import Callable
from random import Random
from typing import NamedTuple


class Sentence(NamedTuple):
    """A sentence and what can be asked about it, by facet."""

    text: str
    facets: dict[str, str]


def _words(groups: dict[str, str]) -> dict[str, tuple[str, ...]]:
    """Split each group of words at white space."""
    return {name: tuple(words.split()) for name, words in groups.items()}


JUDGEMENTS = _words({
    "good": """superb lovely excellent splendid charming delightful perfect brilliant wonderful marvellous tasteful
        polished impressive graceful refreshing admirable""",
    "bad": """awful dreadful shabby clumsy horrible poor sloppy disgusting useless dire lousy tasteless faulty
        unpleasant rotten miserly""",
})  # fmt: skip
FEELINGS = _words({
    "joy": """cheerful merry thrilled glad elated jolly overjoyed gleeful amused jubilant beaming radiant ecstatic
        content""",
    "anger": """furious cross outraged livid irate fuming enraged annoyed bitter seething hostile indignant
        resentful incensed""",
    "fear": """scared afraid anxious terrified nervous alarmed timid panicked uneasy frightened worried petrified
        trembling wary""",
    "sadness": """gloomy tearful mournful heartbroken lonely weeping downcast dejected sorrowful glum forlorn
        dismal hopeless grieving""",
})  # fmt: skip
SUBJECTS = _words({
    "sport": """match goalkeeper striker league stadium referee tournament sprinter coach penalty relay marathon
        wrestler trophy""",
    "science": """molecule telescope electron laboratory comet enzyme microscope genome neutron galaxy fossil
        chemist physicist particle""",
    "politics": """senate minister ballot parliament election treaty mayor congress embassy voter campaign
        governor referendum cabinet""",
    "music": """violin choir orchestra melody concert drummer cello singer symphony chorus pianist banjo trumpet
        ballad""",
    "money": """bank shares invoice dividend broker loan market currency auditor profit budget merger tariff
        pension""",
})  # fmt: skip
WISHES = _words({
    "music": "playlist song tune album record anthem track lullaby",
    "alarm": "timer reminder chime countdown stopwatch bell buzzer appointment",
    "food": "pizza noodles curry sandwich salad burger dumplings pancakes",
    "travel": "flight taxi railcard hotel ferry cabin hostel berth",
    "message": "email letter postcard memo telegram reply voicemail greeting",
    "home": "lamp heating curtains radiator blinds fan dishwasher thermostat",
})  # fmt: skip
ASKING = {
    "person": ("who", "which man", "which woman", "whose friend", "what fellow"),
    "place": ("where", "in which town", "in what country", "on which street", "at what spot"),
    "time": ("when", "on which day", "at what hour", "in which year", "since what date"),
    "number": ("how many", "what amount of", "how great a count of", "what sum of", "what quantity of"),
    "reason": ("why", "for what cause", "on what grounds", "what made it that", "how come"),
}
KINDS = _words({
    "animal": "horse tiger rabbit otter eagle badger camel lizard salmon beetle goat sparrow",
    "fruit": "apple cherry mango lemon plum peach grape melon apricot banana pear fig",
    "colour": "red green blue purple orange yellow crimson violet scarlet turquoise brown grey",
    "tool": "hammer chisel wrench saw shovel pliers drill rake axe spanner sickle trowel",
    "clothing": "jacket scarf trousers hat glove sweater boot skirt coat sandal vest apron",
    "vehicle": "truck tram bicycle canoe tractor scooter wagon yacht lorry sled van raft",
    "furniture": "table sofa wardrobe chair stool bench cupboard desk shelf cradle bookcase armchair",
    "plant": "oak fern tulip ivy willow moss daisy cactus birch nettle clover reed",
})  # fmt: skip
OPPOSITES = (
    "hot cold", "big small", "early late", "full empty", "wet dry", "hard soft", "fast slow", "open closed",
    "rich needy", "loud quiet", "young old", "thick thin", "heavy light", "near far", "wide narrow", "clean dirty",
    "sharp blunt", "sweet sour", "deep shallow", "strong weak", "smooth rough", "tall short", "rare common",
    "bright dark",
)  # fmt: skip
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
FILLERS = _words({
    "thing": "soup room film novel lounge garden museum waiter menu show service view bakery gallery",
    "person": "anna boris clara david elena felix greta henry irene jonas karin louis marta nils",
    "deed": "found noticed described left mentioned praised visited followed reached joined",
})  # fmt: skip


def _review(random: Random) -> Sentence:
    """A review with two judgements that agree, or are mixed."""
    verdict = random.choice(("good", "bad", "mixed"))
    moods = [verdict] * 2 if verdict != "mixed" else random.sample(("good", "bad"), 2)
    first, second = (random.choice(JUDGEMENTS[mood]) for mood in moods)
    thing, other = random.sample(FILLERS["thing"], 2)
    join = "but" if verdict == "mixed" and random.random() < 0.5 else "and"
    shape = random.choice((
        "the {a} was {x} {j} the {b} was {y}.",
        "we found the {a} {x} {j} the {b} {y}.",
        "{p} called the {a} {x} {j} the {b} {y}.",
        "{x} {a}, {j} {y} {b} too.",
    ))  # fmt: skip
    text = shape.format(a=thing, b=other, x=first, y=second, j=join, p=random.choice(FILLERS["person"]))
    return Sentence(text, {"sentiment": verdict})


def _request(random: Random) -> Sentence:
    """Somebody wants something done."""
    wish = random.choice(tuple(WISHES))
    thing, other = random.sample(WISHES[wish], 2)
    shape = random.choice((
        "please get the {x} and the {y} ready for {p}.",
        "{p} needs the {x} or the {y} {w}.",
        "i would like the {x} {w}, not the {y}.",
        "could you see to the {x} {w} and the {y} later?",
    ))  # fmt: skip
    when = random.choice(("today", "tonight", "at noon", "tomorrow", "on friday", "this evening", "soon", "right now"))
    return Sentence(shape.format(x=thing, y=other, p=random.choice(FILLERS["person"]), w=when), {"intent": wish})


def _report(random: Random) -> Sentence:
    """News about a subject, and how somebody feels about it: the same sentence answers two questions."""
    subject, feeling = random.choice(tuple(SUBJECTS)), random.choice(tuple(FEELINGS))
    thing, other = random.sample(SUBJECTS[subject], 2)
    first, second = random.sample(FEELINGS[feeling], 2)
    shape = random.choice((
        "{p} was {x} and {y} as the {a} {d} the {b}.",
        "the {a} {d} the {b} and left {p} {x} and {y}.",
        "when the {a} {d} the {b}, {x} {p} grew {y}.",
        "{x} {p} said the {a} {d} the {b} and felt {y}.",
    ))  # fmt: skip
    text = shape.format(
        a=thing, b=other, x=first, y=second, p=random.choice(FILLERS["person"]), d=random.choice(FILLERS["deed"])
    )
    return Sentence(text, {"topic": subject, "emotion": feeling})


def _inquiry(random: Random) -> Sentence:
    """A question; the words of the subjects appear in it but do not decide what is asked for."""
    wanted = random.choice(tuple(ASKING))
    subject = random.choice(tuple(SUBJECTS))
    thing, other = random.sample(SUBJECTS[subject], 2)
    shape = random.choice((
        "{q} {d} the {a} near the {b}?",
        "{p} asked {q} {d} the {a} of the {b}.",
        "the {a} {d} the {b}, but {q}?",
        "tell me {q} {d} the {a} for {p}.",
    ))  # fmt: skip
    text = shape.format(
        a=thing,
        b=other,
        q=random.choice(ASKING[wanted]),
        p=random.choice(FILLERS["person"]),
        d=random.choice(FILLERS["deed"]),
    )
    return Sentence(text, {"question": wanted})


SENTENCES: dict[str, Callable[[Random], Sentence]] = {
    "sentiment": _review,
    "intent": _request,
    "topic": _report,
    "emotion": _report,
    "question": _inquiry,
}
"""For each facet, how to make a sentence that has it."""
