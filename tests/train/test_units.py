"""A learning rate is in the base's units: the same function, on another scale of embeddings, trains alike at a rate in
that scale (docs/compare.md says which)."""

import copy

import pytest
import torch
from torch.testing import assert_close

import ptmoe
from testing.bases import on_device, tiny, tokens
from testing.training import trainer

# Experts that start the same would give the router a first gradient of rounding alone, which AdamW makes a step of.
EXPERTS = {"num_virtual_tokens": 4, "num_experts": 3, "rank": 3, "distinct_experts": True, "router_noise": 0}
METHODS = {  # and the power of the embeddings' scale that the rate goes with
    "pt": (ptmoe.PTConfig(num_virtual_tokens=4), 1.0),
    "dpt": (ptmoe.DPTConfig(num_virtual_tokens=4, rank=3), 0.5),
    "pt-moe": (ptmoe.PTMoEConfig(**EXPERTS), 0.5),
    "pt-moe, chosen from the first step": (ptmoe.PTMoEConfig(**EXPERTS, routing_anneal=False), 0.5),
}


def scaled(base, factor):
    """The same function of token ids, whose embeddings and residual stream are `factor` times as large."""
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.get_input_embeddings().weight.mul_(factor)
        for layer in other.model.layers:
            layer.self_attn.o_proj.weight.mul_(factor)
            layer.mlp.down_proj.weight.mul_(factor)
    return other


def trained(base, config, rate, folder):
    """The losses of ten steps."""
    # Without clipping, as gradients have units, too.
    steps = {"max_steps": 10, "logging_steps": 1, "save_strategy": "no", "max_grad_norm": 0, "adam_epsilon": 1e-16}
    run = trainer(folder, config, base=base, learning_rate=rate, **steps)
    run.train()
    return torch.tensor([entry["loss"] for entry in run.state.log_history if "loss" in entry])


@pytest.mark.parametrize("factor", [1 / 16, 16])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.ci
def test_training_is_the_same_in_other_units(tmp_path, method, factor):
    base = tiny("llama", rms_norm_eps=0.0, hidden_size=256)  # so wide that at all these rates a router has its pace
    other = scaled(base, factor)
    ids = on_device({"input_ids": tokens(9)[None]})
    assert_close(other(**ids).logits, base(**ids).logits, atol=1e-4, rtol=1e-4)
    config, power = METHODS[method]
    losses = trained(base, config, 0.1, tmp_path / "base")
    same, unscaled = (trained(other, config, 0.1 * factor**p, tmp_path / str(p)) for p in (power, 0.0))
    assert losses[-3:].mean() < losses[:3].mean()
    assert_close(same, losses, atol=1e-3, rtol=1e-3)
    assert (unscaled - losses).abs().max() > 0.05
