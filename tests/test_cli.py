"""The command as a user meets it: exit codes, messages, start-up."""

import json
import os
import subprocess
import sys

import pytest

import ptmoe
from ptmoe.cli import main

TRAIN = [
    "train",
    "--task",
    "nano/mixed",
    "--num-virtual-tokens",
    "6",
    "--rank",
    "4",
    "--num-experts",
    "3",
    "--max-steps",
    "4",
    "--eval-examples",
    "8",
]


def command(*arguments, monkeypatch, capsys):
    """Exit status, standard output and error of one command, in this process."""
    monkeypatch.setattr(sys, "argv", ["ptmoe", *map(str, arguments)])
    try:
        main()
        status = 0
    except SystemExit as stop:
        status = stop.code or 0
    said = capsys.readouterr()
    return status, said.out, said.err


@pytest.fixture
def run(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *arguments: command(*arguments, monkeypatch=monkeypatch, capsys=capsys)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "run"
    # One thread, as in this process: another number of threads adds up in another order.
    subprocess.run(
        [sys.executable, "-m", "ptmoe", *TRAIN, "--output-dir", str(folder)],
        check=True,
        capture_output=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    return folder


def test_importing_the_package_does_not_import_torch():
    code = "import sys, ptmoe, ptmoe.cli; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_help_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['ptmoe', '--help']\n"
        "try:\n    from ptmoe.cli import main; main()\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'pydantic', 'numpy', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_every_command_explains_itself(run):
    for name in ("quickstart", "train", "generate", "inspect", "params", "tasks", "convert"):
        status, out, _ = run(name, "--help")
        assert status == 0
        assert "Usage" in out


def test_a_run_trains_generates_and_repeats(run, run_folder, tmp_path):
    status, out, err = run("generate", run_folder, "harbor: 3 and 4 =>", "--max-new-tokens", 4, "--show-routing")
    assert status == 0
    assert out.endswith("\n")
    assert "expert" in err
    status, out, _ = run("train", run_folder / "config.yaml", "--output-dir", tmp_path / "again")
    assert status == 0
    assert "trainable parameters, 4 steps" in out
    assert "nano/words" not in (tmp_path / "again" / "report.html").read_text()
    assert run("eval", tmp_path / "again", "--task", "nano/words", "--examples", 5)[0] == 0
    assert "nano/words" in (tmp_path / "again" / "report.html").read_text()
    first, again = (folder / "adapter" / "adapter_model.safetensors" for folder in (run_folder, tmp_path / "again"))
    assert first.read_bytes() == again.read_bytes()


def test_inspect_prints_and_draws_the_routing(run, run_folder):
    pytest.importorskip("matplotlib")
    status, out, _ = run("inspect", run_folder, "--task", "nano/mixed", "--examples", 40)
    assert status == 0
    for word in ("harbor", "castle", "expert 2", "entropy", "mutual information", "cosine"):
        assert word in out
    assert list((run_folder / "inspect").glob("*.png"))
    assert json.loads((run_folder / "inspect" / "routing.json").read_text())["num_experts"] == 3


def test_params_counts_without_weights(run):
    status, out, _ = run("params", "--num-virtual-tokens", 20, "--rank", 11, "--num-experts", 4)
    assert status == 0
    assert "3,764" in out
    assert "3,840" in out


def test_tasks_are_listed_and_shown(run):
    status, out, _ = run("tasks")
    assert status == 0
    assert "nano/mixed" in out
    status, out, _ = run("tasks", "show", "nano/mixed", "--examples", 1)
    assert status == 0
    assert "[test-0, harbor: 9 + 4 tokens]\n[P_1 … P_40]harbor: 7 and 24 =>⟦ 31<eos>⟧\nright: 31\n" in out


def test_convert_goes_to_peft_and_back(run, tmp_path):
    from ptmoe.models.bases import load_base

    ptmoe.attach(load_base("nano")[0], ptmoe.PTConfig(num_virtual_tokens=4)).save_pretrained(tmp_path / "pt")
    assert run("convert", tmp_path / "pt", tmp_path / "peft")[0] == 0
    assert run("convert", tmp_path / "peft", tmp_path / "back", "--model", "nano")[0] == 0
    first, back = (folder / "adapter_model.safetensors" for folder in (tmp_path / "pt", tmp_path / "back"))
    assert first.read_bytes() == back.read_bytes()


MISTAKES = {
    ("train", "--task", "nano/mixd"): "did you mean 'nano/mixed'",
    ("train", "--task", "nano/mixed", "--method", "ptmoe"): "unknown method 'ptmoe'; did you mean 'pt-moe'",
    ("train", "--task", "nano/mixed", "--rank", "0"): "rank=0",
    ("train", "--task", "nano/mixed", "--rank", "50"): "rank 50 exceeds min(T, H) = 40",
    ("train", "--task", "nano/mixed", "--model", "./nowhere"): "no model folder './nowhere'",
    ("train",): "give one of the two",
    ("train", "nowhere.yaml"): "no config file nowhere.yaml",
    ("train", "--data", "nowhere.jsonl"): "no data file nowhere.jsonl",
    ("train", "--task", "nano/mixed", "--resume"): "give its --output-dir",
    ("train", "--task", "nano/mixed", "--leerning-rate", "1"): "No such option",
    ("generate", "nowhere", "x"): "no adapter folder nowhere",
    ("inspect", "nowhere", "--task", "nano/mixed"): "no adapter folder nowhere",
    ("convert", "nowhere", "out"): "has no adapter_config.json",
    ("params", "--method", "dtp"): "unknown method 'dtp'; did you mean 'dpt'",
    ("quickstart", "--task", "nano/mixd"): "did you mean 'nano/mixed'",
}


@pytest.mark.parametrize("arguments", MISTAKES, ids=" ".join)
def test_a_mistake_gets_an_answer_that_helps_and_status_2(arguments, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, err = run(*arguments)
    assert status == 2
    assert MISTAKES[arguments] in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_a_misspelt_key_in_a_yaml_is_named_with_its_file(run, tmp_path):
    (tmp_path / "c.yaml").write_text("task: nano/mixed\nlearning_rat: 0.1\n")
    status, _, err = run("train", tmp_path / "c.yaml")
    assert status == 2
    assert f"{tmp_path / 'c.yaml'}: unknown key 'learning_rat'; did you mean 'learning_rate'" in err


def test_an_evaluation_is_run_gone_on_with_and_its_predictions_graded_again(run, tmp_path):
    """On a data set in its own format; `score` gives what `eval` gave."""
    from ptmoe.models.bases import load_base

    ptmoe.attach(load_base("nano")[0], ptmoe.PTConfig(num_virtual_tokens=4)).save_pretrained(tmp_path / "adapter")
    records = [{"question": f"{n} and {n}?", "answer": f"It is {2 * n}.\n#### {2 * n}"} for n in range(12)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    asked = ("--data-dir", tmp_path, "--max-new-tokens", 4)
    status, out, err = run("eval", tmp_path / "adapter", "--task", "gsm8k", *asked)
    assert (status, err) == (0, "")
    assert "accuracy, %" in out
    evaluated = json.loads((tmp_path / "adapter" / "eval" / "gsm8k.json").read_text())
    assert evaluated["examples"] == 12
    assert evaluated["settings"]["chat"], "nano's tokenizer has a template, and gsm8k is put in it"
    lines = (tmp_path / "adapter" / "predictions" / "gsm8k.jsonl").read_bytes()
    assert json.loads(lines.splitlines()[0])["prompt"].count("Question: ") == 1
    assert run("eval", tmp_path / "adapter", "--task", "gsm8k", *asked, "--batch-size", 5)[0] == 0
    assert (tmp_path / "adapter" / "predictions" / "gsm8k.jsonl").read_bytes() == lines
    predictions = tmp_path / "adapter" / "predictions" / "gsm8k.jsonl"
    status, out, _ = run("score", "gsm8k", predictions, "--data-dir", tmp_path, "--output", tmp_path / "score.json")
    assert status == 0
    scored = json.loads((tmp_path / "score.json").read_text())
    assert scored["metrics"] == evaluated["metrics"]
    assert scored["interval"] == evaluated["interval"]
    status, _, err = run("eval", tmp_path / "adapter", "--task", "gsm8k", "--data-dir", tmp_path, "--max-new-tokens", 5)
    assert (status, "max_new_tokens was 4, is 5" in err) == (2, True)


def test_gold_answers_score_100_from_the_command_line_and_bad_records_are_listed(run, tmp_path):
    record = {"question": "2 and 2?", "answer": "#### 4"}
    (tmp_path / "test.jsonl").write_text(json.dumps(record) + '\n{"question": 1}\n' + json.dumps(record) + "\n")
    (tmp_path / "p.json").write_text('{"test-0": "The answer is $4.00.", "test-2": "5"}')
    status, _, err = run("score", "gsm8k", tmp_path / "p.json", "--data-dir", tmp_path)
    assert status == 2
    assert "test.jsonl:2: lacks the key 'answer'" in err
    status, out, _ = run("score", "gsm8k", tmp_path / "p.json", "--data-dir", tmp_path, "--skip-bad")
    assert status == 0
    assert "left out 1 bad record(s)" in out
    assert "50.00 [0.00, 100.00]" in out


def test_what_cannot_be_evaluated_is_said(run, tmp_path):
    (tmp_path / "one.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    for arguments, said in {
        ("eval", "--task", "nano/mixed"): "give a run or adapter folder, or a base with --model",
        ("eval", "--task", "nano/mixed", "--model", "nano"): "name one with --output-dir",
        ("eval", tmp_path): "give a task with --task",
        ("eval", tmp_path, "--task", "nano/mixd"): "did you mean 'nano/mixed'",
        ("eval", tmp_path, "--task", "math-out", "--data-dir", tmp_path / "one.jsonl"): "4 tasks and one file",
        ("eval", tmp_path / "x", "--task", "nano/mixed"): "no adapter folder",
        ("score", "nano/mixed", tmp_path / "none"): "no predictions file",
        ("tasks", "show", "svamp", "--data-dir", tmp_path / "one.jsonl"): "looks like JSON lines of prompts",
        ("train", "--task", "gsm8k=1,svamp", "--output-dir", tmp_path / "r"): "some have none",
        ("train", "--task", "nano/mixed", "--dtype", "float3", "--output-dir", tmp_path / "r"): "dtype",
    }.items():
        status, _, err = run(*arguments)
        assert status == 2, arguments
        assert said in err, (arguments, err)


def test_a_base_alone_is_evaluated_into_a_folder_of_its_own(run, tmp_path):
    arguments = ("--task", "nano/mixed", "--task", "nano/words", "--examples", 5, "--output-dir", tmp_path / "base")
    status, out, _ = run("eval", "--model", "nano", *arguments)
    assert status == 0
    assert "mean" in out
    assert sorted(path.name for path in (tmp_path / "base" / "eval").iterdir()) == [
        "nano__mixed.json",
        "nano__words.json",
    ]


def test_inspect_warns_of_a_collapse_and_shows_the_words_near_each_virtual_token(run, tmp_path):
    import torch

    from ptmoe.models.bases import load_base

    base, tokenizer = load_base("nano")
    model = ptmoe.attach(base, ptmoe.PTMoEConfig(num_virtual_tokens=4, num_experts=2, rank=4, recipe="paper"))
    with torch.no_grad():
        model.encoder.router.weight.zero_()
        model.encoder.router.bias.copy_(torch.tensor([0.0, 3.0]))
    model.save_pretrained(tmp_path / "collapsed")
    status, out, _ = run("inspect", tmp_path / "collapsed", "--task", "nano/mixed", "--examples", 20)
    assert status == 0
    assert "the routing has collapsed, one of 2 experts takes 100.0 % of the inputs" in " ".join(out.split())
    near = json.loads((tmp_path / "collapsed" / "inspect" / "nearest.json").read_text())["experts"]
    assert [len(expert) for expert in near] == [4, 4]
    prompt = model.encoder.expert_prompts()[1, 2].detach()
    cosines = torch.cosine_similarity(prompt, base.get_input_embeddings().weight[: len(tokenizer)], dim=1)
    nearest = int(cosines.argmax())
    word, cosine = near[1][2][0]
    assert word in (tokenizer.decode([nearest]), tokenizer.convert_ids_to_tokens(nearest))
    assert cosine == pytest.approx(float(cosines.max()), abs=1e-5)


def test_inspect_says_what_has_nothing_to_show(run, tmp_path):
    from ptmoe.models.bases import load_base

    ptmoe.attach(load_base("nano")[0], ptmoe.LoRAConfig()).save_pretrained(tmp_path / "lora")
    status, _, err = run("inspect", tmp_path / "lora", "--task", "nano/mixed", "--examples", 5)
    assert status == 2
    assert "lora adapter: it has neither a gate of each input nor virtual tokens" in err
    ptmoe.attach(load_base("nano")[0], ptmoe.PTConfig(num_virtual_tokens=3)).save_pretrained(tmp_path / "pt")
    status, out, _ = run("inspect", tmp_path / "pt", "--task", "nano/mixed", "--examples", 5)
    assert status == 0
    assert "it does not route" in out
    assert "P_3" in out
