"""Which tasks the published benchmarks teach, and in which orders.

Orders 1 to 8 are those of the AIMMerging paper's released code; O-LoRA and SAPT count some of them differently.
"""

STANDARD_CL = {
    "O1": ("dbpedia", "amazon", "yahoo", "agnews"),
    "O2": ("dbpedia", "amazon", "agnews", "yahoo"),
    "O3": ("yahoo", "amazon", "agnews", "dbpedia"),
}
LONG_SEQUENCE = {
    "O4": (
        "mnli", "cb", "wic", "copa", "qqp", "boolqa", "rte", "imdb", "yelp", "amazon", "sst-2", "dbpedia", "agnews",
        "multirc", "yahoo",
    ),
    "O5": (
        "multirc", "boolqa", "wic", "mnli", "cb", "copa", "qqp", "rte", "imdb", "sst-2", "dbpedia", "agnews", "yelp",
        "amazon", "yahoo",
    ),
    "O6": (
        "yelp", "amazon", "mnli", "cb", "copa", "qqp", "rte", "imdb", "sst-2", "dbpedia", "agnews", "yahoo", "multirc",
        "boolqa", "wic",
    ),
}  # fmt: skip
SUPERNI = {
    "O7": (
        "task1572", "task363", "task1290", "task181", "task002", "task1510", "task639", "task1729", "task073",
        "task1590", "task748", "task511", "task591", "task1687", "task875",
    ),
    "O8": (
        "task748", "task073", "task1590", "task639", "task1572", "task1687", "task591", "task363", "task1510",
        "task1729", "task181", "task511", "task002", "task1290", "task875",
    ),
}  # fmt: skip
ORDERS = {**STANDARD_CL, **LONG_SEQUENCE, **SUPERNI}
"""Order id to the tasks in the order in which they are learned."""

TRACE = {
    "TRACE": ("C-STANCE", "FOMC", "MeetingBank", "Py150", "ScienceQA", "NumGLUE-cm", "NumGLUE-ds", "20Minuten"),
}  # fmt: skip

BENCHMARKS = {"standard_cl": STANDARD_CL, "long_sequence": LONG_SEQUENCE, "superni": SUPERNI, "trace": TRACE}
"""Benchmark to its orders; all orders of one benchmark hold the same tasks."""


def tasks_of(benchmark: str) -> tuple[str, ...]:
    """Return the tasks of `benchmark` in the order of its first order."""
    return next(iter(BENCHMARKS[benchmark].values()))
