"""The bridge to `trl`: its `SFTTrainer`, for prompted models.

```python
import ptmoe
from ptmoe.train.trl import SFTTrainer
from trl import SFTConfig

model = ptmoe.attach(base, ptmoe.PTMoEConfig())
SFTTrainer(
    model=model,
    args=SFTConfig("run", learning_rate=0.03),
    train_dataset=dataset,  # columns "prompt" and "completion", as `trl` has them
    processing_class=tokenizer,
).train()
model.save_pretrained("adapter")
```

Data sets, chat templates, truncation, metrics (`entropy`, `mean_token_accuracy`, `num_tokens`), callbacks and
evaluation are `trl`'s. Three things are not:

- **The loss.** `trl` replaces the model's `forward` by a fused output head, which runs the base model without the
  prompt and does not pass on the labels, so a router would read the answers too. Here the model's own `forward`
  computes the loss, as under `transformers.Trainer`: from the labels, over the supervised tokens of the global batch,
  and with `input_mask (B, L)`, the real tokens before the first supervised one, which are all that the router may read.
  An `input_mask` that a batch has already is kept.
- **Checkpoints** are those of `PromptTrainer`: the adapter folder and the states to resume from, no base weights and no
  pickle.
- **Routing** is trained with `RoutingCallback`, which is added where it is missing.

`trl`'s own `SFTTrainer` refuses a prompted model. What cannot be right is refused here: packing and padding-free
batches (several examples in a row, and one prompt for all), label smoothing and `loss_type="dft"` (they need the fused
head), `peft_config` and a `chat_template_path` that is a model (they change the base).
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ptmoe.errors import PtmoeError
from ptmoe.fast.loss import TokenStatistics
from ptmoe.models.causal import PromptedCausalLM, readable_tokens
from ptmoe.train.routing import RoutingCallback
from ptmoe.train.trainer import PromptTrainer

try:
    import trl
except ImportError as missing:
    raise ImportError("ptmoe.train.trl needs trl: pip install 'ptmoe[trl]'") from missing


class SFTTrainer(PromptTrainer, trl.SFTTrainer):
    """`trl.SFTTrainer` for a prompted model.

    Args:
        model: from `attach` or `load_adapter`; its active adapter is trained.
        args: the training arguments.
        **options: every other argument of `trl.SFTTrainer`, by name.

    Raises:
        PtmoeError: a model without a prompt, or an option with which prompted models cannot be trained.
    """

    _tag_names = [*trl.SFTTrainer._tag_names, "ptmoe"]  # of the model card; the model recognises the bridge by it

    def __init__(self, model: PromptedCausalLM, args: trl.SFTConfig | None = None, **options: Any) -> None:
        _refuse_unfit(model, args, options)
        routes = dict(vars(model.config.get_text_config()))
        super().__init__(model=model, args=args, **options)
        self.aux_loss_enabled = False  # of a base's own router, which is frozen
        for name in ("output_router_logits", "router_aux_loss_coef"):  # trl sets them for all models on this base
            if name in routes:
                setattr(model.config.get_text_config(), name, routes[name])
        # trl has replaced the model's forward by its fused head, and has no switch for it.
        vars(model).pop("forward", None)
        if not any(isinstance(callback, RoutingCallback) for callback in self.callback_handler.callbacks):
            self.add_callback(RoutingCallback())

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The model's own loss, over the supervised tokens of the global batch, instead of the fused head's."""
        labels, mask = inputs["labels"], inputs["attention_mask"]
        # The model computes the mask from the labels, which a `compute_loss_func` does not pass on.
        statistics = TokenStatistics()
        inputs = {"input_mask": readable_tokens(mask, labels), **inputs}
        inputs |= {"skip_logits": not return_outputs, "token_statistics": statistics}
        loss, outputs = super(trl.SFTTrainer, self).compute_loss(
            model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        self._add_token_metrics(statistics, mask)
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _add_token_metrics(self, statistics: TokenStatistics, mask: Tensor) -> None:
        """Add what `trl` logs of each batch to its metrics."""
        numbers = (statistics.entropy, statistics.correct, statistics.count, mask.sum())
        local = torch.stack([torch.as_tensor(number, dtype=torch.float, device=mask.device) for number in numbers])
        entropy, correct, supervised, tokens = self.accelerator.reduce(local, "sum").tolist()
        mode = "train" if self.model.training else "eval"
        if mode == "train":
            self._total_train_tokens += int(tokens)
        metrics = self._metrics[mode]
        if supervised:  # a `compute_loss_func` keeps the labels to itself
            metrics["entropy"].append(entropy / supervised)
            metrics["mean_token_accuracy"].append(correct / supervised)
        metrics["num_tokens"] = [self._total_train_tokens]


def _refuse_unfit(model: Any, args: trl.SFTConfig | None, options: dict[str, Any]) -> None:
    if not isinstance(model, PromptedCausalLM):
        raise PtmoeError(
            f"model is {model!r:.60}: give one from ptmoe.attach or ptmoe.load_adapter, or use trl's own SFTTrainer"
        )
    if options.get("peft_config") is not None:
        raise PtmoeError("peft_config on a prompted model: its base stays frozen; leave one of the two out")
    one_row = "puts several examples in one row, which has one prompt, composed from the first: set it to False"
    fused = "needs trl's fused head, which knows no prompt: set it to"
    for name, allowed, reason in (
        ("packing", False, one_row),
        ("eval_packing", False, one_row),
        ("padding_free", False, one_row),
        ("loss_type", "nll", f"{fused} 'nll'"),
        ("label_smoothing_factor", 0, f"{fused} 0"),
        ("router_aux_loss_coef", 0, "is for a base's own router, which is frozen: leave it out"),
    ):
        value = getattr(args, name, allowed)
        if value not in (allowed, None):
            raise PtmoeError(f"{name}={value!r} {reason}")
    template = getattr(args, "chat_template_path", None)
    if template is not None and not Path(template).is_file():
        raise PtmoeError(
            f"chat_template_path={template!r} may add tokens to the frozen base: give a template file, or set "
            "tokenizer.chat_template"
        )
