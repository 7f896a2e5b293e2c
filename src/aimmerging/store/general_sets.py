"""The sets of general ability that a run keeps: their rows, and what the model answered before any training.

RUN/general/01-world/      one committed folder a set: set.json, rows.jsonl, predictions.jsonl
RUN/stages/*/general/      the answers of each stage, 01-world.jsonl for the set in 01-world
"""

from dataclasses import dataclass
from pathlib import Path

from aimmerging.data.tasks import Row
from aimmerging.store import records
from aimmerging.store.files import COMMITTED, check
from aimmerging.store.records import GeneralRecord

FOLDER = "general"
RECORD, ROWS, BEFORE = "set.json", "rows.jsonl", "before"


@dataclass(frozen=True, slots=True)
class GeneralSet:
    """One set: its folder and its set.json."""

    path: Path
    record: GeneralRecord

    def rows(self) -> list[Row]:
        """Read the rows.

        Raises:
            RunDirectoryError: one is damaged.
        """
        return records.read_rows(self.path / ROWS)

    def answers(self, stage: Path | None) -> Path:
        """File of the answers that a stage gave; with None, of those from before any training."""
        folder = self.path / BEFORE if stage is None else stage / FOLDER
        return folder / f"{self.path.name}.jsonl"


def saved(run: Path) -> tuple[GeneralSet, ...]:
    """The sets of a run directory, in the order in which they came to it.

    Raises:
        RunDirectoryError: a file is missing or of another size, or set.json is not the one that was committed.
    """
    found: list[GeneralSet] = []
    for folder in sorted(marker.parent for marker in (run / FOLDER).glob(f"*/{COMMITTED}")):
        check(folder, hashes={RECORD})
        found.append(GeneralSet(folder, records.read(GeneralRecord, folder / RECORD)))
    return tuple(found)
