"""One base in several threads: while one trains on it along the fast paths, another gets what it gets alone."""

import threading

import pytest
import torch

from ptmoe.fast import linear, lock
from ptmoe.models.decoding import Decoder
from testing.architectures import VOCABULARY
from testing.bases import CONFIGS, prompted, tiny, tokens
from testing.losses import ROWS, labelled

STEPS = 40


class NoLock:
    """A lock that keeps nobody out."""

    def acquire(self):
        return True

    def release(self):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def train_and_answer(recomputed):
    """The errors and the answers of a thread beside one that trains, and the answers that it should have got."""
    base = tiny("llama")
    trained, served = prompted(base, CONFIGS["PT"]).train(), prompted(base, CONFIGS["DPT"], seed=2).eval()
    base.eval()
    if recomputed:
        base.activation_checkpointing_enable()
    decoder = Decoder(served)
    prompts = [row.tolist() for row in ROWS]

    def answers():
        with torch.no_grad():
            logits = served(ROWS[0][None]).logits
        generated = served.generate(ROWS[1][None], max_new_tokens=4)
        decoded = decoder(prompts, [0] * len(prompts), max_new_tokens=3, ended=lambda _: False)
        return logits, generated, decoded

    expected = answers()
    inputs = labelled(ROWS, [0] * 5, supervised=3)
    trained.packing = True
    trained(**inputs).loss.backward()
    done, failed, wrong = threading.Event(), [], []

    def train():
        try:
            for _ in range(STEPS):
                trained(**inputs).loss.backward()
        except Exception as error:
            failed.append(error)
        finally:
            done.set()

    thread = threading.Thread(target=train)
    thread.start()
    while not done.is_set():
        try:
            logits, generated, decoded = answers()
        except Exception as error:
            failed.append(error)
            break
        if not (
            torch.allclose(logits, expected[0], atol=1e-5)
            and torch.equal(generated, expected[1])
            and decoded == expected[2]
        ):
            wrong.append(logits)
    thread.join()
    assert base.config._attn_implementation == "sdpa"
    return failed, wrong


@pytest.fixture(autouse=True)
def every_fast_path(monkeypatch):
    monkeypatch.setattr(linear, "_faster_here", lambda: True)
    monkeypatch.setattr("ptmoe.fast.paths.LOGITS_AT_ONCE", 4 * VOCABULARY)


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.slow
def test_a_thread_beside_one_that_trains_gets_its_own_answers(recomputed):
    assert train_and_answer(recomputed) == ([], [])


def test_without_the_lock_they_would_disturb_each_other(monkeypatch):
    """Shows that the test above could fail."""
    monkeypatch.setattr("ptmoe.models.wrapper.base_lock", lambda _: NoLock())
    disturbed = False
    for _ in range(5):
        failed, wrong = train_and_answer(False)
        disturbed = disturbed or bool(failed) or bool(wrong)
        if disturbed:
            break
    assert disturbed


def test_each_base_has_one_lock_that_its_thread_may_take_again():
    one, other = tiny("llama"), tiny("llama")
    assert lock.base_lock(one) is lock.base_lock(one)
    assert lock.base_lock(one) is not lock.base_lock(other)
    model = prompted(one, CONFIGS["PT"])
    with lock.base_lock(one):
        model(tokens(3)[None])
