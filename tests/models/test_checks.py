"""A base is tried out when it is wrapped: from embeddings it gives what it gives from token ids, or it is refused."""

import sys
import time
import warnings
from functools import partial

import peft
import pytest
import tabulate_bases
import torch
import transformers
from accelerate import cpu_offload
from torch.testing import assert_close
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import ptmoe
from ptmoe.errors import PtmoeError
from ptmoe.models import checks
from ptmoe.models.causal import PromptedCausalLM
from ptmoe.models.decoding import Decoder
from testing.bases import CONFIGS, DEVICE, PT_MOE, batch, prompted, tiny, tiny_llama, tokens


def tiny_of(kind):
    base = tabulate_bases.tiny_model(kind).to(DEVICE)
    base.generation_config.forced_eos_token_id = None  # of BART: the last token, whatever the logits
    base.generation_config.eos_token_id = None
    return base


TYPES = tabulate_bases.model_types()
README = {"llama", "qwen2", "mistral", "gemma", "gemma2", "gpt2", "gpt_neox", "opt", "phi"}
# What keeps each from working as it is, and how it is carried: a multiplier, positions, inputs of layers, padding, a
# `generate` without the name.
CARRIED = {
    *("falcon_h1", "mvp", "roberta", "xlm-roberta", "gemma3n_text", "gemma4_text", "gemma4"),
    *("bart", "rwkv", "recurrent_gemma", "mamba", "bamba", "nemotron_h", "zamba2", "gemma3", "git"),
}
ROWS = [tokens(length, length) % 80 + 3 for length in (15, 4, 9)]  # beyond windows of 12 and chunks of 8
LEFTS = [0, 11, 3]


def own_logits(base, row):
    with torch.no_grad():
        return base(input_ids=row[None], use_cache=False).logits[0]


def greedy(base, row, new):
    """New tokens without a cache."""
    for _ in range(new):
        row = torch.cat([row, own_logits(base, row)[-1:].argmax(1)])
    return row[-new:].tolist()


def documented():
    """The rows of the table in docs/bases.md by model type."""
    lines = tabulate_bases.PAGE.read_text().split(tabulate_bases.MARK)[1].strip().splitlines()[2:]
    return {line.split(" | ")[0].removeprefix("| "): line for line in lines}


def test_the_docs_table_has_every_causal_class_of_transformers():
    classes = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    assert set(classes) - set(TYPES) - {"ptmoe"} == {kind for kind in classes if kind not in CONFIG_MAPPING} - {"ptmoe"}
    assert [line.split(" | ")[:2] for line in documented().values()] == [[f"| {kind}", classes[kind]] for kind in TYPES]


@pytest.mark.slow
@pytest.mark.parametrize("kind", TYPES)
def test_the_docs_table_says_what_the_check_finds(kind):
    row, written = tabulate_bases.row(kind), documented()[kind]
    # Why one is not built may lie with what is installed.
    assert written == row or (" | not built | " in row and " | not built | " in written)


@pytest.mark.slow
@pytest.mark.parametrize("kind", TYPES)
def test_every_causal_class_agrees_with_its_base_or_is_refused(kind):
    try:
        base = tiny_of(kind)
    except Exception as error:
        pytest.skip(f"cannot be built small: {error}"[:200])
    try:
        model = PromptedCausalLM(base)
    except PtmoeError:
        assert kind not in README | CARRIED
        return
    ids, mask = batch(ROWS, LEFTS)
    if model.path.chosen is not None:
        with pytest.raises(PtmoeError, match="a padded batch of 15 positions on a base whose attention chooses 8"):
            model(ids, mask)
        ids, mask = ROWS[0][None], torch.ones_like(ROWS[0])[None]
    with torch.no_grad():
        logits = model(ids, mask, adapter_names=["__base__"] * len(ids)).logits
    made = model.generate(*batch(ROWS, LEFTS), max_new_tokens=3, pad_token_id=0)
    for index, (row, left) in enumerate(zip(ROWS, LEFTS, strict=True)):
        if index < len(ids):
            expected = own_logits(base, row)
            scale = float(expected.abs().max())
            assert_close(logits[index, left : left + len(row)], expected, atol=1e-4 * scale, rtol=0)
        own = base.generate(row[None], attention_mask=torch.ones_like(row)[None], max_new_tokens=3, pad_token_id=0)[0]
        # RoBERTa's `generate` counts positions otherwise than its forward; Moshi's forgets what its forward still sees.
        assert made[index, len(ROWS[0]) :].tolist() in (own[len(row) :].tolist(), greedy(base, row, 3))
    model = prompted(base, CONFIGS["PT-MoE selective"])
    rows, experts = [row.tolist() for row in ROWS], [int(model.route(row[None]).gate.argmax()) for row in ROWS]
    decoded = Decoder(model)(rows, experts, max_new_tokens=3, ended=lambda _: False)
    for row, new in zip(ROWS, decoded, strict=True):
        assert model.generate(row[None], max_new_tokens=3, pad_token_id=0)[0, len(row) :].tolist() == new
    labels = torch.where(mask.bool(), ids, -100)
    labels[:, :13] = -100
    model.train()(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
    for parameter in model.encoder.parameters():
        assert bool(parameter.grad.isfinite().all())
        assert bool(parameter.grad.any())


QUICK = {"llama", "gpt2", "gemma3", "bart", "zamba", "falcon", "moss_transcribe_diarize", "roberta", "bamba"}
TUNERS = {"lora": ["rank"], "pissa": ["rank"], "eva": ["rank"], "corda": ["rank"], "hydralora": ["rank"], "ia3": [],
    "prefix-tuning": ["num_virtual_tokens"], "mept": ["num_virtual_tokens"]}  # fmt: skip


SLOWLY = [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in TYPES]


@pytest.mark.ci
@pytest.mark.parametrize("kind", SLOWLY)
def test_a_tuner_fits_a_class_or_is_refused_when_it_is_attached(kind, tmp_path):
    try:
        together = PromptedCausalLM(tiny_of(kind)).path.chosen is None
    except Exception:
        pytest.skip("no base")
    rows, lefts = (ROWS, LEFTS) if together else (ROWS[:1], LEFTS[:1])
    ids, mask = batch(rows, lefts)
    answers = mask.cumsum(1) * mask > 1  # all but each row's first token, which is the input
    examples = {"input_ids": ids, "attention_mask": mask, "labels": torch.where(answers, ids, -100)}
    for method, sizes in TUNERS.items():
        config = ptmoe.METHODS[method](**dict.fromkeys(sizes, 2))
        try:
            model = ptmoe.attach(tiny_of(kind), config, batches=[examples] if config.needs_batches else None)
        except PtmoeError:
            assert kind not in ("llama", "gpt2")
            continue
        assert not any(module.training for module in model.base_model.modules()), method
        model(**examples).loss.backward()
        weights = [parameter for parameter in model.encoder.parameters() if parameter.grad is not None]
        torch.optim.SGD(weights, 0.01).step()
        made = model.generate(ids, mask, max_new_tokens=3, pad_token_id=0)
        for index, row in enumerate(rows):
            alone = model.generate(row[None], max_new_tokens=3, pad_token_id=0)[0, len(row) :]
            assert torch.equal(made[index, ids.shape[1] :], alone), method
        model.save_pretrained(tmp_path / method)
        loaded = ptmoe.load_adapter(tiny_of(kind), tmp_path / method)
        with torch.no_grad():
            expected, found = (one(ids[:1], mask[:1]).logits for one in (model, loaded))
        assert_close(found, expected, atol=1e-4 * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize("kind", sorted(CARRIED))
@pytest.mark.ci
def test_a_row_behind_a_prompt_is_the_same_in_any_batch_in_training_and_in_generation(kind):
    model = prompted(tiny_of(kind), CONFIGS["PT-MoE selective"])
    ids, mask = batch(ROWS, LEFTS)
    labels = torch.where(mask.bool(), ids, -100)
    for index, (row, left) in enumerate(zip(ROWS, LEFTS, strict=True)):
        labels[index, : left + len(row) - 1] = -100
    with torch.no_grad():
        together = model(ids, mask).logits
        loss = model(ids, mask, labels=labels, skip_logits=True).loss
        losses = []
        made = model.generate(ids, mask, max_new_tokens=3, min_new_tokens=3, pad_token_id=0)
        for index, (row, left) in enumerate(zip(ROWS, LEFTS, strict=True)):
            alone = model(row[None]).logits[0]
            scale = float(alone.abs().max())
            assert_close(together[index, left : left + len(row)], alone, atol=1e-4 * scale, rtol=0)
            one = torch.full_like(row, -100)
            one[-1] = row[-1]
            losses.append(model(row[None], labels=one[None]).loss)
            new = made[index, ids.shape[1] :]
            one = slice(index, index + 1)  # with its padding
            assert torch.equal(model.generate(ids[one], mask[one], max_new_tokens=3, min_new_tokens=3)[0], made[index])
            whole = torch.cat([row, new])[None]
            readable = torch.arange(whole.shape[1], device=DEVICE)[None] < len(row)
            logits = model(whole, input_mask=readable).logits[0, len(row) - 1 : -1]
            chosen = logits.gather(1, new[:, None])[:, 0]
            logits[:, 2] = -torch.inf  # the end token, which min_new_tokens leaves out
            assert bool((chosen >= logits.max(1).values - 1e-4 * scale).all())
    assert_close(loss, torch.stack(losses).mean(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["gemma3n_text", "gemma4_text", "falcon_h1", "roberta", "bart"])
def test_beams_behind_a_prompt_are_those_of_each_row_alone(kind):
    model = prompted(tiny_of(kind), CONFIGS["PT"])
    ids, mask = batch(ROWS, LEFTS)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": 3, "pad_token_id": 0}
    made = model.generate(ids, mask, **options)
    for index, row in enumerate(ROWS):
        assert torch.equal(made[index, ids.shape[1] :], model.generate(row[None], **options)[0, len(row) :])


def test_blocks_that_are_counted_from_the_start_of_a_batch_are_those_of_each_row_alone():
    """MiniMax M3 chooses blocks of keys; padding on the left would move their bounds."""
    model = prompted(tiny_of("minimax_m3_vl_text"), CONFIGS["PT"])
    ids, mask = batch(ROWS, LEFTS)
    with torch.no_grad():
        logits = model(ids, mask).logits
        made = model.generate(ids, mask, max_new_tokens=3, pad_token_id=0)
        for index, (row, left) in enumerate(zip(ROWS, LEFTS, strict=True)):
            alone = model(row[None]).logits[0]
            assert_close(logits[index, left : left + len(row)], alone, atol=1e-4 * float(alone.abs().max()), rtol=0)
            alone = model.generate(row[None], max_new_tokens=3, pad_token_id=0)[0, len(row) :]
            assert torch.equal(made[index, ids.shape[1] :], alone)


def test_a_prompt_starts_from_what_the_base_makes_of_its_embeddings():
    base = tiny_of("falcon_h1")
    multiplier = base.config.embedding_multiplier
    prompt = ptmoe.attach(base, ptmoe.PTConfig(num_virtual_tokens=4)).encoder.prompt.detach()
    rows = base.get_input_embeddings().weight.detach() * multiplier
    assert bool((prompt[:, None] == rows).all(2).any(1).all())


def test_positions_that_start_later_leave_fewer():
    base = tiny_of("roberta")
    model = ptmoe.attach(base, ptmoe.PTConfig(num_virtual_tokens=4))
    usable = base.config.max_position_embeddings - 2
    model(torch.full((1, usable - 4), 7, device=DEVICE))
    with pytest.raises(PtmoeError, match=f"exceeds the base's {usable} positions"):
        model(torch.full((1, usable - 3), 7, device=DEVICE))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["llama", "mixtral", "falcon_h1", "gemma3n_text", "roberta", "bamba"])
@pytest.mark.ci
def test_half_precision_is_not_taken_for_a_difference(kind, dtype):
    base = tiny_of(kind)
    expected = PromptedCausalLM(base).path
    found = PromptedCausalLM(base.to(dtype)).path
    assert (found.scale, found.first_position) == (expected.scale, expected.first_position)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "falcon_h1", "gemma4_text", "rwkv"])
def test_the_check_leaves_the_base_as_it_was(kind, monkeypatch):
    monkeypatch.setattr(checks, "_checked", {})
    base = tiny_of(kind).train()
    next(base.children()).eval()
    modes = [module.training for module in base.modules()]
    before = {name: value.clone() for name, value in (*base.named_parameters(), *base.named_buffers())}
    attributes = set(vars(base))
    torch.manual_seed(5)
    state = torch.get_rng_state()
    PromptedCausalLM(base, check=False)
    unchecked = [module.training for module in base.modules()]
    for module, mode in zip(base.modules(), modes, strict=True):
        module.training = mode
    PromptedCausalLM(base)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in base.modules()] == unchecked
    for name, value in (*base.named_parameters(), *base.named_buffers()):
        assert torch.equal(value, before[name]), name
        assert value.grad is None
    assert set(vars(base)) == attributes
    assert not any(module._forward_pre_hooks for module in base.modules())


def test_a_base_is_checked_once_for_each_configuration_and_quickly(monkeypatch):
    monkeypatch.setattr(checks, "_checked", {})
    passes = []
    monkeypatch.setattr(checks, "_obstacle", lambda model, own=checks._obstacle: passes.append(1) or own(model))
    start = time.perf_counter()
    PromptedCausalLM(tiny_llama())
    assert time.perf_counter() - start < 1
    PromptedCausalLM(tiny_llama(seed=1))
    assert len(passes) == 1
    PromptedCausalLM(tiny_llama(tie_word_embeddings=True))
    assert len(passes) == 2
    PromptedCausalLM(tiny_llama(num_hidden_layers=1), check=False)
    assert len(passes) == 2


SMALL = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
NOT_CAUSAL = {
    "LlamaModel": ("LlamaConfig", "is not a decoder that predicts the next token"),
    "LlamaForSequenceClassification": ("LlamaConfig", "is not a decoder that predicts the next token"),
    "LlamaForTokenClassification": ("LlamaConfig", "is not a decoder that predicts the next token"),
    "BertForMaskedLM": ("BertConfig", "is not a decoder that predicts the next token"),
    "BertLMHeadModel": ("BertConfig", "it is not causal: logits change with later tokens"),
    "RobertaForCausalLM": ("RobertaConfig", "it is not causal: logits change with later tokens"),
    "OpenAIGPTLMHeadModel": ("OpenAIGPTConfig", "it does not generate from embeddings"),
    "CpmAntForCausalLM": ("CpmAntConfig", "is not a decoder that takes inputs_embeds"),
}


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_base_with_an_adapter_of_peft_is_refused_until_it_is_merged(wrapped):
    """It would be frozen in place, and be in no folder."""
    theirs = peft.get_peft_model(tiny_llama(), peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    with pytest.raises(PtmoeError, match=r"holds an adapter of peft.*merge_and_unload"):
        ptmoe.attach(theirs if wrapped else theirs.get_base_model(), ptmoe.PTConfig(num_virtual_tokens=4))
    assert any(parameter.requires_grad for parameter in theirs.parameters())
    ptmoe.attach(theirs.merge_and_unload(), ptmoe.PTConfig(num_virtual_tokens=4))


@pytest.mark.parametrize("name", NOT_CAUSAL)
def test_a_class_that_is_no_causal_model_is_refused_before_anything_is_trained(name, monkeypatch):
    monkeypatch.delitem(sys.modules, "peft")  # as in a program that has no use for it
    config, message = NOT_CAUSAL[name]
    sizes = {} if config == "CpmAntConfig" else SMALL
    with torch.device("meta" if config == "CpmAntConfig" else "cpu"):
        base = getattr(transformers, name)(getattr(transformers, config)(**sizes))
    with pytest.raises(PtmoeError, match=f"^{name} .*{message}"):
        ptmoe.attach(base, ptmoe.PTConfig(num_virtual_tokens=4))


@pytest.mark.parametrize(
    ("kind", "method", "message"),
    [
        ("falcon", "prefix-tuning", "prefix-tuning does not fit FalconForCausalLM: the base does not run with it"),
        ("deepseek_v3", "prefix-tuning", "prefix-tuning does not fit DeepseekV3ForCausalLM"),
        ("mpt", "prefix-tuning", "peft refuses prefix-tuning on MptForCausalLM: Please specify"),
        ("moss_transcribe_diarize", "prefix-tuning", "the base counts padding as positions"),
        ("zamba", "pissa", "pissa replaces the weight of each module, and in ZambaForCausalLM several of .* share one"),
        ("git", "lora", "lora does not fit GitForCausalLM: none of the modules that it changes computes text"),
        ("git", "pt-moe-road", "pt-moe-road does not fit GitForCausalLM: none of the modules that it changes computes"),
    ],
)
def test_a_method_that_the_base_cannot_have_is_refused_and_leaves_no_trace(kind, method, message):
    model = ptmoe.attach(tiny_of(kind), ptmoe.PTConfig(num_virtual_tokens=4))
    if method == "prefix-tuning":
        with pytest.raises(PtmoeError, match=message):
            ptmoe.attach(model, ptmoe.METHODS[method](), adapter_name="other")
        assert set(model.encoders) == {"default"}
        assert model.active_adapter == "default"
        assert all(parameter.requires_grad for parameter in model.encoder.parameters())
    else:
        base = tiny_of(kind)
        before = own_logits(base, ROWS[0])
        with pytest.raises(PtmoeError, match=message):
            ptmoe.attach(base, ptmoe.METHODS[method]())
        assert torch.equal(own_logits(base, ROWS[0]), before)
        ptmoe.attach(base, ptmoe.PTConfig(num_virtual_tokens=4))


@pytest.mark.parametrize("method", ["lora", "prefix-tuning", "mept", "pt-moe-road"])
@pytest.mark.parametrize("saved", [False, True])
def test_a_trial_of_an_adapter_that_is_interrupted_leaves_no_trace(method, saved, tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    config, model = ptmoe.METHODS[method](), PromptedCausalLM(tiny_llama())
    ptmoe.attach(tiny_llama(), config).save_pretrained(tmp_path)
    expected = own_logits(model.base_model, ROWS[0])
    if not config.changes_layers:
        ptmoe.attach(model, ptmoe.PTConfig(num_virtual_tokens=4))
    names, active = list(model.encoders), model.active_adapter
    layer = model.base_model.model.layers[1]
    add = partial(ptmoe.load_adapter, path=tmp_path, name="other")
    if not saved:
        add = partial(ptmoe.attach, config=config, adapter_name="other")
    with layer.register_forward_pre_hook(interrupt), pytest.raises(KeyboardInterrupt):
        add(model)
    assert torch.equal(own_logits(model.base_model, ROWS[0]), expected)
    assert list(model.encoders) == names
    assert model.active_adapter == active
    assert all(parameter.requires_grad for encoder in model.encoders.values() for parameter in encoder.parameters())
    ptmoe.attach(model, config, adapter_name="other")


NO_MODELS = {
    "nano": (lambda: "nano", "'nano' is not a model: give one alone"),
    "what load_base returns": (lambda: (tiny_llama(), None), "a tuple is not a model: give one alone"),
    "compiled": (lambda: torch.compile(tiny_llama()), r"OptimizedModule is not .* in it \(its \._orig_mod\), and wrap"),
    "DataParallel": (lambda: torch.nn.DataParallel(tiny_llama()), "DataParallel is not .* the LlamaForCausalLM in it"),
    "a module": (lambda: torch.nn.Linear(2, 2), "Linear is not a model of transformers: give a causal"),
    "nothing": (lambda: None, "NoneType is not a model of transformers: give a causal"),
}


@pytest.mark.parametrize(("make", "message"), NO_MODELS.values(), ids=NO_MODELS)
def test_what_is_no_model_is_refused_in_words(make, message):
    with pytest.raises(PtmoeError, match=message):
        ptmoe.attach(make(), ptmoe.PTConfig(num_virtual_tokens=4))


def test_a_name_in_place_of_a_config_is_refused_in_words():
    with pytest.raises(PtmoeError, match="'pt' is not a method's config"):
        ptmoe.attach(tiny_llama(), "pt")


def test_broken_weights_are_refused_also_where_the_configuration_has_been_checked():
    PromptedCausalLM(tiny_llama())
    broken = tiny_llama()
    broken.lm_head.weight.data[5] = torch.nan
    with pytest.raises(PtmoeError, match="its own logits are NaN"):
        PromptedCausalLM(broken)


def test_a_difference_that_nothing_carries_is_named_with_its_size(monkeypatch):
    """Routing by token id, say: whatever the base does with ids alone."""
    base = tiny_llama(rms_norm_eps=1.5e-6)
    inner = type(base.model).forward

    def by_token(self, input_ids=None, **options):
        out = inner(self, input_ids=input_ids, **options)
        if input_ids is not None:
            out.last_hidden_state = out.last_hidden_state * (1 + (input_ids[..., None] % 3))
        return out

    monkeypatch.setattr(type(base.model), "forward", by_token)
    with pytest.raises(PtmoeError, match=r"LlamaForCausalLM cannot be .* its logits are off by [\d.]+%"):
        ptmoe.attach(base, ptmoe.PTConfig(num_virtual_tokens=4))
    ptmoe.attach(base, ptmoe.PTConfig(num_virtual_tokens=4), check=False)


def test_an_offloaded_embedding_is_refused_and_other_offloaded_layers_are_said_not_to_be_tried():
    base = tiny_llama()
    cpu_offload(base, execution_device=base.device)
    with pytest.raises(PtmoeError, match="the input embedding of this LlamaForCausalLM is offloaded"):
        ptmoe.attach(base, ptmoe.PTConfig(num_virtual_tokens=4))
    base, ids = tiny_llama(), tokens(6)[None]
    expected = prompted(tiny_llama(), CONFIGS["PT"])(ids).logits
    cpu_offload(base.model.layers, execution_device=base.device)
    with pytest.warns(UserWarning, match="parts of this LlamaForCausalLM are offloaded"):
        model = prompted(base, CONFIGS["PT"])
    assert torch.equal(model(ids).logits, expected)


def test_a_base_that_does_not_mask_padding_generates_rows_of_one_length_together_with_all_options():
    model = prompted(tiny_of("bart"), CONFIGS["PT"])
    assert not model.path.left_padding
    same = torch.stack([row[:3] for row in ROWS])
    out = model.generate(same, max_new_tokens=2, return_dict_in_generate=True, output_logits=True, pad_token_id=0)
    assert out.sequences.shape[0] == 3
    ids, mask = batch(ROWS, LEFTS)
    with pytest.raises(PtmoeError, match=r"BartForCausalLM does not mask padding.*give it one row at a time"):
        model.generate(ids, mask, max_new_tokens=2, return_dict_in_generate=True)


def test_a_base_that_does_not_mask_padding_tells_a_function_of_allowed_tokens_which_row_it_reads():
    model = prompted(tiny_of("bart"), CONFIGS["PT"])
    ids, mask = batch(ROWS, LEFTS)
    options = {"max_new_tokens": 2, "pad_token_id": 0, "prefix_allowed_tokens_fn": lambda row, ids: [20 + row]}
    made = model.generate(ids, mask, **options)
    assert made[:, ids.shape[1] :].tolist() == [[20, 20], [21, 21], [22, 22]]


def test_generate_refuses_what_cannot_hold_the_prompt():
    model = prompted(tiny_llama(), CONFIGS["PT"])
    ids = tokens(4)[None]
    for name, value in (("position_ids", torch.arange(4)[None]), ("inputs_embeds", torch.zeros(1, 4, 32))):
        with pytest.raises(PtmoeError, match=f"generate takes no {name}"):
            model.generate(ids, max_new_tokens=2, **{name: value})
    with pytest.raises(PtmoeError, match="use_cache=False reads the input again"):
        model.generate(ids, max_new_tokens=2, use_cache=False)
    expected = model.generate(ids, max_new_tokens=4)
    model.base_model.generation_config.use_cache = False
    assert torch.equal(model.generate(ids, max_new_tokens=4), expected)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_text_generation_pipeline_takes_a_prompted_model(architecture, caplog):
    from ptmoe.models.bases import load_base

    base, tokenizer = load_base("nano")
    if architecture == "gpt2":
        base = tiny("gpt2", vocab_size=len(base.get_input_embeddings().weight))
    model = ptmoe.attach(base, ptmoe.PTMoEConfig(**PT_MOE)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
        made = pipe("2 and 3", max_new_tokens=5, do_sample=False, return_full_text=False)[0]["generated_text"]
    ids = tokenizer("2 and 3", return_tensors="pt")["input_ids"]
    expected = model.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
    assert made == tokenizer.decode(expected, skip_special_tokens=True)
    assert "not supported" not in caplog.text
    assert "text" in repr(pipe)
