"""What is secret is written nowhere, a cache is its owner's, and only the Hub's names are asked of the Hub."""

import io
import os
import shutil
import stat
from email.message import Message

import huggingface_hub
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import ptmoe
from ptmoe.adapters.folder import local_folder
from ptmoe.compare.plan import ComparePlan
from ptmoe.files import cache_folder, names_repository
from ptmoe.models.bases import load_base, locate
from ptmoe.models.gguf import MANIFEST, _is_whole
from ptmoe.tasks import TASKS, sources
from ptmoe.train import TrainOptions, train
from ptmoe.train.resume import recorded

SECRET = "Tr0ub4dor&3"
KEYS = st.sampled_from(
    ["hub_token", "push_to_hub_token", "token", "password", "wandb_api_key", "API-KEY", "client_secret", "credentials"]
)


@st.composite
def with_a_secret(draw):
    """Arguments with a secret somewhere in them: by its key, or by its form."""
    form = st.sampled_from(["hf_" + "aB3" * 9, f"https://me:{SECRET}@example.org/x", f"see hf_{'x' * 30}"])
    value = draw(st.fixed_dictionaries({draw(KEYS): st.just(SECRET)}) | st.fixed_dictionaries({"logging_dir": form}))
    for _ in range(draw(st.integers(0, 3))):
        value = {draw(st.text(max_size=5)): draw(st.sampled_from([value, [value], ["x", [value]]]))}
    return value


@given(arguments=with_a_secret())
def test_no_options_hold_a_secret(arguments):
    for kind, options in ((TrainOptions, {"trainer": arguments}), (ComparePlan, {"train": {"trainer": arguments}})):
        task = {"task": "nano/mixed"} if kind is TrainOptions else {"tasks": ["nano/mixed"]}
        with pytest.raises(ptmoe.PtmoeError, match="would be written into the run folder: set the variable") as refused:
            kind(**task, **options)
        assert SECRET not in str(refused.value)
        assert "aB3aB3" not in str(refused.value)


@pytest.mark.ci
def test_a_secret_is_in_no_file_of_a_run_or_comparison(tmp_path, run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    tiny = {"max_steps": 1, "max_examples": 4, "eval_examples": 4}
    (tmp_path / "secret.yaml").write_text(
        yaml.safe_dump({"tasks": ["nano/mixed"], "train": {"trainer": {"hub_token": SECRET}}} | tiny)
    )
    status, _, error = run("compare", tmp_path / "secret.yaml", "--output-dir", tmp_path / "refused")
    assert (status, SECRET in error) == (2, False)
    assert not (tmp_path / "refused").exists()
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump({"tasks": ["nano/mixed"], "methods": ["pt"], "seeds": 1} | tiny))
    status, _, error = run("compare", tmp_path / "plan.yaml", "--output-dir", tmp_path / "run")
    assert status == 0, error
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {"comparison.yaml", "config.yaml", "environment.json", "report.html"} <= {path.name for path in files}
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


PATHS = r"runs/tpyo ./run ../x/y /runs/x ~/runs a/b/c runs/a\tb x/ a//b -x/y runs/ü a\b/c".split(" ")


@pytest.mark.parametrize("name", PATHS)
def test_a_mistyped_path_is_not_asked_of_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *a, **b: pytest.fail(f"{name} is asked of the Hub")
    )
    assert not names_repository(name)
    if name:  # Path("") is the current folder
        with pytest.raises(ptmoe.PtmoeError, match="no adapter folder"):
            local_folder(name)
        with pytest.raises(ptmoe.PtmoeError, match="no model folder"):
            locate(name)


@pytest.mark.parametrize("name", ["owner/name", "EleutherAI/pythia-70m", "gpt2", "a.b/c_d-e"])
def test_a_name_of_the_hub_is(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda path, **_: tmp_path / path)
    assert locate(name) == name
    if "/" in name:
        assert local_folder(name) == tmp_path / name


@pytest.mark.parametrize("part", ["", "tokens"])
@given(mode=st.integers(0, 0o77))
def test_a_cache_that_others_may_write_to_is_refused(part, mode, tmp_path_factory):
    root = tmp_path_factory.mktemp("cache") / "ptmoe"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PTMOE_CACHE", str(root))
        folder = cache_folder(part, create=True)
        assert {stat.S_IMODE(path.stat().st_mode) for path in (root, folder)} == {0o700}
        folder.chmod(0o700 | mode)
        if mode & 0o022:
            with pytest.raises(ptmoe.PtmoeError, match="can be written by others than you"):
                cache_folder(part)
        else:
            assert cache_folder(part) == folder
        folder.chmod(0o700)
        patch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)
        with pytest.raises(ptmoe.PtmoeError, match="can be written by others than you"):
            cache_folder(part)


@given(data=st.data())
def test_whatever_is_changed_in_a_dequantized_folder_is_noticed(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    digests = {}
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text(name)
        digests[name] = ptmoe.files.sha256(folder / name)
    (folder / MANIFEST).write_text(yaml.safe_dump(digests, default_flow_style=True, width=1000).replace("'", '"'))
    if data.draw(st.booleans()):
        name = data.draw(st.sampled_from(sorted(digests)))
        (folder / name).write_bytes(data.draw(st.binary()))
    else:
        (folder / data.draw(st.sampled_from(["modeling.py", "generation_config.json"]))).write_bytes(b"planted")
    assert not _is_whole(folder)


class Answer(io.BytesIO):
    def __init__(self, content, length=None):
        super().__init__(content)
        self.headers = Message()
        self.given = 0
        if length is not None:
            self.headers["Content-Length"] = str(length)

    def read(self, size):
        self.given += size
        return super().read(size)


@pytest.mark.parametrize("announced", [None, 10**12], ids=["endless", "announced"])
def test_a_download_ends_at_its_limit_and_nothing_is_kept(announced, tmp_path, monkeypatch):
    monkeypatch.setenv("PTMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sources, "LARGEST", 1000)
    monkeypatch.setattr(sources, "_CHUNK", 100)
    answer = Answer(b"x" * 100_000, announced)
    monkeypatch.setattr(sources.urllib.request, "urlopen", lambda *a, **b: answer)
    with pytest.raises(ptmoe.PtmoeError, match="over 1,000 bytes, more than any release"):
        sources.fetch(TASKS["mrqa/drop"].splits["test"], lambda _: None)
    assert answer.given <= 1100
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_file()]


def test_a_planted_download_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setenv("PTMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PTMOE_DATA_DIR", raising=False)
    wanted = TASKS["mrqa/drop"].splits["test"]
    cache_folder(create=True)
    sources.cached(wanted).write_bytes(b"planted")
    assert sources.local(TASKS["mrqa/drop"], "test") is None


@pytest.mark.ci
def test_a_run_records_the_commit_of_its_base_and_is_repeated_with_it(tmp_path, monkeypatch):
    """With a copy of the Hub's cache, in which another commit appears later."""
    commits, repository = ("a" * 40, "b" * 40), tmp_path / "hub" / "models--owner--tiny"
    base, tokenizer = load_base("nano")
    for commit in commits:
        for part in (base, tokenizer):
            part.save_pretrained(repository / "snapshots" / commit)
        base.get_input_embeddings().weight.data.mul_(1.5)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commits[0])
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    method = {"name": "pt", "num_virtual_tokens": 2}
    chosen = {"method": method, "max_steps": 1, "max_examples": 4, "eval_examples": 2, "task": "nano/mixed"}
    options = TrainOptions(model="owner/tiny", revision="main", output_dir="run", **chosen)
    train(options, say=lambda _: None)
    assert recorded(tmp_path / "run").revision == commits[0]
    assert ptmoe.adapters.folder.read_adapter("run/adapter").base.revision == commits[0]
    train(options, resume=True, say=lambda _: None)
    (repository / "refs" / "main").write_text(commits[1])
    again = train(TrainOptions.read("run/config.yaml", output_dir="again"), say=lambda _: None)
    assert again.model.identity.revision == commits[0]
    with pytest.raises(ptmoe.PtmoeError, match=f"revision was '{commits[0]}', is '{commits[1]}'"):
        train(options, resume=True, say=lambda _: None)
    shutil.rmtree("run")
    assert train(options, say=lambda _: None).model.identity.revision == commits[1]
