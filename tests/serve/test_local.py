"""The local engine: every row gets the answer it would get alone."""

import asyncio
import random
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ptmoe.errors import PtmoeError
from ptmoe.methods import METHODS
from ptmoe.models.adapter_set import BASE
from ptmoe.models.greedy import GREEDY
from ptmoe.serve.engine import EngineError, Input, Sampling
from ptmoe.serve.local import LocalEngine, described, sample
from testing.architectures import ARCHITECTURES, VOCABULARY
from testing.bases import BY_ROW, CONFIGS, DEVICE, prompted, tiny, tokens

NAMES = {
    "PT": "fixed",
    "PT-MoE selective": "fixed of each expert",
    "PT-MoE neither": "composed",
    "SMoP": "composed",
    "PT-MoE with RoAd": "composed, and changes of the layers",
}
NEW = 10


def served(base):
    """A model with adapters of every kind."""
    for index, name in enumerate(NAMES):
        model = prompted(base if index == 0 else model, (CONFIGS | BY_ROW)[name], seed=index, name=name)  # noqa: F821
    return model.eval()


def row_of(model, ids, name):
    spliced, prompts = model.adapters.compose(ids[None], adapter_names=[name])
    fixed = name != BASE and model.adapters[name].fixed_prompts() is not None
    expert = 0 if prompts.routing is None else int(prompts.routing.gate[0].argmax())
    return Input(spliced.embeds[0].detach(), ids.tolist(), (name, expert) if fixed else None, prompts.changes)


def alone(model, ids, name, new=NEW):
    return model.generate(ids[None], adapter_names=[name], max_new_tokens=new, **GREEDY)[0, len(ids) :].tolist()


async def ask(engine, row, wait=0.0, **sampling):
    await asyncio.sleep(wait)
    return [token async for token in engine.generate(row, Sampling(**{"max_tokens": NEW, **sampling}))]


def answers(engine, *asked):
    """What `ask` gives for each of `(row, wait, sampling)`, all at once; an exception in place of a failed one."""

    async def run():
        await engine.start()
        try:
            rows = (ask(engine, row, wait, **sampling) for row, wait, sampling in asked)
            return await asyncio.wait_for(asyncio.gather(*rows, return_exceptions=True), 60)
        finally:
            await engine.stop()

    return [
        one if isinstance(one, Exception) else [token.id for token in one] if not asked[0][2].get("logprobs") else one
        for one in asyncio.run(run())
    ]


def test_gpt_neos_window_takes_no_row_its_prompt_beside_a_longer_one(monkeypatch):
    own = {"attention_types": [[["global", "local"], 1]], "window_size": 12}
    monkeypatch.setitem(ARCHITECTURES, "gpt_neo", ("GPTNeo", own))
    model = served(tiny("gpt_neo"))
    rows = [tokens(length, length) for length in (3, 24, 5)]
    asked = [(row_of(model, ids, "PT"), 0.0, {}) for ids in rows]
    assert answers(LocalEngine(model, max_batch=3), *asked) == [alone(model, ids, "PT") for ids in rows]


def test_rows_that_come_and_go_get_the_answers_of_generate_alone(base):
    model = served(base)
    engine = LocalEngine(model, max_batch=5)
    sizes = []
    engine.on_step = sizes.append
    chance = random.Random(0)
    asked, expected = [], []
    for index in range(24):
        ids = tokens(chance.choice([1, 2, 5, 9, 14]), index)
        name, new = chance.choice([*NAMES, BASE]), chance.choice([1, 3, NEW, 25])
        asked.append((row_of(model, ids, name), chance.choice([0.0, 0.0, 0.02, 0.1]), {"max_tokens": new}))
        expected.append(alone(model, ids, name, new))
    assert answers(engine, *asked) == expected
    assert max(sizes) == 5
    assert engine._rows.count == 0


def test_an_end_token_is_the_last_one():
    model = served(tiny("llama"))
    ids = tokens(5)
    whole = alone(model, ids, "PT")
    end = whole[4]
    engine = LocalEngine(model)
    assert answers(engine, (row_of(model, ids, "PT"), 0.0, {"ends": frozenset({end})})) == [
        whole[: whole.index(end) + 1]
    ]


def test_the_keys_of_a_fixed_prompt_are_computed_once():
    model = served(tiny("llama"))
    engine = LocalEngine(model)
    read, shapes, forward = tokens(5), [], model.base_model.forward

    def seen(**inputs):
        if "inputs_embeds" in inputs:
            shapes.append(tuple(inputs["inputs_embeds"].shape[:2]))
        return forward(**inputs)

    model.base_model.forward = seen
    row = row_of(model, read, "PT")
    answers(engine, *[(row, 0.1 * turn, {"max_tokens": 1}) for turn in range(3)])
    assert shapes == [(1, row.virtual)] + [(1, 5)] * 3


def test_a_row_that_nobody_reads_any_more_leaves():
    model = served(tiny("llama", max_position_embeddings=20_000))
    engine = LocalEngine(model)

    async def run():
        await engine.start()
        kept = asyncio.create_task(ask(engine, row_of(model, tokens(5), "PT"), max_tokens=40))
        left = engine.generate(row_of(model, tokens(7), BASE), Sampling(max_tokens=10_000))
        await anext(left)
        await left.aclose()
        whole = await kept
        await asyncio.wait_for(engine.stop(), 10)  # nothing is left to finish
        return [token.id for token in whole]

    assert asyncio.run(run()) == alone(model, tokens(5), "PT", 40)


def test_a_row_keeps_its_changes_of_the_layers_when_its_adapter_is_gone():
    model = served(tiny("llama"))
    model.set_adapter("PT")
    rows = [row_of(model, tokens(length, length), name) for length, name in ((5, "PT-MoE with RoAd"), (7, BASE))]
    expected = [alone(model, tokens(length, length), name) for length, name in ((5, "PT-MoE with RoAd"), (7, BASE))]
    model.delete_adapter("PT-MoE with RoAd")
    assert answers(LocalEngine(model), *[(row, 0.0, {}) for row in rows]) == expected
    assert expected[0] != alone(model, tokens(5, 5), BASE)


@pytest.mark.parametrize("target", ["k_proj", "q_proj"])  # of v_proj's size, and of another
def test_a_row_whose_adapter_was_replaced_by_one_of_other_modules_shares_its_batch(target):
    model, config, ids = served(tiny("llama")), BY_ROW["PT-MoE with RoAd"], tokens(5, 5)
    model.set_adapter("PT")
    rows, expected = [row_of(model, ids, "PT-MoE with RoAd")], [alone(model, ids, "PT-MoE with RoAd")]
    model.delete_adapter("PT-MoE with RoAd")
    model = prompted(model, config.replace(target_modules=[target]), seed=9, name="other")
    rows += [row_of(model, ids, name) for name in (BASE, "other")]
    expected += [alone(model, ids, name) for name in (BASE, "other")]
    assert answers(LocalEngine(model), *[(row, 0.0, {}) for row in rows]) == expected
    assert expected[0] != expected[1] != expected[2]


def test_a_row_that_is_given_up_while_the_batch_is_full_is_kept_by_nobody():
    model = served(tiny("llama", max_position_embeddings=20_000))
    engine = LocalEngine(model, max_batch=1)

    async def run():
        await engine.start()
        first = engine.generate(row_of(model, tokens(7), BASE), Sampling(max_tokens=10_000))
        await anext(first)
        waiting = asyncio.create_task(ask(engine, row_of(model, tokens(5), "PT")))
        while not engine._waiting.qsize():
            await asyncio.sleep(0)
        waiting.cancel()
        with suppress(asyncio.CancelledError):
            await waiting
        left = engine._waiting.qsize()
        await first.aclose()
        await asyncio.wait_for(engine.stop(), 10)
        return left

    assert asyncio.run(run()) == 0


@pytest.mark.parametrize("when", ["input", "step"])
def test_a_fault_ends_the_request_that_caused_it_alone(when):
    model = served(tiny("llama"))
    engine, forward = LocalEngine(model), model.base_model.forward
    lengths = (3, 6, 9)
    rows = [row_of(model, tokens(length), BASE) for length in lengths]
    expected = [alone(model, tokens(length), BASE) for length in lengths]
    second = torch.tensor(expected[1][2], device=DEVICE)
    poison = rows[1].embeds[-1] if when == "input" else model.adapters.embedding(second)

    def failing(**inputs):
        embeds = inputs.get("inputs_embeds")
        embeds = model.adapters.embedding(inputs["input_ids"]) if embeds is None else embeds
        if (embeds == poison).all(-1).any():
            raise RuntimeError("poisoned")
        return forward(**inputs)

    model.base_model.forward = failing
    got = answers(engine, *[(row, 0.0, {}) for row in rows])
    poisoned = [any(bool((row.embeds == poison).all(-1).any()) for row in [one]) for one in rows]
    for answer, whole, row, bad in zip(got, expected, rows, poisoned, strict=True):
        embedded = model.adapters.embedding(torch.tensor(whole[:-1], device=DEVICE))
        if bad or bool((embedded == poison).all(-1).any()):
            assert isinstance(answer, EngineError), row
        else:
            assert answer == whole
    assert any(isinstance(answer, EngineError) for answer in got)
    assert any(isinstance(answer, list) for answer in got)


def test_a_fault_of_the_pass_that_decides_a_near_tie_ends_its_request_alone():
    model = served(tiny("llama"))
    engine = LocalEngine(model)
    engine.margin, read = float("inf"), engine._read  # every token is decided so

    def failing(rows, kept):
        if len(rows[0].input.embeds) == 6 and len(rows[0].tokens) == 2:
            raise RuntimeError("out of memory")
        return read(rows, kept)

    engine._read = failing
    first, failed, last = answers(engine, *[(row_of(model, tokens(length), BASE), 0.0, {}) for length in (3, 6, 9)])
    assert [first, last] == [alone(model, tokens(length), BASE) for length in (3, 9)]
    assert isinstance(failed, EngineError)


def test_output_that_is_no_number_ends_its_row_and_leaves_nothing_in_the_cache():
    model = served(tiny("llama"))
    engine = LocalEngine(model)
    good = row_of(model, tokens(4), BASE)
    bad = Input(torch.full_like(row_of(model, tokens(12), BASE).embeds, float("nan")), tokens(12).tolist())
    got = answers(engine, (good, 0.0, {}), (bad, 0.0, {}), (good, 0.3, {}), (good, 0.3, {}))
    assert isinstance(got.pop(1), EngineError)
    assert got == [alone(model, tokens(4), BASE)] * 3


def test_a_seed_gives_the_same_answer_in_any_company_and_temperature_matters():
    model = served(tiny("llama"))
    row, other = row_of(model, tokens(5), "PT"), row_of(model, tokens(8), BASE)
    drawn = {"temperature": 1.5, "seed": 7}
    (first,) = answers(LocalEngine(model), (row, 0.0, drawn))
    again = answers(LocalEngine(model), (other, 0.0, {"max_tokens": 30}), (row, 0.02, drawn), (row, 0.0, drawn))
    assert again[1:] == [first, first]
    (another,) = answers(LocalEngine(model), (row, 0.0, {"temperature": 1.5, "seed": 8}))
    assert another != first
    (cold,) = answers(LocalEngine(model), (row, 0.0, {"temperature": 1e-30, "seed": 8}))
    assert cold == alone(model, tokens(5), "PT")


def test_samples_follow_the_distribution_and_top_p_cuts_its_tail():
    logits = torch.tensor([0.1, 0.5, 0.15, 0.25]).log()
    generator = torch.Generator().manual_seed(0)
    drawn = [sample(logits, Sampling(1, 1.0), generator) for _ in range(4000)]
    assert [drawn.count(token) / 4000 for token in range(4)] == pytest.approx([0.1, 0.5, 0.15, 0.25], abs=0.03)
    drawn = [sample(logits, Sampling(1, 1.0, top_p=0.7), generator) for _ in range(4000)]
    assert [drawn.count(token) / 4000 for token in range(4)] == pytest.approx([0, 2 / 3, 0, 1 / 3], abs=0.03)
    assert {sample(logits, Sampling(1, 1.0, top_p=1e-9), generator) for _ in range(20)} == {1}


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.5, 1.0, 2.0]))
def test_a_seed_gives_the_same_token_where_a_batch_rounds_otherwise(seed, temperature):
    drawn = torch.Generator().manual_seed(seed)
    logits = torch.randn(4000, generator=drawn).round(decimals=2)  # many are close, as in a large vocabulary
    rounded = logits + 1e-6 * torch.rand(4000, generator=drawn)
    sampling = Sampling(1, temperature)
    alone, beside = (sample(one, sampling, torch.Generator().manual_seed(seed)) for one in (logits, rounded))
    assert alone == beside


@given(st.floats(min_value=0, max_value=1e-6, exclude_min=True))
def test_a_temperature_near_zero_is_greedy(temperature):
    logits = torch.tensor([0.5, 3.0, 2.9, float("-inf")])
    assert sample(logits, Sampling(1, temperature), torch.Generator()) == 1


def test_the_engine_ends_quietly_with_the_loop_that_it_answers_in(monkeypatch):
    faults, loop, model = [], asyncio.new_event_loop(), served(tiny("llama"))
    monkeypatch.setattr("threading.excepthook", faults.append)
    engine = LocalEngine(model)
    answer = engine.generate(row_of(model, tokens(5), BASE), Sampling(59))
    loop.run_until_complete(engine.start())
    loop.run_until_complete(anext(answer))
    loop.close()  # as of a server that is told twice to stop
    engine._waiting.put(None)
    engine._thread.join(30)
    assert not engine._thread.is_alive()
    assert not faults


def test_logprobs_are_the_models_own():
    model = served(tiny("llama"))
    ids = tokens(5)
    ((first, *_),) = answers(LocalEngine(model), (row_of(model, ids, BASE), 0.0, {"logprobs": 3, "temperature": 2.0}))
    with model.disable_adapter():
        expected = model(ids[None]).logits[0, -1].log_softmax(0)
    assert first.logprob == pytest.approx(float(expected[first.id]), abs=1e-4)
    assert [token for token, _ in first.top] == expected.topk(3).indices.tolist()
    assert len(described(0, torch.zeros(VOCABULARY), VOCABULARY + 5).top) == VOCABULARY


def test_what_cannot_be_batched_is_refused_in_words():
    lora = prompted(tiny("llama"), METHODS["lora"](rank=2))
    with pytest.raises(PtmoeError, match="layers are changed by an adapter"):
        LocalEngine(lora)
    model = served(tiny("llama", max_position_embeddings=40))
    row = SimpleNamespace(row=row_of(model, tokens(9), "PT"))
    (refused,) = answers(LocalEngine(model), (row.row, 0.0, {"max_tokens": 27}))
    assert isinstance(refused, PtmoeError)
    assert "9 tokens with 5 virtual and 27 new ones need 41 positions, and the base has 40" in str(refused)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_rotation_that_depends_on_the_length_is_not_shared(kind):
    rope = {"rope_type": kind, "factor": 2.0, "rope_theta": 10000.0, "original_max_position_embeddings": 16}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [1.0, 3.0, 9.0, 27.0]}
    model = served(tiny("llama", rope_parameters=rope, max_position_embeddings=128))
    engine = LocalEngine(model)
    assert engine.max_batch == 1
    rows = [(row_of(model, tokens(length), "PT"), 0.0, {"max_tokens": 20}) for length in (4, 15)]
    assert answers(engine, *rows) == [alone(model, tokens(length), "PT", 20) for length in (4, 15)]
