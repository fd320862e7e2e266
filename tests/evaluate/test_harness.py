"""The lm-evaluation-harness on an adapter: the context decides the routing, never the continuation."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from testing.architectures import POSITIONS
from testing.bases import CONFIGS, SELECTIVE_PROBATIONARY, prompted, tiny, tokens

pytest.importorskip("lm_eval", reason="needs ptmoe[lm-eval]")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from ptmoe import PromptedCausalLM, PTConfig, PTMoEConfig, PtmoeError, attach, load_task, nano
from ptmoe.evaluate import evaluate, harness
from ptmoe.evaluate.harness import PromptedLM
from ptmoe.models.bases import load_base, place

PT_MOE = SELECTIVE_PROBATIONARY["PT-MoE probationary"]  # a mixture of all experts: every text gets a prompt of its own
EXAMPLES = Path(__file__).parents[2] / "examples" / "lm_eval"
Pair = tuple[list[int], list[int]]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(nano.FOLDER)


def lm_on(tokenizer: PreTrainedTokenizerBase, architecture: str, config: Any = PT_MOE, **options: Any) -> PromptedLM:
    base = tiny(architecture, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    return PromptedLM(pretrained=prompted(base, config), tokenizer=tokenizer, **options)


def pairs(model: PromptedCausalLM) -> list[Pair]:
    """Contexts and continuations of mixed lengths, in no order of length."""
    cases = []
    for seed, length in enumerate((3, 11, 7, 11)):
        context = tokens(length, seed).tolist()
        cases += [(context, tokens(1, other).tolist()) for other in range(4)]  # they share one row of logits
        cases += [(context, tokens(size, seed).tolist()) for size in (2, 9, 5)]
    whole = tokens(8, 9).tolist()  # one text split at three places: one input, three contexts
    cases += [(whole[:at], whole[at:]) for at in (2, 5, 7)]
    greedy = model.generate(torch.tensor([whole], device=model.device), max_new_tokens=3, do_sample=False)[0].tolist()
    return [*cases, (whole, greedy[8:])]


def alone(model: PromptedCausalLM, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """The log-likelihood of one continuation by itself, and whether it is the greedy continuation."""
    return likelihood(logits_of(model, context + continuation, len(context)), continuation)


def logits_of(model: PromptedCausalLM, row: list[int], readable: int) -> torch.Tensor:
    """`(L, V)` of one row, of which the router reads the beginning."""
    ids = torch.tensor([row], device=model.device)
    mask = torch.arange(len(row), device=model.device)[None] < readable
    return model(input_ids=ids, input_mask=mask).logits[0]


def likelihood(logits: torch.Tensor, continuation: list[int]) -> tuple[float, bool]:
    scores = logits[-len(continuation) - 1 : -1].log_softmax(-1)
    wanted = torch.tensor(continuation, device=logits.device)
    return scores.gather(1, wanted[:, None]).sum().item(), scores.argmax(1).tolist() == continuation


def score(lm: HFLM, pairs: list[Pair]) -> list[tuple[float, bool]]:
    return lm._loglikelihood_tokens([(None, *pair) for pair in pairs], disable_tqdm=True)


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=given, idx=0) for given in arguments]


def assert_same(given: list[tuple[float, bool]], expected: list[tuple[float, bool]]) -> None:
    torch.testing.assert_close(
        torch.tensor([value for value, _ in given]), torch.tensor([value for value, _ in expected]), rtol=0, atol=1e-3
    )
    assert [greedy for _, greedy in given] == [greedy for _, greedy in expected]


# -- loglikelihood ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_continuation_scores_what_it_scores_alone_with_the_context_s_prompt(
    tokenizer: PreTrainedTokenizerBase, architecture: str
) -> None:
    lm = lm_on(tokenizer, architecture)
    cases = pairs(lm.model)
    with torch.no_grad():
        expected = [alone(lm.model, *pair) for pair in cases]
    # It would show: where `hf` scores the same model, the router reads continuations too, all but their last tokens.
    leaked = HFLM._loglikelihood_tokens(lm, [(None, *pair) for pair in cases], disable_tqdm=True)
    wrong = [abs(value - other) > 0.05 for (value, _), (other, _) in zip(expected, leaked, strict=True)]
    assert sum(wrong) >= 8
    assert expected[-1][1]  # the greedy continuation
    sizes: list[int] = []
    lm.model.encoder.register_forward_hook(lambda _, inputs, prompt: sizes.append(len(inputs[0])))
    for batch_size in (1, 3, 8):
        lm.batch_size_per_gpu = batch_size
        assert_same(score(lm, cases), expected)
        assert max(sizes) == batch_size
    lm.logits_cache = False
    assert_same(score(lm, cases), expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_method_is_scored_with_the_context_s_prompt(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    lm = lm_on(tokenizer, "gpt2", CONFIGS[name], batch_size=4)
    cases = pairs(lm.model)[::3]
    with torch.no_grad():
        assert_same(score(lm, cases), [alone(lm.model, *pair) for pair in cases])


def test_without_an_adapter_it_scores_as_the_harness_s_hf_does(tokenizer: PreTrainedTokenizerBase) -> None:
    base = tiny("gpt2", vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    # With its cache `hf` reads the first logits, not the last, for one text that is split at two places (0.4.13).
    plain = HFLM(base, tokenizer=tokenizer, batch_size=3, logits_cache=False)
    ours = PromptedLM(PromptedCausalLM(base), tokenizer=tokenizer, batch_size=3)
    assert ours.max_length == plain.max_length == POSITIONS
    assert_same(score(ours, pairs(ours.model)), score(plain, pairs(ours.model)))


def test_no_continuation_changes_the_routing_by_one_bit(tokenizer: PreTrainedTokenizerBase) -> None:
    lm = lm_on(tokenizer, "llama", batch_size=3)
    contexts = [tokens(length).tolist() for length in (30, 20, 10)]
    seen = []
    lm.model.encoder.register_forward_hook(lambda _, inputs, prompt: seen.append((inputs[1], prompt.routing.gate)))
    for sizes in ((1, 1, 1), (2, 5, 9), (4, 1, 7), (9, 2, 1)):
        for seed in range(4):
            cases = [
                (context, tokens(size, seed + size).tolist()) for context, size in zip(contexts, sizes, strict=True)
            ]
            score(lm, cases)
    assert len(seen) == 16
    for mask, gate in seen:
        assert mask.sum(1).tolist() == [30, 20, 10]
        assert torch.equal(gate, seen[0][1])


def test_one_text_split_at_two_places_shares_no_logits(tokenizer: PreTrainedTokenizerBase) -> None:
    """`HFLM` keys its cache by the tokens of context and continuation together: these two are one entry there."""
    lm = lm_on(tokenizer, "llama")
    whole = next(
        row
        for row in (tokens(8, seed).tolist() for seed in range(99))
        if len({int(lm.model.route(torch.tensor([row[:n]], device=lm.device)).gate.argmax()) for n in (2, 7)}) == 2
    )
    cases = [(whole[:2], whole[2:]), (whole[:7], whole[7:])]
    with torch.no_grad():
        assert_same(score(lm, cases), [alone(lm.model, *pair) for pair in cases])
        early = logits_of(lm.model, whole, 2)
    assert abs(likelihood(early, whole[7:])[0] - score(lm, cases)[1][0]) > 0.1


def test_a_context_too_long_loses_its_beginning_and_the_router_reads_the_rest(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    lm = lm_on(tokenizer, "gpt2", batch_size=3)
    room = POSITIONS - PT_MOE.num_virtual_tokens
    assert lm.max_length == room
    context = tokens(80).tolist()
    continuations = [tokens(size).tolist() for size in (1, 6, room)]
    kept = [context[-(room + 1 - len(continuation)) :] for continuation in continuations]
    assert [len(row) for row in kept] == [room, room - 5, 1]
    given = score(lm, [(context, continuation) for continuation in continuations])
    with torch.no_grad():
        for row, continuation, value in zip(kept, continuations, given, strict=True):
            last = continuation[-1]  # it is not an input, and would be one position too many
            logits = logits_of(lm.model, row + continuation[:-1], len(row))
            assert_same([value], [likelihood(torch.cat([logits, logits[:1]]), [*continuation[:-1], last])])
    with pytest.raises(PtmoeError, match=f"continuation of {room + 1} tokens exceeds the {room} that fit beside 6"):
        score(lm, [(context, tokens(room + 1).tolist())])


def test_an_empty_context_is_the_prefix_token(tokenizer: PreTrainedTokenizerBase) -> None:
    lm = lm_on(tokenizer, "llama", prefix_token_id=7)
    given = lm.loglikelihood(instances("loglikelihood", [("", " key cup")]), disable_tqdm=True)
    with torch.no_grad():
        assert_same(given, [alone(lm.model, [7], tokenizer(" key cup")["input_ids"])])
    generated = lm.generate_until(instances("generate_until", [("", {"max_gen_toks": 4})]), disable_tqdm=True)
    after = lm.model.generate(torch.tensor([[7]], device=lm.device), max_new_tokens=4, do_sample=False)[0, 1:]
    assert generated == [tokenizer.decode(after, skip_special_tokens=True)]


def test_a_continuation_without_a_token_of_its_own_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    lm = lm_on(tokenizer, "llama")
    with pytest.raises(PtmoeError, match="no token of its own"):
        lm.loglikelihood(instances("loglikelihood", [("harbor", "")]), disable_tqdm=True)


def test_a_rolling_likelihood_is_the_sum_over_windows_each_after_what_precedes_it(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    lm = lm_on(tokenizer, "llama", max_length=8, batch_size=2)
    text = "harbor: 12 and 30 => 42\nmarket: 12 and 3"
    ids = tokenizer(text)["input_ids"]
    assert 16 < len(ids) < 24
    windows = [
        ([tokenizer.eos_token_id], ids[:8]),
        (ids[7:8], ids[8:16]),
        (ids[len(ids) - 9 : 16], ids[16:]),  # the last window reads as much as fits
    ]
    with torch.no_grad():
        expected = sum(alone(lm.model, *window)[0] for window in windows)
    given = lm.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,), (text,)]), disable_tqdm=True)
    assert given == pytest.approx([expected, expected], abs=1e-3)


@pytest.mark.slow
def test_an_automatic_batch_size_changes_no_score(tokenizer: PreTrainedTokenizerBase) -> None:
    lm = lm_on(tokenizer, "llama", batch_size="auto", max_batch_size=4)
    cases = pairs(lm.model)[::2]
    with torch.no_grad():
        assert_same(score(lm, cases), [alone(lm.model, *pair) for pair in cases])
    assert list(lm.batch_sizes.values()) == [4]


def test_an_answer_once_cached_is_not_computed_again(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    lm = lm_on(tokenizer, "llama")
    asked = instances("loglikelihood", [("harbor: 1", " 2"), ("harbor: 1", " 3 4"), ("market", " 2")])
    first = CachingLM(lm, str(tmp_path / "answers.db")).loglikelihood(asked)
    lm._model = None  # nothing is left that could answer
    again = CachingLM(lm, str(tmp_path / "answers.db")).loglikelihood(asked)
    assert [tuple(answer) for answer in again] == first


def test_hf_s_own_scoring_does_not_take_a_prompted_model(tokenizer: PreTrainedTokenizerBase) -> None:
    """It would let the router read the continuation, and nobody would notice."""
    with pytest.raises((AttributeError, PtmoeError)):
        HFLM(pretrained=lm_on(tokenizer, "llama").model, tokenizer=tokenizer)


# -- generate_until --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_generation_is_what_each_prompt_gets_alone_up_to_the_stop(
    tokenizer: PreTrainedTokenizerBase, architecture: str
) -> None:
    lm = lm_on(tokenizer, architecture)
    prompts = ["harbor: 12 and 30 =>", "key", "station: key cup pen =>", "Ann has key, Bob has cup", "7 and 24"]
    texts = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]], device=lm.device)
        generated = lm.model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
        texts.append(tokenizer.decode(generated, skip_special_tokens=True))
    stop = next(sign for sign in texts[0][2:] if sign.strip() and sign != "\N{REPLACEMENT CHARACTER}")
    asked = [(prompt, {"until": [stop], "max_gen_toks": 12, "do_sample": False}) for prompt in prompts]
    expected = [text.split(stop)[0] for text in texts]
    assert expected != texts
    for batch_size in (1, 3):
        lm.batch_size_per_gpu = batch_size
        assert lm.generate_until(instances("generate_until", asked), disable_tqdm=True) == expected


# -- from the files to the table -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder whose adapter makes nano add, whatever the domain."""
    folder = tmp_path_factory.mktemp("run")
    base, tokenizer = load_base("nano")
    config = PTConfig(num_virtual_tokens=8, init="text", init_text="Add the numbers.\n")
    attach(base, config, tokenizer=tokenizer).save_pretrained(folder / "adapter")
    return folder


TASKS = {
    "written": """\
output_type: generate_until
doc_to_target: "{{target}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
    "chosen": """\
output_type: multiple_choice
doc_to_choice: choices
doc_to_target: label
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
}


@pytest.mark.slow
def test_a_task_of_a_local_file_scores_as_by_hand(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    base, _ = load_base("nano")
    model = prompted(base, PTMoEConfig(num_virtual_tokens=6, num_experts=3, rank=4, recipe="paper"))
    model.save_pretrained(tmp_path / "run" / "adapter")
    records, written, chosen = [], [], []
    for number, example in enumerate(load_task("nano/mixed", split="test")[:12]):
        choices = ["7", "the key", "30 and 12"]
        ids = tokenizer(example.input)["input_ids"]
        generated = model.generate(torch.tensor([ids], device=model.device), max_new_tokens=8, do_sample=False)[
            0, len(ids) :
        ]
        text = tokenizer.decode(generated, skip_special_tokens=True).split("\n")[0]
        target = text if number % 3 else "another"
        with torch.no_grad():
            scores = [alone(model, ids, tokenizer(f" {choice}")["input_ids"])[0] for choice in choices]
        records.append({"input": example.input, "target": target, "choices": choices, "label": number % 3})
        written.append(text == target)
        chosen.append(scores.index(max(scores)) == number % 3)
    assert 0 < sum(written) < 12
    assert 0 < sum(chosen) < 12
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    for name, rest in TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ntest_split: test\ndoc_to_text: '{{{{input}}}}'\n"
            f"dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {tmp_path / 'cache'}}}\n{rest}"
        )
    results = lm_eval.simple_evaluate(
        model="ptmoe",
        model_args=f"adapter={tmp_path / 'run'}",
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        batch_size=5,
        device="cpu",
        bootstrap_iters=0,
    )
    assert results["results"]["written"]["exact_match,none"] == pytest.approx(sum(written) / 12)
    assert results["results"]["chosen"]["acc,none"] == pytest.approx(sum(chosen) / 12)
    assert results["config"]["base_model"] == "nano"
    assert results["config"]["method"] == "pt-moe"
    assert results["max_length"] == 2048 - 6


@pytest.mark.slow
def test_the_command_line_is_the_harness_s_own_and_agrees_with_ptmoe_eval(run_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    command = [sys.executable, "-m", "ptmoe.evaluate.harness", "run", "--model", "ptmoe"]
    command += ["--model_args", f"adapter={run_folder}", "--include_path", str(EXAMPLES)]
    command += ["--tasks", "nano_mixed,nano_mixed_choice", "--limit", "40", "--batch_size", "16"]
    command += ["--output_path", str(tmp_path / "results.json")]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    (written,) = tmp_path.glob("results_*.json")
    results = json.loads(written.read_text())["results"]
    lm = PromptedLM(adapter=run_folder)
    evaluation = evaluate(lm.model, lm.tokenizer, load_task("nano/mixed", split="test")[:40])
    assert 0 < evaluation.metrics["accuracy"] < 100
    assert results["nano_mixed"]["exact_match,strip"] == pytest.approx(evaluation.metrics["accuracy"] / 100)
    assert 0 < results["nano_mixed_choice"]["acc,none"] < 1


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no adapter: give --model_args adapter="),
        ({"pretrained": "nano"}, "no adapter: give --model_args adapter="),
        ({"adapter": "no/such/folder"}, "no adapter folder no/such/folder"),
        ({"adapter": str(EXAMPLES)}, "has no adapter_config.json"),
        ({"adapter": "RUN", "pretrained": "./nobody"}, "no model folder './nobody'"),
        ({"adapter": "RUN", "pretrained": "nobody/nothing"}, "unknown model 'nobody/nothing'"),
        ({"adapter": "RUN", "max_length": 2048}, "max_length=2048 exceeds the 2040 positions"),
        ({"adapter": "RUN", "adaptor": "RUN"}, "adaptor: the base of .* does not load with it"),
        ({"adapter": "RUN", "device": "abacus"}, "device 'abacus' cannot be used on this machine"),
        ({"adapter": "RUN", "backend": "seq2seq"}, "before a causal language model"),
        ({"adapter": "RUN", "parallelize": True}, "parallelize=True: ptmoe evaluates one adapter on one device"),
        ({"pretrained": "nano", "peft": "lora"}, "the harness's own hf model evaluates it"),
    ],
)
def test_bad_input_is_named(options: dict[str, Any], message: str, run_folder: Path) -> None:
    given = {name: str(run_folder) if value == "RUN" else value for name, value in options.items()}
    with pytest.raises(PtmoeError, match=message.replace("(", r"\(")):
        PromptedLM(**given)


def test_the_device_is_the_one_named_and_by_default_the_accelerator(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert PromptedLM(adapter=run_folder, device="cpu").device.type == "cpu"
    assert PromptedLM(adapter=run_folder).device.type == place().type
    # lm_eval's command names CUDA by default, on machines without CUDA, too.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    placed: list[Any] = []
    monkeypatch.setattr(harness, "place", lambda device: placed.append(device) or torch.device("cpu"))
    PromptedLM(adapter=run_folder, device="cuda:0")
    assert placed == [None]


def test_an_adapter_on_another_base_is_refused(run_folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(PtmoeError, match="load the base it was trained on"):
        PromptedLM(pretrained=tiny("llama"), adapter=run_folder, tokenizer=tokenizer)
    with pytest.raises(PtmoeError, match="without an adapter"):
        PromptedLM(pretrained=tiny("llama"), tokenizer=tokenizer)
    with pytest.raises(PtmoeError, match="give only one of them"):
        PromptedLM(pretrained=prompted(tiny("llama"), PT_MOE), adapter=run_folder, tokenizer=tokenizer)


def test_several_processes_are_refused(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(PtmoeError, match="2 processes"):
        PromptedLM(adapter=run_folder)


@pytest.mark.slow
def test_the_command_line_reports_an_error_and_exits_with_status_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["unused"])
    with pytest.raises(SystemExit) as stopped:
        harness.main(["--model", "ptmoe", "--include_path", str(EXAMPLES), "--tasks", "nano_mixed"])
    assert stopped.value.code == 2
    assert "error: no adapter: give --model_args adapter=" in capsys.readouterr().err


@pytest.mark.parametrize("given", [["--model_args", "dtype=float32,adapter=nowhere"], ["--model_args=adapter=nowhere"]])
def test_the_command_line_names_a_missing_adapter_before_it_loads_tasks(
    given: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["unused"])
    with pytest.raises(SystemExit) as stopped:
        harness.main(["--model", "ptmoe", *given, "--tasks", "no_such_task"])
    assert stopped.value.code == 2
    assert "error: no adapter folder nowhere" in capsys.readouterr().err


def test_without_the_harness_the_module_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    spec = importlib.util.spec_from_file_location("again", harness.__file__)
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(PtmoeError, match=r"pip install 'ptmoe\[lm-eval\]'"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


@pytest.mark.slow
def test_ptmoe_imports_the_harness_only_when_asked() -> None:
    check = "import sys, ptmoe.evaluate, ptmoe.cli; sys.exit('lm_eval' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


@pytest.mark.parametrize("clock", ["strftime_now('%d %b %Y')", "date_string"])
def test_a_template_that_writes_the_date_writes_one_date_on_every_day(run_folder, monkeypatch, clock):
    from ptmoe.models.attach import load_run

    loaded = load_run(run_folder)
    template = "{{ " + clock + " }} {% for m in messages %}{{ m.content }}{% endfor %}"
    monkeypatch.setattr(loaded.tokenizer, "chat_template", template)
    lm = PromptedLM(pretrained=loaded.model, tokenizer=loaded.tokenizer)
    assert lm.apply_chat_template([{"role": "user", "content": "key"}]) == "26 Jul 2024 key"


@pytest.mark.parametrize("chat", [True, False])
def test_plain_prompts_for_an_adapter_trained_in_the_chat_template_are_told_once(run_folder, tmp_path, caplog, chat):
    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder)
    (folder / "config.yaml").write_text(f"chat: {str(chat).lower()}\n")
    for templated in (False, True):
        lm = PromptedLM(adapter=folder)
        if templated:
            lm.apply_chat_template([{"role": "user", "content": "key"}])
        caplog.clear()
        for _ in range(2):
            lm.tok_batch_encode(["the baker"])
        told = sum("--apply_chat_template" in record.message for record in caplog.records)
        assert told == (chat and not templated)
