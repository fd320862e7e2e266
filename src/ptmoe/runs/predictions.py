"""`predictions/TASK.jsonl`: a line for each answered example, appended as it comes, and resumed after an interruption.

Beside it lies `TASK.settings.json`, everything that decides a prediction. Lines are in the order in which examples are
answered, the longest prompts first, which is the same for every batch size: so what an interrupted evaluation has
written is the beginning of the whole file, and whatever is left of a broken line is written anew.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ptmoe.errors import PtmoeError
from ptmoe.files import append, write_whole
from ptmoe.runs.records import Prediction
from ptmoe.settings import differences


def read_predictions(path: Path) -> list[Prediction]:
    """All predictions of a task.

    Raises:
        PtmoeError: the file is missing or empty, a line is no prediction, or an id repeats.
    """
    if not path.is_file():
        raise PtmoeError(f"{path} is missing")
    predictions = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            predictions.append(Prediction.parse(line))
        except (ValueError, TypeError, KeyError):
            raise PtmoeError(f"{path}, line {number} is no prediction") from None
    if not predictions or len({prediction.id for prediction in predictions}) < len(predictions):
        raise PtmoeError(f"{path}: {len(predictions)} line(s), needs one for each example and no id twice")
    return predictions


class PredictionsFile:
    """The predictions of one task in one run.

    Args:
        path: of the JSON lines.
        settings: what decides the predictions, as JSON.
        ids: of the examples, in the order in which they are answered.
        overwrite: discard what is there.
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
        """What is there already, after a check that it belongs to this evaluation; a broken last line is dropped.

        Raises:
            PtmoeError: it belongs to another evaluation, or was changed.
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
                    prediction = Prediction.parse(line)
                except (ValueError, TypeError, KeyError):
                    raise self._foreign(f"line {number + 1} is no prediction") from None
                if number >= len(self.ids) or prediction.id != self.ids[number]:
                    raise self._foreign(f"line {number + 1} has the id {prediction.id!r}")
                done.append(prediction)
                end += len(line)
        os.truncate(self.path, end)
        return done

    def append(self, predictions: Sequence[Prediction]) -> None:
        append(self.path, b"".join(prediction.line() for prediction in predictions))

    def _check_settings(self) -> None:
        try:
            written = json.loads(self.settings_path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise self._foreign(f"{self.settings_path.name} is missing or damaged") from None
        written = written if isinstance(written, dict) else {}
        keys = {**written, **self.settings}
        if changed := differences((key, written.get(key), self.settings.get(key)) for key in keys):
            raise self._foreign(", ".join(changed))

    def _foreign(self, why: str) -> PtmoeError:
        return PtmoeError(
            f"{self.path} holds predictions of another evaluation ({why}): choose another --output-dir, or start over "
            "with --overwrite"
        )
