"""Any system's predictions, from a file: SQuAD's `{id: text}`, or JSON lines (or an array) of ids and texts.

{"56be4db0acb8001400a502ec": "Denver Broncos", …}
{"id": "test-0", "completion": "… #### 18"}
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ptmoe.errors import PtmoeError
from ptmoe.tasks.records import Problems, Record, head, json_array, json_lines

ID_KEYS = ("id", "qid", "ID")
TEXT_KEYS = ("completion", "prediction", "prediction_text", "text", "answer", "output")


def read_predictions(path: str | Path) -> dict[str, str]:
    """Each prediction by its example's id.

    Raises:
        PtmoeError: no such file, a damaged record, a record without id or text, or a repeated id.
    """
    path = Path(path)
    if not path.is_file():
        raise PtmoeError(f"no predictions file {path}")
    problems = Problems()
    predictions: dict[str, str] = {}
    places: dict[str, str] = {}
    for place, name, text in _predictions(path, problems):
        if name in places:
            problems.add(place, f"id {name!r} was given before, at {places[name]}")
        places[name], predictions[name] = place, text
    if problems.count:
        raise PtmoeError(problems.listed())
    if not predictions:
        raise PtmoeError(f"{path} holds no prediction: needs at least one")
    return predictions


def _predictions(path: Path, problems: Problems) -> Iterator[tuple[str, str, str]]:
    start = head(path)
    if start.kind not in "{[" or not start.kind:
        raise PtmoeError(f"{path} is neither JSON nor JSON lines: needs {{id: text}}, or lines with an id and a text")
    lines = start.kind == "[" or bool(start.keys & {*ID_KEYS, *TEXT_KEYS})
    if not lines and (whole := _object(path)) is not None:
        for key, value in whole:
            if isinstance(value, str):
                yield str(path), key, value
            else:
                problems.add(f"{path}, id {key!r}", f"the prediction is {type(value).__name__}, needs text")
        return
    records: Iterator[Record] = (json_array if start.kind == "[" else json_lines)(path, problems)
    for place, record in records:
        name: Any = next((record[key] for key in ID_KEYS if key in record), None)
        text: Any = next((record[key] for key in TEXT_KEYS if key in record), None)
        has = f"(has {', '.join(map(repr, record)) or 'none'})"
        if not isinstance(name, (str, int)) or isinstance(name, bool):
            problems.add(place, f"lacks an id {has}: needs 'id' in each record")
        elif isinstance(text, (int, float)) and not isinstance(text, bool):
            yield place, str(name), str(text)
        elif not isinstance(text, str):
            problems.add(
                place, f"lacks the predicted text {has}: needs {', '.join(map(repr, TEXT_KEYS[:3]))} or another"
            )
        else:
            yield place, str(name), text


def _object(path: Path) -> list[tuple[str, Any]] | None:
    """The key–value pairs of a file that is one JSON object, else None. A dict would hide repeated ids."""
    try:
        pairs = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=lambda pairs: pairs)
    except UnicodeDecodeError:
        raise PtmoeError(f"{path}: not UTF-8 text") from None
    except json.JSONDecodeError:
        return None
    return pairs if isinstance(pairs, list) and all(isinstance(pair, tuple) for pair in pairs) else None
