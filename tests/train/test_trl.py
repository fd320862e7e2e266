"""The bridge to `trl.SFTTrainer`: the losses of `transformers.Trainer`, and a router that never reads an answer."""

import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

import ptmoe
from ptmoe.train.data import collate
from testing.bases import DEVICE, on_device, tiny_llama

trl = pytest.importorskip("trl")

from datasets import Dataset  # noqa: E402  # it comes with trl

from ptmoe.train.trl import SFTTrainer  # noqa: E402

PROMPTS = [
    "add two and three:",
    "which is larger, the first number or the second one:",
    "spell cat:",
    "the capital of the country that lies north of the sea is:",
    "say it backwards, slowly:",
    "count:",
]
COMPLETIONS = [
    " five",
    " the second one, as it is larger",
    " c a t",
    " no one knows",
    " it",
    " one two three four five",
]
OTHER_COMPLETIONS = [" seven and then some", " first", " d o g, which is another", " two", " a long answer", " six"]


@pytest.fixture(scope="module")
def tokenizer():
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(PROMPTS + COMPLETIONS, vocab_size=300, special_tokens=["<pad>", "<eos>"])
    return PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, pad_token="<pad>", eos_token="<eos>")


def prompted(**changes):
    """The tiny Llama of the tests, with a PT-MoE adapter whose router is trained without noise."""
    config = {"num_virtual_tokens": 4, "num_experts": 3, "rank": 4, "router_noise": 0.0} | changes
    base = tiny_llama(vocab_size=300, max_position_embeddings=128)
    return ptmoe.attach(base, ptmoe.PTMoEConfig(**config))


def arguments(folder, kind=trl.SFTConfig, **changes):
    chosen = {
        "per_device_train_batch_size": 2,
        "max_steps": 5,
        "learning_rate": 0.03,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": False,
        "use_cpu": DEVICE.type == "cpu",
    }
    return kind(str(folder), **(chosen | changes))


def data(completions=COMPLETIONS):
    return Dataset.from_dict({"prompt": PROMPTS, "completion": completions})


def bridge(model, tokenizer, folder, completions=COMPLETIONS, eval_dataset=None, compute_loss_func=None, **changes):
    return SFTTrainer(
        model=model,
        args=arguments(folder, **changes),
        train_dataset=data(completions),
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        compute_loss_func=compute_loss_func,
    )


def rows(tokenizer):
    """What the data set is as tokens, made without `trl`."""
    examples = []
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        question, answer = tokenizer(prompt)["input_ids"], tokenizer(completion + "<eos>")["input_ids"]
        examples.append({"input_ids": question + answer, "labels": [-100] * len(question) + answer})
    return examples


def losses(trainer):
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def trained(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.encoder.parameters()])


def record(model):
    """Every batch that `model` is trained on from here, with its routing; the router's start evaluates."""
    calls = []

    def note(_, arguments, given, output):
        if model.training:
            calls.append((given, output.routing))

    model.register_forward_hook(note, with_kwargs=True)
    return calls


def prompts_alone(batch):
    """`input_ids` and `attention_mask` of a batch's prompts, without any answer."""
    lengths = (batch["labels"] != -100).int().argmax(1)
    asked = [ids[:length] for ids, length in zip(batch["input_ids"], lengths, strict=True)]
    ids = torch.nn.utils.rnn.pad_sequence(asked, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in asked], batch_first=True)
    return ids, mask


@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.slow
def test_the_bridge_trains_what_the_trainer_of_transformers_trains(tokenizer, tmp_path, noise):
    ours, reference = prompted(router_noise=noise), prompted(router_noise=noise)
    start = trained(ours)
    # Experts that start alike give the router a gradient of mere rounding, 1e-9, which Adam would make a full step of.
    bridged = bridge(ours, tokenizer, tmp_path, optim="sgd")
    bridged.train()
    plain = Trainer(
        model=reference,
        args=arguments(tmp_path, TrainingArguments, optim="sgd"),
        train_dataset=rows(tokenizer),
        data_collator=collate,
        callbacks=[ptmoe.RoutingCallback()],
    )
    plain.train()
    assert len(losses(bridged)) == 5
    assert losses(bridged) == pytest.approx(losses(plain), rel=1e-5)
    assert not torch.equal(trained(ours), start)
    torch.testing.assert_close(trained(ours), trained(reference), rtol=1e-4, atol=1e-5)


def test_training_routes_each_example_as_its_prompt_alone_is_routed(tokenizer, tmp_path):
    model = prompted()
    calls = record(model)
    bridge(model, tokenizer, tmp_path, learning_rate=0.0, per_device_train_batch_size=3).train()
    model.eval()
    assert calls
    for batch, routing in calls:
        assert torch.equal(routing.probabilities, model.route(*prompts_alone(batch)).probabilities)
        with_answers = model.route(batch["input_ids"], batch["attention_mask"])
        assert not torch.equal(routing.probabilities, with_answers.probabilities)


@pytest.mark.ci
def test_another_answer_changes_the_loss_and_no_bit_of_the_routing(tokenizer, tmp_path):
    seen, lost = [], []
    for completions in (COMPLETIONS, OTHER_COMPLETIONS):
        model = prompted(router_init="random")  # the start from the gradients learns from the answers, as training does
        calls = record(model)
        trainer = bridge(model, tokenizer, tmp_path, completions, learning_rate=0.0)
        trainer.train()
        seen.append(torch.cat([routing.probabilities for _, routing in calls]))
        lost.append(losses(trainer))
    assert torch.equal(*seen)
    assert lost[0] != lost[1]


def test_the_plain_combination_is_refused_and_says_why(tokenizer, tmp_path):
    with pytest.raises(ptmoe.PtmoeError, match=r"fused head .* average the answers too.* ptmoe\.train\.trl"):
        trl.SFTTrainer(
            model=prompted(), args=arguments(tmp_path), train_dataset=data(), processing_class=tokenizer
        ).train()


@pytest.mark.filterwarnings("ignore:training without ptmoe.RoutingCallback")
def test_a_routed_model_is_not_trained_with_neither_labels_nor_input_mask(tokenizer):
    model, ids = prompted(), torch.tensor([[5, 6, 7, 8]], device=DEVICE)
    model.eval()(ids)
    model.train()
    model(ids, input_mask=torch.tensor([[1, 1, 0, 0]], device=DEVICE))
    with torch.no_grad():
        model(ids)
    with pytest.raises(ptmoe.PtmoeError, match="depend on the answers"):
        model(ids)


@pytest.mark.ci
def test_splitting_a_batch_into_accumulation_steps_changes_nothing(tokenizer, tmp_path):
    # Of experts that start alike the router's first gradient is rounding error, which Adam makes a whole step of.
    whole, split = prompted(distinct_experts=True), prompted(distinct_experts=True)
    once = bridge(whole, tokenizer, tmp_path, per_device_train_batch_size=4)
    once.train()
    twice = bridge(split, tokenizer, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    twice.train()
    assert losses(twice) == pytest.approx(losses(once), rel=1e-4)
    torch.testing.assert_close(trained(split), trained(whole), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"packing": True}, "packing=True puts several examples in one row"),
        ({"eval_packing": True}, "eval_packing=True puts several examples in one row"),
        ({"padding_free": True, "max_length": None}, "padding_free=True puts several examples in one row"),
        ({"loss_type": "dft"}, "loss_type='dft' needs trl's fused head"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 needs trl's fused head"),
        ({"router_aux_loss_coef": 0.02}, "router_aux_loss_coef=0.02 is for a base's own router"),
        ({"chat_template_path": "some/model"}, "may add tokens to the frozen base"),
    ],
)
def test_options_that_cannot_be_right_are_refused(tokenizer, tmp_path, option, message):
    with pytest.raises(ptmoe.PtmoeError, match=message):
        bridge(prompted(), tokenizer, tmp_path, **option)


def test_a_model_without_a_prompt_is_refused(tokenizer, tmp_path):
    with pytest.raises(ptmoe.PtmoeError, match=r"give one from ptmoe\.attach"):
        bridge(tiny_llama(vocab_size=300), tokenizer, tmp_path)


def test_a_data_set_without_prompts_leaves_the_router_nothing_to_read(tokenizer, tmp_path):
    text = Dataset.from_dict({"text": PROMPTS})
    trainer = SFTTrainer(
        model=prompted(router_standardize=False),
        args=arguments(tmp_path),
        train_dataset=text,
        processing_class=tokenizer,
    )
    with pytest.raises(ValueError, match="no input token for the router to read"):
        trainer.train()


@pytest.mark.ci
@pytest.mark.filterwarnings("ignore:`compute_loss_func` is deprecated:FutureWarning")
def test_a_loss_function_of_the_users_own_leaves_the_routing_alone(tokenizer, tmp_path):
    def shifted(outputs, labels, num_items_in_batch) -> Tensor:
        scores = outputs.logits[:, :-1].flatten(0, 1).float()
        return cross_entropy(scores, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch

    own, default = (bridge(prompted(), tokenizer, tmp_path, compute_loss_func=function) for function in (shifted, None))
    calls = [record(trainer.model) for trainer in (own, default)]
    own.train()
    default.train()
    assert losses(own) == pytest.approx(losses(default), rel=1e-4)
    first_own, first_default = (routing.probabilities for (_, routing), *_ in calls)
    assert torch.equal(first_own, first_default)
    logged = [{key for line in run.state.log_history for key in line} for run in (own, default)]
    assert logged[1] - logged[0] == {"entropy", "mean_token_accuracy"}  # which no labels are there to count for


@pytest.mark.parametrize("whole_logits", [False, True])
def test_evaluation_gives_the_loss_the_accuracy_and_the_entropy(tokenizer, tmp_path, whole_logits):
    model = prompted()
    trainer = bridge(model, tokenizer, tmp_path, eval_dataset=data(), per_device_eval_batch_size=8)
    trainer.args.prediction_loss_only = not whole_logits
    if whole_logits:
        trainer.compute_metrics = lambda predicted: {"width": predicted.predictions.shape[2]}
    found = trainer.evaluate()

    batch = on_device(collate(rows(tokenizer)))
    out = model.eval()(**batch)
    supervised = batch["labels"][:, 1:] != -100
    scores, targets = out.logits[:, :-1][supervised], batch["labels"][:, 1:][supervised]
    assert found["eval_loss"] == pytest.approx(out.loss.item(), rel=1e-5)
    assert found["eval_mean_token_accuracy"] == pytest.approx((scores.argmax(1) == targets).float().mean().item())
    entropy = torch.distributions.Categorical(logits=scores).entropy().mean().item()
    assert found["eval_entropy"] == pytest.approx(entropy, rel=1e-4)
    assert found.get("eval_width") == (300 if whole_logits else None)


@pytest.mark.slow
def test_a_checkpoint_holds_the_adapter_only_and_training_resumes_from_it(tokenizer, tmp_path):
    model = prompted()
    frozen = {name: value.clone() for name, value in model.base_model.state_dict().items()}
    trainer = bridge(model, tokenizer, tmp_path, max_steps=6, save_strategy="steps", save_steps=3)
    trainer.train()
    checkpoint = tmp_path / "checkpoint-3"
    assert {path.name for path in checkpoint.iterdir() if path.suffix not in (".json", ".md")} == {
        "adapter_model.safetensors",
        "optimizer.safetensors",
        "training_state.safetensors",
    }
    assert all(torch.equal(value, frozen[name]) for name, value in model.base_model.state_dict().items())

    again = prompted()
    resumed = bridge(again, tokenizer, tmp_path, max_steps=6)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert losses(resumed) == pytest.approx(losses(trainer))
    torch.testing.assert_close(trained(again), trained(model))

    saved = ptmoe.load_adapter(tiny_llama(vocab_size=300, max_position_embeddings=128), tmp_path / "checkpoint-6")
    batch = on_device(collate(rows(tokenizer)))
    torch.testing.assert_close(saved.eval()(**batch).logits, model.eval()(**batch).logits)


def test_a_trained_model_keeps_its_own_forward(tokenizer, tmp_path):
    model = prompted()
    trainer = bridge(model, tokenizer, tmp_path, max_steps=1)
    assert "forward" not in vars(model)
    trainer.train()
    ids = torch.tensor([tokenizer(PROMPTS[0])["input_ids"]], device=model.device)
    assert model.eval().generate(ids, max_new_tokens=3).shape[1] == ids.shape[1] + 3
