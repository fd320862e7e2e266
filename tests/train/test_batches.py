"""Batches by tokens, and less at once where memory does not hold a batch."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import TrainingArguments

from ptmoe import PtmoeError
from ptmoe.fast.loss import IGNORED
from ptmoe.train import TrainOptions, train
from ptmoe.train.batches import Blanking, EvenBatches, TokenBatches, WithBlanks
from ptmoe.train.data import collate
from ptmoe.train.recipe import Trained
from ptmoe.train.trainer import PromptTrainer
from testing.bases import CONFIGS, on_device, prompted, tiny_llama, tokens

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=80)


def cost(lengths: list[int], batch: list[int], padded: bool) -> int:
    sizes = [lengths[index] for index in batch]
    return max(sizes) * len(sizes) if padded else sum(sizes)


@given(LENGTHS, st.integers(60, 300), st.booleans(), st.integers(0, 3))
def test_each_example_once_within_the_budget_and_no_batch_needlessly_small(
    lengths: list[int], budget: int, padded: bool, seed: int
) -> None:
    sampler = TokenBatches(lengths, budget, padded=padded, seed=seed)
    batches = list(sampler)
    assert len(batches) == len(sampler)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert all(cost(lengths, batch, padded) <= budget for batch in batches)
    for batch, following in zip(sampler.batches, sampler.batches[1:], strict=False):
        assert cost(lengths, [*batch, following[0]], padded) > budget


@given(LENGTHS, st.integers(1, 4))
def test_an_epoch_has_the_batches_of_the_others_and_every_process_as_many(lengths: list[int], processes: int) -> None:
    sampler = TokenBatches(lengths, 100, seed=1)
    first = list(sampler)
    shared = EvenBatches(sampler, processes)
    every, data = list(shared), WithBlanks([{"labels": index} for index in range(len(lengths))])
    collated = Blanking(lambda examples: {"labels": torch.tensor([example["labels"] for example in examples])})
    assert len(every) == len(shared) == -(-len(first) // processes) * processes
    assert every[: len(first)] == first
    for batch in every:
        labels = collated([data[index] for index in batch])["labels"].tolist()
        assert labels == (batch if min(batch) >= 0 else [IGNORED])
    assert all(min(batch) < 0 for batch in every[len(first) :])
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert sorted(sampler) == sorted(first)
    again = TokenBatches(lengths, 100, seed=1)
    again.set_epoch(1)
    assert list(again) == list(sampler)


def test_the_order_of_batches_is_random() -> None:
    sampler = TokenBatches([10] * 200, 20)
    first = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert list(TokenBatches([10] * 200, 20, seed=1)) != first


@pytest.mark.parametrize("padded", [False, True])
def test_which_examples_share_a_batch_is_random(padded: bool) -> None:
    """Data is often sorted by what it is about."""
    shared = [sorted(TokenBatches([10] * 200, 20, padded=padded, seed=seed).batches) for seed in range(2)]
    assert shared[0] != shared[1]
    assert all(sum(abs(first - second) for first, second in batches) > 10 * len(batches) for batches in shared)


def test_padding_stays_below_five_percent_where_it_costs() -> None:
    lengths = np.random.default_rng(0).lognormal(4, 0.7, 5_000).astype(int).clip(4, 1_000)
    together = TokenBatches(lengths, 8_000, padded=True)
    computed = sum(cost(lengths, batch, True) for batch in together)
    assert computed <= lengths.sum() / 0.95


def test_a_budget_below_the_longest_example_names_it() -> None:
    with pytest.raises(PtmoeError, match=r"tokens_per_batch=50: example 1 has 70 tokens, .* and 1 more"):
        TokenBatches([10, 70, 60], 50)


# -- in the trainer ----------------------------------------------------------------------------------------------------


def rows(lengths: list[int]) -> list[dict[str, np.ndarray]]:
    examples = []
    for seed, length in enumerate(lengths):
        ids = tokens(length, seed).cpu().numpy().astype(np.int32)
        labels = ids.copy()
        labels[: length - 2] = IGNORED
        examples.append({"input_ids": ids, "labels": labels})
    return examples


def trainer(folder: Path, batches: TokenBatches | None = None, **options: object) -> PromptTrainer:
    model = prompted(tiny_llama(), CONFIGS["PT"])
    arguments = TrainingArguments(
        output_dir=str(folder),
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
        learning_rate=0.01,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        accelerator_config={"even_batches": False},
        **options,  # type: ignore[arg-type]
    )
    return PromptTrainer(
        model=model,
        args=arguments,
        train_dataset=rows([5, 9, 14, 7, 20, 11, 6]),
        data_collator=collate,
        batches=batches,
    )


def trained(built: PromptTrainer, **options: object) -> dict[str, Tensor]:
    built.train(**options)  # type: ignore[arg-type]
    return {name: value.clone() for name, value in built.model.encoder.state_dict().items()}


def budgeted() -> TokenBatches:
    return TokenBatches([5, 9, 14, 7, 20, 11, 6], 30, seed=3)


def test_the_trainer_reads_those_batches(tmp_path: Path) -> None:
    built = trainer(tmp_path, budgeted(), num_train_epochs=2)
    seen: list[list[int]] = []
    forward = built.model.forward

    def watched(**inputs: Tensor) -> object:
        seen.append(inputs["attention_mask"].sum(1).tolist())
        return forward(**inputs)

    built.model.forward = watched  # type: ignore[method-assign]
    trained(built)
    lengths = [5, 9, 14, 7, 20, 11, 6]
    expected = []
    for epoch in range(2):
        batches = budgeted()
        batches.set_epoch(epoch)
        expected += [[lengths[index] for index in batch] for batch in batches]
    assert seen == expected
    assert built.state.global_step == 2 * len(budgeted())


def test_those_batches_are_loaded_as_others_are(tmp_path: Path) -> None:
    names = ["num_workers", "persistent_workers", "prefetch_factor", "multiprocessing_context", "in_order"]
    values = [1, True, 3, "spawn", False]
    options = {f"dataloader_{name}": value for name, value in zip(names, values, strict=True)}
    loaders = [trainer(tmp_path, batches, **options).get_train_dataloader() for batches in (None, budgeted())]
    for name in names:
        plain, by_tokens = (getattr(loader, name) for loader in loaders)
        assert plain == by_tokens or type(plain) is type(by_tokens) is not type(None), name


@pytest.mark.slow
@pytest.mark.parametrize("stop", [2, 4, 5])
def test_resumed_in_the_middle_of_an_epoch_it_ends_as_undisturbed(tmp_path: Path, stop: int) -> None:
    assert len(budgeted()) == 4
    whole = trained(trainer(tmp_path / "whole", budgeted(), num_train_epochs=3, save_strategy="no"))
    first = trainer(tmp_path / "parts", budgeted(), num_train_epochs=3, save_strategy="steps", save_steps=stop)
    trained(first)
    for other in (tmp_path / "parts").glob("checkpoint-*"):
        if other.name != f"checkpoint-{stop}":
            import shutil

            shutil.rmtree(other)
    second = trainer(tmp_path / "parts", budgeted(), num_train_epochs=3, save_strategy="no")
    again = trained(second, resume_from_checkpoint=True)
    for name, value in whole.items():
        assert torch.equal(again[name], value), name


class Memory:
    """Of a machine that holds `rows` rows of a forward pass, whatever it holds in the first `spared` ones."""

    def __init__(self, built: PromptTrainer, rows: int, after_backward: bool = False, spared: int = 0) -> None:
        self.tried: list[int] = []
        forward = built.model.forward

        def limited(**inputs: Tensor) -> object:
            size = len(inputs["input_ids"])
            self.tried.append(size)
            out = forward(**inputs)
            if size > rows and len(self.tried) > spared:
                if after_backward:
                    out.loss.backward(retain_graph=True)
                raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return out

        built.model.forward = limited  # type: ignore[method-assign]


@pytest.mark.slow
@pytest.mark.parametrize("after_backward", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_out_of_memory_halves_what_is_computed_at_once_and_changes_nothing_else(
    tmp_path: Path, accumulation: int, after_backward: bool
) -> None:
    options = {"max_steps": 3, "per_device_train_batch_size": 7, "gradient_accumulation_steps": accumulation}
    options |= {"save_strategy": "no"}
    plain = trained(trainer(tmp_path / "a", **options))
    built = trainer(tmp_path / "b", **options)
    memory = Memory(built, 2, after_backward)
    with pytest.warns(UserWarning, match="out of memory with") as warned:
        limited = trained(built)
    assert memory.tried[:5] == [7, 4, 2, 2, 2]  # all, then in two parts, then in four
    assert max(memory.tried[5:]) == 2  # remembered
    assert len([warning for warning in warned if "out of memory" in str(warning.message)]) == 2
    for name, value in plain.items():
        assert torch.allclose(limited[name], value, atol=1e-5), name
    losses = [line["loss"] for line in built.state.log_history if "loss" in line]
    assert losses[0] == pytest.approx(loss_of_all(), rel=1e-4)


@pytest.mark.ci
def test_memory_that_runs_out_within_a_step_leaves_the_gradients_of_its_earlier_batches(tmp_path: Path) -> None:
    options = {"max_steps": 1, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    options |= {"save_strategy": "no", "optim": "sgd", "max_grad_norm": 0.0}
    start = {name: value.clone() for name, value in trainer(tmp_path).model.encoder.state_dict().items()}
    plain = trained(trainer(tmp_path / "a", **options))
    built = trainer(tmp_path / "b", **options)
    memory = Memory(built, 1, after_backward=True, spared=1)
    with pytest.warns(UserWarning, match="out of memory with"):
        limited = trained(built)
    assert memory.tried == [4, 3, 2, 1, 1, 1]  # the second batch is started three times
    for name, value in plain.items():
        learnt = value - start[name]
        assert torch.allclose(limited[name] - start[name], learnt, atol=1e-3 * float(learnt.abs().max())), name


def loss_of_all() -> float:
    model = prompted(tiny_llama(), CONFIGS["PT"])
    return float(model(**on_device(collate(rows([5, 9, 14, 7, 20, 11, 6])))).loss)


@pytest.mark.slow
def test_memory_that_holds_not_even_a_row_is_an_error(tmp_path: Path) -> None:
    built = trainer(tmp_path, max_steps=1, per_device_train_batch_size=7)
    Memory(built, 0)
    warnings.simplefilter("ignore")
    with pytest.raises(RuntimeError, match="out of memory"):
        built.train()


def test_other_errors_are_not_taken_for_memory(tmp_path: Path) -> None:
    built = trainer(tmp_path, max_steps=1, per_device_train_batch_size=7)

    def broken(**_: Tensor) -> object:
        raise RuntimeError("size mismatch")

    built.model.forward = broken  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="size mismatch"):
        built.train()


# -- as options of a run -----------------------------------------------------------------------------------------------


def run(folder: Path, **options: object) -> Trained:
    plan = {"task": "nano/mixed", "max_examples": 60, "max_steps": 3, "eval_examples": 4, "eval_batch_size": 4}
    plan |= {"method": {"name": "pt", "num_virtual_tokens": 4}, "output_dir": str(folder / "run")}
    return train(TrainOptions(**(plan | options)), say=lambda _: None)


@pytest.mark.slow
def test_a_run_by_tokens_repeats_itself_from_its_config(tmp_path: Path) -> None:
    first = run(tmp_path, tokens_per_batch=200)
    again = TrainOptions.read(first.folder / "config.yaml", output_dir=str(tmp_path / "again"))
    assert again.tokens_per_batch == 200
    second = train(again, say=lambda _: None)
    for name, value in first.model.encoder.state_dict().items():
        assert torch.equal(second.model.encoder.state_dict()[name], value)


@pytest.mark.parametrize(("trainer", "seed"), [({}, 5), ({"data_seed": 7}, 7), ({"data_seed": 0}, 0)])
def test_the_seed_of_the_data_decides_the_batches(
    tmp_path: Path, trainer: dict[str, int], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def batches(*_: object, seed: int, **__: object) -> None:
        raise PtmoeError(f"batches of seed {seed}")

    monkeypatch.setattr("ptmoe.train.batches.TokenBatches", batches)
    with pytest.raises(PtmoeError, match=f"batches of seed {seed}"):
        run(tmp_path, tokens_per_batch=200, seed=5, trainer=trainer)


@pytest.mark.slow
def test_a_run_with_packing_and_one_without_learn_the_same(tmp_path: Path) -> None:
    packed, padded = (
        run(tmp_path / name, packing=packing).model.encoder.state_dict()["prompt"]
        for name, packing in (("packed", True), ("padded", False))
    )
    assert torch.allclose(packed, padded, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens_per_batch": 10}, r"tokens_per_batch=10: example \d+ has \d+ tokens"),
        ({"packing": True, "method": {"name": "prefix-tuning", "num_virtual_tokens": 4}}, "cannot be packed"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    tmp_path: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(PtmoeError, match=message):
        run(tmp_path, **options)
    assert not (tmp_path / "run").exists()
