"""`predictions/TASK.jsonl`: a line for each answered example, written as it comes, and gone on with after a kill.

Beside it lies `TASK.settings.json`, all that decides a prediction. Lines are in the order in which examples are
answered, the longest prompts first, which is the same for every batch size: so what a killed evaluation has written is
the beginning of the whole file, and whatever a kill left of a line is written anew.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ptmoe.errors import PtmoeError
from ptmoe.files import write_whole


@dataclass(frozen=True)
class Prediction:
    """One answered example.

    Attributes:
        id: the example's.
        references: the example's.
        domain: the example's.
        prompt: as the model was given it; cut where it was.
        completion: the model's.
        scores: by metric, from 0 to 1.
        gate: over the experts; None for a method that does not route.
        cut: tokens of the context that were left out of the prompt.
        answered: false where the prompt does not fit the base even without its context; such an example scores 0.
    """

    id: str
    prompt: str
    completion: str
    references: list[str]
    scores: dict[str, float]
    domain: str = ""
    gate: list[float] | None = None
    cut: int = 0
    answered: bool = True


class PredictionsFile:
    """The predictions of one task in one run.

    Args:
        path: of the JSON lines.
        settings: what decides the predictions, as JSON.
        ids: of the examples, in the order in which they are answered.
        overwrite: forget what is there.
    """

    def __init__(self, path: Path, settings: dict[str, Any], ids: Sequence[str], *, overwrite: bool = False) -> None:
        self.path = path
        self.settings_path = path.with_suffix(".settings.json")
        self.settings = settings
        self.ids = ids
        if overwrite:
            path.unlink(missing_ok=True)
            self.settings_path.unlink(missing_ok=True)

    def resume(self) -> list[Prediction]:
        """What is there already, after checking that it belongs to this evaluation; what a kill broke off is dropped.

        Raises:
            PtmoeError: it belongs to another one, or was changed.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            write_whole(self.settings_path, json.dumps(self.settings, indent=2, ensure_ascii=False) + "\n")
            self.path.touch()
            return []
        self._check_settings()
        done, end = [], 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file):
                if not line.endswith(b"\n"):
                    break
                try:
                    prediction = Prediction(**json.loads(line))
                except (ValueError, TypeError):
                    raise self._foreign(f"line {number + 1} is no prediction") from None
                if number >= len(self.ids) or prediction.id != self.ids[number]:
                    raise self._foreign(f"line {number + 1} has the id {prediction.id!r}")
                done.append(prediction)
                end += len(line)
        os.truncate(self.path, end)
        return done

    def append(self, predictions: Sequence[Prediction]) -> None:
        """Add lines; whole ones, as far as the system writes them."""
        text = "".join(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in predictions)
        with self.path.open("ab") as file:
            # A lone surrogate that a model may write has no UTF-8.
            file.write(text.encode("utf-8", errors="backslashreplace"))

    def _check_settings(self) -> None:
        try:
            written = json.loads(self.settings_path.read_text())
        except (OSError, ValueError):
            raise self._foreign(f"{self.settings_path.name} is missing or damaged") from None
        written = written if isinstance(written, dict) else {}
        changed = [key for key in {**written, **self.settings} if written.get(key) != self.settings.get(key)]
        if changed:
            said = ", ".join(f"{key} was {written.get(key)!r}, is {self.settings.get(key)!r}" for key in changed)
            raise self._foreign(said)

    def _foreign(self, why: str) -> PtmoeError:
        return PtmoeError(
            f"{self.path} holds predictions of another evaluation ({why}): choose another --output-dir, or start over "
            "with --overwrite"
        )
