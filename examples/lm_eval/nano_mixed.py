"""nano/mixed for the two task files beside this one: generated, so there is nothing to download.

One record:

    {"input": "harbor: 7 and 24 =>", "target": "31", "choices": ["31<eos>", "24 and 7<eos>", …], "label": 0}
"""

import re
from typing import Any

import datasets

from ptmoe import load_task

DOMAINS = ["harbor", "market", "garden", "castle"]  # sum, swapped, larger, smaller
END = "<eos>"  # of nano; without it "24" is never less probable than "24 and 7"


def splits(**_: Any) -> dict[str, datasets.Dataset]:
    """What the harness calls for the data; it passes the model's arguments too."""
    records = []
    for example in load_task("nano/mixed", split="test"):
        first, second = map(int, re.findall(r"\d+", example.input))
        choices = [first + second, f"{second} and {first}", max(first, second), min(first, second)]
        records.append(
            {
                "input": example.input,
                "target": example.references[0],
                "choices": [f"{choice}{END}" for choice in choices],
                "label": DOMAINS.index(example.domain),
            }
        )
    return {"test": datasets.Dataset.from_list(records)}


def distinct(records: datasets.Dataset) -> datasets.Dataset:
    """Those whose four choices differ: with a zero, the sum is the larger number."""
    return records.filter(lambda record: len(set(record["choices"])) == len(DOMAINS))
