"""Files that are whole whatever happens."""

import pytest

from ptmoe.files import replaced, write_whole


def test_a_file_is_as_it_was_until_its_successor_is_whole(tmp_path):
    path = tmp_path / "plan.yaml"
    write_whole(path, "first")

    def broken_off():
        with replaced(path) as part:
            part.write_text("half of the sec")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken_off()
    assert path.read_text() == "first"
    write_whole(path, "second")
    assert [(one.name, one.read_text()) for one in tmp_path.iterdir()] == [("plan.yaml", "second")]
