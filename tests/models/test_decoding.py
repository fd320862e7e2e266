"""Decoding: the tokens of `transformers`' greedy generation, whoever leaves the batch and whatever is kept."""

from contextlib import contextmanager

import pytest
import torch
import transformers
from typer.testing import CliRunner

import ptmoe
from ptmoe.cli.main import app
from ptmoe.evaluate import evaluate
from ptmoe.evaluate.evaluation import batches_within
from ptmoe.evaluate.generation import complete
from ptmoe.methods import METHODS
from ptmoe.models.attach import attach
from ptmoe.models.bases import load_base
from ptmoe.models.decoding import Decoder
from ptmoe.tasks import load_task
from testing.architectures import ARCHITECTURES, COMMON
from testing.bases import BY_ROW, CONFIGS, DEVICE, prompted, tiny, tokens
from testing.decoding import NEW, ROWS, decoded, experts_of, generated

PROMPTS = {
    **CONFIGS,
    "P-tuning": METHODS["p-tuning"](num_virtual_tokens=5),
    "multitask": METHODS["multitask-prompt-tuning"](num_virtual_tokens=5),
}
FIXED = ("PT", "DPT", "ULPT", "EPT", "PT-MoE selective", "P-tuning", "multitask")
OTHERS = {
    "LoRA": METHODS["lora"](rank=2),
    "prefix": METHODS["prefix-tuning"](num_virtual_tokens=5),
    **BY_ROW,
}
ROUTED = CONFIGS["PT-MoE selective probationary"]


@contextmanager
def read_by(base):
    """The shapes `(rows, positions)` that the base reads."""
    shapes, forward = [], base.forward

    def read(**inputs):
        given = inputs.get("input_ids")
        shapes.append(tuple((inputs["inputs_embeds"] if given is None else given).shape[:2]))
        return forward(**inputs)

    base.forward = read
    try:
        yield shapes
    finally:
        base.forward = forward


@pytest.mark.parametrize("config", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.ci
def test_a_batch_of_mixed_lengths_gets_the_tokens_of_generate(base, config):
    decoder = Decoder(prompted(base, config).eval())
    assert decoder.steps
    assert decoded(decoder) == generated(decoder.model)


@pytest.mark.parametrize("config", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "opt", "phi"])
def test_so_it_does_where_the_method_changes_the_base_or_fills_the_cache(architecture, config):
    model = prompted(tiny(architecture), config).eval()
    assert decoded(Decoder(model)) == generated(model)
    with model.disable_adapter():
        assert decoded(Decoder(model)) == generated(model)


@pytest.mark.parametrize("config", [CONFIGS["PT"], ROUTED, OTHERS["LoRA"]], ids=["PT", "PT-MoE", "LoRA"])
def test_a_row_that_ends_leaves_the_batch_and_changes_no_other(base, config):
    decoder = Decoder(prompted(base, config).eval())
    whole = generated(decoder.model)
    lengths = [3, 1, NEW, 5, 4]
    ends = [row[:length] for row, length in zip(whole, lengths, strict=True)]
    expected = [next(row[:n] for n in range(1, NEW + 1) if row[:n] in ends or n == NEW) for row in whole]
    assert len({len(row) for row in expected}) > 1, "rows end together: tells nothing"
    with read_by(base) as shapes:
        assert decoded(decoder, ended=ends.__contains__) == expected
    assert [rows for rows, _ in shapes] == [sum(len(row) > step for row in expected) for step in range(len(shapes))]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", FIXED)
@pytest.mark.ci
def test_a_fixed_prompt_is_read_once_and_not_again_with_the_rows(architecture, name):
    wide = {"sliding_window": 40} if architecture in ("mistral", "gemma2") else {}
    model = prompted(tiny(architecture, **wide), CONFIGS.get(name) or PROMPTS[name]).eval()
    several = name != "PT-MoE selective" or len(set(experts_of(model, ROWS))) > 1
    assert several, "one expert takes all: tells nothing"
    with read_by(model.base_model) as shapes:
        decoder = Decoder(model)
        made = [decoded(decoder), decoded(decoder)]
    virtual, longest = model.num_virtual_tokens, max(map(len, ROWS))
    assert shapes == [(len(model.fixed_prompts()), virtual)] + 2 * (
        [(len(ROWS), longest)] + (NEW - 1) * [(len(ROWS), 1)]
    )
    decoder.prefix = None
    assert made == 2 * [decoded(decoder)] == 2 * [generated(model)]


@pytest.mark.parametrize("window", [12, 20])
@pytest.mark.parametrize("architecture", ["mistral", "gemma2"])
def test_a_window_that_may_lose_the_prompt_is_filled_with_it_each_time(architecture, window):
    """Also where it holds the prompt and the longest row, but not all new tokens as well."""
    model = prompted(tiny(architecture, sliding_window=window), CONFIGS["PT"]).eval()
    with read_by(model.base_model) as shapes:
        assert decoded(Decoder(model)) == generated(model)
    assert (len(ROWS), model.num_virtual_tokens + max(map(len, ROWS))) in shapes


@pytest.mark.parametrize("window", [12, 64])
def test_gpt_neos_window_of_which_its_cache_does_not_know_is_one_that_may_lose_the_prompt(monkeypatch, window):
    own = {"attention_types": [[["global", "local"], 1]], "window_size": window}
    monkeypatch.setitem(ARCHITECTURES, "gpt_neo", ("GPTNeo", own))
    model = prompted(tiny("gpt_neo"), CONFIGS["PT"]).eval()
    with read_by(model.base_model) as shapes:
        assert decoded(Decoder(model)) == generated(model)
    again = (len(ROWS), model.num_virtual_tokens + max(map(len, ROWS))) in shapes
    assert again == (window == 12)


def test_what_decides_a_rotation_by_the_length_is_read_each_time():
    model = prompted(
        tiny("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), CONFIGS["PT"]
    )
    assert Decoder(model.eval()).prefix is None


def test_prompts_that_differ_from_input_to_input_are_not_fixed():
    fixed = {name for name, config in PROMPTS.items() if prompted(tiny(), config).fixed_prompts() is not None}
    assert fixed == set(FIXED)
    model = prompted(tiny(), CONFIGS["PT"])
    with model.disable_adapter():
        assert model.fixed_prompts() is None


@pytest.mark.parametrize("config", [ROUTED, CONFIGS["PT"]], ids=["PT-MoE", "PT"])
def test_in_half_precision_a_batch_gets_the_tokens_that_generate_gives_it(base, config):
    model = prompted(base.to(torch.bfloat16), config).eval()
    rows = [tokens(9, seed).tolist() for seed in range(4)]
    expected = model.generate(torch.tensor(rows, device=DEVICE), max_new_tokens=NEW)[:, 9:].tolist()
    assert decoded(Decoder(model), rows) == expected


EVERY_TOKEN = 1e9  # a margin that none has


def test_a_row_alone_decides_for_itself_when_others_have_left_the_batch():
    decoder = Decoder(prompted(tiny(), CONFIGS["PT"]).eval())
    ends = [row[:length] for row, length in zip(generated(decoder.model), (1, 3, NEW, 5, 4), strict=True)]
    made = decoded(decoder, ended=ends.__contains__)
    assert len({len(row) for row in made}) > 2, "rows end together: tells nothing"
    assert decoded(decoder, ended=ends.__contains__, margin=EVERY_TOKEN) == made


def test_where_two_tokens_nearly_tie_one_pass_over_the_row_alone_decides():
    model = prompted(tiny(), CONFIGS["PT"]).eval()
    decoder, whole = Decoder(model), generated(model)
    with read_by(model.base_model) as shapes:
        assert decoded(decoder, margin=EVERY_TOKEN) == whole
    steps = [shape for shape in shapes if shape[0] == len(ROWS)]
    assert len(steps) == NEW
    assert len(shapes) == NEW * (1 + len(ROWS))
    counts = set()
    for margin in (0.01, 0.05, 0.2):
        with read_by(model.base_model) as shapes:
            assert decoded(decoder, margin=margin) == whole
        counts.add(len(shapes))
    assert len(counts) > 1, "no margin tells tokens apart: tells nothing"


@pytest.mark.parametrize("config", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.slow
def test_a_row_alone_has_the_scores_that_it_has_in_the_batch(base, config):
    """Its prompt is composed from the input and not from what has been made."""
    decoder = Decoder(prompted(base, config).eval())
    assert decoded(decoder, margin=EVERY_TOKEN) == generated(decoder.model)


@pytest.mark.parametrize("config", OTHERS.values(), ids=OTHERS)
def test_so_it_has_where_the_method_changes_the_base_or_fills_the_cache(config):
    decoder = Decoder(prompted(tiny(), config).eval())
    assert decoded(decoder, margin=EVERY_TOKEN) == generated(decoder.model)


def lfm2():
    """Convolutions, whose state is no keys and values, between attention."""
    sizes = {"intermediate_size": 64, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]}
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(transformers.Lfm2Config(**(COMMON | sizes))).to(DEVICE).eval()


def suppressing():
    base = tiny()
    base.generation_config.suppress_tokens = generated(prompted(base, ROUTED).eval())[0][:3]
    return base


def preparing():
    """Phi 3 prepares its inputs itself."""
    sizes = {"intermediate_size": 64, "num_key_value_heads": 2}
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(transformers.Phi3Config(**(COMMON | sizes))).to(DEVICE).eval()


@pytest.mark.parametrize("make", [lfm2, suppressing, preparing])
def test_another_base_is_decoded_by_transformers_with_the_same_ends_and_margins(make):
    model = prompted(make(), CONFIGS["PT"], name="another").eval()
    decoder = Decoder(model)
    assert not decoder.steps
    assert decoder.prefix is None
    rows = [tokens(7, seed).tolist() for seed in range(3)]
    whole = generated(model, rows)
    assert decoded(decoder, rows) == whole
    ends = [whole[0][:4], whole[2][:1]]
    cut = [next(row[:n] for n in range(1, NEW + 1) if row[:n] in ends or n == NEW) for row in whole]
    assert decoded(decoder, rows, ended=ends.__contains__) == cut
    assert decoded(decoder, rows, margin=EVERY_TOKEN) == whole


def test_a_row_too_long_for_the_base_is_refused():
    decoder = Decoder(prompted(tiny(), CONFIGS["PT"]).eval())
    with pytest.raises(ptmoe.PtmoeError, match="an input of 50 tokens with 5 virtual tokens and 12 new ones exceeds"):
        decoded(decoder, [tokens(50).tolist()])


# -- evaluation ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nano():
    base, tokenizer = load_base("nano")
    config = ptmoe.PTMoEConfig(num_virtual_tokens=6, num_experts=3, rank=3, probationary=False)
    model = attach(base, config, seed=3)
    with torch.no_grad():
        model.encoder.router.weight.mul_(30)
    return model.eval(), tokenizer


@pytest.fixture(scope="module")
def examples():
    return load_task("nano/all", max_examples=40)


def written(nano, examples, folder, **options):
    evaluate(*nano, examples, folder=folder, max_new_tokens=6, **options)
    return (folder / "predictions" / "nano__all.jsonl").read_bytes()


@pytest.mark.ci
def test_kept_prompts_ends_and_stop_texts_give_the_same_completions_in_every_batch(nano, examples):
    model, tokenizer = nano
    prompts = [tokenizer(example.input)["input_ids"] for example in examples[:16]]

    def completed(size, decoder=None):
        parts = [prompts[i : i + size] for i in range(0, len(prompts), size)]
        options = {"max_new_tokens": 16, "until": ["the", "a "]}
        return [one for part in parts for one in complete(model, tokenizer, part, decoder=decoder, **options)]

    plain = Decoder(model)
    plain.prefix = None
    alone = completed(1, plain)
    assert len({one.text for one in alone}) > 4
    assert alone == completed(1) == completed(5) == completed(16) == completed(16, plain)


def test_an_evaluation_reads_its_prompts_once(nano, examples, tmp_path):
    model, _ = nano
    with read_by(model.base_model) as shapes:
        written(nano, examples, tmp_path, batch_size=4)
    assert shapes.count((3, model.num_virtual_tokens)) == 1
    assert sum(positions > 1 for _, positions in shapes) > 10


def test_batches_of_tokens_hold_what_fits_and_change_no_answer(nano, examples, tmp_path):
    model, tokenizer = nano
    by_rows = written(nano, examples, tmp_path / "rows", batch_size=7)
    longest = max(len(tokenizer(example.input)["input_ids"]) for example in examples)
    budget = 5 * (longest + model.num_virtual_tokens + 6)
    with read_by(model.base_model) as shapes:
        assert written(nano, examples, tmp_path / "tokens", tokens_per_batch=budget) == by_rows
    first = [(rows, positions) for rows, positions in shapes[1:] if positions > 1 and rows > 1]
    assert first[0] == (5, longest)
    assert all(rows * (positions + model.num_virtual_tokens + 6) <= budget for rows, positions in first)
    assert max(rows for rows, _ in first) > 5, "all batches are alike: tells nothing"


def test_a_batch_is_closed_only_where_the_next_row_does_not_fit():
    needs = [0, 0, 50, 49, 49, 30, 20, 20, 20, 20, 19, 1]
    batches = batches_within(range(len(needs)), needs, 100)
    assert batches == [[0, 1, 2, 3], [4, 5], [6, 7, 8, 9, 10], [11]]
    assert batches_within(range(5), [1] * 5, 2) == [[0, 1], [2, 3], [4]]


@pytest.mark.slow
def test_an_evaluation_by_tokens_goes_on_with_whole_batches(nano, examples, tmp_path):
    budget = 250
    whole = written(nano, examples, tmp_path / "whole", tokens_per_batch=budget)
    model, _ = nano
    with read_by(model.base_model) as undisturbed:
        written(nano, examples, tmp_path / "again", tokens_per_batch=budget)
    lines = whole.splitlines(keepends=True)
    for kept in (1, 7, 20, 39):
        folder = tmp_path / str(kept)
        written(nano, examples, folder, tokens_per_batch=budget)
        (folder / "predictions" / "nano__all.jsonl").write_bytes(b"".join(lines[:kept]))
        with read_by(model.base_model) as shapes:
            assert written(nano, examples, folder, tokens_per_batch=budget) == whole
        assert shapes[1:] == undisturbed[len(undisturbed) - len(shapes) + 1 :]


def test_a_budget_below_what_a_prompt_needs_is_refused_with_its_example(nano, examples):
    model, tokenizer = nano
    longest = max(examples, key=lambda example: len(tokenizer(example.input)["input_ids"]))
    length = len(tokenizer(longest.input)["input_ids"])
    said = (
        f"tokens_per_batch=20: example '{longest.id}' needs {length + 12}, {length} of its prompt, 6 virtual and 6 new"
    )
    with pytest.raises(ptmoe.PtmoeError, match=said):
        evaluate(model, tokenizer, examples, max_new_tokens=6, tokens_per_batch=20)


def test_the_command_takes_a_budget(nano, tmp_path):
    nano[0].save_pretrained(tmp_path / "adapter")
    arguments = ["eval", str(tmp_path / "adapter"), "--task", "nano/all", "--examples", "8", "--max-new-tokens", "4"]

    def predictions(folder, *more):
        result = CliRunner().invoke(app, [*arguments, "--output-dir", str(tmp_path / folder), *more])
        assert result.exit_code == 0, result.output
        return (tmp_path / folder / "predictions" / "nano__all.jsonl").read_bytes()

    assert predictions("rows") == predictions("tokens", "--tokens-per-batch", "200")
    result = CliRunner().invoke(app, [*arguments, "--output-dir", str(tmp_path / "few"), "--tokens-per-batch", "9"])
    assert isinstance(result.exception, ptmoe.PtmoeError)
