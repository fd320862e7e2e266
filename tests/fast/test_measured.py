"""Which way is faster on a machine is measured once and kept."""

import time

import pytest
import torch

from ptmoe.fast import attention, linear, measured
from testing.bases import DEVICE, tiny_llama

VERDICTS = {
    "onednn": (linear._faster_here, lambda: linear.onednn_obstacle(tiny_llama().requires_grad_(False))),
    "attention": (attention._products_are_faster, lambda: attention.products_obstacle(tiny_llama().bfloat16())),
}
needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this build of torch has no oneDNN")
pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="these are paths of the CPU")


@pytest.mark.parametrize("name", [pytest.param("onednn", marks=needs_onednn), "attention"])
def test_the_verdict_on_a_machine_is_measured_once_and_kept(name: str, tmp_path, monkeypatch) -> None:
    """The two ways round differently: a resumed run, another process, must compute in the same one."""
    verdict, obstacle = VERDICTS[name]
    monkeypatch.setenv("PTMOE_CACHE", str(tmp_path))
    try:
        for ratio, faster in ((0.5, True), (1.2, False)):
            monkeypatch.setattr(measured, "time_ratio", lambda *_, ratio=ratio: ratio)
            for kept in (tmp_path / name).glob("*"):
                kept.unlink()
            verdict.cache_clear()
            assert (obstacle() is None) == faster
            monkeypatch.setattr(measured, "time_ratio", lambda *_: pytest.fail("measured again"))
            verdict.cache_clear()  # as in another process
            assert (obstacle() is None) == faster
        (tmp_path / name).rename(tmp_path / "other")
        (tmp_path / name).write_text("not a folder: nothing can be kept")
        verdict.cache_clear()
        assert "as fast" in obstacle()
    finally:
        verdict.cache_clear()


def test_of_processes_that_measure_at_the_same_time_the_first_decides_for_all(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PTMOE_CACHE", str(tmp_path))
    ratios = iter([1.2, 0.5])

    def measure(*_) -> float:
        ratio = next(ratios)
        if ratio == 1.2:  # while this process measures another one does, and is faster
            assert verdict()
        return ratio

    def verdict() -> bool:
        return measured.is_faster("one", max, min, lambda: [])

    monkeypatch.setattr(measured, "time_ratio", measure)
    assert verdict()
    assert len(list((tmp_path / "one").iterdir())) == 1


def test_what_was_measured_with_other_threads_or_another_torch_does_not_count(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PTMOE_CACHE", str(tmp_path))
    monkeypatch.setattr(measured, "time_ratio", lambda *_: 0.5)

    def verdict() -> bool:
        return measured.is_faster("one", max, min, lambda: [])

    before = torch.get_num_threads()
    try:
        assert verdict()
        monkeypatch.setattr(measured, "time_ratio", lambda *_: 1.2)
        assert verdict()
        torch.set_num_threads(before + 1)
        assert not verdict()
    finally:
        torch.set_num_threads(before)
    monkeypatch.setattr(torch, "__version__", "another")
    assert not verdict()


def test_the_ratio_is_of_the_fastest_of_each_in_turns(monkeypatch) -> None:
    clock, order = [0.0], []
    seconds = {"a": iter([9.0, 2.0, 5.0, 5.0, 5.0, 1.0, 1.0, 1.0, 1.0, 1.0]), "b": iter([4.0] * 5 + [2.0] * 5)}

    def way(name):
        def compute(operand):
            order.append(name + operand)
            clock[0] += next(seconds[name])

        return compute

    assert measured.time_ratio(way("a"), way("b"), ["1", "2"], lambda: clock[0]) == (2 + 1) / (4 + 2)
    assert order == ["a1", "b1"] * measured.TIMES + ["a2", "b2"] * measured.TIMES


def test_what_else_the_machine_does_counts_for_nothing_where_one_thread_is_measured(tmp_path, monkeypatch) -> None:
    """Preempted, two threads were told apart wrongly, and the verdict stayed."""
    monkeypatch.setenv("PTMOE_CACHE", str(tmp_path))
    before, threads = torch.get_num_threads(), []

    def busy(*_) -> None:
        threads.append(torch.get_num_threads())
        sum(range(100_000))

    def kept_waiting(*_) -> None:
        sum(range(1_000))
        time.sleep(0.01)

    try:
        torch.set_num_threads(2)
        assert measured.is_faster("one", kept_waiting, busy, lambda: ["x"], one_thread=True)
        assert threads == [1] * measured.TIMES
        assert torch.get_num_threads() == 2
        assert not measured.is_faster("all", kept_waiting, busy, lambda: ["x"])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", [pytest.param("onednn", marks=needs_onednn), "attention"])
def test_the_real_measurement_ends_in_a_verdict(name: str, tmp_path, monkeypatch) -> None:
    verdict, obstacle = VERDICTS[name]
    monkeypatch.setenv("PTMOE_CACHE", str(tmp_path))
    verdict.cache_clear()
    try:
        obstacle()
        (kept,) = (tmp_path / name).iterdir()
        assert float(kept.read_text().split()[0]) > 0
    finally:
        verdict.cache_clear()
