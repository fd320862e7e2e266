"""Bases that rotate all positions by the longest row's length: a row gets in a batch what it gets alone."""

import pytest
import tabulate_bases
import torch
from torch.testing import assert_close

import ptmoe
from ptmoe.errors import PtmoeError
from ptmoe.methods import METHODS
from ptmoe.models import rotation
from ptmoe.models.causal import PromptedCausalLM
from ptmoe.models.decoding import Decoder
from testing.architectures import ARCHITECTURES
from testing.bases import CONFIGS, DEVICE, batch, prompted, tiny, tokens

SWITCH = 12  # of the longrope bases
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": SWITCH, "factor": 4.0}
LONG |= {"short_factor": [1.0] * 4, "long_factor": [1.0, 3.0, 9.0, 27.0]}
SCALED = {"rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": SWITCH}
ROTATIONS = {
    "longrope": LONG,
    "dynamic": SCALED | {"rope_type": "dynamic"},
    "linear": SCALED | {"rope_type": "linear"},
    "yarn": SCALED | {"rope_type": "yarn"},
    "llama3": SCALED | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0},
}
SWITCHING = ["llama", *tabulate_bases.LONG]
KINDS_OF_METHOD = {
    "PT": CONFIGS["PT"],
    "PT-MoE": CONFIGS["PT-MoE selective"],
    "LoRA": METHODS["lora"](rank=2, target_modules=["o_proj"]),
    "prefix": METHODS["prefix-tuning"](num_virtual_tokens=3),
}
PAIRS = [  # a sliding window, as those have by default, does not keep a prefix
    pytest.param(kind, method, marks=[pytest.mark.slow] * (kind not in ("llama", "phi3")), id=f"{kind}-{method}")
    for kind in SWITCHING
    for method in KINDS_OF_METHOD
    if kind == "llama" or method != "prefix"
]
# On both sides of 12 positions, with a prompt and without.
ROWS = [tokens(length, length) % 80 + 3 for length in (20, 3, 7, 14, 12, 13)]
LEFTS = [0, 17, 5, 2, 0, 7]
NEW = 9  # tokens, that carry the short rows past 12


def switching(kind):
    """A base with a switch at 12 positions."""
    base = tiny(rope_parameters=LONG) if kind == "llama" else tabulate_bases.tiny_model(kind).to(DEVICE)
    base.generation_config.eos_token_id = None
    return base


def base_of(kind):
    return tiny(kind) if kind in ARCHITECTURES else tiny(rope_parameters=ROTATIONS[kind])


def without_a_cache(model, row, new):
    whole = row
    for _ in range(new):
        readable = torch.arange(len(whole), device=DEVICE)[None] < len(row)
        with torch.no_grad():
            whole = torch.cat([whole, model(whole[None], input_mask=readable).logits[0, -1:].argmax(1)])
    return whole[len(row) :].tolist()


def alone_and_together(model):
    """Each row's logits in a batch, and its logits alone."""
    ids, mask = batch(ROWS, LEFTS)
    with torch.no_grad():
        logits = model(ids, mask).logits
        for row, left, given in zip(ROWS, LEFTS, logits, strict=True):
            yield given[left : left + len(row)], model(row[None]).logits[0]


@pytest.mark.parametrize("kind", [*ARCHITECTURES, *ROTATIONS])
def test_in_every_architecture_and_rotation_a_row_has_the_logits_that_it_has_alone(kind):
    for together, alone in alone_and_together(prompted(base_of(kind), CONFIGS["PT"])):
        assert_close(together, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("kind", "method"), PAIRS)
def test_rows_on_both_sides_of_a_switch_have_the_logits_and_the_loss_of_each_alone(kind, method, monkeypatch):
    model = prompted(switching(kind), KINDS_OF_METHOD[method])
    for together, alone in alone_and_together(model):
        assert_close(together, alone, atol=1e-4, rtol=1e-4)
    ids, mask = batch(ROWS, LEFTS)
    labels = torch.where(mask.bool() & (mask.cumsum(1) > 2), ids, -100)
    labels[2] = -100  # nothing of this row is supervised
    total = int((labels != -100).sum())
    losses, gradients = [], []
    for packing in (False, None):
        model.packing = packing
        model.zero_grad()
        losses.append(model(ids, mask, labels=labels, skip_logits=True).loss)
        losses[-1].backward()
        gradients.append([one.grad.clone() for one in model.encoder.parameters() if one.grad is not None])
    losses.append(model(ids, mask, labels=labels).loss)
    model.zero_grad()
    real = [slice(left, left + len(row)) for row, left in zip(ROWS, LEFTS, strict=True)]
    parts = [
        model(row[None], labels=labels[index : index + 1, place], num_items_in_batch=total).loss
        for index, (row, place) in enumerate(zip(ROWS, real, strict=True))
        if index != 2
    ]
    sum(parts).backward()
    for loss in losses:
        assert_close(loss, sum(parts), atol=1e-5, rtol=1e-5)
    expected = [one.grad for one in model.encoder.parameters() if one.grad is not None]  # of Phi 4's vision tower: none
    for found in gradients:
        for one, alone in zip(found, expected, strict=True):
            assert_close(one, alone, atol=1e-4, rtol=1e-3)
    monkeypatch.setattr(model.path, "switches", ())
    off = [float((together - alone).abs().max()) for together, alone in alone_and_together(model)]
    assert max(off) > 1e-2, "no row is rotated by another: tells nothing"


def test_hidden_states_of_rows_on_both_sides_come_back_in_order():
    model = prompted(switching("llama"), CONFIGS["PT"])
    ids, mask = batch(ROWS, LEFTS)
    with torch.no_grad():
        together = model(ids, mask, output_hidden_states=True).hidden_states
        for index, (row, left) in enumerate(zip(ROWS, LEFTS, strict=True)):
            alone = model(row[None], output_hidden_states=True).hidden_states
            for found, expected in zip(together, alone, strict=True):
                assert_close(found[index, left : left + 5 + len(row)], expected[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("kind", "method"), PAIRS)
@pytest.mark.ci
def test_a_row_that_passes_a_switch_is_generated_as_without_a_cache(kind, method, monkeypatch):
    model = prompted(switching(kind), KINDS_OF_METHOD[method]).eval()
    expected = [without_a_cache(model, row, NEW) for row in ROWS]
    options = {"max_new_tokens": NEW, "pad_token_id": 0, "do_sample": False}
    ids, mask = batch(ROWS, LEFTS)
    assert model.generate(ids, mask, **options)[:, ids.shape[1] :].tolist() == expected
    same = torch.stack([ROWS[1], ROWS[1].flip(0)])  # of one length, they pass it together
    made = model.generate(same, **options)[:, 3:].tolist()
    assert made == [expected[1], without_a_cache(model, same[1], NEW)]
    rows, experts = [row.tolist() for row in ROWS], [0] * len(ROWS)
    if method == "PT-MoE":
        experts = [int(model.route(row[None]).gate.argmax()) for row in ROWS]
    assert Decoder(model)(rows, experts, max_new_tokens=NEW, ended=lambda _: False) == expected
    if (kind, method) in (("llama", "PT"), ("phi3", "PT"), ("phimoe", "PT-MoE")):
        # Phi's own `generate` reads again at a switch that does not count virtual tokens.
        monkeypatch.setattr(model.path, "switches", ())
        assert [model.generate(row[None], **options)[0, len(row) :].tolist() for row in ROWS] != expected


@pytest.mark.ci
def test_the_first_tokens_are_the_same_however_many_are_asked_for():
    """Also where the last one alone is read past a switch."""
    model = prompted(switching("llama"), KINDS_OF_METHOD["PT"]).eval()
    decoder = Decoder(model)
    for row in (tokens(length, length) % 80 + 3 for length in range(2, 8)):
        expected = without_a_cache(model, row, NEW)
        for new in range(1, NEW + 1):
            assert decoder([row.tolist()], [0], max_new_tokens=new, ended=lambda _: False) == [expected[:new]]
            made = model.generate(row[None], max_new_tokens=new, pad_token_id=0)
            assert made[0, len(row) :].tolist() == expected[:new]


def test_so_is_one_of_a_base_that_takes_inputs_for_each_layer(monkeypatch):
    rotations = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}, "full_attention": LONG}
    own = tabulate_bases.OWN["gemma3n_text"] | {"rope_parameters": rotations}
    monkeypatch.setitem(tabulate_bases.OWN, "gemma3n_text", own)
    model = prompted(switching("gemma3n_text"), CONFIGS["PT"]).eval()
    assert model.path.switches == (SWITCH,)
    expected = [without_a_cache(model, row, NEW) for row in ROWS[1:3]]
    made = model.generate(*batch(ROWS[1:3], LEFTS[1:3]), max_new_tokens=NEW, pad_token_id=0, do_sample=False)
    assert made[:, -NEW:].tolist() == expected


@pytest.mark.parametrize("rotation", ["default", "longrope"])
def test_a_base_whose_user_prepares_its_inputs_keeps_that(rotation):
    base = tiny() if rotation == "default" else switching("llama")
    lengths = []

    def prepare(input_ids, own=base.prepare_inputs_for_generation, **options):
        lengths.append(input_ids.shape[1])
        return own(input_ids, **options)

    model = prompted(base, CONFIGS["PT"]).eval()
    base.prepare_inputs_for_generation = prepare
    for _ in range(2):
        model.generate(ROWS[1][None], max_new_tokens=NEW, min_new_tokens=NEW, pad_token_id=0, do_sample=False)
    assert base.prepare_inputs_for_generation is prepare
    assert lengths == 2 * list(range(3, 3 + NEW))


@pytest.mark.parametrize("kind", SWITCHING)
@pytest.mark.ci
def test_beams_that_pass_a_switch_are_scored_as_their_tokens_are_without_a_cache(kind):
    model = prompted(switching(kind), CONFIGS["PT"]).eval()
    asked = {"num_beams": 3, "return_dict_in_generate": True, "output_scores": True, "length_penalty": 0.0}
    row = ROWS[1]
    made = model.generate(row[None], max_new_tokens=NEW, do_sample=False, pad_token_id=0, **asked)
    expected = 0.0
    for length in range(len(row), len(row) + NEW):
        with torch.no_grad():
            scores = model(made.sequences[:, :length]).logits[0, -1].log_softmax(0)
        expected += float(scores[made.sequences[0, length]])
    assert float(made.sequences_scores[0]) == pytest.approx(expected, abs=1e-4)


def test_beams_of_rows_that_pass_a_switch_are_read_again_behind_each_rows_own_prompt():
    model = prompted(switching("llama"), KINDS_OF_METHOD["PT-MoE"]).eval()
    rows = torch.stack([tokens(3, seed) for seed in range(4)])
    assert len(set(model.route(rows).gate.argmax(1).tolist())) > 1, "one expert takes all: tells nothing"
    options = {"max_new_tokens": NEW, "num_beams": 3, "pad_token_id": 0, "do_sample": False}
    for row, made in zip(rows, model.generate(rows, **options), strict=True):
        assert torch.equal(made, model.generate(row[None], **options)[0])


def test_rows_that_are_generated_apart_keep_their_adapters_and_the_tokens_that_decide_their_prompts():
    model = prompted(switching("llama"), KINDS_OF_METHOD["PT-MoE"], name="moe")
    model = prompted(model, CONFIGS["PT"], seed=2, name="pt").eval()
    names, options = ["moe", "pt"] * 3, {"max_new_tokens": NEW, "pad_token_id": 0, "do_sample": False}
    ids, mask = batch(ROWS, LEFTS)
    readable = mask * (mask.cumsum(1) <= 1)
    made = model.generate(ids, mask, input_mask=readable, adapter_names=names, **options)
    assert not torch.equal(made, model.generate(ids, mask, adapter_names=names, **options)), "tells nothing"
    for i, (row, name) in enumerate(zip(ROWS, names, strict=True)):
        first = readable[i, mask[i].bool()][None]
        alone = model.generate(row[None], input_mask=first, adapter_names=[name], **options)
        assert torch.equal(made[i, -NEW:], alone[0, -NEW:])


@pytest.mark.parametrize("several", [False, True])
def test_a_row_that_ends_before_others_is_filled_with_its_end_token_where_no_token_is_for_padding(several):
    base = switching("llama")
    model = prompted(base, CONFIGS["PT"]).eval()
    ids, mask = batch(ROWS[1:3], LEFTS[1:3])
    free = model.generate(ids, mask, max_new_tokens=NEW, pad_token_id=0, do_sample=False)[0]
    end, base.generation_config.pad_token_id = int(free[-NEW + 2]), None
    ends = [end, 1] if several else end
    made = model.generate(ids, mask, max_new_tokens=NEW, do_sample=False, eos_token_id=ends)
    assert made[0].tolist() == [*free[: -NEW + 3].tolist(), *[end] * (NEW - 3)]


def test_rows_on_one_side_stay_one_batch():
    model = prompted(switching("llama"), CONFIGS["PT"])
    passes = []
    handle = model.base_model.register_forward_pre_hook(lambda *_: passes.append(1))
    for rows, expected in ((ROWS[1:3], 1), ([ROWS[0], ROWS[3]], 1), (ROWS, 2)):  # 8 and 12 positions; 25 and 19; both
        passes.clear()
        model(*batch(rows, [0] * len(rows)))
        assert len(passes) == expected
    handle.remove()


@pytest.mark.parametrize("kind", SWITCHING)
@pytest.mark.ci
def test_a_rotation_that_the_config_does_not_name_is_refused(kind, monkeypatch):
    base = switching(kind)
    PromptedCausalLM(base)
    base.config.bos_token_id = 3  # another configuration, which has not been checked
    monkeypatch.setattr("ptmoe.models.input_path.switches", lambda base: ())
    with pytest.raises(PtmoeError, match="depend on a row's length between 5 and 64 positions"):
        PromptedCausalLM(base)
    monkeypatch.setattr("ptmoe.models.input_path.switches", lambda base: (SWITCH + 1,))
    with pytest.raises(PtmoeError, match="depend on a row's length between 5 and 13 positions"):
        PromptedCausalLM(base)


def test_a_sharded_base_is_refused_rows_on_both_sides(monkeypatch):
    model = prompted(switching("llama"), CONFIGS["PT"])
    monkeypatch.setattr("ptmoe.models.causal.is_sharded", lambda base: True)
    model(*batch(ROWS[1:3], [0, 0]))
    with pytest.raises(PtmoeError, match=r"sharded over processes.*rows of up to 12 positions and longer ones apart"):
        model(*batch(ROWS, LEFTS))


def test_a_row_as_long_as_a_switch_is_before_it():
    assert [rows.tolist() for rows in rotation.sides(torch.tensor([13, 12, 1, 40, 20]), (12, 20))] == [
        [1, 2],
        [0, 4],
        [3],
    ]
    assert ptmoe.attach(tiny(), ptmoe.PTConfig(num_virtual_tokens=2)).path.switches == ()
