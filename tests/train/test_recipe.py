"""Training: what a run writes, that it learns, resumes and stops, and that unfit options write nothing."""

import json
import math
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainingArguments

import ptmoe
from ptmoe.adapters.identity import BaseIdentity
from ptmoe.models.bases import load_base
from ptmoe.tasks import load_task
from ptmoe.tasks.tokens import encode_completion, encode_prompt
from ptmoe.train import TrainOptions, train
from ptmoe.train.arguments import NEED_EVALUATION, check_trainer_arguments
from ptmoe.train.data import collate, fit
from ptmoe.train.trainer import DivergedError

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k" / "train.jsonl"
SMALL = {"name": "pt-moe", "num_virtual_tokens": 6, "rank": 4, "num_experts": 3}


def options(folder, **changes):
    chosen = {
        "task": "nano/mixed",
        "method": SMALL,
        "max_steps": 12,
        "per_device_train_batch_size": 8,
        "logging_steps": 2,
        "save_steps": 6,
        "eval_examples": 20,
        "output_dir": str(folder),
    }
    return TrainOptions(**(chosen | changes))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train(options(tmp_path_factory.mktemp("train") / "run"))


def logged(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_folder_holds_what_the_design_says(trained):
    names = {path.name for path in trained.folder.iterdir()}
    assert names >= {
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "checkpoints",
        "adapter",
        "eval",
        "predictions",
    }
    assert [line["step"] for line in logged(trained.folder)] == [2, 4, 6, 8, 10, 12]
    assert len((trained.folder / "predictions" / "nano__mixed.jsonl").read_text().splitlines()) == 20
    assert json.loads((trained.folder / "eval" / "nano__mixed.json").read_text())["examples"] == 20
    assert (
        json.loads((trained.folder / "result.json").read_text())["trainable_parameters"]
        == 6 * 4 * 3 + 4 * 192 + 3 * 193
    )


def test_every_file_of_a_run_may_be_read_by_whom_any_new_file_may(trained, tmp_path):
    (tmp_path / "new").touch()
    allowed = {path.name: path.stat().st_mode for path in trained.folder.rglob("*") if path.is_file()}
    assert {"adapter_model.safetensors", "optimizer.safetensors", "training_state.safetensors"} <= allowed.keys()
    assert set(allowed.values()) == {(tmp_path / "new").stat().st_mode}


def test_the_environment_records_the_base_by_its_embedding(trained):
    embedding = load_base("nano")[0].get_input_embeddings().weight
    recorded = json.loads((trained.folder / "environment.json").read_text())["base"]
    assert recorded == BaseIdentity.of(embedding).mark != BaseIdentity.of(2 * embedding).mark


@pytest.mark.slow
def test_the_environment_records_the_fast_paths_and_why_each_other_was_not_taken(trained, tmp_path, monkeypatch):
    recorded = json.loads((trained.folder / "environment.json").read_text())["fast_paths"]
    assert recorded == trained.model.fast_paths()
    assert recorded["packing"] is None
    assert "--torch-compile" in recorded["compiled_layers"]
    monkeypatch.setattr("ptmoe.fast.compiled.compile_layers", lambda base: "no C++ compiler")
    short = {"max_steps": 1, "eval_examples": 1, "packing": False, "torch_compile": True}
    again = json.loads((train(options(tmp_path / "run", **short)).folder / "environment.json").read_text())
    assert again["fast_paths"]["packing"] == "not asked for (packing=False)"
    assert again["fast_paths"]["compiled_layers"] == "no C++ compiler"


@pytest.mark.slow
def test_the_loss_falls(tmp_path):
    longer = {"max_steps": 60, "per_device_train_batch_size": 16, "warmup_steps": 5, "eval_examples": 1}
    losses = [line["loss"] for line in logged(train(options(tmp_path / "run", **longer)).folder)]
    assert sum(losses[-10:]) < sum(losses[:10])


@pytest.mark.slow
def test_the_base_is_unchanged_to_the_bit(trained):
    fresh = load_base("nano", device=trained.model.device)[0].state_dict()
    after = trained.model.base_model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in fresh.items())


def test_the_saved_adapter_is_the_trained_one(trained):
    device = trained.model.device
    again = ptmoe.load_adapter(load_base("nano", device=device)[0], trained.folder).eval()
    ids = torch.tensor([encode_prompt(load_task("nano/mixed")[0], trained.tokenizer).ids], device=device)
    assert torch.equal(again(ids).logits, trained.model(ids).logits)


@pytest.mark.slow
def test_the_resolved_config_repeats_the_run(trained, tmp_path):
    written = yaml.safe_load((trained.folder / "config.yaml").read_text())
    assert written["learning_rate"] > 0
    assert written["method"]["router_noise"] == 0.1
    again = train(TrainOptions.read(trained.folder / "config.yaml", output_dir=str(tmp_path / "again")))
    for name, value in load_file(trained.folder / "adapter" / "adapter_model.safetensors").items():
        assert torch.equal(load_file(again.folder / "adapter" / "adapter_model.safetensors")[name], value)


@pytest.mark.slow
def test_a_run_resumed_from_its_checkpoint_ends_the_same(trained, tmp_path):
    part = train(options(tmp_path / "run", max_steps=12, trainer={"ignore_data_skip": False}))
    for path in (part.folder / "checkpoints" / "checkpoint-12").iterdir():
        path.unlink()
    (part.folder / "checkpoints" / "checkpoint-12").rmdir()
    resumed = train(options(tmp_path / "run"), resume=True)
    assert [line["step"] for line in logged(resumed.folder)] == [2, 4, 6, 8, 10, 12]
    for name, value in load_file(trained.folder / "adapter" / "adapter_model.safetensors").items():
        assert torch.equal(load_file(resumed.folder / "adapter" / "adapter_model.safetensors")[name], value)


def test_checkpoints_hold_the_adapter_its_states_and_no_pickle(trained):
    for checkpoint in (trained.folder / "checkpoints").iterdir():
        assert {path.name for path in checkpoint.iterdir()} == {
            "adapter_config.json",
            "adapter_model.safetensors",
            "training_state.safetensors",
            "optimizer.safetensors",
            "scheduler.json",
            "random_state.json",
            "trainer_state.json",
            "sha256.json",
        }


@pytest.mark.parametrize("method", ["pt-moe", "pt", "dpt", "smop", "attempt"])
@pytest.mark.slow
def test_a_checkpoint_at_the_papers_sizes_is_under_2_mb(method, tmp_path):
    """On a base of Llama-3.2-1B's hidden size, with little else of it."""
    from ptmoe.methods import METHODS
    from ptmoe.train import PromptTrainer, RoutingCallback
    from testing.bases import tiny_llama

    model = ptmoe.attach(tiny_llama(hidden_size=2048, intermediate_size=32, num_hidden_layers=1), METHODS[method]())
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}] * 2
    arguments = TrainingArguments(str(tmp_path), max_steps=1, save_steps=1, report_to="none", disable_tqdm=True)
    PromptTrainer(
        model=model, args=arguments, train_dataset=rows, data_collator=collate, callbacks=[RoutingCallback()]
    ).train()
    assert sum(path.stat().st_size for path in (tmp_path / "checkpoint-1").iterdir()) < 2_000_000


class Diverge(TrainerCallback):
    """Makes the loss NaN at a step, and keeps the parameters that each step begins with."""

    def __init__(self, step):
        self.at, self.step, self.before = step, 0, {}

    def on_train_begin(self, args, state, control, model, **_):
        model.register_forward_hook(self.spoil)

    def on_step_begin(self, args, state, control, model, **_):
        self.step = state.global_step + 1
        self.before[self.step] = {key: value.detach().clone() for key, value in model.encoder.tensors().items()}

    def spoil(self, module, arguments, output):
        if self.step == self.at:
            output.loss = output.loss * math.nan
        return output


def same(tensors, others):
    return all(torch.equal(value, others[key]) for key, value in tensors.items())


@pytest.mark.slow
def test_a_loss_that_turns_nan_stops_and_keeps_the_last_good_adapter(tmp_path):
    diverge = Diverge(step=5)
    with pytest.raises(DivergedError, match=r"nan at step 5; stopped with the adapter as it was before.*/adapter"):
        train(options(tmp_path / "run", method=SMALL | {"recipe": "paper"}), callbacks=[diverge])
    kept = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert same(kept, diverge.before[4])  # the parameters that gave the last finite loss
    assert not same(kept, diverge.before[5])
    assert not (tmp_path / "run" / "result.json").exists()


FT = {"method": {"name": "ft"}, "eval_examples": 1, "per_device_train_batch_size": 2, "save_total_limit": 3}


@pytest.mark.slow
def test_full_fine_tuning_that_diverges_goes_back_to_the_newest_checkpoint(tmp_path):
    diverge = Diverge(step=6)
    with pytest.raises(DivergedError, match=r"nan at step 6; stopped with the weights of .*checkpoint-4.*/adapter"):
        train(options(tmp_path / "run", **FT, save_steps=2), callbacks=[diverge])
    kept = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert same(kept, diverge.before[5])
    assert not same(kept, diverge.before[6])


@pytest.mark.slow
def test_a_checkpoint_with_broken_weights_is_passed_over(tmp_path):
    class Spoil(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step == 4:
                path = tmp_path / "run" / "checkpoints" / "checkpoint-4" / "adapter_model.safetensors"
                save_file({key: value * math.nan for key, value in load_file(path).items()}, path)

    diverge = Diverge(step=5)
    with pytest.raises(DivergedError, match=r"the weights of .*checkpoint-2"):
        train(options(tmp_path / "run", **FT, save_steps=2), callbacks=[diverge, Spoil()])
    assert same(load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors"), diverge.before[3])


@pytest.mark.slow
def test_full_fine_tuning_that_diverges_before_a_checkpoint_saves_nothing_and_says_so(tmp_path):
    with pytest.raises(
        DivergedError, match=r"no checkpoint holds earlier weights, so nothing was saved: .*--save-steps"
    ):
        train(options(tmp_path / "run", **FT, save_steps=100), callbacks=[Diverge(step=3)])
    assert not (tmp_path / "run" / "adapter").exists()


UNFIT = {
    "an unknown key": ({"learning_rat": 1.0}, "unknown key 'learning_rat'; did you mean 'learning_rate'"),
    "an unknown method": ({"method": {"name": "pt-mo"}}, "unknown method 'pt-mo'; did you mean 'pt-moe'"),
    "an unknown field": ({"method": {"name": "pt", "rank": 3}}, "unknown key 'rank'"),
    "a zero size": (
        {"method": {**SMALL, "num_experts": 0}},
        "num_experts=0: input should be greater than or equal to 1",
    ),
    "a negative size": ({"method": {**SMALL, "rank": -2}}, "rank=-2"),
    "a rank above its limit": (
        {"method": {**SMALL, "rank": 7}},
        r"rank 7 exceeds min\(T, H\) = 6: lower rank or raise",
    ),
    "an unknown task": ({"task": "nano/mixd"}, "unknown task 'nano/mixd'; did you mean 'nano/mixed'"),
    "an unknown model": ({"model": "./nowhere"}, "no model folder './nowhere'"),
    "no data": ({"task": None}, "task=None, data=None: give one of the two"),
    "no steps": ({"max_steps": 0}, "max_steps=0"),
    "a negative rate": ({"learning_rate": -1.0}, "learning_rate=-1.0"),
    "an unknown scheduler": ({"lr_scheduler_type": "linaer"}, "transformers refuses these options: .*linaer"),
    "a trainer argument of another type": (
        {"trainer": {"data_seed": "7"}},
        r"trainer: data_seed='7': needs int \| None",
    ),
    "a trainer argument beyond 64 bits": ({"trainer": {"data_seed": 2**64}}, "needs a number of 64 bits"),
    "an evaluation before training": ({"trainer": {"eval_on_start": True}}, "needs an evaluation during training"),
    "no whole batch": (
        {"max_examples": 5, "trainer": {"dataloader_drop_last": True}},
        "5 examples fill no batch, and dataloader_drop_last leaves out",
    ),
    "a compiler of the whole model": ({"trainer": {"torch_compile_mode": "default"}}, "layer by layer"),
    "an unknown trainer argument": ({"trainer": {"optm": "x"}}, "trainer: unknown key 'optm'; did you mean 'optim'"),
}


@pytest.mark.parametrize("case", UNFIT)
@pytest.mark.slow
def test_unfit_options_are_refused_by_name_and_write_nothing(case, tmp_path):
    changes, message = UNFIT[case]
    with pytest.raises(ptmoe.PtmoeError, match=message):
        train(options(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def of_the_trainer():
    """The names and defaults of what may stand under `trainer`."""
    refused = {"hub_token", "torch_compile_backend", "torch_compile_mode"}
    others = NEED_EVALUATION | TrainOptions.model_fields.keys() | refused
    for field in fields(TrainingArguments):
        if field.name not in others:
            yield field.name, field.default if field.default_factory is MISSING else field.default_factory()


def test_a_trainer_argument_has_the_type_that_transformers_states():
    for name, default in of_the_trainer():
        check_trainer_arguments(TrainOptions(task="nano/mixed", trainer={name: default}))
        with pytest.raises(ptmoe.PtmoeError, match=f"trainer: {name}="):
            check_trainer_arguments(TrainOptions(task="nano/mixed", trainer={name: [[None]]}))


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 2**32},
        {"num_train_epochs": math.inf},
        {"warmup_steps": math.inf},
        {"weight_decay": math.inf},
        {"per_device_train_batch_size": 2**63},
        {"trainer": {"ddp_timeout": "soon"}},
        {"trainer": {"ddp_timeout": None}},
        {"trainer": {"ddp_timeout": 0}},
    ],
)
def test_numbers_that_no_training_can_use_are_refused_by_name(changes, tmp_path):
    (name,) = changes.get("trainer", changes)
    with pytest.raises(ptmoe.PtmoeError, match=name):
        options(tmp_path / "run", **changes)


@pytest.mark.ci
def test_a_refusal_after_the_base_is_loaded_leaves_a_folder_that_can_be_used(tmp_path):
    chosen = {"method": SMALL | {"recipe": "paper"}, "max_steps": 1, "eval_examples": 1}
    with pytest.raises(ptmoe.PtmoeError, match=r"tokens_per_batch=1: .* too long; raise it"):
        train(options(tmp_path / "run", **chosen, tokens_per_batch=1))
    assert train(options(tmp_path / "run", **chosen)).result.steps == 1


def test_bad_data_starts_no_training(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    with pytest.raises(ptmoe.PtmoeError, match=r"1 bad record\(s\)"):
        train(options(tmp_path / "run", task=None, data=str(tmp_path / "d.jsonl")))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_folder_that_holds_a_run_is_refused(trained):
    before = sorted(path.stat().st_mtime_ns for path in trained.folder.rglob("*"))
    with pytest.raises(ptmoe.PtmoeError, match="already holds a run"):
        train(options(trained.folder))
    assert sorted(path.stat().st_mtime_ns for path in trained.folder.rglob("*")) == before


@pytest.mark.ci
def test_long_examples_are_left_out_or_cut_and_counted(tmp_path):
    lines = [{"prompt": "x " * length, "completion": " y"} for length in (5, 3000, 7, 4000)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    messages = []
    plain = {"task": None, "data": str(tmp_path / "d.jsonl"), "max_steps": 1, "per_device_train_batch_size": 1}
    result = train(options(tmp_path / "out", **plain), say=messages.append).result
    assert (result.examples, result.examples_left_out, result.examples_cut) == (2, 2, 0)
    assert "2 of 4 examples left out and 0 cut" in messages[0]
    result = train(options(tmp_path / "cut", **plain, truncation="cut"), say=messages.append).result
    assert (result.examples, result.examples_left_out, result.examples_cut) == (4, 0, 2)
    (tmp_path / "long.jsonl").write_text(json.dumps(lines[1]) + "\n")
    with pytest.raises(ptmoe.PtmoeError, match="none of the 1 examples fits"):
        train(options(tmp_path / "none", **(plain | {"data": str(tmp_path / "long.jsonl")})))


@pytest.mark.ci
@pytest.mark.parametrize(("evaluated", "count"), [("ab", 4), ("bcd", 2), ("cd", 0), ("AB", 4)])
def test_training_examples_that_are_evaluated_are_counted_and_told(evaluated, count, tmp_path):
    for name, letters in (("trained", "ab"), ("evaluated", evaluated)):
        lines = [{"prompt": f"{letter} {n} =", "completion": f" {name}"} for letter in letters for n in range(2)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    plain = {"task": None, "data": str(tmp_path / "trained.jsonl"), "eval_task": str(tmp_path / "evaluated.jsonl")}
    messages = []
    trained = train(options(tmp_path / "run", **plain, max_steps=1, max_new_tokens=1), say=messages.append)
    assert trained.result.examples_evaluated == count
    assert json.loads((trained.folder / "result.json").read_text())["examples_evaluated"] == count
    told = [message for message in messages if "evaluated as well" in message]
    assert [message.partition(" of ")[0] for message in told] == [str(count)] * (count > 0)


def test_cutting_keeps_the_completion_and_the_end_of_the_prompt():
    _, tokenizer = load_base("nano")
    (example,) = load_task("nano/words", "test")[:1]
    whole = encode_prompt(example, tokenizer).ids + encode_completion(example, tokenizer)
    row = fit([example], tokenizer, len(whole) - 2, "cut")[0]
    assert row["input_ids"].tolist() == whole[2:]
    assert [label for label in row["labels"] if label != -100] == encode_completion(example, tokenizer)
    assert encode_completion(example, tokenizer)[-1] == tokenizer.eos_token_id


def test_a_conversation_trains_on_the_prompt_that_generation_gives():
    from ptmoe.tasks.base import Example

    _, tokenizer = load_base("nano")
    asked = ({"role": "user", "content": "2 and 3"},)
    example = Example("1", "", "5", ("5",), "chat", messages=asked)
    prompt = tokenizer.apply_chat_template(list(asked), tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(
        [*asked, {"role": "assistant", "content": "5"}], tokenize=False, add_generation_prompt=False
    )
    assert tokenizer.decode(encode_prompt(example, tokenizer).ids) == prompt
    assert tokenizer.decode(encode_completion(example, tokenizer)) == whole.removeprefix(prompt) + tokenizer.eos_token


def squad_file(path, questions=6):
    """SQuAD's JSON with contexts far longer than a row, the answer anywhere in them."""
    qas, context = [], ""
    for number in range(questions):
        context += "The box is empty. " * 12 + f"The key number {number} is in Place{number}. "
        qas.append({"id": f"q{number}", "question": f"Where is key {number}?", "answers": []})
    for number, question in enumerate(qas):
        question["answers"] = [{"text": f"Place{number}", "answer_start": context.index(f"Place{number}")}]
    qas[0]["answers"] = qas[0]["answers"] * 2
    path.write_text(json.dumps({"data": [{"paragraphs": [{"context": context, "qas": qas}]}], "version": "1.1"}))
    return path


@pytest.mark.ci
def test_a_question_trains_on_the_passage_around_its_answer_and_is_asked_as_it_was_trained(tmp_path):
    file = squad_file(tmp_path / "squad.json")
    messages = []
    squad = {"task": "mrqa/squad", "data_dir": str(file), "max_length": 160, "max_steps": 1, "eval_task": "mrqa/squad"}
    squad |= {"eval_data_dir": str(file), "max_new_tokens": 4}
    trained = train(options(tmp_path / "run", **squad), say=messages.append)
    assert trained.result.examples_cut == trained.result.examples == 6
    assert "6 of the training examples are evaluated as well" in messages[0]
    assert "0 of 6 examples left out and 6 cut: longer than 160 tokens" in messages[1]
    tokenizer = trained.tokenizer
    rows = fit(load_task("mrqa/squad", "train", file), tokenizer, 160, chat=True)
    for number, row in enumerate(rows):
        text = tokenizer.decode(row["input_ids"])
        assert len(row["input_ids"]) == 160
        assert text.count(f"Place{number}") == 2, "once in what is left of the passage, once as the answer"
        assert f"Question: Where is key {number}?\nAnswer:" in text
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert written["chat"] is True, "nano's tokenizer has a chat template"
    (evaluation,) = trained.evaluations
    assert evaluation.settings["chat"] is True
    assert all(
        prediction.cut > 0 and prediction.prompt.startswith("user: The box") for prediction in evaluation.predictions
    )
    assert set(evaluation.metrics) == {"exact_match", "f1"}


@pytest.mark.ci
def test_a_mixture_of_named_tasks_trains_and_several_are_evaluated(tmp_path):
    for name in ("gsm8k", "svamp"):
        (tmp_path / name).mkdir()
    records = [{"question": f"{n} and 1?", "answer": f"#### {n + 1}"} for n in range(10)]
    for split in ("train", "test"):
        text = "".join(json.dumps(record) + "\n" for record in records)
        (tmp_path / "gsm8k" / f"{split}.jsonl").write_text(text + '{"question": 1}\n')
    item = {"ID": "c", "Body": "b", "Question": "q?", "Answer": 2.0, "Type": "Addition"}
    (tmp_path / "svamp" / "SVAMP.json").write_text(json.dumps([item]))
    mixed = {"task": "gsm8k=1,nano/mixed=2", "data_dir": str(tmp_path), "eval_task": "gsm8k,svamp", "max_steps": 2}
    mixed["max_new_tokens"] = 3
    with pytest.raises(ptmoe.PtmoeError, match=r"test\.jsonl:11: lacks the key 'answer'"):
        train(options(tmp_path / "run", **mixed))
    assert not (tmp_path / "run").exists()
    messages = []
    trained = train(options(tmp_path / "run", **mixed, skip_bad=True), say=messages.append)
    assert trained.result.examples == 31, "10 of gsm8k and twice as many of nano's, up to the turn of the eleventh"
    assert "test.jsonl:11" in messages[0]
    assert "train.jsonl:11" in messages[1]
    assert [evaluation.task.name for evaluation in trained.evaluations] == ["gsm8k", "svamp"]
    assert sorted(path.name for path in (tmp_path / "run" / "eval").iterdir()) == ["gsm8k.json", "svamp.json"]


@pytest.mark.parametrize("chat", [False, True])
def test_what_training_supervises_follows_what_evaluation_asks(chat, tmp_path):
    """For every family: the row is the evaluation's prompt, then the answer, then the end."""
    _, tokenizer = load_base("nano")
    examples = load_task("mrqa/squad", "test", squad_file(tmp_path / "s.json")) + load_task("nano/all", max_examples=3)
    rows = fit(examples, tokenizer, 2000, chat=chat)
    for example, row in zip(examples, rows, strict=True):
        prompt = encode_prompt(example, tokenizer, chat=chat).ids
        assert row["input_ids"][: len(prompt)].tolist() == prompt
        assert (row["labels"][: len(prompt)] == -100).all()
        answer = tokenizer.decode(row["labels"][len(prompt) :], skip_special_tokens=True)
        assert answer.strip() == example.target.strip()
        assert tokenizer.eos_token_id in row["labels"][-2:]


@pytest.mark.slow
@pytest.mark.skipif(not GSM8K.exists(), reason="needs GSM8K's own file")
def test_gsm8k_trains_with_a_falling_loss_saves_reloads_and_generates(tmp_path):
    trained = train(
        options(
            tmp_path / "run",
            task="gsm8k",
            data_dir=str(GSM8K),
            max_examples=24,
            warmup_steps=2,
            per_device_train_batch_size=3,
        )
    )
    losses = [line["loss"] for line in logged(trained.folder)]
    assert losses[-1] < 0.9 * losses[0]
    device = trained.model.device
    again = ptmoe.load_adapter(load_base("nano", device=device)[0], trained.folder).eval()
    ids = trained.tokenizer("How many legs do three cats have? ", return_tensors="pt")["input_ids"].to(device)
    generated = again.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(generated[:, : ids.shape[1]], ids)
    assert torch.equal(generated, trained.model.generate(input_ids=ids, max_new_tokens=8, do_sample=False))


def test_batches_are_padded_on_the_right_and_pads_are_not_supervised():
    batch = collate([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8, 9], "labels": [-100, 9]}])
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [-100, 9, -100]]
