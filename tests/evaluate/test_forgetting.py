"""What a base forgets: the loss of each text against numpy, and what a run records of it."""

import gzip

import numpy as np
import pytest
import torch

from ptmoe.errors import PtmoeError
from ptmoe.evaluate.forgetting import Text, encode_texts, forgetting, predicted, text_loss
from ptmoe.models.attach import attach
from ptmoe.models.bases import load_base
from ptmoe.models.causal import PromptedCausalLM
from ptmoe.runs.folders import read_run
from ptmoe.tasks.base import Example
from ptmoe.train import TrainOptions, train
from ptmoe.train.examples import forgetting_examples
from testing.bases import CONFIGS, DEVICE, array, prompted, tiny, tokens


def texts(seed=0):
    """Of several lengths; of some the beginning is given, of the others a line is read whole."""
    rows = [tokens(length, seed).tolist() for length in (17, 9, 30, 2, 12)]
    return [Text(rows[0], 8, 8), Text(rows[1], 1, 9), Text(rows[2], 25, 25), Text(rows[3], 1, 2), Text(rows[4], 1, 12)]


def by_hand(base, text, prompt):
    """The sum of -log p over the predicted tokens, in numpy, of a text by itself behind a prompt `(T, H)`."""
    embeds = array(base.get_input_embeddings().weight)[text.ids]
    whole = torch.tensor(np.concatenate([prompt, embeds])[None], dtype=torch.float32, device=DEVICE)
    with torch.no_grad():
        logits = array(base(inputs_embeds=whole).logits[0])
    total = 0.0
    for place in range(text.given, len(text.ids)):
        row = logits[len(prompt) + place - 1]
        total += np.log(np.exp(row - row.max()).sum()) + row.max() - row[text.ids[place]]
    return total


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("name", ["PT", "PT-MoE selective probationary"])
def test_the_loss_is_the_mean_over_the_predicted_tokens_of_all_texts(architecture, name):
    base, given = tiny(architecture), texts()
    table = array(base.get_input_embeddings().weight)
    model = prompted(base, CONFIGS[name])
    tensors = {key: array(value) for key, value in model.encoder.tensors().items()}

    def prompt(text):
        if "prompt" in tensors:
            return tensors["prompt"]
        scores = tensors["router.weight"] @ table[text.ids[: text.read]].mean(0) + tensors["router.bias"]
        shares = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
        return shares.max() * tensors["A"][shares.argmax()] @ tensors["B"]

    count = sum(len(text.ids) - text.given for text in given)
    expected = sum(by_hand(base, text, prompt(text)) for text in given) / count
    untouched = sum(by_hand(base, text, np.zeros((0, table.shape[1]))) for text in given) / count
    found = forgetting(model, given)
    assert (found.texts, found.tokens) == (5, count) == (5, predicted(given))
    assert found.loss == pytest.approx(expected, rel=2e-5)
    assert found.base_loss == pytest.approx(untouched, rel=2e-5)
    assert text_loss(PromptedCausalLM(tiny(architecture)), given) == pytest.approx(untouched, rel=2e-5)
    assert abs(expected - untouched) > 1e-2


def test_a_method_that_changes_layers_is_measured_with_its_layers_and_without(monkeypatch):
    from ptmoe.methods import METHODS

    base, given = tiny(), texts()
    before = text_loss(PromptedCausalLM(tiny()), given)
    model = attach(base, METHODS["lora"](rank=2))
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    model.train()
    found = forgetting(model, given)
    assert model.training
    assert found.base_loss == pytest.approx(before, rel=1e-6)
    assert abs(found.loss - before) > 1e-2


def test_on_nano_the_answers_of_instructed_skills_are_predicted_and_a_routers_input_holds_none():
    _, tokenizer = load_base("nano")
    examples = forgetting_examples(TrainOptions(task="nano/mixed"))
    assert len(examples) == 110
    assert all("\n" in example.input for example in examples), "an instruction before the input"
    encoded = encode_texts(examples, tokenizer, 2048, 10)
    answers = sorted(tokenizer.decode(text.ids[text.given :]) for text in encoded)
    assert answers == sorted(example.target + tokenizer.eos_token for example in examples)
    assert all(text.read == text.given for text in encoded)


def test_lines_of_a_file_are_cut_and_counted(tmp_path):
    _, tokenizer = load_base("nano")
    (tmp_path / "lines.txt").write_text("\n".join(["", "a", *[f"line {n} " + "key " * 900 for n in range(300)]]))
    examples = forgetting_examples(TrainOptions(task="nano/mixed", forgetting=str(tmp_path / "lines.txt")))
    assert [example.input[:8] for example in examples[:3]] == ["a", "line 0 k", "line 1 k"]
    encoded = encode_texts(examples, tokenizer, 2048, 10)
    assert len(examples) == 200
    assert len(encoded) == 199, "of a single token nothing is predicted"
    assert {len(text.ids) for text in encoded} == {512}
    assert {(text.given, text.read) for text in encoded} == {(1, 512)}
    assert {len(text.ids) for text in encode_texts(examples, tokenizer, 100, 10)} == {90}
    zipped = tmp_path / "lines.txt.gz"
    zipped.write_bytes(gzip.compress((tmp_path / "lines.txt").read_bytes()))
    assert forgetting_examples(TrainOptions(task="nano/mixed", forgetting=str(zipped))) == examples


def test_other_bases_have_no_texts_by_default_and_files_without_any_are_refused(tmp_path):
    assert forgetting_examples(TrainOptions(task="nano/mixed", model="smollm2")) == []
    _, tokenizer = load_base("nano")
    assert encode_texts([], tokenizer, 2048, 10) == []
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"a line\n")[:-4])
    for name, message in {
        "empty.txt": "no line of text",
        "binary.txt": "UTF-8",
        "cut.txt.gz": "needs a file",
        "none.txt": "needs a file",
        "\0": "needs a file",
    }.items():
        with pytest.raises(PtmoeError, match=message):
            forgetting_examples(TrainOptions(task="nano/mixed", forgetting=str(tmp_path / name)))
    with pytest.raises(PtmoeError, match="no line has two tokens"):
        encode_texts([Example("1", "a", "", (), "forgetting")], tokenizer, 2048, 10)


SLOW = [pytest.param(*row, marks=pytest.mark.slow) for row in (("ft", 0.05), ("lora:rank=1", 0.0))]


@pytest.mark.ci
@pytest.mark.parametrize(("method", "least"), [("pt:num_virtual_tokens=4", 0.05), *SLOW])
def test_a_run_records_what_its_base_forgets_and_what_the_adapter_takes(tmp_path, method, least):
    asked = {"task": "nano/mixed", "max_steps": 4, "per_device_train_batch_size": 4, "eval_examples": 5}
    asked |= {"learning_rate": 0.01, "warmup_steps": 0}
    trained = train(TrainOptions(method=method, output_dir=str(tmp_path / "run"), **asked), say=lambda line: None)
    result = read_run(tmp_path / "run").result
    assert result == trained.result
    assert result.forgetting is not None
    assert result.forgetting.base_loss < 0.5, "nano can do what it was pretrained for"
    assert result.forgetting.loss > result.forgetting.base_loss + least, "four steps of lora, which starts at the base"
    files = list((tmp_path / "run" / "adapter").glob("*.safetensors"))
    assert result.adapter_bytes == sum(path.stat().st_size for path in files) > 4 * result.trainable_parameters
    # On a GPU what torch allocates there, on a CPU the whole process.
    smallest = 10**7 if torch.cuda.is_available() else 10**8
    assert result.peak_memory is None or smallest < result.peak_memory < 10**11
    scored = TrainOptions(method=method, output_dir=str(tmp_path / "trial"), validation_examples=6, **asked)
    trial = train(scored, say=lambda line: None)
    assert list(read_run(tmp_path / "trial").evaluations) == ["nano/mixed, validation"]
    assert trial.evaluations[0].summary().examples == 6
    assert trial.result.forgetting is None, "a trial is not asked"
