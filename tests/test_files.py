"""Files that are complete or absent."""

import pytest

from ptmoe.files import replaced, write_whole


def test_a_file_is_unchanged_until_its_replacement_is_complete(tmp_path):
    path = tmp_path / "plan.yaml"
    write_whole(path, "first")

    def interrupted():
        with replaced(path) as part:
            part.write_text("half of the sec")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "first"
    write_whole(path, "second")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("plan.yaml", "second")]
