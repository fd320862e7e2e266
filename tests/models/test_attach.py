"""Adapters on a base: what becomes active, what trains, and a run loaded in one call."""

import pytest
import torch
from accelerate import cpu_offload

import ptmoe
from ptmoe.errors import PtmoeError
from ptmoe.methods import METHODS, method_named
from ptmoe.methods.weights import features_of
from ptmoe.models.attach import load_run
from ptmoe.models.bases import load_base, place
from ptmoe.models.decoding import Decoder
from ptmoe.models.elsewhere import ELSEWHERE
from testing.architectures import HIDDEN
from testing.bases import CONFIGS, prompted, tiny, tiny_llama, tokens


def test_an_adapter_that_is_loaded_beside_another_is_neither_active_nor_training(base, tmp_path):
    """As in peft: serving code adds adapters while another one trains."""
    prompted(base, CONFIGS["DPT"]).save_pretrained(tmp_path)
    model = prompted(base, CONFIGS["PT"], name="trained").train()
    ids = tokens(6)[None]
    labels = ids.clone()
    labels[:, :3] = -100
    model(ids, labels=labels).loss.backward()
    gradient = model.encoder.prompt.grad.clone()
    ptmoe.load_adapter(model, tmp_path, name="added")
    assert model.active_adapter == "trained"
    assert model.encoders["added"].training
    assert torch.equal(model.encoder.prompt.grad, gradient)
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == [
        "encoders.trained.prompt"
    ]
    model.set_adapter("added")
    assert not model.encoders["trained"].prompt.requires_grad
    assert all(parameter.requires_grad for parameter in model.encoder.parameters())


@pytest.mark.parametrize("method", ["lora", "ft"])
def test_a_model_whose_base_another_model_has_changed_says_so(method):
    base = tiny_llama()
    model, ids = prompted(base, CONFIGS["PT"]).eval(), tokens(6)[None]
    expected = model(ids).logits
    other = ptmoe.attach(base, ptmoe.METHODS[method]())
    other(ids)
    for use in (model, lambda ids: model.generate(ids, max_new_tokens=1), lambda _: Decoder(model)):
        with pytest.raises(ptmoe.PtmoeError, match=f"this base holds a {method} adapter of another model"):
            use(ids)
    with pytest.raises(ptmoe.PtmoeError, match="of another model"):
        ptmoe.attach(model, CONFIGS["DPT"], adapter_name="more")
    if method != "ft":
        other.delete_adapter("default")
        assert torch.equal(model(ids).logits, expected)


def test_saving_takes_no_option_that_it_would_ignore(tmp_path):
    model = prompted(tiny_llama(), CONFIGS["PT"])
    with pytest.raises(ptmoe.PtmoeError, match="no 'selected_adapters'; name one adapter with adapter_name"):
        model.save_pretrained(tmp_path / "a", selected_adapters=["b"])
    with pytest.raises(ptmoe.PtmoeError, match="no 'adapter_nam'; did you mean 'adapter_name'"):
        model.save_pretrained(tmp_path / "a", adapter_nam="b")
    model.save_pretrained(tmp_path / "a", is_main_process=False, safe_serialization=True)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("kind", ["LoraConfig", "IA3Config"])
def test_an_adapter_of_peft_around_one_of_ours_is_refused_as_one_would_not_be_saved(kind):
    import peft

    with pytest.raises(ptmoe.PtmoeError, match="peft has put an adapter of its own into this model's base"):
        peft.get_peft_model(prompted(tiny_llama(), CONFIGS["PT"]), getattr(peft, kind)())


def test_names_that_other_libraries_have_say_what_to_use_here():
    model = prompted(tiny_llama(), CONFIGS["PT"])
    assert model.active_adapters == ["default"]
    for name in ELSEWHERE:
        with pytest.raises(AttributeError, match=f"has no {name}: "):
            getattr(model, name)
        assert not hasattr(type(model), name) or name == "peft_config"
    with pytest.raises(ptmoe.PtmoeError, match=r"attach\(model, config, adapter_name='b'\)"):
        model.add_adapter("b", CONFIGS["PT"])
    with pytest.raises(ptmoe.PtmoeError, match=r"no adapter \['default'\]; did you mean 'default'"):
        model.set_adapter(["default"])
    with pytest.raises(ptmoe.PtmoeError, match="adapter_names='default': give a list"):
        model(tokens(6)[None], adapter_names="default")


def test_copies_for_several_gpus_in_one_process_are_refused():
    with pytest.raises(ptmoe.PtmoeError, match="start one for each with torchrun"):
        prompted(tiny_llama(), CONFIGS["PT"])._replicate_for_data_parallel()  # as nn.DataParallel calls it


def test_where_parts_of_the_base_are_is_said_as_the_base_says_it():
    base = tiny_llama()
    model = prompted(base, CONFIGS["PT"])
    assert not hasattr(model, "hf_device_map")
    base.hf_device_map = {"": "cpu"}
    assert model.hf_device_map == {"": "cpu"}


@pytest.mark.parametrize("method", ["lora", "ft"])
def test_what_a_method_trains_in_a_base_on_several_devices_stays_with_its_layers(method):
    base = tiny_llama()
    base.model.layers[1].to("meta")
    model = ptmoe.attach(base, METHODS[method](), check=False)
    for name, parameter in model.encoder.named_parameters():
        assert (parameter.device.type == "meta") == (".layers.1." in name)


@pytest.mark.parametrize("method", ["hydralora", "lotr", "msplora", "compacter", "bilora"])
def test_a_part_is_where_its_module_is_and_what_parts_share_comes_to_it(method):
    base = tiny_llama()
    base.model.layers[1].to("meta")
    model = ptmoe.attach(base, METHODS[method](), check=False).train()
    embeds, mask = torch.ones(2, 3, HIDDEN, device="meta"), torch.ones(2, 3, dtype=torch.bool, device="meta")
    for module, part in model.encoder.targets:
        at = module.weight.device
        vars(part)["trains_vectors"] = torch.ones(2, dtype=torch.bool, device=base.device)  # bilora's
        assert {value.device for value in part.state_dict().values()} == {at}
        x = torch.ones(2, 3, features_of(module)[0], device=at)
        assert part(x, module(x), module).device == at
    assert {value.device for value in model.encoder.state_dict().values()} == {base.device, embeds.device}
    prompt = model.encoder(embeds, mask)
    assert prompt.auxiliary_loss is None or prompt.auxiliary_loss.device == embeds.device


@pytest.mark.parametrize("method", ["sorsa", "kasa"])
def test_a_loss_of_what_is_on_several_devices_is_where_the_embedding_is(method):
    base = tiny_llama()
    model = ptmoe.attach(base, METHODS[method]()).train()
    base.model.layers[1].to("meta")
    embeds, mask = torch.ones(2, 3, HIDDEN, device="meta"), torch.ones(2, 3, dtype=torch.bool, device="meta")
    assert model.encoder(embeds, mask).auxiliary_loss.device == embeds.device


def offloaded(architecture="llama"):
    """A base whose layers are brought when they are needed."""
    base = tiny(architecture)
    cpu_offload(base.model.layers, execution_device=base.device)
    return base


@pytest.mark.parametrize("method", ["lora", "ft", "peft:ln-tuning"])
def test_a_method_within_offloaded_layers_is_refused_and_the_base_left_as_it_was(method, tmp_path):
    config, ids = method_named(method)(), tokens(6)[None]
    base, names = offloaded(), [name for name, _ in tiny_llama().named_parameters()]
    expected = base(ids).logits
    ptmoe.attach(tiny_llama(), config).save_pretrained(tmp_path)
    for put in (lambda: ptmoe.attach(base, config), lambda: ptmoe.load_adapter(base, tmp_path)):
        with pytest.warns(UserWarning, match="offloaded"), pytest.raises(PtmoeError, match="some are offloaded: load"):
            put()
    assert [name for name, _ in base.named_parameters()] == names
    assert torch.equal(base(ids).logits, expected)


def test_parts_of_an_offloaded_layer_are_where_it_computes(tmp_path):
    model, ids = prompted(tiny_llama(), METHODS["hydralora"]()), tokens(6)[None]
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="offloaded"):
        again = ptmoe.load_adapter(offloaded(), tmp_path)
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_an_offloaded_bias_that_a_part_reads_is_refused_in_words(tmp_path):
    ptmoe.attach(tiny("qwen2"), METHODS["edora"](rank=2)).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="offloaded"):
        model = ptmoe.load_adapter(offloaded("qwen2"), tmp_path)
    with pytest.raises(PtmoeError, match="edora takes a module's bias off its output"):
        model(tokens(6)[None])


def test_the_first_adapter_is_active(tmp_path):
    prompted(tiny_llama(), CONFIGS["PT"]).save_pretrained(tmp_path)
    assert ptmoe.load_adapter(tiny_llama(), tmp_path, name="only").active_adapter == "only"


def test_a_run_is_loaded_with_its_base_tokenizer_and_chat_setting(tmp_path):
    base, _ = load_base("nano")
    model = ptmoe.attach(base, ptmoe.PTConfig(num_virtual_tokens=4))
    model.save_pretrained(tmp_path / "adapter")
    loaded = load_run(tmp_path, device="cpu")
    assert loaded.chat is None
    assert not loaded.model.training
    assert loaded.model.name_or_path == "nano"
    (tmp_path / "config.yaml").write_text("chat: true\n")
    loaded = load_run(tmp_path, dtype="bfloat16", device="cpu")
    assert loaded.chat is True
    assert loaded.model.dtype == torch.bfloat16
    ids = loaded.tokenizer("2 and 3", return_tensors="pt")["input_ids"]
    assert loaded.model(ids).logits.shape[1] == ids.shape[1]


def test_a_device_that_is_not_there_is_refused_in_words():
    assert place("cpu") == torch.device("cpu")
    with pytest.raises(ptmoe.PtmoeError, match="device 'nowhere' cannot be used on this machine"):
        place("nowhere")
    with pytest.raises(ptmoe.PtmoeError, match="device 'nowhere' cannot be used on this machine"):
        load_base("nano", device="nowhere")


def test_by_default_commands_use_the_accelerator(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("meta"))
    assert place() == torch.device("meta")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    assert place() == torch.device("cpu")
