"""`ptmoe serve` and `chat`, as a user starts them."""

import io
import shutil
import signal
import time
from importlib.util import find_spec

import pytest

from ptmoe.serve import start
from testing.serving import alone, save, service_of


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save(tmp_path_factory.mktemp("served"))


@pytest.mark.parametrize("name", ["routed", "fixed"])
def test_chat_answers_each_line_and_names_the_expert(run, model, monkeypatch, name):
    service = service_of(model)
    messages, answers = [], []
    for line in ("hello", "and then?"):
        messages.append({"role": "user", "content": line})
        answers.append(alone(model, service, name, messages, 9))
        messages.append({"role": "assistant", "content": answers[-1]})
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nand then?\n\nnot read"))
    options = ("--model", model.folder / "base", "--device", "cpu", "--max-new-tokens", "9")
    status, out, err = run("chat", model.folder / "adapters" / name, *options)
    assert status == 0, err
    assert out == "".join(f"{answer}\n" for answer in answers)
    assert err.count("expert ") == (2 if name == "routed" else 0)


def test_a_conversation_that_has_no_room_left_starts_again(run, model, monkeypatch):
    long = " ".join(["hello"] * 300)  # of four tokens each
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{long}\n{long}\nhello\n"))
    options = ("--model", model.folder / "base", "--device", "cpu", "--max-new-tokens", "9")
    status, out, err = run("chat", model.folder / "adapters" / "fixed", *options)
    assert status == 0, err
    assert "the base 2,048 positions" in err
    assert err.count("the conversation starts again") == 1
    expected = alone(model, service_of(model), "fixed", [{"role": "user", "content": "hello"}], 9)
    assert out.splitlines()[-1] == expected.splitlines()[-1]


def test_ctrl_c_ends_a_conversation_that_waits_for_a_line(run, model, monkeypatch):
    class Terminal(io.StringIO):
        def readline(self):
            if line := super().readline():
                return line
            signal.raise_signal(signal.SIGINT)
            time.sleep(1)
            waited.append("for a line after Ctrl+C")
            return ""

    waited = []
    monkeypatch.setattr("sys.stdin", Terminal("hello\n"))
    options = ("--model", model.folder / "base", "--device", "cpu", "--max-new-tokens", "3")
    status, out, _ = run("chat", model.folder / "adapters" / "fixed", *options)
    assert status == 130
    assert out
    assert not waited


def test_an_adapter_with_the_name_of_its_base_is_not_taken_for_it(run, model, monkeypatch, tmp_path):
    shutil.copytree(model.folder / "adapters" / "fixed", tmp_path / "base")
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    status, out, err = run("chat", tmp_path / "base", "--model", model.folder / "base", "--device", "cpu")
    assert (status, out) == (2, "")
    assert "'base' is the name of the base as well" in err


def test_no_limit_of_a_server_ends_a_conversation(run, model, monkeypatch):
    def service(*arguments, limits, **options):
        made.append(local_service(*arguments, limits=limits, **options))
        return made[0]

    made, local_service = [], start.local_service
    monkeypatch.setattr(start, "local_service", service)
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    options = ("--model", model.folder / "base", "--device", "cpu", "--max-new-tokens", "5000")
    status, _, err = run("chat", model.folder / "adapters" / "fixed", *options)
    assert status == 0, err
    assert "the base has 2,048" in err
    assert made[0].limits.deadline >= 24 * 3600


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "nothing to serve"),
        (("nowhere",), "no folder nowhere"),
        (("--model", "nano", "--engine", "ftp://x"), "unknown engine"),
        (("--model", "nano", "--engine", "http://127.0.0.1:99999"), "unknown engine"),
        (("nowhere", "--model", "nano"), "no folder nowhere"),
        (("--model", "nano", "--queue", "-1"), "queue"),
        (("--model", "nano", "--api-key", " "), "API key is empty"),
        (("--model", "nano", "--admin-key", ""), "API key is empty"),
        (("--model", "nano", "--cors-origin", "https://a.example/"), "--cors-origin 'https://a.example/'"),
        (("--model", "nano", "--cors-origin", "a.example"), "needs https://HOST"),
        (("--model", "nano", "--engine-option", "max_model_len=64"), "--engine-option is for --engine vllm"),
        (("--model", "nano", "--engine", "vllm", "--device", "cpu", "--quantization", "4bit"), "--device, --quant"),
        (("--model", "nano", "--engine", "http://127.0.0.1:9", "--dtype", "float32"), "options of `vllm serve`"),
    ],
)
def test_what_cannot_be_served_is_refused_in_words(run, arguments, message):
    status, _, err = run("serve", *arguments)
    assert status == 2
    assert message in err


@pytest.mark.parametrize("value", ["", "  "])
@pytest.mark.parametrize("variable", ["PTMOE_API_KEY", "PTMOE_ADMIN_KEY", "PTMOE_ENGINE_KEY"])
def test_a_key_in_a_variable_that_is_empty_is_refused_before_anything_is_loaded(run, monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    monkeypatch.setattr("ptmoe.serve.start.bind", lambda *_: pytest.fail("went on"))
    status, _, err = run("serve", "--model", "nano")
    assert status == 2
    assert f"{variable} is set and empty" in err


@pytest.mark.parametrize("command", ["serve", "chat"])
def test_a_folder_that_is_not_there_is_said_before_packages_that_are_missing(run, monkeypatch, tmp_path, command):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "no folder nowhere" in run(command, "nowhere")[2]
    assert "pip install 'ptmoe[serve]'" in run(command, tmp_path)[2]


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_its_engine_is_refused_with_what_to_install(run):
    status, _, err = run("serve", "--model", "nano", "--engine", "vllm")
    assert status == 2
    assert "pip install vllm" in err
