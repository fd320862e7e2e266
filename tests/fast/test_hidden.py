"""The logits of many positions a part at a time, on bases that name their decoder in other ways than Llama."""

import pytest
import torch
import transformers
from transformers import LlamaForCausalLM

from ptmoe.fast.hidden import decoder_of
from testing.architectures import COMMON, ROTARY, VOCABULARY
from testing.bases import CONFIGS, DEVICE, prompted
from testing.losses import ROWS, assert_same, labelled, loss_and_gradients

LLAMA4 = ROTARY | {"intermediate_size_mlp": 64, "num_local_experts": 2, "head_dim": 8}
PER_LAYER = ROTARY | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY, "head_dim": 8}
OTHERS = ("image_token_id", "video_token_id", "audio_token_id", "boi_token_id", "eoi_token_id")
GEMMA4 = {"text_config": COMMON | PER_LAYER, "vision_config": None, **dict.fromkeys(OTHERS, 1)}
# Its head is called decoder; get_decoder gives the model itself; what calls the decoder wants token ids.
NAMED_OTHERWISE = {
    "ModernBertDecoder": ("ModernBertDecoderForCausalLM", COMMON | {"intermediate_size": 64}),
    "Llama4Text": ("Llama4ForCausalLM", COMMON | LLAMA4),
    "Gemma4": ("Gemma4ForConditionalGeneration", GEMMA4),
}


@pytest.mark.parametrize("name", NAMED_OTHERWISE)
def test_the_loss_in_parts_is_the_loss_whatever_the_decoder_is_called(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_class, options = NAMED_OTHERWISE[name]
    torch.manual_seed(0)
    base = getattr(transformers, model_class)(getattr(transformers, f"{name}Config")(**options)).to(DEVICE)
    model = prompted(base, CONFIGS["PT"]).train()
    base.eval()
    inputs = labelled(ROWS, [0] * 5, supervised=3)
    whole = loss_and_gradients(model, inputs, None)
    positions: list[int] = []
    base.get_output_embeddings().register_forward_hook(lambda _, __, out: positions.append(out.shape[:-1].numel()))
    monkeypatch.setattr("ptmoe.fast.paths.LOGITS_AT_ONCE", 4 * VOCABULARY)
    assert_same(loss_and_gradients(model, inputs, None), whole)
    assert max(positions) == 4
    assert model.fast_paths()["loss_in_parts"] is None


class Reading(LlamaForCausalLM):
    """Its logits follow from more than the last hidden states."""

    def forward(self, input_ids=None, inputs_embeds=None, **options):
        output = super().forward(input_ids=input_ids, inputs_embeds=inputs_embeds, **options)
        embeds = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        output.logits[..., 0] += embeds.mean(-1)
        return output


def test_a_base_whose_logits_follow_from_more_computes_them_all_at_once() -> None:
    torch.manual_seed(0)
    model = prompted(Reading(transformers.LlamaConfig(**COMMON | ROTARY)).to(DEVICE), CONFIGS["PT"])
    assert decoder_of(model.base_model) is None
    with pytest.warns(UserWarning, match="Reading are computed all at once"):
        assert "more than the last hidden states" in str(model.fast_paths()["loss_in_parts"])
