"""Any system's predictions, from a file: SQuAD's `{id: text}`, or JSON lines (or an array) of ids and texts.

{"56be4db0acb8001400a502ec": "Denver Broncos", …}
{"id": "test-0", "completion": "… #### 18"}
{"id": "test-1", "completion": "", "answered": false}
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ptmoe.errors import PtmoeError
from ptmoe.tasks.problems import BadRecordError, Problems
from ptmoe.tasks.records import READERS, has, head, unique, whole_text

ID_KEYS = ("id", "qid", "ID")
TEXT_KEYS = ("completion", "prediction", "prediction_text", "text", "answer", "output")
UNSURE = frozenset(TEXT_KEYS[3:])  # beside one another, one of these may be the question or the right answer

LARGEST_OBJECT = 50_000_000  # bytes; it is read whole


def read_predictions(path: str | Path) -> dict[str, str | None]:
    """Each prediction by its example's id; None where the record says that it was not answered.

    Raises:
        PtmoeError: no such file, a damaged record, a record without id or text, or a repeated id.
    """
    path = Path(path)
    if not path.is_file():
        raise PtmoeError(f"no predictions file {path}")
    problems = Problems()
    predictions = unique(_predictions(path, problems), problems)
    if problems.count:
        raise PtmoeError(problems.listed())
    if not predictions:
        raise PtmoeError(f"{path} holds no prediction: needs at least one")
    return predictions


def _predictions(path: Path, problems: Problems) -> Iterator[tuple[str, str, str | None]]:
    """Each prediction's location, id and text."""
    kind, keys = head(path)
    if kind not in ("{", "["):
        raise PtmoeError(f"{path} is neither JSON nor JSON lines: needs {{id: text}}, or lines with an id and a text")
    if kind == "{" and keys.isdisjoint({*ID_KEYS, *TEXT_KEYS}) and (pairs := _object(path)) is not None:
        for key, value in pairs:
            with problems.at(f"{path}, id {key!r}"):
                if not isinstance(value, str):
                    raise BadRecordError(f"the prediction is {type(value).__name__}, needs text")
                yield str(path), key, value
        return
    for place, record in READERS[kind](path, problems):
        with problems.at(place):
            name, text = (next((record[key] for key in keys if key in record), None) for keys in (ID_KEYS, TEXT_KEYS))
            if isinstance(name, bool) or not isinstance(name, (str, int, float)) or name != name:
                raise BadRecordError(f"lacks an id {has(record)}: needs 'id' in each record")
            if record.keys().isdisjoint(TEXT_KEYS[:3]) and len(several := sorted(record.keys() & UNSURE)) > 1:
                raise BadRecordError(f"has {' and '.join(map(repr, several))}: call the predicted text 'completion'")
            if isinstance(text, bool) or not isinstance(text, (str, int, float)) or text != text:
                wanted = ", ".join(map(repr, TEXT_KEYS[:3]))
                raise BadRecordError(f"lacks the predicted text {has(record)}: needs {wanted} or another")
            yield place, str(name), None if record.get("answered") is False else str(text)


def _object(path: Path) -> list[tuple[str, Any]] | None:
    """The key–value pairs of a file that is one JSON object, else None. A dict would hide repeated ids."""
    try:
        pairs = json.loads(whole_text(path, LARGEST_OBJECT), object_pairs_hook=lambda pairs: pairs)
    except UnicodeDecodeError:
        raise PtmoeError(f"{path}: not UTF-8 text") from None
    except OSError as error:
        raise PtmoeError(f"{path}: {error}") from None
    except json.JSONDecodeError:
        return None
    except (ValueError, RecursionError) as error:  # integers of thousands of digits, lists in lists in lists
        raise PtmoeError(f"{path}: {str(error)[:200]}") from None
    return pairs if isinstance(pairs, list) and all(isinstance(pair, tuple) for pair in pairs) else None
