"""`--optim`: the optimizers of transformers, what refuses them, and what checkpoints hold of them."""

import contextlib
import importlib.util
import shutil
import warnings
from dataclasses import fields

import pytest
import torch
import transformers.trainer_optimizer
from safetensors.torch import load_file
from torch.testing import assert_close

from ptmoe.errors import PtmoeError
from ptmoe.methods import METHODS
from ptmoe.models.attach import attach
from ptmoe.train import TrainOptions, train
from ptmoe.train.arguments import check_arguments
from ptmoe.train.optimizer import check_targets, load_state, save_state
from testing.bases import tiny, tiny_llama

ON_THREE = {"rank": "rank=4,update_proj_gap=2", "targets": ["q_proj", "up_proj"]}
OPTIMIZERS = {  # by name: its package, its class, its options, and whether checkpoints hold its state
    "adafactor": (None, "Adafactor", {}, True),
    "sgd": (None, "SGD", {"optim_args": "momentum=0.9"}, True),
    "galore_adamw": ("galore_torch", "AdamW", ON_THREE, False),
    "galore_adamw_layerwise": ("galore_torch", "LayerWiseDummyOptimizer", ON_THREE, False),
    "apollo_adamw": ("apollo_torch", "AdamW", ON_THREE, False),
    "lomo": ("lomo_optim", "Lomo", {}, False),
    "adalomo": ("lomo_optim", "AdaLomo", {}, False),
    "schedule_free_adamw": ("schedulefree", "AdamWScheduleFree", {}, True),
    "grokadamw": ("grokadamw", "GrokAdamW", {}, False),
    "stable_adamw": ("optimi", "StableAdamW", {}, False),
}


def options(folder, **changes):
    given = {
        "task": "nano/mixed",
        "method": {"name": "ft"},
        "max_steps": 3,
        "save_steps": 2,
        "max_examples": 16,
        "per_device_train_batch_size": 4,
        "eval_examples": 2,
        "warmup_steps": 0,
        "output_dir": str(folder),
    }
    return TrainOptions(**(given | changes))


def quiet(*arguments, **more):
    return train(*arguments, **more, say=lambda _: None)


@pytest.mark.ci
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_ft_trains_with_it_and_resumes(name, tmp_path):
    package, kind, more, whole = OPTIMIZERS[name]
    if package is not None and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    if name == "adalomo" and not torch.cuda.is_available():
        pytest.skip("adalomo needs CUDA")
    if "rank" in more:
        more = {"optim_args": more["rank"], "optim_target_modules": more["targets"]}
    made, real = [], transformers.Trainer.create_optimizer

    def create(trainer, *arguments):
        made.append(real(trainer, *arguments))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        patch.setattr(transformers.Trainer, "create_optimizer", create)
        run = quiet(options(tmp_path / "run", optim=name, **more))
    assert type(made[0]).__name__ == kind
    assert any("checkpoints do not hold the state" in str(one.message) for one in caught) != whole
    checkpoints = tmp_path / "run" / "checkpoints"
    assert (checkpoints / "checkpoint-2" / "optimizer.safetensors").exists() == whole
    trained = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    last = load_file(checkpoints / "checkpoint-3" / "adapter_model.safetensors")
    before = attach(run.model.base_model.__class__(run.model.config), METHODS["ft"]()).encoder.tensors()
    assert trained.keys() == before.keys()
    for key, value in trained.items():
        assert value.isfinite().all()
        assert torch.equal(last[key], value)  # what is saved on the way is what is saved at the end
        assert torch.equal(run.model.encoder.tensors()[key].cpu(), value)  # and what was evaluated
    early = load_file(checkpoints / "checkpoint-2" / "adapter_model.safetensors")
    assert any(not torch.equal(early[key], value) for key, value in trained.items())

    shutil.rmtree(checkpoints / "checkpoint-3")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = quiet(options(tmp_path / "run", optim=name, **more), resume=True)
    assert again.result.steps == 3
    if whole:
        for key, value in again.model.encoder.tensors().items():
            assert_close(value.cpu(), trained[key], atol=1e-6, rtol=0)


REFUSED = {
    "an unknown one": ({"optim": "adafacter"}, "no such optimizer.*did you mean 'adafactor'"),
    "arguments of none": ({"optim_args": "rank=4"}, "belongs to an optimizer: name it with optim"),
    "targets of none": ({"optim_target_modules": "all-linear"}, "belongs to an optimizer: name it with optim"),
    "arguments that are none": ({"optim": "sgd", "optim_args": "momentum"}, "needs KEY=VALUE"),
    "an unfit argument": ({"optim": "sgd", "optim_args": "momentum=fast"}, "cannot be used: could not convert"),
    "another unfit one": ({"optim": "sgd", "optim_args": "momentum=-1"}, "cannot be used: Invalid momentum"),
    "one whose package is missing": ({"optim": "galore_adamw"}, "cannot be used: You need to install `galore_torch`"),
    "steps that it cannot add up": ({"optim": "lomo", "gradient_accumulation_steps": 2}, "cannot add up"),
    "a method with its own": (
        {"optim": "adafactor", "method": {"name": "lora-fa"}},
        "lora-fa consists in an optimizer",
    ),
    "another": ({"optim": "sgd", "method": {"name": "riemannian"}}, "riemannian consists in an optimizer"),
    "a number that the default cannot use": ({"trainer": {"adam_beta1": 2.0}}, "refuses .*Invalid beta parameter"),
    "a schedule that lacks a number": ({"lr_scheduler_type": "cosine_with_min_lr"}, "refuses .*min_lr_rate should be"),
    "a schedule with one too many": ({"trainer": {"lr_scheduler_kwargs": {"x": 1}}}, "refuses .*unexpected .*'x'"),
    "a schedule by evaluations": ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "a run evaluates after it"),
    "two precisions": ({"bf16": True, "fp16": True}, "bf16=True, fp16=True: give one of the two"),
    "an unknown logger": ({"report_to": "nologger"}, "report_to='nologger': nologger is not supported"),
    "a logger whose package is missing": ({"report_to": "wandb"}, "report_to='wandb': .*requires wandb"),
    "kernels for bases alone": ({"trainer": {"use_liger_kernel": True}}, "use_liger_kernel has no effect"),
    "no number of steps": ({"trainer": {"torch_empty_cache_steps": 0}}, "refuses .*torch_empty_cache_steps"),
    "a negative number of workers": ({"trainer": {"dataloader_num_workers": -1}}, "refuses .*non-negative"),
    "what workers alone do": ({"trainer": {"dataloader_persistent_workers": True}}, "refuses .*persistent_workers"),
    "what they alone do ahead": ({"trainer": {"dataloader_prefetch_factor": 2}}, "refuses .*prefetch_factor"),
    "an evaluation on the way": ({"trainer": {"eval_strategy": "steps"}}, "eval_strategy='steps' needs an evaluation"),
    "a part of it": ({"trainer": {"eval_steps": 5}}, "eval_steps=5 needs an evaluation"),
    "another schedule by evaluations": ({"lr_scheduler_type": "greedy"}, "'greedy' follows an evaluation"),
    "an unknown level": ({"trainer": {"log_level": "loud"}}, "log_level='loud': needs one of .*critical"),
    "an unknown order": ({"trainer": {"train_sampling_strategy": "sorted"}}, "needs one of random, "),
    "an order of batches by tokens": (
        {"tokens_per_batch": 99, "trainer": {"train_sampling_strategy": "sequential"}},
        "train_sampling_strategy has no effect on batches by tokens",
    ),
    "a last one among them": (
        {"tokens_per_batch": 99, "trainer": {"dataloader_drop_last": True}},
        "dataloader_drop_last has no effect on batches by tokens",
    ),
    "an unknown count": ({"trainer": {"include_num_input_tokens_seen": "some"}}, "needs one of all, "),
    "a file that is missing": ({"trainer": {"accelerator_config": "nowhere.json"}}, "refuses .*nowhere.json"),
    "negative noise": ({"trainer": {"neftune_noise_alpha": -1.0}}, "needs a number from 0 to inf"),
    "too much smoothing": ({"trainer": {"label_smoothing_factor": 2.0}}, "needs a number from 0 to 1"),
    "an unknown key of recomputation": (
        {"gradient_checkpointing": True, "trainer": {"gradient_checkpointing_kwargs": {"bogus": 1}}},
        "refuses .*bogus",
    ),
    "sharding of the adapter": ({"trainer": {"deepspeed": {"zero": 1}}}, "deepspeed would shard the adapter"),
    "another way to resume": ({"trainer": {"resume_from_checkpoint": "x"}}, "--resume continues a run"),
    "one among the trainer's": ({"trainer": {"optim": "sgd"}}, "'optim' is an option of the run itself"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.ci
def test_what_cannot_be_used_is_refused_before_the_base_is_loaded(case, tmp_path, monkeypatch):
    changes, message = REFUSED[case]
    monkeypatch.setattr(transformers.trainer_optimizer, "is_galore_torch_available", lambda: False)
    monkeypatch.setattr(transformers.integrations.integration_utils, "is_wandb_available", lambda: False)
    monkeypatch.setattr("ptmoe.train.recipe.load_base", lambda *_, **__: pytest.fail("the base was loaded"))
    with pytest.raises(PtmoeError, match=message):
        quiet(options(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.ci
def test_whatever_stands_under_trainer_is_taken_or_refused_in_words(tmp_path):
    refused = 0
    for field in fields(transformers.TrainingArguments):
        for value in (0, -1, 2, 0.5, -0.5, True, "bogus", "", {}, {"bogus": 1}, [], ["bogus"], None):
            with contextlib.suppress(PtmoeError):
                given = options(tmp_path, trainer={field.name: value}, gradient_checkpointing=True)
                check_arguments(given, METHODS["ft"]())
                refused -= 1
            refused += 1
    assert refused > 1000


def test_label_smoothing_is_for_methods_that_do_without_the_labels(tmp_path):
    smoothed = {"trainer": {"label_smoothing_factor": 0.1}, "max_steps": 1}
    assert quiet(options(tmp_path / "pt", method={"name": "pt"}, **smoothed)).result.steps == 1
    with pytest.raises(PtmoeError, match=r"^label_smoothing_factor=0\.1 keeps the labels from pt-moe"):
        quiet(options(tmp_path / "pt-moe", method={"name": "pt-moe"}, **smoothed))


@pytest.mark.parametrize(
    ("method", "architecture", "targets", "message"),
    [
        ("ft", "llama", ["q_prj"], r"ft trains none of this name: one is base_model\.model\.layers\.0"),
        ("ft", "llama", "q_proj", "ft trains none of this name"),  # a regular expression, for the whole name
        ("pt", "llama", "all-linear", "pt trains none: leave optim out"),
        ("lora", "gpt2", "all-linear", None),
        ("ft", "llama", ["q_proj"], None),
        ("ft", "llama", r".*\.q_proj", None),
        ("ft", "llama", "all-linear", None),
    ],
)
def test_what_is_to_be_projected_is_trained(method, architecture, targets, message, tmp_path):
    model = attach(tiny(architecture), METHODS[method]())
    given = options(tmp_path, optim="galore_adamw", optim_target_modules=targets)
    if message is None:
        check_targets(given, model)
    else:
        with pytest.raises(PtmoeError, match=message):
            check_targets(given, model)


def test_without_one_it_is_the_trainers_own(tmp_path):
    from ptmoe.train.data import collate
    from ptmoe.train.trainer import PromptTrainer

    arguments = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    trainer = PromptTrainer(attach(tiny_llama(), METHODS["ft"]()), arguments, data_collator=collate)
    assert type(trainer.create_optimizer()) is torch.optim.AdamW


class Averaging(torch.optim.Optimizer):
    """Moves by less at each step, which it counts where schedule-free optimizers do: in its groups."""

    def __init__(self, params, lr=0.1, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "k": 0})

    def step(self):
        for group in self.param_groups:
            group["k"] += 1
            for weight in group["params"]:
                weight.data -= group["lr"] / group["k"] * (weight.grad + group["weight_decay"] * weight.data)


KINDS = [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop, transformers.Adafactor, Averaging]


def stepped(kind, weight, steps, of=None):
    """An optimizer of a weight, after so many steps of it; `of` is a folder that its state is first loaded from."""
    options = {"relative_step": False} if kind is transformers.Adafactor else {}
    optimizer = kind([weight], lr=0.1, weight_decay=1e-3, **options)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    if of is not None:
        load_state(optimizer, scheduler, of, changed=True)
    for _ in range(steps):
        weight.grad = weight.detach().cos()
        optimizer.step()
        scheduler.step()
    return optimizer, scheduler


@pytest.mark.parametrize("kind", KINDS)
def test_other_options_take_over_what_an_optimizer_has_counted_and_another_optimizer_starts_afresh(kind, tmp_path):
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 6).view(2, 3))
    save_state(*stepped(kind, weight, 3), "adamw_torch", tmp_path)
    for other in KINDS:
        resumed = torch.nn.Parameter(weight.detach().clone())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer, _ = stepped(other, resumed, 2, tmp_path)
        assert [str(one.message).endswith("starts afresh") for one in caught] == [True] * (other is not kind)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 6)  # of step 5, whoever takes it
        assert not torch.equal(resumed, weight)
        if other is kind:
            whole = torch.nn.Parameter(torch.linspace(-1, 1, 6).view(2, 3))
            stepped(kind, whole, 5)
            assert torch.equal(resumed, whole)
