"""A trainer that is not ours: all that training has decided is in what it saves, and what it cannot do is refused."""

import random
import shutil
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer

import ptmoe
from ptmoe.errors import PtmoeError
from ptmoe.methods import METHODS
from ptmoe.train import PromptTrainer
from ptmoe.train.data import collate
from testing.architectures import PAD
from testing.bases import DEVICE, batch, on_device, tiny_llama, tokens
from testing.shelf import OF_SHORT
from testing.training import dataset, trainer

SIZES = {
    "pt": {"num_virtual_tokens": 4},
    "dpt": {"num_virtual_tokens": 4, "rank": 2},
    "p-tuning": {"num_virtual_tokens": 4},
    "prefix-tuning": {"num_virtual_tokens": 4},
    "lora": {"rank": 2},
    "hydralora": {"rank": 2},
    "ia3": {},
    "ft": {},
}
ROUTED = {
    "pt-moe": ptmoe.PTMoEConfig(num_virtual_tokens=4, num_experts=3, rank=3),
    "pt-moe by gradient": ptmoe.PTMoEConfig(num_virtual_tokens=4, num_experts=3, rank=3, router_init="gradient"),
    "pt-moe, annealing alone": ptmoe.PTMoEConfig(
        num_virtual_tokens=4, num_experts=2, rank=3, router_standardize=False, router_noise=0.3
    ),
    "pt-moe, one factor for all, split": ptmoe.PTMoEConfig(
        num_virtual_tokens=4, num_experts=3, rank=3, distinct_experts=False, shared_factor=True, split_after=0.5
    ),
    "smop": ptmoe.SMoPConfig(num_virtual_tokens=4, num_experts=2, router_init="gradient", routing_anneal=True),
    "pt-moe-road": METHODS["pt-moe-road"](num_virtual_tokens=4, num_experts=3, rank=3, split_after=0.5),
}

SLOW = pytest.mark.slow


@pytest.mark.ci
@pytest.mark.parametrize("method", [pytest.param(name, marks=[] if name == "vblora" else SLOW) for name in OF_SHORT])
def test_a_resumed_run_of_a_type_of_peft_ends_at_the_numbers_of_the_undisturbed_one(method, tmp_path):
    whole, resumed = (trainer(tmp_path, METHODS[method](**OF_SHORT[method])) for _ in range(2))
    whole.train()
    shutil.rmtree(tmp_path / "checkpoint-4")
    resumed.train(resume_from_checkpoint=True)
    for name, value in whole.model.encoder.tensors().items():
        assert torch.equal(resumed.model.encoder.tensors()[name], value), name


@pytest.mark.parametrize("config", ROUTED.values(), ids=ROUTED)
@pytest.mark.parametrize("after", [1, 3])
@pytest.mark.slow
def test_a_resumed_run_ends_at_the_adapter_of_the_undisturbed_one(config, after, tmp_path):
    whole = trainer(tmp_path, config, save_steps=1)
    whole.train()
    for step in range(after + 1, 5):
        shutil.rmtree(tmp_path / f"checkpoint-{step}")  # as if it had been killed
    resumed = trainer(tmp_path, config, save_steps=1)
    resumed.train(resume_from_checkpoint=True)
    expected, found = (run.model.encoder.tensors() for run in (whole, resumed))
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert whole.model.encoder.state_dict().keys() == expected.keys()  # the published form, when training is over
    whole.save_model(str(tmp_path / "saved"))
    whole.model.save_pretrained(tmp_path / "adapter")
    model = ptmoe.load_adapter(tiny_llama(), tmp_path / "adapter")
    ids = tokens(6)[None]
    assert torch.equal(model(ids).logits, whole.model.eval()(ids).logits)


@pytest.mark.ci
@pytest.mark.parametrize("strategy", ["random", "group_by_length", "batch_rebalance"])
def test_a_run_that_is_resumed_in_a_later_epoch_reads_the_same_batches(strategy, tmp_path):
    chosen = {"trainer_class": PromptTrainer, "max_steps": 5, "save_steps": 1, "train_sampling_strategy": strategy}
    runs = [trainer(tmp_path, METHODS["pt"](num_virtual_tokens=4), **chosen) for _ in range(2)]
    runs[0].train()
    runs[1].train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))  # of three batches an epoch
    assert torch.equal(runs[1].model.encoder.prompt, runs[0].model.encoder.prompt)


@pytest.mark.ci
@pytest.mark.parametrize("trainer_class", [pytest.param(Trainer, marks=pytest.mark.slow), PromptTrainer])
def test_a_prompt_between_earlier_ones_resumes_where_it_was(trainer_class, tmp_path):
    ptmoe.attach(tiny_llama(), METHODS["pt"](num_virtual_tokens=4), seed=3).save_pretrained(tmp_path / "earlier")
    config = METHODS["fwd-prompt"](num_virtual_tokens=4, earlier=[str(tmp_path / "earlier")])
    runs = [trainer(tmp_path / "run", config, trainer_class=trainer_class, save_steps=1) for _ in range(2)]
    runs[0].train()
    for step in (3, 4):
        shutil.rmtree(tmp_path / "run" / f"checkpoint-{step}")  # as if it had been killed
    runs[1].train(resume_from_checkpoint=True)
    assert runs[0].model.encoder.basis is not None
    first, second = (run.model.encoder.state_dict() for run in runs)
    assert first.keys() == second.keys() == {"prompt", "start", "basis"}
    assert all(torch.equal(second[key], value) for key, value in first.items())
    runs[0].model.save_pretrained(tmp_path / "adapter")
    loaded, ids = ptmoe.load_adapter(tiny_llama(), tmp_path / "adapter"), tokens(6)[None]
    assert torch.equal(loaded(ids).logits, runs[0].model.eval()(ids).logits)


@pytest.mark.parametrize("method", ["pt-moe", "pt-moe, one factor for all, split"])
def test_an_adapter_saved_in_the_middle_of_training_is_the_published_form(method, tmp_path):
    run = trainer(tmp_path, ROUTED[method])
    router = run.model.encoder.router
    if run.model.encoder.S is not None:
        torch.nn.init.normal_(run.model.encoder.S)
    router.standardize(torch.randn(20, router.weight.shape[1], device=DEVICE))
    run.model.encoder.hardness = 0.5
    assert {"router.mean", "router.scale", "hardness", "confidence"} <= run.model.encoder.state_dict().keys()
    run.model.save_pretrained(tmp_path)
    ids = tokens(6)[None]
    loaded = ptmoe.load_adapter(tiny_llama(), tmp_path)
    assert torch.equal(loaded(ids).routing.gate, run.model.eval()(ids).routing.gate)
    assert torch.equal(loaded.encoder.expert_prompts(), run.model.encoder.expert_prompts())
    assert loaded.encoder.S is None


@pytest.mark.slow
def test_a_checkpoint_without_the_statistics_is_refused(tmp_path):
    from safetensors.torch import save_file

    trainer(tmp_path, ROUTED["pt-moe"], max_steps=2).train()
    file = tmp_path / "checkpoint-2" / "model.safetensors"
    kept = {name: value for name, value in load_file(file).items() if not name.endswith((".mean", ".scale"))}
    save_file(kept, file, {"format": "pt"})
    with pytest.raises(PtmoeError, match="checkpoint of step 2 lacks the statistics of the router's inputs"):
        trainer(tmp_path, ROUTED["pt-moe"]).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("method", SIZES)
@pytest.mark.ci
def test_label_smoothing_smooths_the_tokens_that_are_predicted(method, tmp_path):
    batch = on_device(collate(dataset(6)))

    def loss(smoothing):
        run = trainer(tmp_path, METHODS[method](**SIZES[method]), label_smoothing_factor=smoothing, callbacks=False)
        return run.compute_loss(run.model.eval(), dict(batch)).detach()

    assert_close(loss(1e-6), loss(0.0), atol=1e-4, rtol=0)
    assert abs(float(loss(0.3) - loss(0.0))) > 1e-3


@pytest.mark.parametrize("config", [ROUTED["pt-moe"], METHODS["kasa"](rank=2)], ids=["pt-moe", "kasa"])
@pytest.mark.ci
def test_a_trainer_that_keeps_the_labels_is_refused_where_training_needs_them(config, tmp_path):
    run = trainer(tmp_path, config, label_smoothing_factor=0.1, callbacks=False)
    with pytest.raises(PtmoeError, match=r"label smoothing|label_smoothing_factor"):
        run.train()


def test_with_its_callback_what_needs_the_labels_is_refused_before_it_is_evaluated(tmp_path):
    with pytest.raises(PtmoeError, match="the router would read the answers"):
        trainer(tmp_path, ROUTED["pt-moe"], label_smoothing_factor=0.1)
    with pytest.raises(PtmoeError, match="from kasa, so its own loss is left out"):
        trainer(tmp_path, METHODS["kasa"](rank=2), label_smoothing_factor=0.1)
    trainer(tmp_path, METHODS["pt"](**SIZES["pt"]), label_smoothing_factor=0.1)


READING = ROUTED | {
    "attempt": METHODS["attempt"](num_virtual_tokens=4),
    "id-spam": METHODS["id-spam"](num_virtual_tokens=4, bottleneck=3),
    "mept": METHODS["mept"](num_virtual_tokens=2),
}


def own_loss(outputs, labels, num_items_in_batch=None):
    """As `compute_loss_func`: the trainer gives it the labels, and the model none."""
    logits = outputs.logits[:, :-1].flatten(0, 1).float()
    return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100)


def test_every_method_whose_prompt_depends_on_the_input_is_among_those_that_read_it():
    reading = {name for name, config in METHODS.items() if config.reads_input or config.routes}
    assert reading == {config.method for config in READING.values()}


@pytest.mark.parametrize("config", READING.values(), ids=READING)
@pytest.mark.parametrize("callbacks", [False, True], ids=["alone", "callback"])
@pytest.mark.parametrize("keeping", ["smoothing", "function"])
def test_an_evaluation_whose_trainer_keeps_the_labels_does_not_let_the_prompt_read_the_answers(
    keeping, callbacks, config, tmp_path
):
    options = {"label_smoothing_factor": 0.1} if keeping == "smoothing" else {"compute_loss_func": own_loss}
    for asked in ("evaluate", "predict"):
        with pytest.raises(PtmoeError, match=r"the router would read the answers|would depend on the answers"):
            getattr(trainer(tmp_path, config, callbacks=callbacks, **options), asked)(dataset(4))


@pytest.mark.parametrize("config", [ROUTED["pt-moe"], METHODS["lora"](rank=2)], ids=["pt-moe", "lora"])
def test_an_evaluation_by_generation_does_not_let_the_prompt_read_the_answers(config, tmp_path):
    rows = dataset(4)
    evaluated = Seq2SeqTrainer(
        model=ptmoe.attach(tiny_llama(), config),
        args=Seq2SeqTrainingArguments(
            str(tmp_path), use_cpu=DEVICE.type == "cpu", report_to="none", disable_tqdm=True, predict_with_generate=True
        ),
        data_collator=collate,
        compute_metrics=lambda _: {},
    )
    evaluated.model.config.pad_token_id = PAD
    for asked in (evaluated.evaluate, evaluated.predict):
        with pytest.raises(PtmoeError, match=r"generate takes no labels: .* let the prompt read the answer"):
            asked(rows, max_new_tokens=3)
    inputs = [row["input_ids"][:-2] for row in rows]
    ids, mask = batch([torch.tensor(row, device=DEVICE) for row in inputs], [4 - index for index in range(4)])
    evaluated.data_collator = lambda _: {"input_ids": ids, "attention_mask": mask}
    made = evaluated.predict([{"input_ids": row} for row in inputs], max_new_tokens=3).predictions
    for row, found in zip(inputs, made[:, ids.shape[1] :][:, :3].tolist(), strict=True):
        alone = evaluated.model.generate(torch.tensor([row], device=DEVICE), max_new_tokens=3, pad_token_id=PAD)
        assert found == alone[0, len(row) :].tolist()


@pytest.mark.parametrize("config", READING.values(), ids=READING)
def test_with_the_tokens_that_decide_the_prompt_such_a_loss_is_that_of_the_model(config, tmp_path):
    def with_masks(rows):
        made = collate(rows)
        return made | {"input_mask": made["attention_mask"].bool() & ((made["labels"] != -100).cumsum(1) == 0)}

    rows = [row for row in dataset(24) if len(row["input_ids"]) == 6]
    run = trainer(tmp_path, config, callbacks=False, compute_loss_func=own_loss)
    run.data_collator = with_masks
    plain = trainer(tmp_path, config, callbacks=False)
    found, expected = (one.evaluate(rows)["eval_loss"] for one in (run, plain))
    assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.ci
@pytest.mark.parametrize("method", ["pt", "lora", "pt-moe", "smop"])
def test_noise_on_the_embeddings_trains(method, tmp_path):
    run = trainer(tmp_path, READING.get(method) or METHODS[method](**SIZES[method]), neftune_noise_alpha=5, max_steps=2)
    before = {name: value.clone() for name, value in run.model.encoder.named_parameters()}
    run.train()
    assert run.model.can_pack()
    assert any(not torch.equal(value, before[name]) for name, value in run.model.encoder.named_parameters())
    quiet = trainer(tmp_path, run.model.method_config, max_steps=2)
    quiet.train()
    assert run.state.log_history[-1]["train_loss"] != quiet.state.log_history[-1]["train_loss"]


def test_a_checkpoint_of_other_sizes_is_refused_in_words(tmp_path):
    trainer(tmp_path, ROUTED["smop"], max_steps=2).train()
    other = ROUTED["smop"].model_copy(update={"num_experts": 3})
    with pytest.raises(PtmoeError, match=r"has shape \(2, .* in what is to be loaded and \(3, .* in this adapter"):
        trainer(tmp_path, other).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("trainer_class", [Trainer, PromptTrainer])
@pytest.mark.parametrize("method", ["pt", "lora", "ft"])
@pytest.mark.ci
def test_a_checkpoint_on_another_base_is_refused(method, trainer_class, tmp_path):
    config = METHODS[method](**SIZES[method])
    trainer(tmp_path, config, trainer_class=trainer_class).train()
    other = trainer(tmp_path, config, base=tiny_llama(seed=1), trainer_class=trainer_class)
    with pytest.raises(PtmoeError, match="trained on another base than this one"):
        other.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("method", ["pt", "ft"])
@pytest.mark.ci
def test_the_best_checkpoint_of_a_run_is_on_its_base_whatever_it_has_trained(method, tmp_path):
    evaluated = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    run = trainer(tmp_path, METHODS[method](**SIZES[method]), **evaluated)
    run.train()
    assert run.state.best_model_checkpoint is not None


@pytest.mark.parametrize(("saved", "loaded"), [("pt", "dpt"), ("dpt", "pt"), ("lora", "ia3")])
@pytest.mark.ci
def test_a_checkpoint_of_another_method_is_refused(saved, loaded, tmp_path):
    trainer(tmp_path, METHODS[saved](**SIZES[saved])).train()
    with pytest.raises(PtmoeError, match=f"this {loaded} adapter are not of one method with the same options"):
        trainer(tmp_path, METHODS[loaded](**SIZES[loaded])).train(resume_from_checkpoint=True)


def test_the_state_of_one_adapter_of_several_can_be_loaded_and_none_is_taken_for_it():
    config = METHODS["pt"](**SIZES["pt"])
    one, both = (ptmoe.attach(tiny_llama(), config, seed=seed) for seed in (0, 1))
    both = ptmoe.attach(both, config, adapter_name="b")
    state = one.state_dict()
    assert both.load_state_dict(state, strict=False).missing_keys == ["b.prompt"]
    assert torch.equal(both.encoders["default"].prompt, one.encoder.prompt)
    with pytest.raises(RuntimeError, match=r"b\.prompt"):
        both.load_state_dict(state)


CAST = {name: METHODS[name](**fields) for name, fields in SIZES.items() if name != "ft"} | ROUTED


@pytest.mark.parametrize("config", CAST.values(), ids=CAST)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.ci
def test_a_cast_of_the_whole_model_leaves_the_adapter_in_float32(config, dtype):
    model = ptmoe.attach(tiny_llama(), config)
    batch = on_device(collate(dataset(4)))
    model(**batch).loss.backward()  # gradients are cast with their parameters
    before = {name: parameter.clone() for name, parameter in model.encoder.named_parameters()}
    model = model.to(dtype) if dtype == torch.bfloat16 else model.half()
    assert model.base_model.dtype == dtype
    assert model.get_input_embeddings().weight.dtype == dtype
    for name, parameter in model.encoder.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, before[name])
    loss = model(**batch).loss
    loss.backward()
    assert loss.isfinite()
    loaded = ptmoe.attach(tiny_llama().to(dtype), config)
    with torch.no_grad():
        for name, parameter in loaded.encoder.named_parameters():
            parameter.copy_(before[name])
    assert_close(model.eval()(**batch).loss, loaded.eval()(**batch).loss)
    assert model.generate(tokens(5)[None], max_new_tokens=2).shape == (1, 7)


DOUBLED = READING | {
    name: METHODS[name](**{key: 2 for key in ("rank",) if key in METHODS[name].model_fields} | OF_SHORT.get(name, {}))
    for name, config in METHODS.items()
    # The last three decompose as `peft` does, which it refuses in double precision.
    if not (config().needs_batches or config.reads_input or name in ("ft", "pissa", "sorsa", "ba-lora"))
}


@pytest.mark.parametrize("config", DOUBLED.values(), ids=DOUBLED)
@pytest.mark.ci
def test_a_model_in_double_precision_is_one_attached_to_a_base_in_double_precision(config):
    cast, attached = ptmoe.attach(tiny_llama(), config).double(), ptmoe.attach(tiny_llama().double(), config)
    pairs = zip(cast.encoder.named_parameters(), attached.encoder.named_parameters(), strict=True)
    for (name, one), (other, two) in pairs:
        assert name == other
        with torch.no_grad():
            two.copy_(one)
    batch = on_device(collate(dataset(4)))
    found, expected = (model.eval()(**batch) for model in (cast, attached))
    assert_close(found.logits, expected.logits, atol=1e-5, rtol=1e-5)
    found.loss.backward()
    assert any(one.grad is not None for one in cast.encoder.parameters())


def test_full_fine_tuning_is_cast_with_its_base():
    model = ptmoe.attach(tiny_llama(), METHODS["ft"]()).to(torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model(**on_device(collate(dataset(4)))).loss.isfinite()


def test_all_random_numbers_behind_a_checkpoint_are_those_of_the_undisturbed_run(tmp_path):
    def drawn():
        return random.random(), np.random.random(), float(torch.rand(()))

    made = trainer(tmp_path, METHODS["pt"](num_virtual_tokens=4), trainer_class=PromptTrainer)
    made._save_rng_state(str(tmp_path))
    expected = drawn()
    made._load_rng_state(str(tmp_path))
    assert drawn() == expected


def test_the_loss_scale_of_half_precision_is_saved_without_a_pickle(tmp_path):
    scales = []
    for start in (8.0, 2.0):
        made = trainer(tmp_path, METHODS["pt"](num_virtual_tokens=4), trainer_class=PromptTrainer)
        made.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=start)
        scales.append(made)
    scales[0]._save_scaler(str(tmp_path))
    scales[1]._load_scaler(str(tmp_path))
    assert scales[1].accelerator.scaler.state_dict() == scales[0].accelerator.scaler.state_dict()
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]


def test_an_optimizer_that_updates_in_the_backward_pass_is_undone_to_the_last_finite_loss(tmp_path):
    """The weights that it breaks in step 2 give the loss of step 3."""
    made = trainer(tmp_path, METHODS["pt"](num_virtual_tokens=4), trainer_class=PromptTrainer, save_strategy="no")
    (prompt,) = made.model.encoder.parameters()
    before = []

    def update(parameter):
        before.append(parameter.detach().clone())
        parameter.data.fill_(float("nan") if len(before) == 2 else 0.5)

    prompt.register_post_accumulate_grad_hook(update)
    with pytest.raises(PtmoeError, match="loss became nan at step 3"):
        made.train()
    assert torch.equal(prompt, before[1])


@pytest.mark.ci
def test_a_data_set_without_a_whole_batch_ends_as_it_does_without_a_router(tmp_path):
    options = {"dataloader_drop_last": True, "per_device_train_batch_size": 64}
    for config in (ROUTED["pt-moe"], METHODS["pt"](num_virtual_tokens=4)):
        run = trainer(tmp_path, config, **options)
        run.train()
        assert run.state.global_step == 0


def test_what_is_saved_last_has_the_tokenizer_and_what_is_pushed_is_there_while_it_is_uploaded(tmp_path, monkeypatch):
    from huggingface_hub import HfApi

    from ptmoe.models.bases import load_base

    base, tokenizer = load_base("nano")
    uploads, done = [], Future()
    done.set_result(None)
    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: SimpleNamespace(repo_id="me/it"))

    def upload(_, folder_path, **options):
        uploads.append(Path(folder_path))
        return done

    monkeypatch.setattr(HfApi, "upload_folder", upload)
    run = trainer(
        tmp_path,
        METHODS["pt"](num_virtual_tokens=4),
        base=base,
        trainer_class=PromptTrainer,
        push_to_hub=True,
        hub_model_id="me/it",
        hub_strategy="all_checkpoints",
        hub_always_push=True,
    )
    run.processing_class = tokenizer
    run.train()
    assert uploads == [tmp_path, tmp_path / "checkpoint-2", tmp_path, tmp_path / "checkpoint-4"]
    assert all((folder / "adapter_model.safetensors").is_file() for folder in uploads)
    assert not (tmp_path / "checkpoint-4" / "tokenizer.json").exists()
    run.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "tokenizer.json").is_file()
    for folder in (tmp_path, tmp_path / "saved"):
        ptmoe.load_adapter(load_base("nano")[0], folder)


@pytest.mark.parametrize("config", [ROUTED["pt-moe"], METHODS["lora"](rank=2)], ids=["pt-moe", "lora"])
@pytest.mark.ci
def test_what_another_trainer_saves_is_told_from_an_adapter_and_made_one(config, tmp_path):
    run = trainer(tmp_path, config)
    run.train()
    run.save_model(str(tmp_path / "saved"))
    for folder in (tmp_path / "checkpoint-4", tmp_path / "saved"):
        with pytest.raises(PtmoeError, match=r"what transformers' Trainer saves .*load_state_dict.*save_pretrained"):
            ptmoe.load_adapter(tiny_llama(), folder)
        model = ptmoe.attach(tiny_llama(), config)
        model.load_state_dict(load_file(folder / "model.safetensors"))
        model.save_pretrained(tmp_path / "adapter")
        ids = tokens(6)[None]
        loaded = ptmoe.load_adapter(tiny_llama(), tmp_path / "adapter")
        assert_close(loaded(ids).logits, run.model.eval()(ids).logits)
