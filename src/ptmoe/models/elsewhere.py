"""What users of `transformers`, `peft` and `lm_eval` look for on a model, and what to use instead of it here."""

_NOT_MERGED = (
    "a prompt stands before the input and has no weights to merge; model.base_model is the base, delete_adapter takes "
    "a weight-side adapter out of it, and peft merges one that save_pretrained has written, if it is of a type of peft"
)
_NOT_OF_PEFT = (
    "it is no model of peft: model.method_config is its adapter's config, model.save_pretrained writes it, and "
    "ptmoe.load_adapter and ptmoe.attach put another beside it"
)
ELSEWHERE = {
    "get_base_model": "it is model.base_model",
    "get_prompt": "model.adapters.encode composes the prompts of a batch",
    "load_adapter": "ptmoe.load_adapter(model, path, name=…) puts a saved adapter beside the others",
    "merge_adapter": _NOT_MERGED,
    "merge_and_unload": _NOT_MERGED,
    "peft_config": _NOT_OF_PEFT,
    "prepare_inputs_for_generation": f"generate composes the prompt first; {_NOT_OF_PEFT}",
    "resize_token_embeddings": "base.resize_token_embeddings(…) before ptmoe.attach: adapters belong to an embedding",
    # `HFLM` ties the weights of the model it is given, and would later score context and continuation as one text.
    "tie_weights": (
        "the harness's hf model would let the router read the continuation: give it "
        "ptmoe.evaluate.harness.PromptedLM(pretrained=model, tokenizer=tokenizer)"
    ),
    "unload": _NOT_MERGED,
}
