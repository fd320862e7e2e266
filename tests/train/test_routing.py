"""What training does for the router: its coordinates, a start that parts the inputs, a gate that hardens in time."""

import warnings

import pytest
import torch
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    default_data_collator,
)

import ptmoe
from ptmoe.methods.pt_moe import PTMoE
from ptmoe.methods.routing import CONFIDENCE_PACE, ROUTER_RATE, SPREAD, Router
from ptmoe.train import routing
from ptmoe.train.data import collate
from ptmoe.train.routing import RoutingCallback, prompt_gradients, sample_batches, start_router
from testing.bases import DEVICE, batch, on_device, tiny, tiny_llama, tokens

HIDDEN, EXPERTS = 16, 4


def encoder(seed=0, config=None):
    config = config or ptmoe.PTMoEConfig(num_virtual_tokens=5, rank=3, num_experts=EXPERTS)
    built = config.build(HIDDEN)
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(seed))
    return built


def grouped(seed=0, examples=240, groups=EXPERTS, noise=3.0):
    """Inputs that differ mostly by what does not matter, gradients that are mostly noise; in both there is a group."""
    generator = torch.Generator().manual_seed(seed)
    group = torch.arange(examples) % groups
    means = torch.randn(examples, HIDDEN, generator=generator) + 50  # a large part that all inputs share
    means[torch.arange(examples), group] += 5
    wanted = torch.randn(groups, 40, generator=generator)[group]
    gradients = wanted + noise * torch.randn(examples, 40, generator=generator)
    return group, means, torch.nn.functional.normalize(gradients, dim=1)


def routed_to(router, means):
    return router(means, 0.0).argmax(1)


WITHOUT_BIAS = ptmoe.SMoPConfig(num_virtual_tokens=5, num_experts=EXPERTS)


@pytest.mark.parametrize("config", [None, WITHOUT_BIAS], ids=["standardised", "without a bias"])
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.ci
def test_the_router_starts_by_parting_the_groups_that_want_different_prompts(seed, config):
    group, means, gradients = grouped(seed, examples=960)
    built = encoder(seed, config)
    if built.config.router_bias:
        built.router.standardize(means)
    chance = start_router(built, means, gradients, torch.Generator().manual_seed(seed))
    assert chance <= routing.SIGNIFICANT if built.config.router_test else chance == 1
    routes = routed_to(built.router, means)
    shares = torch.stack([torch.bincount(routes[group == index], minlength=EXPERTS) for index in range(EXPERTS)]) / 240
    assert shares.max(1).values.min() > 0.95
    assert len(set(shares.argmax(1).tolist())) == EXPERTS


@pytest.mark.parametrize("standardised", [True, False])
def test_the_start_is_calibrated_to_the_confidence_it_names(standardised):
    _, means, gradients = grouped()
    built = encoder()
    if standardised:
        built.router.standardize(means)
    assert start_router(built, means, gradients, torch.Generator().manual_seed(0)) <= routing.SIGNIFICANT
    confidence = built.router(means, 0.0).softmax(1).amax(1).mean()
    torch.testing.assert_close(confidence, torch.tensor(routing.CONFIDENCE), atol=1e-3, rtol=0)


def test_a_router_without_a_bias_is_not_standardised_since_nothing_could_hold_the_mean():
    message = "router_standardize=True: the router of smop has no bias to fold the inputs' mean into"
    with pytest.raises(ptmoe.PtmoeError, match=message):
        ptmoe.SMoPConfig(router_standardize=True)
    with pytest.raises(ValueError, match="without a bias"):
        encoder(config=WITHOUT_BIAS).router.standardize(grouped()[1])


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize(("examples", "ridge"), [(8, 0.01), (8, 10.0), (40, 0.01), (40, 10.0)])
def test_the_error_of_what_is_left_out_is_that_of_a_fit_without_it(examples, ridge, intercept):
    """With fewer examples than features as well, where a fit to all of them has no error."""
    generator = torch.Generator().manual_seed(examples)
    inputs = torch.randn(examples, HIDDEN, generator=generator, dtype=torch.double) + 3
    targets = torch.randn(examples, 5, generator=generator, dtype=torch.double)
    expected = []
    for i in range(examples):
        others = torch.arange(examples) != i
        x, y = inputs[others], targets[others]
        shift, mean = (x.mean(0), y.mean(0)) if intercept else (torch.zeros(HIDDEN), torch.zeros(5))
        x, y = x - shift, y - mean
        slope = torch.linalg.solve(x.T @ x + ridge * torch.eye(HIDDEN, dtype=x.dtype), x.T @ y)
        expected.append(targets[i] - mean - (inputs[i] - shift) @ slope)
    x, y = (inputs - inputs.mean(0), targets - targets.mean(0)) if intercept else (inputs, targets)
    inverse = torch.linalg.inv(x @ x.T + ridge * torch.eye(examples, dtype=x.dtype))
    found = routing.left_out_residuals(inverse, ridge, intercept) @ y
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-8, rtol=1e-6)


def wide(seed, parts, examples=80, features=160):
    """Fewer examples than features, as on a real model's first steps."""
    generator = torch.Generator().manual_seed(seed)
    group = torch.arange(examples) % 2
    means = torch.randn(examples, features, generator=generator)
    means[:, :8] += 4 * (group[:, None] - 0.5)
    wanted = torch.randn(2, 40, generator=generator)[group if parts else torch.zeros_like(group)]
    gradients = wanted + 2 * torch.randn(examples, 40, generator=generator)
    return group, means, torch.nn.functional.normalize(gradients, dim=1)


@pytest.mark.parametrize("seed", range(5))
def test_the_penalty_with_the_least_error_holds_for_other_examples(seed):
    group, means, gradients = wide(seed, parts=True, examples=160)
    built = ptmoe.PTMoEConfig(num_virtual_tokens=5, rank=3, num_experts=2).build(means.shape[1])
    built.router.initialise(torch.Generator().manual_seed(seed))
    built.router.standardize(means[:80])
    assert start_router(built, means[:80], gradients[:80], torch.Generator().manual_seed(seed)) <= routing.SIGNIFICANT
    right = (routed_to(built.router, means[80:]) == group[80:]).float().mean()
    assert max(right, 1 - right) > 0.9


@pytest.mark.ci
def test_one_expert_serves_data_without_parts_and_two_serve_data_with_two():
    constant = {False: 0, True: 0}
    for parts in constant:
        for seed in range(40):
            _, means, gradients = wide(seed, parts)
            built = ptmoe.PTMoEConfig(num_virtual_tokens=5, rank=3, num_experts=2).build(means.shape[1])
            built.router.initialise(torch.Generator().manual_seed(seed))
            built.router.standardize(means)
            chance = start_router(built, means, gradients, torch.Generator().manual_seed(seed))
            assert built.router.is_constant or chance <= routing.SIGNIFICANT
            constant[parts] += built.router.is_constant
    assert constant[False] >= 32  # 36 are expected
    assert constant[True] == 0


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD, torch.optim.Rprop])
def test_a_router_of_one_expert_gives_its_prompt_whole_and_never_moves(optimizer):
    """Rprop follows signs alone, so a gradient must be 0 exactly."""
    torch.manual_seed(0)
    built = encoder().train()
    built.has_callback = True
    built.router.standardize(grouped()[1], learning_rate=30.0)
    built.router.choose_always(2)
    embeds, mask = 30 * torch.randn(6, 7, HIDDEN), torch.ones(6, 7, dtype=torch.bool)
    before = [parameter.clone() for parameter in built.router.parameters()]
    others = [0, 1, 3]
    unused = built.A[others].clone()
    updates = optimizer(built.parameters(), lr=0.1)
    for hardness in (0.0, 0.5, 1.0):
        built.hardness = hardness
        prompt = built(embeds, mask)
        torch.testing.assert_close(prompt.embeds, (built.whole("A")[2] @ built.B).expand_as(prompt.embeds))
        updates.zero_grad()
        prompt.embeds.square().sum().backward()
        updates.step()
    for parameter, value in zip(built.router.parameters(), before, strict=True):
        assert torch.equal(parameter, value)
    assert torch.equal(built.A[others], unused)
    built.finish_training()
    assert built.router.is_constant
    assert torch.equal(built.eval()(embeds, mask).routing.gate[:, 2], torch.ones(6))


@pytest.mark.parametrize(("examples", "test"), [(240, False), (routing.TELLING - 1, True)])
def test_without_the_test_or_enough_examples_for_it_the_router_is_left_alone(examples, test):
    _, means, gradients = grouped(examples=examples)
    noise = torch.randn(gradients.shape, generator=torch.Generator().manual_seed(9))
    config = ptmoe.PTMoEConfig(num_virtual_tokens=5, rank=3, num_experts=EXPERTS, router_test=test)
    built = encoder(config=config)
    before = built.router.weight.clone()
    assert start_router(built, means, noise, torch.Generator().manual_seed(0)) == 1
    assert torch.equal(built.router.weight, before)


def test_without_a_bias_no_router_can_be_of_one_expert():
    with pytest.raises(ptmoe.PtmoeError, match="router_test=True: the router of smop has no bias"):
        ptmoe.SMoPConfig(router_test=True)
    with pytest.raises(ValueError, match="without a bias"):
        encoder(config=WITHOUT_BIAS).router.choose_always(0)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_data_set_with_too_few_examples_starts_the_router_at_random_and_says_so(count, tmp_path):
    """However often training reads them."""
    run = trainer(tmp_path)
    run.train_dataset = rows(count)
    before = run.model.encoder.router.weight.clone()
    state = TrainerState(max_steps=1000)
    with pytest.warns(UserWarning, match=rf"the router starts at random: {count} examples \(3% of"):
        RoutingCallback().on_train_begin(run.args, state, TrainerControl(), run.model, run.get_train_dataloader())
    assert torch.equal(run.model.encoder.router.weight, before)


def test_training_on_data_without_parts_says_so_and_ends_as_one_prompt(tmp_path, monkeypatch):
    monkeypatch.setattr(routing, "START_SHARE", 1.0)
    run = trainer(tmp_path)
    with pytest.warns(UserWarning, match=r"one expert for all inputs: 24 examples do not show .* router_test=false"):
        run.train()
    encoder = run.model.encoder
    assert encoder.router.is_constant
    assert torch.equal(encoder.A[1], encoder.A[2])
    assert not torch.equal(encoder.A[0], encoder.A[1])


@pytest.mark.parametrize("stopped", [None, 4])
@pytest.mark.ci
def test_an_expert_that_trains_alone_trains_as_dpt(stopped, tmp_path, monkeypatch):
    """Step by step, from the start that both have, through a resumed run and in the published form."""
    monkeypatch.setattr(routing, "START_SHARE", 1.0)
    alike = {"num_virtual_tokens": 4, "rank": 3}
    one = trainer(tmp_path / "dpt", config=ptmoe.DPTConfig(**alike))
    one.train()
    run = trainer(tmp_path / "pt-moe", router_noise=0)
    run.args.set_save("steps", 4)
    start = run.model.encoder.B.detach().clone()
    with pytest.warns(UserWarning, match="one expert for all inputs"):
        run.train()
    if stopped:
        run = trainer(tmp_path / "pt-moe", router_noise=0)
        run.train(resume_from_checkpoint=str(tmp_path / "pt-moe" / f"checkpoint-{stopped}"))
    dpt, encoder = one.model.encoder, run.model.encoder
    assert not torch.allclose(encoder.B, start)
    torch.testing.assert_close(encoder.A[0], dpt.A)
    torch.testing.assert_close(encoder.B, dpt.B)
    assert not encoder.alone


def test_standardising_and_folding_leave_the_same_function_to_the_bit():
    _, means, _ = grouped()
    built = encoder()
    built.router.standardize(means)
    trained = built.router(means, 0.0)
    built.finish_training()
    assert torch.equal(built.router(means, 0.0), trained)
    assert built.router.mean is None
    assert built.router.scale is None


@pytest.mark.parametrize("hidden", [32, 192, 576, 2048])
@pytest.mark.parametrize("rate", [0.001, 0.03, 0.3, 3.0])
def test_no_learning_rate_makes_the_router_faster_than_its_own(rate, hidden):
    """The largest change of a logit in a step of an optimizer that moves every parameter by its rate, whatever the
    gradient."""
    generator = torch.Generator().manual_seed(0)
    means = 3 + torch.randn(64, hidden, generator=generator)
    router = Router(hidden, 3)
    router.initialise(generator)
    router.standardize(means, learning_rate=rate)
    updates = torch.optim.Adam(router.parameters(), lr=rate)
    standard = (means - means.mean(0)) / means.std(0, correction=0)
    before = router(means, 0.0).detach()
    for parameter in router.parameters():
        parameter.grad = torch.ones_like(parameter)  # Adam's first step is its rate, whatever the gradient's size
    updates.step()
    moved = (router(means, 0.0) - before).detach()
    own = min(rate, ROUTER_RATE / hidden)
    expected = -own * (SPREAD * standard.sum(1, keepdim=True) + 1).expand(-1, 3)
    torch.testing.assert_close(moved, expected, atol=1e-4 * float(expected.abs().max()), rtol=1e-3)


@pytest.mark.parametrize("rate", [0.003, 0.3])
def test_a_trained_router_keeps_its_function_in_the_coordinates_of_more_training(rate):
    _, means, _ = grouped()
    built = encoder()
    before = built.router(means, 0.0)
    built.router.standardize(means, learning_rate=rate, keep=True)
    torch.testing.assert_close(built.router(means, 0.0), before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("start", ["gradient", "random"])
@pytest.mark.parametrize("rate", [0.003, 3.0])
def test_the_initial_routing_is_the_same_whatever_the_learning_rate(rate, start):
    _, means, gradients = grouped()
    starts = []
    for given in (rate, 0.0):
        built = encoder()
        built.router.standardize(means, learning_rate=given)
        if start == "gradient":
            start_router(built, means, gradients, torch.Generator().manual_seed(0))
        starts.append(built.router(means, 0.0).detach())
    torch.testing.assert_close(*starts, atol=1e-4, rtol=1e-4)


def test_a_feature_that_never_varies_does_not_decide():
    _, means, _ = grouped()
    means[:, 3] = 7 + 1e-6 * (torch.arange(len(means)) % 2)  # but for rounding
    built = encoder()
    built.router.standardize(means)
    weight, bias = built.router.published()
    assert weight.isfinite().all()
    assert bias.isfinite().all()
    assert built.router.scale[3] == 1


def rows(count=24):
    generator = torch.Generator().manual_seed(1)
    examples = []
    for _ in range(count):
        ids = torch.randint(3, 90, (int(torch.randint(4, 9, (), generator=generator)),), generator=generator).tolist()
        examples.append({"input_ids": ids, "labels": [-100] * (len(ids) - 2) + ids[-2:]})
    return examples


def test_each_rows_gradient_is_the_one_it_has_alone_at_the_mean_prompt_and_without_dropout():
    config = ptmoe.PTMoEConfig(num_virtual_tokens=4, rank=3, num_experts=3, distinct_experts=True)
    model = ptmoe.attach(tiny("gpt2"), config).train()
    together = prompt_gradients(model, on_device(collate(rows(5))))
    alone = torch.cat([prompt_gradients(model, on_device(collate([row]))) for row in rows(5)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(5, device=DEVICE))
    with torch.no_grad():
        model.encoder.A.copy_(model.encoder.A.mean(0))
    at_mean = prompt_gradients(model, on_device(collate(rows(5))))
    torch.testing.assert_close(at_mean, together, atol=1e-5, rtol=1e-4)
    assert model.base_model.training


def test_gradients_of_batches_that_memory_does_not_hold_are_computed_in_parts(monkeypatch):
    model = ptmoe.attach(tiny_llama(), ptmoe.PTMoEConfig(num_virtual_tokens=4, rank=3))
    batches = [on_device(collate(rows(7))), on_device(collate(rows(5)))]
    whole = torch.cat([prompt_gradients(model, one) for one in batches])
    tried, forward = [], model.forward

    def limited(**inputs):
        tried.append(len(inputs["input_ids"]))
        if tried[-1] > 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(**inputs)

    monkeypatch.setattr(model, "forward", limited)
    with pytest.warns(UserWarning, match="out of memory with 4 rows at once: batches are computed in 4 parts"):
        parts = torch.cat(list(routing.gradients_of(model, batches)))
    assert tried == [7, 4, 2, 2, 2, 1, 2, 2, 1]
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-4)


def test_the_start_reads_what_the_router_reads_no_answer_and_no_padding():
    model = ptmoe.attach(tiny_llama(), ptmoe.PTMoEConfig(num_virtual_tokens=4, rank=3))
    ids, mask = batch([tokens(7, 1), tokens(4, 2)], [1, 3])
    labels = torch.where(mask.cumsum(1) > 2, ids, -100)
    both = torch.ones_like(mask)  # padding, too
    both[labels != -100] = 0
    read = []
    model.encoder.router.register_forward_pre_hook(lambda module, given: read.append(given[0]))
    for given in ({"labels": labels}, {"input_mask": both}, {"input_mask": both, "labels": labels}):
        model(ids, mask, **given)
        found = routing.mean_inputs(model, {"input_ids": ids, "attention_mask": mask, **given})
        torch.testing.assert_close(found, read[-1])
        torch.testing.assert_close(found, read[0])


def test_examples_without_labels_are_refused_in_words(tmp_path):
    run = trainer(tmp_path)
    run.train_dataset = [{"input_ids": list(range(n, n + 6))} for n in range(3, 27)]
    run.data_collator = default_data_collator
    with pytest.raises(ptmoe.PtmoeError, match="training examples with neither labels nor input_mask"):
        run.train()


def arguments(folder, steps):
    return TrainingArguments(
        str(folder),
        max_steps=steps,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        remove_unused_columns=False,
    )


def trainer(folder, steps=10, config=None, **fields):
    config = config or ptmoe.PTMoEConfig(num_virtual_tokens=4, rank=3, num_experts=3, **fields)
    model = ptmoe.attach(tiny_llama(), config)
    return Trainer(
        model=model,
        args=arguments(folder, steps),
        train_dataset=rows(),
        data_collator=collate,
        callbacks=[RoutingCallback()],
    )


@pytest.mark.ci
def test_the_router_starts_from_batches_that_hold_more_than_tensors(tmp_path):
    def absent(examples):
        return collate(examples) | {"position_ids": None}

    started = []
    for collator in (collate, absent):
        run = trainer(tmp_path)
        run.data_collator = collator
        run.train()
        started.append(run.model.encoder.router.weight)
    assert torch.equal(*started)


def test_after_training_the_router_is_in_the_published_coordinates(tmp_path):
    run = trainer(tmp_path)
    run.train()
    router = run.model.encoder.router
    assert router.mean is None
    assert router.scale is None
    assert run.model.encoder.hardness == 1.0


def test_any_routed_method_has_the_training_of_its_router(tmp_path):
    hardness = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model, **_):
            hardness.append(model.encoder.hardness)

    config = ptmoe.SMoPConfig(num_virtual_tokens=4, router_init="gradient", routing_anneal=True)
    run = trainer(tmp_path, config=config)
    run.add_callback(Watch())
    kinds = [[low + i % 5, low + i % 7, low + i % 9, low + i % 4] for i in range(16) for low in (10, 60)]
    run.train_dataset = [
        {"input_ids": [*ids, answer, answer], "labels": [-100] * 4 + [answer, answer]}
        for ids, answer in zip(kinds, [50, 90] * 16, strict=True)
    ]
    state = TrainerState(max_steps=1000)
    RoutingCallback().on_train_begin(run.args, state, TrainerControl(), run.model, run.get_train_dataloader())
    routes = run.model.eval().route(torch.tensor(kinds, device=run.model.device)).gate.argmax(1)
    assert sorted([routes[0].item(), routes[1].item()]) == [0, 1]
    assert torch.equal(routes, routes[:2].repeat(16))
    run.train()
    assert hardness[0] == 0.0
    assert hardness == sorted(hardness)
    assert hardness[-1] == run.model.encoder.hardness == 1.0
    assert set(run.model.encoder.tensors()) == {"prompts", "router.weight"}


@pytest.mark.parametrize("config", [None, WITHOUT_BIAS], ids=["PT-MoE", "SMoP"])
def test_a_checkpoint_restores_the_training_of_the_router(config):
    trained, restored = encoder(1, config), encoder(2, config)
    if trained.config.router_bias:
        trained.router.standardize(grouped()[1])
        trained.S, restored.S = (torch.nn.Parameter(built.A.detach().sum(0)) for built in (trained, restored))
    trained.hardness, trained.confidence = 0.25, torch.tensor(0.75)
    restored.load_tensors(trained.tensors())
    restored.load_training_state({key: value.clone() for key, value in trained.training_state().items()})
    expected, found = trained.training_state(), restored.training_state()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert torch.equal(restored.expert_prompts(), trained.expert_prompts())


@pytest.mark.parametrize("shared", [False, True])
def test_the_experts_are_one_until_they_split_and_then_the_router_starts(shared, tmp_path, monkeypatch):
    spread, started, confidences = [], [], []
    monkeypatch.setattr(routing, "START_SHARE", 1.0)
    monkeypatch.setattr(routing, "start_router", lambda *_: started.append(len(spread)) or start_router(*_))

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model, **_):
            prompts = model.encoder.expert_prompts()
            spread.append((prompts - prompts.mean(0)).abs().max().item())
            confidences.append(float(model.encoder.confidence))

    run = trainer(tmp_path, router_noise=0.0, distinct_experts=False, shared_factor=shared, split_after=0.4)
    run.args.learning_rate = 0.03
    run.add_callback(Watch())
    before = run.model.encoder.router.weight.clone()
    run.train()
    assert started == [4]
    assert max(spread[:4]) < 1e-6
    assert min(spread[4:]) > 1e-4
    assert 0 < confidences[4] <= 1.01 * CONFIDENCE_PACE  # of the router that has started, one step from zero
    assert not torch.equal(run.model.encoder.router.weight, before)
    assert not run.model.encoder.together
    assert run.model.encoder.S is None


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.ci
def test_however_short_the_training_and_late_the_split_the_experts_part_before_it_ends(steps, tmp_path):
    """Else each would have learnt as 1/N of a prompt, and be given alone, by a router that has never started."""
    run = trainer(tmp_path, steps=steps, split_after=0.9)
    parted = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model, **_):
            parted.append(not model.encoder.together)

    run.add_callback(Watch())
    run.train()
    assert parted[-1]


def test_an_expert_is_the_shared_factor_and_its_difference():
    model = ptmoe.attach(tiny_llama(), ptmoe.PTMoEConfig(num_virtual_tokens=4, rank=3, shared_factor=True))
    encoder = model.encoder
    torch.nn.init.normal_(encoder.S)
    ids = torch.stack([tokens(6, seed) for seed in range(3)])
    embeds, mask = model.adapters.embedding(ids), torch.ones_like(ids, dtype=torch.bool)
    prompt = encoder(embeds, mask)
    expected = torch.einsum("bn,ntr,rh->bth", prompt.routing.gate, encoder.A + encoder.S, encoder.B)
    torch.testing.assert_close(prompt.embeds, expected)
    encoder.finish_training()
    torch.testing.assert_close(encoder(embeds, mask).embeds, expected)
    assert set(dict(encoder.named_parameters())) == {"A", "B", "router.weight", "router.bias"}


def test_preparing_the_router_changes_no_random_number_of_the_training(tmp_path):
    torch.manual_seed(3)
    run = trainer(tmp_path)
    before = torch.get_rng_state()
    callback = RoutingCallback()
    state = TrainerState(max_steps=1000)
    callback.on_train_begin(run.args, state, TrainerControl(), run.model, run.get_train_dataloader())
    assert torch.equal(torch.get_rng_state(), before)


def test_the_papers_recipe_is_left_alone(tmp_path):
    run = trainer(tmp_path, recipe="paper")
    before = run.model.encoder.router.weight.clone()
    callback = RoutingCallback()
    state = TrainerState(max_steps=1000)
    callback.on_train_begin(run.args, state, TrainerControl(), run.model, run.get_train_dataloader())
    callback.on_step_begin(run.args, TrainerState(max_steps=10), TrainerControl(), run.model)
    encoder = run.model.encoder
    assert torch.equal(encoder.router.weight, before)
    assert encoder.router.scale is None
    assert encoder.hardness == 1.0


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.slow
def test_the_routers_start_takes_its_share_of_the_training_and_shows_how_far_it_is(tmp_path, accumulation):
    """Counted in rows that the base reads before the first step and in all of training."""
    shown, read, before = [], [], []

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            before.append(sum(read))

    run = trainer(tmp_path, steps=40)
    run.args.gradient_accumulation_steps = accumulation
    run.callback_handler.callbacks = [
        callback for callback in run.callback_handler.callbacks if not isinstance(callback, RoutingCallback)
    ]
    run.add_callback(RoutingCallback(lambda done, total, loss: shown.append((done, total))))
    run.add_callback(Watch())
    run.model.register_forward_pre_hook(
        lambda module, arguments, options: read.append(len(options["input_ids"])), with_kwargs=True
    )
    run.train()
    start, training = before[0], sum(read) - before[0]
    assert 0 < start <= routing.START_SHARE * training
    assert shown == sorted(shown)
    assert shown[-1] == (start, start)


def test_more_examples_than_the_limit_are_never_read_and_too_few_say_so(tmp_path):
    run = trainer(tmp_path, steps=5)
    loader = run.get_train_dataloader()
    assert routing.start_examples(run.args, TrainerState(max_steps=10**6), loader) == routing.EXAMPLES
    with pytest.warns(UserWarning, match=r"the router starts at random: 1 examples \(3% of"):
        run.train()


def hardnesses(confidence, split_after, steps=100):
    """The gate's hardness at every step, for a router that is this confident from the start."""
    config = ptmoe.PTMoEConfig(num_virtual_tokens=4, rank=3, num_experts=3, split_after=split_after)
    model = ptmoe.attach(tiny_llama(), config)
    model.encoder.hardness = 0.0
    model.encoder.confidence = confidence
    seen = []
    for step in range(steps):
        state = TrainerState(global_step=step, max_steps=steps)
        RoutingCallback().on_step_begin(arguments("runs", 100), state, TrainerControl(), model)
        seen.append(model.encoder.hardness)
    return seen


@pytest.mark.parametrize(("split_after", "earliest", "latest"), [(0.0, 30, 60), (0.5, 65, 80)])
def test_the_gate_hardens_when_the_routing_has_settled_and_at_the_latest_in_time(split_after, earliest, latest):
    """In fractions of the steps that are left when the experts part."""
    settled, unsettled = hardnesses(0.99, split_after), hardnesses(0.5, split_after)
    assert settled[earliest - 1] == 0.0
    assert 0 < settled[earliest] < 1
    assert unsettled[latest - 1] == 0.0
    assert 0 < unsettled[latest] < 1
    for seen in (settled, unsettled):
        assert seen == sorted(seen)
        assert seen[-1] == pytest.approx(1.0)


@pytest.mark.ci
def test_the_routing_settles_at_the_pace_of_steps_however_their_batches_are_accumulated(tmp_path):
    confidences = {}
    for size in (8, 2):
        run = trainer(tmp_path, steps=4, router_noise=0.0)
        run.args.per_device_train_batch_size, run.args.gradient_accumulation_steps = size, 8 // size
        seen = confidences[size] = []

        class Watch(TrainerCallback):
            def on_step_end(self, args, state, control, model, seen=seen, **_):
                seen.append(float(model.encoder.confidence))

        run.add_callback(Watch())
        run.train()
    assert len(confidences[2]) == 4
    assert confidences[2] == pytest.approx(confidences[8], rel=0.05)
    assert 0 < confidences[2][0] <= CONFIDENCE_PACE  # one step from zero


def test_what_is_generated_in_training_mode_is_not_counted_as_training():
    """By a callback that shows samples: it would decide when the gate hardens, and fill the log."""
    model = ptmoe.attach(tiny_llama(), ptmoe.PTMoEConfig(num_virtual_tokens=4, rank=4)).train()
    model.generate(tokens(4)[None], max_new_tokens=1)
    model.route(tokens(4)[None])
    assert model.encoder.of_step == (0.0, 0)
    assert "expert_use" not in model.encoder.training_log()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, "router_init='gradient', router_test=True, router_standardize=True, routing_anneal=True without effect"),
        ({"router_init": "random", "split_after": 0.5}, ": router_standardize=True, .*split_after=0.5 without"),
        ({"recipe": "paper", "split_after": 0.25}, ": split_after=0.25 without effect"),
    ],
)
def test_training_without_the_callback_says_so_once_and_what_it_leaves_out(options, named):
    model = ptmoe.attach(tiny_llama(), ptmoe.PTMoEConfig(num_virtual_tokens=4, rank=3, **options)).train()
    assert isinstance(model.encoder, PTMoE)
    with torch.no_grad():  # nothing is trained
        model(**on_device(collate(rows(2))))
    assert not model.encoder.has_callback
    with pytest.warns(UserWarning, match=f"RoutingCallback.*{named}"):
        model(**on_device(collate(rows(2))))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**on_device(collate(rows(2))))


def test_a_checkpoint_with_a_shared_factor_is_whole_where_training_has_ended():
    """A notebook's `trainer.train(resume_from_checkpoint=…)` after the end of a training in the same process."""
    config = ptmoe.PTMoEConfig(num_virtual_tokens=5, rank=3, num_experts=EXPERTS, shared_factor=True)
    built = encoder(config=config)
    built.S = torch.nn.Parameter(torch.randn(built.A.shape[1:], generator=torch.Generator().manual_seed(3)))
    state = {key: value.clone() for key, value in built.state_dict().items()}
    prompts = built.expert_prompts().detach().clone()
    built.finish_training()
    torch.nn.init.zeros_(built.A)
    built.load_state_dict(state, strict=False)
    torch.testing.assert_close(built.expert_prompts(), prompts)


def test_a_trained_router_that_is_trained_further_goes_on_from_where_it_is(tmp_path):
    run = trainer(tmp_path)
    run.train()
    ids = torch.stack([tokens(6, seed) for seed in range(8)])
    before = run.model.eval().route(ids).probabilities
    state, loader = TrainerState(max_steps=1000), run.get_train_dataloader()
    RoutingCallback().on_train_begin(run.args, state, TrainerControl(), run.model, loader)
    encoder = run.model.encoder
    assert encoder.router.mean is not None
    assert encoder.hardness == 1.0
    torch.testing.assert_close(run.model.route(ids).probabilities, before, atol=1e-4, rtol=1e-3)
    run.model.save_pretrained(tmp_path / "adapter")
    loaded = ptmoe.load_adapter(tiny_llama(), tmp_path / "adapter")
    RoutingCallback().on_train_begin(run.args, state, TrainerControl(), loaded, loader)
    torch.testing.assert_close(loaded.eval().route(ids).probabilities, before, atol=1e-4, rtol=1e-3)


def test_a_trained_router_that_is_trained_further_is_not_parted_again_where_that_is_resumed(tmp_path):
    run = trainer(tmp_path, steps=4, split_after=0.5)
    run.train()
    begin = RoutingCallback().on_train_begin
    begin(run.args, TrainerState(max_steps=4), TrainerControl(), run.model, run.get_train_dataloader())
    saved = run.model.encoder.training_state()
    other = trainer(tmp_path, steps=4, split_after=0.5)
    other.model.encoder.load_training_state(saved)
    begin(run.args, TrainerState(global_step=1, max_steps=4), TrainerControl(), other.model)
    assert not other.model.encoder.together


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(rows())


def test_the_start_reads_examples_from_all_over_a_data_set_or_the_first_of_a_stream():
    assert sample_batches(range(100), list, 4, 10) == [[0, 10, 20, 30], [40, 50, 60, 70], [80, 90]]
    assert sample_batches(range(3), list, 4, 10) == [[0, 1, 2]]
    assert sample_batches(Stream(), list, 4, 5) == [rows()[:4], rows()[4:5]]


@pytest.mark.ci
def test_the_router_starts_from_a_stream_and_from_rows_without_a_mask(tmp_path):
    run = trainer(tmp_path, steps=4)
    run.train_dataset = Stream()
    run.train()
    alike = [{"input_ids": list(range(n, n + 6)), "labels": [-100] * 4 + [n, n]} for n in range(3, 27)]
    run = trainer(tmp_path, steps=4)
    run.train_dataset, run.data_collator = alike, default_data_collator
    run.train()
    assert run.model.encoder.trained
