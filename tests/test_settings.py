"""Settings say what a key that they do not have could have been."""

import pytest

from ptmoe.compare.plan import ComparePlan
from ptmoe.compare.search import TunePlan
from ptmoe.errors import PtmoeError
from ptmoe.methods import METHODS
from ptmoe.settings import Flag
from ptmoe.train.options import TrainOptions

FLAGS = [
    (owner, spelling.lstrip("-").replace("-", "_"), name)
    for owner in (TrainOptions, ComparePlan, TunePlan)
    for name, field in owner.model_fields.items()
    for entry in field.metadata
    if isinstance(entry, Flag)
    for spelling in entry.names
]


@pytest.mark.parametrize(("owner", "key", "name"), [entry for entry in FLAGS if entry[1] != entry[2]])
def test_a_flag_of_another_name_than_its_field_is_known_as_a_key(owner, key, name):
    with pytest.raises(PtmoeError, match=f"unknown key '{key}'; did you mean '{name}'"):
        owner(**{key: 1})


TASK = {"task": "nano/mixed"}
NEEDED = {TrainOptions: TASK, ComparePlan: {"tasks": ["nano/mixed"]}, TunePlan: TASK}


@pytest.mark.parametrize("owner", [*NEEDED, *METHODS.values()], ids=lambda owner: owner.__name__)
def test_yes_is_no_number(owner):
    defaults = owner(**NEEDED.get(owner, {})).model_dump()
    whole = {name for name, value in defaults.items() if type(value) in (int, float)}
    for name in whole | {"seeds", "learning_rate", "search_factors", "budget", "max_length"} & defaults.keys():
        for value in (True, False, [True, 2], [0.5, False]):
            with pytest.raises(PtmoeError, match=name):
                owner(**{**NEEDED.get(owner, {}), name: value})
