"""Settings say what a key that they do not have could have been."""

import pytest

from ptmoe.compare.plan import ComparePlan
from ptmoe.compare.search import TunePlan
from ptmoe.errors import PtmoeError
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
