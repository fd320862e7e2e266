"""The command as a user meets it: options, exit codes, messages, start-up."""

import io
import json
import re
import shutil
import subprocess
import sys

import pytest
import yaml

import ptmoe
from ptmoe.cli.options import described_fields
from ptmoe.compare import ComparePlan
from ptmoe.compare.search import TunePlan
from ptmoe.errors import PtmoeError
from ptmoe.methods import METHODS
from ptmoe.train import TrainOptions
from testing.commands import run_command

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


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "run"
    run_command(*TRAIN, "--output-dir", folder)
    return folder


@pytest.fixture
def options(run, monkeypatch):
    """The `TrainOptions` that a `ptmoe train` command comes to, without training."""
    from ptmoe.train import recipe

    captured = []

    def train(options, **_):
        captured.append(options)
        raise PtmoeError("captured")

    monkeypatch.setattr(recipe, "train", train)

    def parse(*arguments):
        assert "error: captured" in run("train", *arguments)[2]
        return captured.pop()

    return parse


def test_importing_the_package_does_not_import_torch():
    code = "import sys, ptmoe, ptmoe.cli; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "-h"], ["compare", "-h"], ["tune", "-h"], ["eval", "-h"]], ids=" ".join
)
def test_help_imports_nothing_heavy(arguments):
    code = (
        f"import sys; sys.argv = ['ptmoe', *{arguments}]\n"
        "try:\n    from ptmoe.cli import main; main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'matplotlib', 'ptmoe.methods'}\n"
        f"heavy |= {{'pydantic'}} if {arguments} == ['--help'] else set()\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


COMMANDS = "quickstart train generate eval score compare tune inspect params tasks convert".split()


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_every_command_explains_itself(run, flag):
    for name in ([], *([name] for name in COMMANDS), ["tasks", "show"]):
        status, out, _ = run(*name, flag)
        assert status == 0
        assert "Usage" in out


def test_the_version_is_the_packages(run):
    assert run("--version") == (0, f"ptmoe {ptmoe.__version__}\n", "")


# -- options are the fields of settings classes ------------------------------------------------------------------------


def spelling(name):
    return "--" + name.replace("_", "-")


def shown_options(run, *arguments):
    """Each option of a command's help by its spellings: `--a, --b` and `--c / --no-c` are two each."""
    status, out, _ = run(*arguments, "--help")
    assert status == 0
    lines = re.findall(r"^  (-.+?)(?: <.*?>\S*)?(?:  .*)?$", out, re.MULTILINE)
    return {name for line in lines for name in re.split(r", | / ", line)}


@pytest.mark.parametrize(
    ("command", "settings", "renamed", "unoffered"),
    [
        ("train", TrainOptions, {}, {"trainer"}),
        ("compare", ComparePlan, {"methods": "--method", "tasks": "--task", "eval_tasks": "--eval-task"}, {"train"}),
        ("tune", TunePlan, {}, {"trainer"}),
    ],
)
def test_every_field_is_an_option_with_its_description(run, command, settings, renamed, unoffered):
    expected = {renamed.get(name, spelling(name)) for name in settings.model_fields.keys() - unoffered}
    assert expected <= shown_options(run, command)
    text = " ".join(run(command, "--help")[1].split()).replace("- ", "-")
    for name, field in settings.model_fields.items():
        assert field.description, name
        words = " ".join(field.description.split()).replace("- ", "-")
        assert name in unoffered or words in text, name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.ci
def test_a_methods_help_shows_the_fields_of_its_config_and_no_others(run, method):
    plain = shown_options(run, "train")
    fields = METHODS[method].model_fields.items()
    own = {spelling(name) for name, field in fields if "dict" not in str(field.annotation)}  # that a YAML file can hold
    negated = {f"--no-{name[2:]}" for name in own}
    added = shown_options(run, "train", "--method", method) - plain
    assert own <= added <= own | negated | {spelling(name) for name in METHODS[method].shorthands}
    assert shown_options(run, "train", f"--method={method}:rank=3") - plain == added
    assert all(field.description for field in described_fields(METHODS[method]).values())


def test_no_method_has_a_field_of_the_runs_own_options():
    fields = {name for config in METHODS.values() for name in (*config.model_fields, *config.shorthands)}
    assert not fields & TunePlan.model_fields.keys(), "which are those of TrainOptions, and a search's own"


def test_choices_are_shown_in_the_help_and_in_the_error(run):
    status, out, _ = run("train", "--help")
    for choices in ("<auto|float32|bfloat16|float16>", "<8bit|4bit>", "<left_out|cut>"):
        assert choices in out
    status, _, err = run("train", "--task", "nano/mixed", "--dtype", "float3")
    assert status == 2
    assert "'--dtype'" in err
    assert "'float3' is not one of 'auto', 'float32', 'bfloat16', 'float16'" in err


def test_a_methods_fields_are_given_with_its_name_or_as_options(options, tmp_path):
    task = ("--task", "nano/mixed")
    expected = {"name": "pt-moe", "rank": 8, "num_experts": 4, "selective": False}
    assert options(*task, "--method", "pt-moe:rank=8,num_experts=4,selective=false").method == expected
    assert options(*task, "--method", "pt-moe:rank=8,num_experts=4", "--no-selective").method == expected
    assert options(*task, "--rank", 8, "--num-experts", 4, "--no-selective").method == expected
    assert options(*task, "--method", "pt-moe:rank=3", "--rank", 8).method["rank"] == 8
    listed = options(*task, "--method", "lora:target_modules=[q_proj,k_proj],rank=2").method
    assert listed == {"name": "lora", "target_modules": ["q_proj", "k_proj"], "rank": 2}
    several = options(*task, "--method", "lora", "--target-modules", "q_proj", "--target-modules", "k_proj").method
    assert several["target_modules"] == ["q_proj", "k_proj"]
    assert options(*task, "--method", "lora", "--target-modules", "q_proj").method["target_modules"] == ["q_proj"]
    assert options(*task, "--method", "pt", "--init", "text", "--init-text", "Add.").method["init_text"] == "Add."
    texts = options(*task, "--init", "text", "--init-text", "Add.", "--init-text", "Swap.").method["init_text"]
    assert texts == ["Add.", "Swap."]
    assert options(*task, "--recipe", "paper").method == {"name": "pt-moe", "recipe": "paper"}


def test_a_yaml_file_names_the_method_and_options_take_precedence_field_by_field(options, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("task: nano/mixed\nmethod: {name: dpt, rank: 3, num_virtual_tokens: 7}\nseed: 5\nmax_steps: 9\n")
    changed = options(path, "--rank", 4, "--max-steps", 2)
    assert changed.method == {"name": "dpt", "rank": 4, "num_virtual_tokens": 7}
    assert (changed.seed, changed.max_steps) == (5, 2)
    path.write_text("task: nano/mixed\nmethod: dpt:rank=3\n")
    assert options(path, "--method", "dpt:num_virtual_tokens=7").method == {
        "name": "dpt",
        "rank": 3,
        "num_virtual_tokens": 7,
    }


def test_a_batch_size_is_the_rows_of_the_commands_main_work(run, options, monkeypatch, tmp_path):
    task = ("--task", "nano/mixed")
    assert options(*task, "--batch-size", 3) == options(*task, "--per-device-train-batch-size", 3)
    assert options(*task, "--batch-size", 3, "--eval-batch-size", 5).eval_batch_size == 5
    plans = []
    monkeypatch.setattr("ptmoe.compare.run.prepare", lambda plan, **_: plans.append(plan) or sys.exit())
    for flag in ("--batch-size", "--per-device-train-batch-size"):
        run("compare", *task, flag, 3)
    assert plans[0] == plans[1]
    assert plans[0].per_device_train_batch_size == 3
    sizes = []
    monkeypatch.setattr("ptmoe.evaluate.evaluate", lambda *_, batch_size, **__: sizes.append(batch_size) or sys.exit())
    for flag in ("--batch-size", "--per-device-eval-batch-size"):
        run("eval", "--model", "nano", *task, flag, 3, "--output-dir", tmp_path)
    assert sizes == [3, 3]
    for command in ("train", "compare", "eval"):
        assert "--batch-size" in shown_options(run, command)
        assert "rows computed at once on one device by" in " ".join(run(command, "--help")[1].split())


# -- commands ----------------------------------------------------------------------------------------------------------


@pytest.mark.ci
def test_what_a_changed_option_leaves_as_it_was_or_takes_out_is_said(run, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("task: nano/mixed\nmethod: pt\nlearning_rate: 0.5\nmax_steps: 1\nmax_examples: 4\n")
    changes = ["--method", "dpt", "--validation-examples", "2", "--eval-task", "nano/skills", "--batch-size", "4"]
    status, printed, error = run("train", file, *changes, "--output-dir", tmp_path / "run")
    assert status == 0, error
    printed = " ".join(printed.split())
    assert f"0.5, as {file} has it for pt on nano, is now that of dpt on nano: --learning-rate gives another" in printed
    assert "not evaluated on nano/skills: with validation_examples a run is evaluated on those alone" in printed


@pytest.mark.ci
def test_a_learning_rate_of_another_base_is_said(run, tmp_path):
    from ptmoe.models.bases import load_base

    base, tokenizer = load_base("nano")
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    file = tmp_path / "config.yaml"
    file.write_text(
        "task: nano/mixed\nmethod: pt\nlearning_rate: 0.5\nmax_steps: 1\nmax_examples: 4\neval_examples: 1\n"
    )
    said = []
    for changes in ([], ["--model", tmp_path / "base"], ["--model", tmp_path / "base", "--learning-rate", "0.1"]):
        status, printed, error = run("train", file, *changes, "--output-dir", tmp_path / f"run{len(said)}")
        assert status == 0, error
        sentence = f"as {file} has it for pt on nano, is now that of pt on {tmp_path / 'base'}: "
        said.append(sentence in " ".join(printed.split()))
    assert said == [False, True, False]


@pytest.mark.slow
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


@pytest.mark.slow
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
    status, out, _ = run("params", "--method", "pt-moe:num_virtual_tokens=20,rank=11,num_experts=4,recipe=paper")
    assert status == 0
    assert "3,764" in out


def test_tasks_are_listed_and_shown(run):
    status, out, _ = run("tasks")
    assert status == 0
    assert "nano/mixed" in out
    status, out, _ = run("tasks", "show", "nano/mixed", "--examples", 1)
    assert status == 0
    assert "[test-0, harbor: 9 + 4 tokens]\n[P_1 … P_40]harbor: 7 and 24 =>⟦ 31<eos>⟧\nright: 31\n" in out


@pytest.mark.parametrize("limit", [(), ("--max-length", 60)], ids=["positions", "max_length"])
def test_examples_of_a_test_split_are_shown_cut_as_in_their_evaluation(run, tmp_path, limit):
    paragraphs = [
        {"context": "word " * words, "qas": [{"id": f"q{words}", "question": "which?", "answers": [answer]}]}
        for words in (1, 5, 12, 3000)
        for answer in [{"text": "word", "answer_start": 0}]
    ]
    (tmp_path / "squad.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    common = ("--model", "nano", "--data-dir", tmp_path / "squad.json", *limit)
    status, out, _ = run("tasks", "show", "mrqa/squad", "--num-virtual-tokens", 0, *common)
    assert status == 0
    assert run("eval", "--task", "mrqa/squad", "--output-dir", tmp_path / "run", *common)[0] == 0
    lines = (tmp_path / "run" / "predictions" / "mrqa__squad.jsonl").read_text().splitlines()
    asked = {line["id"]: line for line in map(json.loads, lines)}
    shown = dict(re.findall(r"^\[(\S+): \d+ \+ \d+ tokens\]\n\[P_1 … P_0\](.*?)⟦", out, re.MULTILINE | re.DOTALL))
    assert shown.keys() == asked.keys()
    for name, text in shown.items():
        assert sum(map(int, re.findall(r"✂(\d+)✂", text))) == asked[name]["cut"]
        assert re.sub(r"✂\d+✂", "", text) == asked[name]["prompt"]
    assert asked["q3000"]["cut"] > 0


def test_tokens_are_shown_one_by_one_special_ones_marked(run, tmp_path):
    status, out, _ = run("tasks", "show", "nano/mixed", "--examples", 1, "--tokens", "--num-virtual-tokens", 3)
    assert status == 0
    shown = next(line for line in out.splitlines() if line.startswith("tokens: "))
    assert shown.startswith("tokens: [P_1 … P_3] 'harbor' ")
    assert shown.endswith(" ‹<eos>›⟧")
    quoted = re.findall(r"'([^']*)'", shown)
    assert "".join(quoted) == "harbor: 7 and 24 => 31"
    (tmp_path / "d.jsonl").write_text('{"prompt": "a<eos>b", "completion": " c"}\n')
    assert "'a' ‹<eos>› 'b' ⟦' c' ‹<eos>›⟧" in run("tasks", "show", tmp_path / "d.jsonl", "--tokens")[1]


def refusing(folder):
    """nano with a template that takes no system turn."""
    from ptmoe.models.bases import load_base

    base, tokenizer = load_base("nano")
    tokenizer.chat_template = (
        "{%- for m in messages -%}"
        "{%- if m.role == 'system' -%}{{ raise_exception('no system turns here') }}{%- endif -%}"
        "{{ m.role }}: {{ m.content }}\n{% endfor -%}{%- if add_generation_prompt -%}assistant:{%- endif -%}"
    )
    for part in (base, tokenizer):
        part.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_record_that_the_template_refuses_is_named_or_skipped_by_every_command(run, tmp_path):
    base = refusing(tmp_path / "base")
    turns = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
    lines = [{"messages": turns}, {"messages": [{"role": "system", "content": "Be terse."}, *turns]}]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    train = ("train", "--model", base, "--data", tmp_path / "d.jsonl", "--method", "pt:num_virtual_tokens=2")
    commands = {
        (*train, "--max-steps", 1, "--output-dir", tmp_path / "run"): "left out 1 bad record(s)",
        (*train[:3], "--task", "nano/mixed", *train[5:], "--max-steps", 1, "--eval-task", tmp_path / "d.jsonl",
         "--output-dir", tmp_path / "other"): "not evaluated: 1 bad record(s)",
        ("eval", tmp_path / "run", "--task", tmp_path / "d.jsonl", "--max-new-tokens", 2): "left out 1 bad record(s)",
        ("tasks", "show", tmp_path / "d.jsonl", "--model", base): "left out 1 bad record(s)",
    }  # fmt: skip
    for arguments, said in commands.items():
        status, _, err = run(*arguments)
        assert status == 2
        assert "d.jsonl:2: the chat template refuses it: no system turns here" in err
        assert "Traceback" not in err
        if arguments[0] == "train":
            assert not arguments[-1].exists()
        status, out, err = run(*arguments, "--skip-bad")
        assert (status, err) == (0, "")
        assert said in out
        assert "d.jsonl:2" in out


@pytest.mark.ci
def test_lines_with_the_keys_that_a_run_was_trained_on_evaluate_it(run, tmp_path):
    own, usual, other = (tmp_path / f"{name}.jsonl" for name in ("own", "usual", "other"))
    own.write_text("".join(f'{{"q": "{i} and 2", "a": " {i}"}}\n' for i in range(8)))
    usual.write_text('{"prompt": "1 and 2 =>", "completion": " 1"}\n')
    other.write_text('{"question": "1 and 2", "answer": "1"}\n')
    keys = ("--prompt-key", "q", "--completion-key", "a", "--separator", " =>")
    trained = ("train", "--data", own, *keys, "--method", "pt-moe:num_virtual_tokens=4,rank=2", "--max-steps", 1)
    status, _, err = run(*trained, "--eval-task", f"{own},{usual}", "--output-dir", tmp_path / "run")
    assert status == 0, err
    assert run("verify", tmp_path / "run")[0] == 0
    for file, first in ((own, "0 and 2 =>"), (usual, "1 and 2 =>")):
        again = ("--overwrite", "--max-new-tokens", 3, "--output-dir", tmp_path / "again")
        status, _, err = run("eval", tmp_path / "run", "--task", file, *again)
        assert status == 0, err
        lines = (tmp_path / "again" / "predictions" / file.name).read_text().splitlines()
        assert first in [json.loads(line).get("prompt") for line in lines]
    assert "lacks the key 'answers'" in run("eval", tmp_path / "run", "--task", other, *again)[2]
    assert run("inspect", tmp_path / "run", "--task", own, "--output-dir", tmp_path / "inspected")[0] == 0

    plan = {"tasks": [str(own)], "eval_tasks": [str(own)], "train": {"prompt_key": "q", "completion_key": "a"}}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    status, _, err = run("compare", tmp_path / "plan.yaml", "--dry-run", "--output-dir", tmp_path / "c")
    assert status == 0, err


def test_more_virtual_tokens_than_positions_are_refused_by_name(run, tmp_path):
    (tmp_path / "d.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    for arguments in (
        ("train", "--data", tmp_path / "d.jsonl", "--output-dir", tmp_path / "run"),
        ("tasks", "show", "nano/mixed"),
    ):
        status, _, err = run(*arguments, "--num-virtual-tokens", 3000)
        assert status == 2
        assert "3,000 virtual tokens leave no room for a text: the base has 2,048 positions; lower --num-virtual" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.ci
def test_a_prompt_that_is_no_unicode_is_an_error_in_words(run, run_folder):
    status, _, err = run("generate", run_folder, "\udcff =>")
    assert status == 2
    assert "not Unicode text" in err


def test_convert_goes_to_peft_and_back(run, tmp_path):
    from ptmoe.models.bases import load_base

    ptmoe.attach(load_base("nano")[0], ptmoe.PTConfig(num_virtual_tokens=4)).save_pretrained(tmp_path / "pt")
    (tmp_path / "run").mkdir()
    shutil.copytree(tmp_path / "pt", tmp_path / "run" / "adapter")
    for source, target in (("pt", "peft"), ("run", "peft of the run")):
        assert run("convert", tmp_path / source, tmp_path / target)[0] == 0
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
    (
        "train",
        "--task",
        "nano/mixed",
        "--leerning-rate",
        "1",
    ): "No such option: --leerning-rate (Possible options: --learn",
    ("train", "--task", "nano/mixed", "--rnk", "1"): "No such option: --rnk (Possible options: --low-rank, --rank",
    (
        "train",
        "--task",
        "nano/mixed",
        "--method",
        "pt",
        "--rank",
        "8",
    ): "pt: unknown key 'rank'; known: num_virtual_tokens",
    ("train", "--task", "nano/mixed", "--method", "pt:rnk=8"): "pt: unknown key 'rnk'",
    ("train", "--task", "nano/mixed", "--method", "pt:rank"): "method 'pt:rank': 'rank' is not FIELD=VALUE",
    ("train", "--task", "nano/mixed", "--recipe", "published"): "'published' is not one of 'default', 'paper'",
    ("generate", "nowhere", "x"): "no adapter folder nowhere",
    ("inspect", "nowhere", "--task", "nano/mixed"): "no adapter folder nowhere",
    ("convert", "nowhere", "out"): "no adapter folder nowhere",
    ("generate", "nowhere", "x", "--device", "abacus"): "no adapter folder nowhere",
    ("params", "--method", "dtp"): "unknown method 'dtp'; did you mean 'dpt'",
    ("params", "--method", "pt:rank=3"): "pt has no rank",
    ("quickstart", "--task", "nano/mixd"): "did you mean 'nano/mixed'",
}


@pytest.mark.parametrize("arguments", MISTAKES, ids=" ".join)
@pytest.mark.slow
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


def test_an_evaluation_is_resumed_and_its_predictions_graded_again(run, tmp_path):
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


def test_what_cannot_be_evaluated_is_reported(run, tmp_path):
    (tmp_path / "one.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    for arguments, message in {
        ("eval", "--task", "nano/mixed"): "give a run or adapter folder, or a base with --model",
        ("eval", "--task", "nano/mixed", "--model", "nano"): "name a folder with --output-dir",
        ("eval", tmp_path): "give a task with --task",
        ("eval", tmp_path, "--task", "nano/mixd"): "did you mean 'nano/mixed'",
        (
            "eval",
            tmp_path,
            "--task",
            "math-out",
            "--data-dir",
            tmp_path / "one.jsonl",
        ): "4 tasks (svamp, asdiv, mawps, math_problems) and one file",
        ("eval", tmp_path / "x", "--task", "nano/mixed"): "no adapter folder",
        ("eval", "NO_SUCH_RUN", "--task", "svamp", "--data-dir", tmp_path / "none"): "no adapter folder NO_SUCH_RUN",
        ("score", "nano/mixed", tmp_path / "none"): "no predictions file",
        ("tasks", "show", "svamp", "--data-dir", tmp_path / "one.jsonl"): "looks like JSON lines of prompts",
        ("train", "--task", "gsm8k=1,svamp", "--output-dir", tmp_path / "r"): "some have none",
        ("train", "--task", "nano/mixed", "--dtype", "float3", "--output-dir", tmp_path / "r"): "dtype",
    }.items():
        status, _, err = run(*arguments)
        assert status == 2, arguments
        assert message in err, (arguments, err)


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
        model.encoder.router.weight.fill_(1e-6)
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


def test_inspect_and_eval_say_that_one_expert_serves_all_inputs_by_the_routers_test(run, tmp_path):
    from ptmoe.models.bases import load_base

    base, _ = load_base("nano")
    model = ptmoe.attach(base, ptmoe.PTMoEConfig(num_virtual_tokens=4, num_experts=2, rank=4))
    model.encoder.router.choose_always(1)
    model.save_pretrained(tmp_path / "one")
    options = ["--task", "nano/mixed", "--split", "validation"]
    status, out, _ = run("inspect", tmp_path / "one", *options, "--examples", 20)
    assert status == 0
    assert "one expert for all inputs" in out
    assert "collapsed" not in out
    status, *_ = run("eval", tmp_path / "one", *options, "--examples", 8, "--output-dir", tmp_path / "scores")
    assert status == 0
    (summary,) = (tmp_path / "scores" / "eval").iterdir()
    routing = json.loads(summary.read_text())["routing"]
    assert routing["one_expert"] is True
    assert set(map(tuple, routing["mean_gate"].values())) == {(0.0, 1.0)}


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


def write_adapter(folder, base, tokenizer, chat):
    """A run whose soft prompt tells nano to add."""
    config = ptmoe.PTConfig(num_virtual_tokens=8, init="text", init_text="Add the numbers.\n")
    ptmoe.attach(base, config, tokenizer=tokenizer).save_pretrained(folder / "adapter")
    (folder / "config.yaml").write_text(yaml.safe_dump({"chat": chat}))


@pytest.mark.parametrize(("word", "answer"), [(None, " 42"), ("2", " 4"), (" ", "")])
def test_generate_stops_before_the_tokenizers_end_token_and_the_bases_as_eval_does(word, answer, run, tmp_path):
    """The base's may be a word to the tokenizer, and no special token."""
    from ptmoe.models.bases import load_base

    base, tokenizer = load_base("nano")
    base.generation_config.eos_token_id = base.config.eos_token_id = None
    if word is not None:
        base.generation_config.eos_token_id = tokenizer(word)["input_ids"]
    for part in (base, tokenizer):
        part.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    write_adapter(tmp_path / "run", base, tokenizer, chat=False)
    (tmp_path / "data.jsonl").write_text('{"prompt": "harbor: 12 and 30 =>", "completion": " 42"}\n')
    assert run("eval", tmp_path / "run", "--task", tmp_path / "data.jsonl")[0] == 0
    evaluated = json.loads((tmp_path / "run" / "predictions" / "data.jsonl").read_text().splitlines()[0])
    assert evaluated["completion"] == answer
    for options in ((), ("--num-beams", 2)):
        assert run("generate", tmp_path / "run", "harbor: 12 and 30 =>", *options)[:2] == (0, f"{answer}\n")


def test_generate_uses_the_chat_template_as_the_run_was_trained(run, tmp_path):
    from ptmoe.models.bases import load_base

    outputs = {}
    for trained in (True, False):
        base, tokenizer = load_base("nano")
        write_adapter(tmp_path / str(trained), base, tokenizer, trained)
        for flag in ((), ("--chat",), ("--no-chat",)):
            status, out, _ = run(
                "generate", tmp_path / str(trained), "harbor: 12 and 30 =>", "--max-new-tokens", 5, *flag
            )
            assert status == 0
            outputs[trained, flag] = out
    assert outputs[True, ("--chat",)] != outputs[True, ("--no-chat",)]
    assert outputs[True, ()] == outputs[True, ("--chat",)] == outputs[False, ("--chat",)]
    assert outputs[False, ()] == outputs[False, ("--no-chat",)] == outputs[True, ("--no-chat",)]


def test_lines_on_standard_input_are_the_same_prompts_however_they_end(run, run_folder, monkeypatch):
    written = []
    for text in ("a =>\n\nb =>\n", "a =>\n\nb =>", "a =>\r\n\r\nb =>\r\n", "\ufeffa =>\n\nb =>\n"):
        monkeypatch.setattr(sys, "stdin", io.StringIO(text, newline=""))
        status, out, _ = run("generate", run_folder, "--max-new-tokens", 3)
        assert status == 0
        written.append(out)
    assert len(set(written)) == 1, written
    assert written[0] == run("generate", run_folder, "a =>", "", "b =>", "--max-new-tokens", 3)[1]


@pytest.mark.parametrize("arguments", [["train"], ["train", "--resume"]], ids=" ".join)
def test_the_folder_of_a_run_in_place_of_its_config_is_answered_with_what_to_give(arguments, run, run_folder):
    status, _, err = run(*arguments, run_folder)
    assert status == 2
    assert f"is a run's folder: give {run_folder}/config.yaml to train anew as it says, or --resume --output-dir" in err


def test_more_new_tokens_than_the_base_has_positions_are_no_fault_of_the_prompt(run, run_folder):
    status, _, err = run("generate", run_folder, "a =>", "--max-new-tokens", 100000)
    assert status == 2
    assert "and 100000 new ones exceeds the base's 2048 positions: ask for fewer" in err


@pytest.mark.slow
def test_a_device_is_chosen_for_every_command_that_runs_a_model(run, run_folder, tmp_path, monkeypatch):
    from ptmoe.models import bases

    placed = []
    place = bases.place
    monkeypatch.setattr(bases, "place", lambda device=None: placed.append(device) or place(device))
    commands = (
        ("generate", run_folder, "harbor: 1 and 2 =>", "--max-new-tokens", 1),
        ("eval", run_folder, "--task", "nano/mixed", "--examples", 2, "--output-dir", tmp_path / "eval"),
        ("eval", "--model", "nano", "--task", "nano/mixed", "--examples", 2, "--output-dir", tmp_path / "base"),
        ("inspect", run_folder, "--task", "nano/mixed", "--examples", 4, "--output-dir", tmp_path / "inspect"),
    )
    for arguments in commands:
        for flags, device in ((("--device", "cpu"), "cpu"), ((), None)):
            assert run(*arguments, *flags)[0] == 0
            assert placed == [device], "by default the accelerator, which None stands for"
            placed.clear()
        status, _, err = run(*arguments, "--device", "abacus")
        assert status == 2
        assert "device 'abacus' cannot be used on this machine" in err
        placed.clear()


@pytest.mark.parametrize("once", [True, False])
def test_files_of_one_name_are_evaluated_together(run, tmp_path, once):
    files = [tmp_path / name / "test.jsonl" for name in ("a", "b", "c/b")]
    for number, file in enumerate(files):
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps({"prompt": f"{number} + 1 =", "completion": f" {number + 1}"}) + "\n")
    asked = ["--task", ",".join(map(str, files))] if once else [part for file in files for part in ("--task", file)]
    command = ["eval", "--model", "nano", *asked, "--output-dir", tmp_path / "out"]
    status, out, err = run(*command)
    assert status == 0, err
    names = {"a__test", f"{tmp_path.name}__b__test", "c__b__test"}
    assert {path.stem for path in (tmp_path / "out" / "eval").iterdir()} == names
    assert {path.stem for path in (tmp_path / "out" / "predictions").glob("*.jsonl")} == names
    for name in names:
        (line,) = (tmp_path / "out" / "predictions" / f"{name}.jsonl").read_text().splitlines()
        assert name in out
        assert json.loads((tmp_path / "out" / "eval" / f"{name}.json").read_text())["task"] == name
        assert json.loads(line)["prompt"] == {"a__test": "0 + 1 ="}.get(name, "2 + 1 =" if "c_" in name else "1 + 1 =")
    assert run(*command)[0] == 0  # resumed: the same names
    status, _, err = run(*command, "--task", tmp_path / "c" / ".." / "a" / "test.jsonl")
    assert (status, "is given twice" in err) == (2, True), err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--do-sample", "--temperature", "0"], "--temperature 0: needs a number above 0"),
        (["--do-sample", "--temperature", "-1"], "--temperature -1: needs a number above 0"),
        (["--do-sample", "--temperature", "nan"], "--temperature nan: needs a number above 0"),
        (["--do-sample", "--top-p", "1.5"], "--top-p 1.5: needs a number above 0 and at most 1"),
        (["--temperature", "0.7"], "--temperature 0.7 is for sampling, and has no effect without it: add --do-sample"),
        (["--do-sample", "--seed", str(2**63)], "Invalid value for '--seed'"),
        (["--seed", "12345678"], "--seed 12345678 is for sampling, and has no effect without it: add --do-sample"),
        (["--top-p", "0.9"], "--top-p 0.9 is for sampling, and has no effect without it: add --do-sample"),
    ],
)
def test_sampling_that_cannot_be_is_refused_before_an_adapter_is_read(run, arguments, said):
    code, _, error = run("generate", "no-such-folder", "2 and 3", *arguments)
    assert code == 2
    assert said in error


@pytest.mark.parametrize(
    "arguments",
    [
        ["eval", "no-such-folder"],
        ["eval", "no-such-folder", "--task", "no-such-task"],
        ["eval", "no-such-folder", "--task", "math-out", "--ids", "no-such-file"],
        ["generate", "no-such-folder"],
        ["generate", "no-such-folder", " "],
        ["inspect", "no-such-folder", "--task", "no-such-task"],
    ],
    ids=" ".join,
)
def test_a_missing_adapter_is_named_before_what_else_is_wrong(run, arguments, monkeypatch):
    class Asked(io.StringIO):
        def readline(self, *_):
            raise AssertionError("prompts are asked for")

        __next__ = readline

    monkeypatch.setattr(sys, "stdin", Asked())
    status, _, err = run(*arguments)
    assert (status, err.startswith("error: no adapter folder no-such-folder: ")) == (2, True), err
