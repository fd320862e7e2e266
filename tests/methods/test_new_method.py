"""A new method is one file and one line: these two are known to the package by their registration alone."""

from typing import ClassVar, Literal

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import ptmoe
from ptmoe.adapters.folder import read_adapter
from ptmoe.compare.budget import fit_budget, sizes_of
from ptmoe.methods.base import InitialEmbeddings, Prompt, PromptConfig, PromptEncoder, Size
from ptmoe.methods.routing import RoutedConfig, RoutedEncoder, Router
from ptmoe.models.bases import load_base
from ptmoe.train import TrainOptions, train
from testing.bases import batch, tiny_llama, tokens


class ScaledConfig(PromptConfig):
    """P = diag(s) prompt: `T·(H + 1)` trainable parameters."""

    method: ClassVar[str] = "scaled"

    def build(self, hidden_size: int) -> "Scaled":
        return Scaled(self, hidden_size)


class Scaled(PromptEncoder):
    def __init__(self, config: ScaledConfig, hidden_size: int) -> None:
        super().__init__(config)
        self.prompt = nn.Parameter(torch.empty(config.num_virtual_tokens, hidden_size))
        self.scale = nn.Parameter(torch.empty(config.num_virtual_tokens, 1))

    def forward(self, input_embeds: Tensor, input_mask: Tensor) -> Prompt:
        return Prompt((self.scale * self.prompt).expand(len(input_embeds), -1, -1))

    @torch.no_grad()
    def initialise(self, source: InitialEmbeddings) -> None:
        self.prompt.copy_(source.rows(self.config, len(self.prompt)))
        self.scale.fill_(1.0)


class MixtureConfig(RoutedConfig):
    """P = Σ_i p_i (A_i ⊗ b_i): `N·(T + H) + N·(H + 1)` trainable parameters; its router is trained as PT-MoE's."""

    method: ClassVar[str] = "mixture"
    free_sizes: ClassVar[tuple[str, ...]] = ("num_experts", "num_virtual_tokens")
    num_experts: Size = 3
    router_init: Literal["gradient", "random"] = "gradient"
    router_standardize: bool = True
    routing_anneal: bool = True

    def build(self, hidden_size: int) -> "Mixture":
        return Mixture(self, hidden_size)


class Mixture(RoutedEncoder):
    def __init__(self, config: MixtureConfig, hidden_size: int) -> None:
        super().__init__(config)
        self.A = nn.Parameter(torch.empty(config.num_experts, config.num_virtual_tokens))
        self.b = nn.Parameter(torch.empty(config.num_experts, hidden_size))
        self.router = Router(hidden_size, config.num_experts)

    def forward(self, input_embeds: Tensor, input_mask: Tensor) -> Prompt:
        routing = self.route(input_embeds, input_mask)
        return Prompt(torch.einsum("bn,nt,nh->bth", routing.gate, self.A, self.b), routing)

    @torch.no_grad()
    def initialise(self, source: InitialEmbeddings) -> None:
        self.A.copy_(source.normal(*self.A.shape))
        self.b.copy_(source.rows(self.config, len(self.b)))
        self.router.initialise(source.generator)

    def expert_prompts(self) -> Tensor:
        return self.A[..., None] * self.b[:, None]


SIZES = {ScaledConfig: {"num_virtual_tokens": 5}, MixtureConfig: {"num_virtual_tokens": 5, "num_experts": 4}}
COUNTS = {ScaledConfig: 5 * (192 + 1), MixtureConfig: 4 * (5 + 192) + 4 * (192 + 1)}  # on nano
KEYS = {ScaledConfig: {"prompt", "scale"}, MixtureConfig: {"A", "b", "router.weight", "router.bias"}}


@pytest.fixture(params=SIZES, ids=lambda config_class: config_class.method)
def config_class(request, monkeypatch):
    monkeypatch.setitem(ptmoe.METHODS, request.param.method, request.param)
    return request.param


def test_it_is_counted_and_sized_by_a_budget(config_class):
    base_config, config = load_base("nano")[0].config, config_class(**SIZES[config_class])
    assert ptmoe.count_parameters(base_config, config) == COUNTS[config_class]
    assert sizes_of(config) == SIZES[config_class]
    free = config_class.free_sizes[0]
    picked = fit_budget(base_config, config_class, 3000, {k: v for k, v in SIZES[config_class].items() if k != free})
    assert ptmoe.count_parameters(base_config, picked) <= 3000
    larger = picked.replace(**{free: getattr(picked, free) + 1})
    assert ptmoe.count_parameters(base_config, larger) > 3000


@torch.no_grad()
def test_padding_changes_nothing_and_it_is_saved_and_loaded(config_class, tmp_path):
    model = ptmoe.attach(tiny_llama(), config_class(**SIZES[config_class])).eval()
    rows, lefts = [tokens(6, 1), tokens(3, 2)], [1, 4]
    ids, mask = batch(rows, lefts, 8)
    together = model(input_ids=ids, attention_mask=mask)
    for i, (row, left) in enumerate(zip(rows, lefts, strict=True)):
        alone = model(input_ids=row[None])
        torch.testing.assert_close(together.logits[i, left : left + len(row)], alone.logits[0], atol=1e-5, rtol=0)
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == KEYS[config_class]
    assert isinstance(read_adapter(tmp_path).config, config_class)
    again = ptmoe.load_adapter(tiny_llama(), tmp_path)
    assert torch.equal(again(input_ids=ids, attention_mask=mask).logits, together.logits)


@pytest.mark.slow
def test_it_is_trained_evaluated_and_resumed_by_its_name(config_class, tmp_path):
    def options(folder):
        return TrainOptions(
            task="nano/mixed",
            method={"name": config_class.method, **SIZES[config_class]},
            max_steps=8,
            save_steps=4,
            logging_steps=4,
            per_device_train_batch_size=8,
            eval_examples=4,
            output_dir=str(tmp_path / folder),
        )

    run = train(options("run"), say=lambda _: None)
    assert run.result.trainable_parameters == COUNTS[config_class]
    assert run.evaluations[0].metrics.keys() == {"accuracy"}
    assert (run.evaluations[0].predictions[0].gate is not None) == config_class.routes
    start = ptmoe.attach(load_base("nano")[0], run.model.method_config).encoder.tensors()
    trained = load_file(run.folder / "adapter" / "adapter_model.safetensors")
    assert all(not torch.equal(value, start[key]) for key, value in trained.items())
    if config_class.routes:
        encoder = run.model.encoder
        assert encoder.has_callback
        assert encoder.router.mean is None  # folded
        assert encoder.hardness == 1.0

    other = train(options("other"), say=lambda _: None).folder
    for path in (other / "checkpoints" / "checkpoint-8").iterdir():
        path.unlink()
    (other / "checkpoints" / "checkpoint-8").rmdir()
    resumed = train(options("other"), resume=True, say=lambda _: None)
    assert all(
        torch.equal(value, trained[key])
        for key, value in load_file(resumed.folder / "adapter" / "adapter_model.safetensors").items()
    )
