"""Generation: `input_ids` followed by the tokens that the base gives after a prompt spliced by hand."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.testing import assert_close
from transformers import GenerationConfig, PreTrainedTokenizerFast, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from ptmoe.errors import PtmoeError
from ptmoe.methods import METHODS
from ptmoe.models.attach import attach
from testing.architectures import HIDDEN, PAD, POSITIONS, VOCABULARY
from testing.bases import BY_ROW, CONFIGS, DEVICE, batch, prompted, tiny_llama, tokens

all_methods = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
ROUTED = CONFIGS["PT-MoE selective probationary"]
ROWS = [tokens(6, 1), tokens(2, 2), tokens(9, 3), tokens(4, 4)]
RIGHT, LEFT, BOTH = [0, 0, 0, 0], [3, 7, 0, 5], [2, 3, 0, 5]


def spliced_by_hand(model, rows):
    """What the base needs for left-padded rows, composed one by one."""
    embed = model.get_input_embeddings()
    parts = []
    for row in rows:
        embeds = embed(row)[None]
        prompt = model.encoder(embeds, torch.ones(1, len(row), dtype=torch.bool, device=DEVICE)).embeds
        parts.append(torch.cat([prompt, embeds], 1)[0])
    width = max(map(len, parts))
    embeds = torch.stack([torch.cat([part.new_zeros(width - len(part), HIDDEN), part]) for part in parts])
    mask = torch.stack([torch.arange(width, device=DEVICE) >= width - len(part) for part in parts]).long()
    return {"inputs_embeds": embeds.detach(), "attention_mask": mask}


def greedy_by_hand(model, row, new, penalty=1.0):
    """Token by token, no cache: the whole sequence through the bare base each time."""
    spliced, ids = spliced_by_hand(model, [row])["inputs_embeds"], row
    with torch.no_grad():
        for _ in range(new):
            logits = model.base_model(inputs_embeds=spliced).logits[0, -1].clone()
            seen = ids.unique()
            logits[seen] = torch.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
            ids = torch.cat([ids, logits.argmax()[None]])
            spliced = torch.cat([spliced, model.get_input_embeddings()(ids[-1:])[None]], 1)
    return ids


@all_methods
@pytest.mark.parametrize("lefts", [RIGHT, LEFT, BOTH], ids=["right", "left", "both"])
def test_padding_on_any_side_gives_each_row_the_tokens_it_gets_alone(base, config, lefts):
    model = prompted(base, config)
    ids, mask = batch(ROWS, lefts)
    out = model.generate(ids, mask, max_new_tokens=4, output_logits=True, return_dict_in_generate=True)
    assert torch.equal(out.sequences[:, : ids.shape[1]], ids)
    for i, row in enumerate(ROWS):
        alone = model.generate(row[None], max_new_tokens=4, output_logits=True, return_dict_in_generate=True)
        assert torch.equal(out.sequences[i, ids.shape[1] :], alone.sequences[0, len(row) :])
        assert_close(torch.stack(out.logits)[:, i], torch.stack(alone.logits)[:, 0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_greedy_tokens_are_those_of_the_whole_sequence_without_a_cache(base, penalty):
    model = prompted(base, ROUTED)
    for row in ROWS:
        generated = model.generate(row[None], max_new_tokens=5, repetition_penalty=penalty)
        assert torch.equal(generated[0], greedy_by_hand(model, row, 5, penalty))


@pytest.mark.parametrize("config", [ROUTED, *BY_ROW.values()])
def test_a_static_cache_gives_the_same_tokens(config):
    model = prompted(tiny_llama(), config)
    ids, mask = batch(ROWS, BOTH)
    expected = model.generate(ids, mask, max_new_tokens=4)
    assert torch.equal(model.generate(ids, mask, max_new_tokens=4, cache_implementation="static"), expected)


OPTIONS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "beams with a length penalty": {"num_beams": 3, "length_penalty": -2.0, "early_stopping": True, "eos_token_id": 7},
    "several beams returned": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "beam sampling": {"do_sample": True, "num_beams": 2},
    "repetition penalty": {"repetition_penalty": 1.7},
    "no repeated n-gram": {"no_repeat_ngram_size": 1},
    "an end token": {"eos_token_id": list(range(3, VOCABULARY, 4))},
    "an end token not before": {"eos_token_id": list(range(3, VOCABULARY, 4)), "min_new_tokens": 4},
    "a config": {"generation_config": GenerationConfig(num_beams=2, max_new_tokens=6)},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.ci
def test_every_way_to_decode_is_that_of_the_base_after_the_prompt(base, options, padded):
    model = prompted(base, ROUTED)
    rows = ROWS if padded else [tokens(6, i) for i in range(4)]
    ids, mask = batch(rows, LEFT if padded else [0] * 4)
    options = options if "generation_config" in options else options | {"max_new_tokens": 6}
    options = options | {"return_dict_in_generate": True, "output_scores": True}
    torch.manual_seed(3)
    out = model.generate(input_ids=ids, attention_mask=mask, **options)
    torch.manual_seed(3)
    expected = base.generate(ids, **spliced_by_hand(model, rows), **options)
    assert torch.equal(out.sequences, expected.sequences)
    copies = len(out.sequences) // len(ids)
    assert torch.equal(out.sequences[:, : ids.shape[1]], ids.repeat_interleave(copies, 0))
    # -inf, of a filter, where both have it
    assert_close(torch.stack(out.scores), torch.stack(expected.scores), atol=1e-5, rtol=0)


class Heard(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


def test_a_streamer_hears_the_input_and_each_new_token():
    model, heard = prompted(tiny_llama(), ROUTED), Heard()
    sequence = model.generate(ROWS[0][None], max_new_tokens=5, streamer=heard)
    assert heard.tokens == sequence[0].tolist()
    assert heard.ended


class After(StoppingCriteria):
    """Stops as soon as a row holds this many tokens, and keeps what it was shown."""

    def __init__(self, length):
        self.length, self.shown = length, []

    def __call__(self, input_ids, scores, **options):
        self.shown.append(input_ids.clone())
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length, device=DEVICE)


def test_stopping_criteria_see_the_input_and_the_new_tokens():
    model, criterion = prompted(tiny_llama(), ROUTED), After(9)
    sequence = model.generate(ROWS[0][None], max_new_tokens=20, stopping_criteria=[criterion])
    assert torch.equal(sequence, model.generate(ROWS[0][None], max_new_tokens=3))
    assert [shown.shape[1] for shown in criterion.shown] == [7, 8, 9]
    assert torch.equal(criterion.shown[-1], sequence)


def test_stop_strings_end_a_row():
    characters = Tokenizer(models.WordLevel({chr(33 + i): i for i in range(VOCABULARY)}, unk_token="!"))
    characters.pre_tokenizer, characters.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=characters, unk_token="!")
    model = prompted(tiny_llama(), ROUTED)
    free = model.generate(ROWS[0][None], max_new_tokens=8)[0]
    word = tokenizer.decode(free[8:10])
    stopped = model.generate(ROWS[0][None], max_new_tokens=8, stop_strings=[word], tokenizer=tokenizer)[0]
    assert torch.equal(stopped, free[: len(stopped)])
    assert tokenizer.decode(stopped).endswith(word)
    assert len(stopped) <= 10


def test_a_logits_processor_sees_the_input_and_the_new_tokens():
    model, seen = prompted(tiny_llama(), ROUTED), []

    def processor(input_ids, scores):
        seen.append(input_ids.clone())
        return scores

    sequence = model.generate(ROWS[0][None], max_new_tokens=3, logits_processor=[processor])
    assert [len(ids[0]) for ids in seen] == [6, 7, 8]
    assert torch.equal(seen[-1], sequence[:, :-1])


def test_a_logits_processor_sees_scores_with_the_repetition_penalty():
    model, seen = prompted(tiny_llama(), ROUTED), []

    def processor(input_ids, scores):
        seen.append(scores)
        return scores

    options = {"max_new_tokens": 3, "repetition_penalty": 3.0, "return_dict_in_generate": True, "output_scores": True}
    ids, mask = batch(ROWS[:2], [1, 2])  # with padding the penalty is not transformers' own
    made = model.generate(ids, mask, logits_processor=[processor], pad_token_id=PAD, **options)
    assert_close(torch.stack(seen), torch.stack(made.scores))


# -- lengths -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["options", "a config", "the base's config"])
def test_max_length_counts_the_input_and_new_tokens_but_not_virtual_ones(base, where):
    model = prompted(base, ROUTED)
    options = {"max_length": 11}
    if where == "a config":
        options = {"generation_config": GenerationConfig(max_length=11)}
    if where == "the base's config":
        base.generation_config.max_length, options = 11, {}
    assert model.generate(ROWS[0][None], **options).shape == (1, 11)
    with pytest.raises(ValueError, match="max_length"):
        model.generate(tokens(11)[None], **options)


@pytest.mark.parametrize("where", ["options", "a config", "the base's config"])
def test_min_length_counts_the_input_and_new_tokens_but_not_virtual_ones(where):
    model = prompted(tiny_llama(), ROUTED)
    likely = model.generate(ROWS[0][None], max_new_tokens=4)[0, 6:].tolist()
    ending = {"eos_token_id": likely, "max_new_tokens": 12}
    options = ending | {"min_length": 14}
    if where == "a config":
        options = {"generation_config": GenerationConfig(**options)}
    if where == "the base's config":
        model.generation_config.min_length, options = 14, ending
    held = model.generate(ROWS[0][None], **options)
    assert held.shape[1] >= 14
    assert set(held[0, 6:13].tolist()).isdisjoint(likely)


def test_what_the_caller_asks_for_goes_before_the_bases_config():
    model = prompted(tiny_llama(), ROUTED)
    model.generation_config.max_new_tokens = 7
    ids = ROWS[0][None]
    assert model.generate(ids).shape[1] == 6 + 7
    assert model.generate(ids, max_length=9).shape[1] == 9
    given = GenerationConfig(max_new_tokens=2)
    assert model.generate(ids, generation_config=given).shape[1] == 6 + 2
    assert model.generate(ids, generation_config=given, max_new_tokens=4).shape[1] == 6 + 4
    assert given.max_new_tokens == 2
    assert given.max_length is None


def test_without_a_length_it_makes_as_many_tokens_as_transformers_or_as_fit(base):
    model = prompted(base, ROUTED)
    assert model.generate(ROWS[0][None]).shape[1] == base.generate(ROWS[0][None]).shape[1] == 6 + 20
    longest = POSITIONS - ROUTED.num_virtual_tokens
    assert model.generate(tokens(longest - 5)[None]).shape[1] == longest
    base.generation_config.max_length = POSITIONS
    assert model.generate(ROWS[0][None]).shape[1] == longest


@pytest.mark.parametrize("options", [{"max_new_tokens": 0}, {"max_length": 6}, {"max_length": 3}])
def test_no_room_for_a_new_token_is_an_error(options):
    with pytest.raises(ValueError, match="max_length"):
        prompted(tiny_llama(), ROUTED).generate(ROWS[0][None], **options)


# -- routing and adapters ----------------------------------------------------------------------------------------------


def test_routing_is_decided_once_and_held(base):
    model = prompted(base, ROUTED)
    calls = []
    model.encoder.register_forward_hook(lambda module, arguments, prompt: calls.append(prompt.routing.gate))
    ids, mask = batch(ROWS, BOTH)
    model.generate(ids, mask, max_new_tokens=6, num_beams=2)
    assert len(calls) == 1
    assert torch.equal(calls[0], model.route(ids, mask).gate)


def test_input_mask_decides_the_prompt_of_a_generation():
    model = prompted(tiny_llama(), ROUTED)
    ids = tokens(8, 1)[None]
    readable = torch.tensor([[1, 1, 1, 0, 0, 0, 0, 0]], device=DEVICE)
    calls = []
    model.encoder.register_forward_hook(lambda module, arguments, prompt: calls.append(prompt.routing.gate))
    model.generate(ids, input_mask=readable, max_new_tokens=2)
    assert torch.equal(calls[0], model.route(ids[:, :3]).gate)


def test_each_row_generates_with_the_adapter_it_names(base):
    model = prompted(base, ROUTED, name="moe")
    model = prompted(model, CONFIGS["PT"].replace(num_virtual_tokens=2), seed=2, name="pt")
    model = prompted(model, BY_ROW["PT-MoE with RoAd"], seed=3, name="rows")
    names = ["moe", "__base__", "pt", "rows"]
    ids, mask = batch(ROWS, BOTH)
    new = model.generate(ids, mask, adapter_names=names, max_new_tokens=4)[:, ids.shape[1] :]
    for i, (row, name) in enumerate(zip(ROWS, names, strict=True)):
        if name == "__base__":
            alone = base.generate(row[None], attention_mask=torch.ones_like(row)[None], max_new_tokens=4)
        else:
            model.set_adapter(name)
            alone = model.generate(row[None], max_new_tokens=4)
        assert torch.equal(new[i], alone[0, len(row) :])


REPEATING = [
    torch.tensor(row, device=DEVICE) for row in ([9, 8, 7, 9, 8, 7, 6], [5, 4], [3, 9, 5, 3, 4, 8, 9, 3, 6, 7])
]
PROMPTS = {"PT": CONFIGS["PT"], "prefix": METHODS["prefix-tuning"](num_virtual_tokens=3)}


def third_of_each_sort(row, ids):
    """Tokens whose remainder by three is that of the last one's and the row's sum: a different third for each row."""
    return [token for token in range(VOCABULARY) if (token - int(ids[-1]) - row) % 3 == 0]


READING = {
    "repetition penalty": {"repetition_penalty": 3.0},
    "a penalty below 1": {"repetition_penalty": 0.3},
    "beams with a penalty": {"repetition_penalty": 3.0, "num_beams": 3},
    "several beams with a penalty": {"repetition_penalty": 3.0, "num_beams": 3, "num_return_sequences": 2},
    "no repeated n-gram": {"no_repeat_ngram_size": 2},
    "beams without a repeated n-gram": {"no_repeat_ngram_size": 2, "num_beams": 3},
    "bad words": {"bad_words_ids": [[last, token] for last in (6, 4, 7) for token in range(VOCABULARY // 2)]},
    "a bias": {"sequence_bias": [[[last, 5], 90.0] for last in (6, 4, 7)]},
    "allowed tokens": {"prefix_allowed_tokens_fn": third_of_each_sort},
}


@pytest.mark.parametrize("lefts", [[0, 0, 0], [3, 7, 0], [1, 4, 0]], ids=["right", "left", "both"])
@pytest.mark.parametrize("options", READING.values(), ids=READING)
@pytest.mark.parametrize(
    ("prompt", "names"), [("PT", None), ("PT", ["default", "__base__", "__base__"]), ("prefix", None)]
)
@pytest.mark.ci
def test_whatever_reads_the_tokens_reads_those_of_each_row_and_no_padding(lefts, options, prompt, names):
    model = prompted(tiny_llama(), PROMPTS[prompt])
    options = options | {"max_new_tokens": 8, "pad_token_id": PAD}
    options |= {"return_dict_in_generate": True, "output_scores": True}
    ids, mask = batch(REPEATING, lefts)
    made = model.generate(ids, mask, adapter_names=names, **options)
    count = len(made.sequences) // len(REPEATING)
    assert torch.equal(made.sequences[:, : ids.shape[1]], ids.repeat_interleave(count, 0))
    for i, row in enumerate(REPEATING):
        if "prefix_allowed_tokens_fn" in options:
            options["prefix_allowed_tokens_fn"] = lambda _, ids, i=i: third_of_each_sort(i, ids)
        alone = model.generate(row[None], adapter_names=names and names[i : i + 1], **options)
        new = made.sequences[i * count : (i + 1) * count, ids.shape[1] :]
        assert torch.equal(new, alone.sequences[:, len(row) :])
        rows = len(alone.scores[0])
        scores = torch.stack(made.scores)[:, i * rows : (i + 1) * rows]
        assert_close(scores, torch.stack(alone.scores), atol=1e-4, rtol=0)


def test_stopping_criteria_are_shown_the_new_tokens_right_after_the_last_one():
    model, criterion = prompted(tiny_llama(), ROUTED), After(99)
    ids, mask = batch(ROWS, [0] * len(ROWS))
    sequences = model.generate(ids, mask, max_new_tokens=3, stopping_criteria=[criterion])
    for row, shown, made in zip(ROWS, criterion.shown[-1], sequences, strict=True):
        assert torch.equal(shown[-3 - len(row) :], torch.cat([row, made[-3:]]))


# -- arguments ---------------------------------------------------------------------------------------------------------


def test_inputs_is_another_name_for_input_ids():
    model = prompted(tiny_llama(), ROUTED)
    ids = ROWS[0][None]
    expected = model.generate(ids, max_new_tokens=3)
    assert torch.equal(model.generate(inputs=ids, max_new_tokens=3), expected)
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=3), expected)
    for given in ((), ({"input_ids": ids},), ("hello",)):
        with pytest.raises(PtmoeError, match=r"composed from the input: generate\(\*\*tokenizer"):
            model.generate(*given, max_new_tokens=3)


@pytest.mark.parametrize("config", [ROUTED, METHODS["lora"](rank=2), METHODS["prefix-tuning"](num_virtual_tokens=3)])
def test_what_is_no_tensor_or_has_no_token_is_refused_in_words(config):
    model = prompted(tiny_llama(), config)
    with pytest.raises(PtmoeError, match=r"attention_mask is a GenerationConfig: needs a tensor; .* by name"):
        model.generate(ROWS[0][None], GenerationConfig(max_new_tokens=3))  # its place in transformers
    with pytest.raises(PtmoeError, match="input_ids is a dict: needs a tensor"):
        model({"input_ids": ROWS[0][None]})
    for call in (model, model.generate):
        for empty in (ROWS[0][None, :0], ROWS[0][None][:0]):
            with pytest.raises(PtmoeError, match=r"input_ids has shape \(\d, \d\): needs"):
                call(empty)


@pytest.mark.parametrize("ends", [None, 7, [7, PAD]])
@pytest.mark.parametrize("lefts", [RIGHT, LEFT, BOTH], ids=["right", "left", "both"])
@pytest.mark.parametrize("where", ["options", "a config", "the base's config"])
def test_without_a_mask_padding_is_where_transformers_takes_it_to_be(base, where, lefts, ends):
    model = prompted(base, ROUTED)
    ids, mask = batch(ROWS, lefts)
    options = {"pad_token_id": PAD, "eos_token_id": ends, "max_new_tokens": 4}
    if where == "a config":
        options = {"generation_config": GenerationConfig(**options)}
    if where == "the base's config":
        model.generation_config, options = GenerationConfig(**options), {}
    expected = model.generate(ids, torch.ones_like(mask) if ends == [7, PAD] else mask, **options)
    assert torch.equal(model.generate(ids, **options), expected)
    real = tokens(5)[None].index_fill(1, torch.tensor([2], device=DEVICE), PAD)  # in the middle of a text
    with model.disable_adapter():
        assert torch.equal(model.generate(real, **options), base.generate(real, **options))


def test_a_generation_config_that_is_set_is_used():
    model = prompted(tiny_llama(), ROUTED)
    model.generation_config = GenerationConfig(max_new_tokens=3)
    assert model.generate(ROWS[0][None]).shape[1] == len(ROWS[0]) + 3


@pytest.mark.parametrize("beams", [1, 2])
def test_transition_scores_are_those_of_the_new_tokens(beams):
    model = prompted(tiny_llama(), ROUTED)
    ids, mask = batch(ROWS, BOTH)
    made = model.generate(
        ids, mask, max_new_tokens=4, num_beams=beams, output_scores=True, return_dict_in_generate=True
    )
    scores = model.compute_transition_scores(made.sequences, made.scores, made.get("beam_indices"))  # (B, new)
    for row, found, made_row in zip(ROWS, scores, made.sequences, strict=True):
        new, whole = made_row[-4:], torch.cat([row, made_row[-4:]])[None]
        readable = torch.arange(whole.shape[1], device=DEVICE)[None] < len(row)
        logits = model(whole, input_mask=readable).logits[0, len(row) - 1 : -1]
        expected = logits if beams == 1 else logits.log_softmax(-1)
        assert_close(found, expected.gather(1, new[:, None])[:, 0], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prompt_lookup_num_tokens", 2),
        ("prefill_chunk_size", 2),
        ("assistant_early_exit", 0),
        ("use_mtp", True),
        ("token_healing", True),
        ("cache_implementation", "paged"),
        ("encoder_repetition_penalty", 1.3),
        ("encoder_no_repeat_ngram_size", 2),
    ],
)
@pytest.mark.parametrize("in_config", [False, True])
def test_what_would_read_the_input_again_without_its_prompt_is_refused(name, value, in_config):
    model = prompted(tiny_llama(), ROUTED)
    options = {"generation_config": GenerationConfig(**{name: value})} if in_config else {name: value}
    with pytest.raises(PtmoeError, match=name):
        model.generate(ROWS[0][None], **options)


def test_checkpointing_in_training_mode_is_refused_as_it_leaves_no_cache():
    model = prompted(tiny_llama(), ROUTED)
    expected = model.eval().generate(ROWS[0][None], max_new_tokens=3)
    model.train().gradient_checkpointing_enable()  # as Trainer leaves a model
    with pytest.raises(PtmoeError, match=r"drops the cache, .*call model\.eval\(\)"):
        model.generate(ROWS[0][None], max_new_tokens=3)
    assert torch.equal(model.eval().generate(ROWS[0][None], max_new_tokens=3), expected)


def test_what_is_off_is_not_refused():
    model = prompted(tiny_llama(), ROUTED)
    off = {"use_mtp": False, "token_healing": False, "prompt_lookup_num_tokens": None}
    expected = model.generate(ROWS[0][None], max_new_tokens=3)
    assert torch.equal(model.generate(ROWS[0][None], max_new_tokens=3, **off), expected)


@pytest.mark.parametrize("method", ["pt", "prefix-tuning"])
def test_a_base_that_was_saved_without_its_cache_generates(method):
    """As one that was trained with gradient checkpointing; only what a caller asks for is refused."""
    model = attach(tiny_llama(), METHODS[method]()).eval()
    expected = model.generate(ROWS[0][None], max_new_tokens=3)
    model.base_model.generation_config.use_cache = model.base_model.config.use_cache = False
    assert torch.equal(model.generate(ROWS[0][None], max_new_tokens=3), expected)
    for asked in ({"use_cache": False}, {"generation_config": GenerationConfig(use_cache=False)}):
        with pytest.raises(PtmoeError, match="use_cache=False"):
            model.generate(ROWS[0][None], max_new_tokens=3, **asked)


@pytest.mark.parametrize("method", ["prefix-tuning", "mept"])
def test_what_a_prompt_has_in_the_cache_comes_to_the_device_of_each_layer(method):
    model = attach(tiny_llama(), METHODS[method](num_virtual_tokens=4))
    _, prompts = model.compose(tokens(6)[None])
    cache = model._filled_cache(prompts.cache, 1, 1)
    new = torch.ones(1, 2, 3, 8, device="meta")
    keys, values = cache.update(new, new, 1)
    assert keys.device == values.device == new.device
    assert keys.shape == values.shape == (1, 2, 7, 8)


def test_an_assistant_is_refused():
    with pytest.raises(PtmoeError, match="assistant_model"):
        prompted(tiny_llama(), ROUTED).generate(ROWS[0][None], assistant_model=tiny_llama())


def test_generation_works_on_a_bfloat16_base(base):
    model = prompted(base.to(torch.bfloat16), ROUTED)
    ids, mask = batch(ROWS, BOTH)
    out = model.generate(ids, mask, max_new_tokens=4, output_scores=True, return_dict_in_generate=True)
    assert out.sequences.shape == (4, ids.shape[1] + 4)
    assert torch.stack(out.scores).isfinite().all()
