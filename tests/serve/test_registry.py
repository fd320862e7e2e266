"""Adapters come, change and go while the server runs."""

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest
import torch

from ptmoe.errors import PtmoeError
from ptmoe.methods import METHODS
from ptmoe.models.adapter_set import AdapterSet
from ptmoe.models.causal import PromptedCausalLM
from ptmoe.serve import registry as registry_module
from ptmoe.serve.engine import UnavailableError
from ptmoe.serve.registry import Registry, UnknownModelError
from ptmoe.serve.start import base_of
from testing.bases import BY_ROW, CONFIGS, DEVICE, prompted, tiny, tokens
from testing.serving import until

IDS = tokens(6).tolist()


@pytest.fixture
def base():
    return tiny("llama")


@pytest.fixture
def folder(base, tmp_path):
    for index, name in enumerate(("a.b", "keys", "c")):
        prompted(tiny("llama"), CONFIGS["PT-MoE selective probationary"], seed=index).save_pretrained(tmp_path / name)
    return tmp_path


def registry_of(base, folder, **options):
    return Registry(AdapterSet(base.get_input_embeddings()), folder, base="tiny", **options)


def test_names_are_those_of_the_folders_and_nothing_else(base, folder):
    registry = registry_of(base, folder)
    assert registry.names() == ["tiny", "a.b", "c", "keys"]
    for name in ("a.b/", "./c", "../" + folder.name, str(folder / "c"), "", "C", "__base__", "adapter0"):
        with pytest.raises(UnknownModelError, match="no model"):
            registry.compose(name, IDS)
    with pytest.raises(UnknownModelError, match="did you mean 'keys'"):
        registry.compose("keys2", IDS)


def test_a_row_is_the_adapters_own(base, folder):
    registry = registry_of(base, folder)
    model = prompted(base, CONFIGS["PT-MoE selective probationary"], seed=2)
    ids = torch.tensor([IDS], device=DEVICE)
    spliced, prompts = model.compose(ids)
    composed = registry.compose("c", IDS)
    assert torch.equal(composed.row.embeds, spliced.embeds[0])
    assert composed.gate == prompts.routing.gate[0].tolist()
    assert composed.row.virtual == 6
    assert composed.row.prefix is None
    assert torch.equal(registry.compose("tiny", IDS).row.embeds, model.adapters.embedding(ids[0]))


def test_an_adapter_that_changes_each_rows_layers_is_served_where_the_base_is(base, folder):
    config = BY_ROW["PT-MoE with RoAd"]
    model = prompted(tiny("llama"), config, seed=3)
    model.save_pretrained(folder / "rows")
    prompted(tiny("llama"), config.replace(target_modules=["q_proj"])).save_pretrained(folder / "rows of q_proj")
    registry = Registry(PromptedCausalLM(base).adapters, folder, base="tiny")
    composed = registry.compose("rows", IDS)
    _, prompts = model.compose(torch.tensor([IDS], device=DEVICE))
    (numbers,), (expected,) = composed.row.changes.numbers.values(), prompts.changes.numbers.values()
    assert torch.equal(numbers, expected)
    assert registry.compose("c", IDS).row.changes is None
    assert registry.compose("rows of q_proj", IDS).row.changes.numbers.keys().isdisjoint(composed.row.changes.numbers)
    prompted(tiny("llama"), METHODS["lora"](rank=2)).save_pretrained(folder / "lora")
    registry.scan(settled=True)
    with pytest.raises(UnknownModelError, match="a lora adapter, which needs a base model of its own"):
        registry.compose("lora", IDS)
    with pytest.raises(UnknownModelError, match="a pt-moe-road adapter, which needs its base model's layers"):
        registry_of(base, folder).compose("rows", IDS)


def test_a_broken_adapter_is_listed_and_the_rest_served(base, folder, caplog):
    shutil.copytree(folder / "c", folder / "cut")
    (folder / "cut" / "adapter_model.safetensors").write_bytes(b"123")
    shutil.copytree(folder / "c", folder / "gone")
    (folder / "gone" / "adapter_model.safetensors").unlink()
    prompted(tiny("llama", seed=9), CONFIGS["PT"]).save_pretrained(folder / "foreign")
    config = folder / "foreign" / "adapter_config.json"
    named = {**json.loads(config.read_text()), "base_model_name_or_path": "/home/somebody/bases/other"}
    config.write_text(json.dumps(named))
    prompted(tiny("llama"), METHODS["lora"](rank=2)).save_pretrained(folder / "lora")
    prompted(tiny("llama"), CONFIGS["PT"]).save_pretrained(folder / "tiny")
    (folder / "empty").mkdir()
    (folder / "file").write_text("no adapter")
    registry = registry_of(base, folder)
    registry.fill()
    assert registry.names() == ["tiny", "a.b", "c", "keys"]
    errors = {name: about["error"] for name, about in registry.listing().items() if "error" in about}
    assert errors.keys() == {"cut", "gone", "foreign", "lora", "tiny"}
    assert all(f"adapter {name!r} is skipped: {error}" in caplog.text for name, error in errors.items())
    assert "trained on another base (other) than" in errors["foreign"]
    assert "needs its base model's layers" in errors["lora"]
    assert "name of the base" in errors["tiny"]
    assert not any(str(folder) in error for error in errors.values())
    with pytest.raises(UnknownModelError, match="cannot be served"):
        registry.compose("cut", IDS)


REFUSALS = ["ptmoe.adapters.folder.safe_open", "ptmoe.adapters.folder.read_json", "pathlib.Path.read_bytes"]


@pytest.mark.parametrize("place", REFUSALS)
def test_what_the_system_could_not_read_is_tried_again(place, base, folder, monkeypatch):
    registry, tries = registry_of(base, folder), []

    def refuse(*_, **__):
        tries.append(place)
        raise OSError(errno.EMFILE, "Too many open files")

    now = time.monotonic()
    monkeypatch.setattr(registry_module.time, "monotonic", lambda: now)
    with monkeypatch.context() as patched:
        patched.setattr(place, refuse)
        for _ in range(2):
            with pytest.raises(UnavailableError, match=r"'c' cannot be served: .*Too many open files") as refused:
                registry.compose("c", IDS)
            assert str(folder) not in str(refused.value)
    assert len(tries) == 1, "a moment later it is not worth a look"
    assert "error" in registry.listing()["c"]
    assert registry.names() == ["tiny", "a.b", "keys"]
    now += 2 * registry_module.POLL
    assert torch.equal(registry.compose("c", IDS).row.embeds, registry_of(base, folder).compose("c", IDS).row.embeds)
    assert "error" not in registry.listing()["c"]
    assert "c" in registry.names()


@pytest.mark.parametrize("written", [b"123", None], ids=["cut", "whole"])
def test_files_that_changed_since_the_last_look_are_not_read_as_if_they_were_settled(base, folder, written):
    registry = registry_of(base, folder)
    prompted(tiny("llama"), CONFIGS["PT"], seed=3).save_pretrained(folder / "c")
    if written is not None:
        (folder / "c" / "adapter_model.safetensors").write_bytes(written)
    with pytest.raises(UnavailableError, match="may still be written"):
        registry.compose("c", IDS)
    prompted(tiny("llama"), CONFIGS["PT"], seed=4).save_pretrained(folder / "c")
    registry.scan()
    registry.scan()
    assert torch.equal(registry.compose("c", IDS).row.embeds, registry_of(base, folder).compose("c", IDS).row.embeds)
    assert not registry.adapters.encoders.keys() - {registry.ready("c").key}


def test_an_adapter_that_one_thread_could_read_is_served_though_another_could_not(base, folder, monkeypatch):
    registry = registry_of(base, folder)
    load = registry.adapters.load

    def fails_while_another_reads(*arguments):
        monkeypatch.setattr(registry.adapters, "load", load)
        registry.ready("c")
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(registry.adapters, "load", fails_while_another_reads)
    assert registry.compose("c", IDS).expert is not None
    assert "c" in registry.names()


def test_the_folder_is_followed(base, folder):
    registry = registry_of(base, folder)
    before = registry.compose("c", IDS).row.embeds
    prompted(tiny("llama"), CONFIGS["PT"], seed=3).save_pretrained(folder / "new")
    shutil.rmtree(folder / "keys")
    shutil.rmtree(folder / "c")
    prompted(tiny("llama"), CONFIGS["PT"], seed=4).save_pretrained(folder / "c")
    registry.scan()  # it may be half written
    assert registry.names() == ["tiny", "a.b", "c"]
    assert torch.equal(registry.compose("c", IDS).row.embeds, before)
    registry.scan()
    assert registry.names() == ["tiny", "a.b", "c", "new"]
    after = registry.compose("c", IDS)
    assert after.row.virtual == 5
    assert after.row.prefix != registry.compose("new", IDS).row.prefix
    assert len(registry.adapters.encoders) == 2


def test_an_adapter_is_withdrawn_and_added_by_name(base, folder):
    registry = registry_of(base, folder)
    registry.withdraw("c")
    with pytest.raises(UnknownModelError):
        registry.compose("c", IDS)
    registry.scan(settled=True)
    registry.fill()
    assert registry.names() == ["tiny", "a.b", "keys"]
    assert not registry.listing()["c"]["in_memory"]
    registry.add("c")
    assert registry.compose("c", IDS).expert is not None
    with pytest.raises(UnknownModelError):
        registry.add("nothing")
    prompted(tiny("llama"), CONFIGS["PT"], seed=3).save_pretrained(folder / "new")
    registry.add("new")
    assert "new" in registry.names()


def test_adding_one_adapter_believes_nothing_of_another_that_is_being_written(base, folder):
    registry = registry_of(base, folder)
    before = registry.compose("c", IDS).row.embeds
    (folder / "c" / "adapter_model.safetensors").write_bytes(b"123")
    for name in ("keys", "a.b"):
        prompted(tiny("llama"), CONFIGS["PT"], seed=3).save_pretrained(folder / name)
        registry.add(name)
    registry.scan()
    assert torch.equal(registry.compose("c", IDS).row.embeds, before)
    assert registry.compose("keys", IDS).row.virtual == 5


def test_a_look_that_is_under_way_does_not_take_back_what_is_added(base, folder, monkeypatch):
    registry = registry_of(base, folder)
    find, looked, added = registry._find, threading.Event(), threading.Event()

    def slow():
        found = find()
        looked.set()
        added.wait(0.5)
        return found

    monkeypatch.setattr(registry, "_find", slow)
    polling = threading.Thread(target=registry.scan)
    polling.start()
    looked.wait()
    monkeypatch.setattr(registry, "_find", find)
    prompted(tiny("llama"), CONFIGS["PT"], seed=3).save_pretrained(folder / "new")
    registry.add("new")
    added.set()
    polling.join()
    assert "new" in registry.names()


MENDED = {  # what is wrong with an adapter, and how that is put right without a change of its two files
    "a pickle beside it": (lambda one: (one / "x.bin").touch(), lambda one: (one / "x.bin").unlink()),
    "no YAML": (lambda one: (one / "config.yaml").write_text("chat: ["), lambda one: (one / "config.yaml").unlink()),
}


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize(("spoil", "mend"), MENDED.values(), ids=MENDED)
def test_an_adapter_that_was_mended_is_served_again(base, folder, spoil, mend, at_once):
    spoil(folder / "c")
    registry = registry_of(base, folder)
    with suppress(UnknownModelError):
        registry.compose("c", IDS)
    assert "c" not in registry.names()
    mend(folder / "c")
    if at_once:
        registry.add("c")
    else:
        registry.scan()
        registry.scan()
    assert registry.compose("c", IDS).expert is not None


def test_how_a_run_was_trained_is_read_again_when_its_config_comes_late(base, folder):
    registry = registry_of(base, folder)
    assert registry.ready("c").chat is None
    (folder / "c" / "config.yaml").write_text("chat: false\n")
    registry.scan()
    registry.scan()
    assert registry.ready("c").chat is False


def test_an_adapter_may_be_called_adapter(base, folder):
    registry = registry_of(base, folder)
    shutil.copytree(folder / "c", folder / "adapter")
    registry.scan(settled=True)
    assert registry.names() == ["tiny", "a.b", "adapter", "c", "keys"]


@pytest.mark.parametrize("gone", ["work", "work/adapters"])
def test_a_folder_that_is_gone_is_never_looked_for_on_the_hub(base, folder, gone, tmp_path_factory, monkeypatch):
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))
    shutil.copytree(folder, "work/adapters")
    registries = [registry_of(base, "work/adapters")]
    monkeypatch.chdir("work")
    registries += [registry_of(base, "adapters")]
    monkeypatch.chdir("..")
    shutil.move(gone, "elsewhere")
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *name, **_: asked.append(name))
    for registry in registries:
        registry.scan()
        with pytest.raises(UnknownModelError):
            registry.compose("c", IDS)
    assert not asked


def test_a_name_that_is_no_text_can_be_listed(base, folder):
    os.rename(folder / "c", os.fsencode(folder) + b"/caf\xe9")
    listing = registry_of(base, folder).listing()
    assert "rename its folder" in json.loads(json.dumps(listing, ensure_ascii=False).encode())["caf\\udce9"]["error"]


def test_the_base_is_neither_added_nor_withdrawn(base, folder):
    registry = registry_of(base, folder)
    for change in (registry.add, registry.withdraw):
        with pytest.raises(PtmoeError, match="'tiny' is the base"):
            change("tiny")


def test_the_watcher_survives_a_fault(base, folder, monkeypatch):
    monkeypatch.setattr("ptmoe.serve.registry.POLL", 0.01)
    registry = registry_of(base, folder)
    loads = []

    def load(*_):
        loads.append(None)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(registry.adapters, "load", load)
    registry.watch()
    until(lambda: len(loads) > 1)
    registry.stop()


def test_the_least_recently_used_make_room(base, folder):
    size = sum(value.numel() * 4 for value in prompted(base, CONFIGS["PT-MoE selective"]).encoder.state_dict().values())
    registry = registry_of(base, folder, memory=int(2.9 * size))
    registry.fill()
    assert size <= registry.bytes_in_memory <= 2 * size
    expected = {name: registry.compose(name, IDS).row.embeds for name in ("a.b", "c", "keys")}
    for name in ("c", "a.b", "keys", "c", "keys"):
        assert torch.equal(registry.compose(name, IDS).row.embeds, expected[name])
        assert registry.bytes_in_memory == 2 * size
    held = {name for name, about in registry.listing().items() if about["in_memory"]}
    assert held == {"c", "keys"}


def test_one_adapter_or_run_folder_is_served_under_its_name(base, folder):
    assert registry_of(base, folder / "c").names() == ["tiny", "c"]
    shutil.move(folder / "c", folder / "run" / "adapter")
    (folder / "run" / "config.yaml").write_text("chat: true\n")
    registry = registry_of(base, folder / "run")
    assert registry.names() == ["tiny", "run"]
    assert registry.ready("run").chat is True


def test_the_watcher_reads_and_follows(base, folder, monkeypatch):
    monkeypatch.setattr("ptmoe.serve.registry.POLL", 0.05)
    registry = registry_of(base, folder)
    registry.watch()
    prompted(tiny("llama"), CONFIGS["PT"], seed=3).save_pretrained(folder / "new")
    end = time.monotonic() + 10
    while not registry.listing().get("new", {}).get("in_memory"):
        assert time.monotonic() < end
        time.sleep(0.02)
    registry.stop()


def test_what_is_hidden_does_not_choose_the_base(folder):
    for name, base in (("a.b", "shown"), (".old", "hidden")):
        shutil.copytree(folder / "c", folder / name, dirs_exist_ok=True)
        config = folder / name / "adapter_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": base}))
    assert base_of(folder, None, None) == ("shown", None)


MEMORY = """
import sys
import psutil
import torch
from torch import nn
from ptmoe.models.adapter_set import AdapterSet
from ptmoe.serve.registry import Registry
matrix = torch.load(sys.argv[2])
registry = Registry(AdapterSet(nn.Embedding.from_pretrained(matrix)), None, base="base")
registry.folder = __import__("pathlib").Path(sys.argv[1])
registry.scan(settled=True)
registry.compose("0", [1, 2, 3])
process, before = psutil.Process(), registry.bytes_in_memory
resident = process.memory_info().rss
registry.fill()
print((process.memory_info().rss - resident) / (registry.bytes_in_memory - before))
"""


@pytest.mark.slow
def test_adapters_take_little_more_than_their_bytes(tmp_path):
    base = tiny("llama", hidden_size=2048, num_attention_heads=4)
    config = METHODS["pt-moe"](num_virtual_tokens=40, num_experts=2, rank=36)
    prompted(base, config).save_pretrained(tmp_path / "adapters" / "0")
    for index in range(1, 1500):
        shutil.copytree(tmp_path / "adapters" / "0", tmp_path / "adapters" / str(index))
    torch.save(base.get_input_embeddings().weight.detach().clone(), tmp_path / "matrix")
    made = subprocess.run(
        [sys.executable, "-c", MEMORY, tmp_path / "adapters", tmp_path / "matrix"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert float(made.stdout) <= 1.1
