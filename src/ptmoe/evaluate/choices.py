"""The label that a model finds most likely, for tasks that have labels (`--score choices`).

    score(label) = log p(label's tokens | prompt, P),  P = encoder(prompt)

summed over the label's tokens, without the end token and without a division by their number. The router reads the
prompt alone. Labels that share all tokens but the last are one row, so that a prompt whose labels are one token each is
read once. Of labels that are equally likely the first in alphabetical order is chosen.

As in `ptmoe.evaluate.generation`, in float32 the choice is the same in whatever batch it is computed: where two labels,
or two experts, are nearly tied, one pass over the example alone decides.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations

import torch
from transformers import PreTrainedTokenizerBase

from ptmoe.errors import PtmoeError
from ptmoe.evaluate.generation import NEAR_TIE, Completion, nearly_tied, rounded_gate
from ptmoe.evaluate.routing import route
from ptmoe.fast.paths import fast_kernels
from ptmoe.models.causal import PromptedCausalLM
from ptmoe.models.decoding import padded
from ptmoe.models.greedy import last_logits
from ptmoe.tasks import TASKS, Example, Task, check_labels
from ptmoe.tasks.tokens import encode_completion

Labels = dict[str, list[int]]  # a label's tokens
Row = tuple[int, list[int], list[int]]  # which example's, its prompt, and a label's tokens before the last


def labels_by_task(
    task: Task, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, *, chat: bool = False
) -> dict[str, Labels]:
    """The tokens of the labels of a task, or of each part of a mixture, by the name that examples have of it.

    Raises:
        PtmoeError: a task without labels, and as `label_tokens`.
    """
    check_labels([task])
    firsts = {example.task: example for example in examples}
    return {
        name: label_tokens(task.labels or TASKS[name].labels, first, tokenizer, chat=chat)
        for name, first in firsts.items()
    }


def label_tokens(
    labels: Sequence[str], example: Example, tokenizer: PreTrainedTokenizerBase, *, chat: bool = False
) -> Labels:
    """The tokens of each label as a completion of the example, without what closes it.

    Raises:
        PtmoeError: a chat template that changes labels, or labels of which one begins another.
    """
    tokens: Labels = {}
    for label in sorted(labels):
        whole = encode_completion(replace(example, target=f" {label}"), tokenizer, chat=chat)
        for text in (f" {label}", label):  # a chat template may end with the space
            ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
            if whole[: len(ids)] == ids:
                tokens[label] = ids
                break
        else:
            raise PtmoeError(f"the chat template does not begin an answer with the label {label!r}: use --no-chat")
    for first, second in permutations(tokens, 2):
        if tokens[second][: len(tokens[first])] == tokens[first]:
            raise PtmoeError(
                f"the tokens of the label {second!r} begin with those of {first!r}, which is therefore never less "
                "likely: evaluate by answers (--score answers)"
            )
    return tokens


@torch.no_grad()
def choose(model: PromptedCausalLM, prompts: Sequence[list[int]], labels: Sequence[Labels]) -> list[Completion]:
    """The most likely label of each prompt, computed in batches of as many rows as there are prompts.

    Args:
        model: in evaluation mode, with its active adapter.
        prompts: token ids, at least one each.
        labels: of each prompt (`label_tokens`).
    """
    exact = model.dtype == torch.float32
    together = model.path.left_padding and not model.path.switches
    size = len(prompts) if together else 1
    scores = likelihoods(model, prompts, labels, size)
    completions = []
    for index, prompt in enumerate(prompts):
        routing = route(model, prompt)
        longest = max(map(len, labels[index].values()))
        lead = sorted(scores[index].values())[-2:]
        near = len(lead) > 1 and not lead[1] - lead[0] >= NEAR_TIE * longest  # also where it is NaN
        if exact and (near or (routing is not None and nearly_tied(routing))):
            (scores[index],) = likelihoods(model, [prompt], [labels[index]], 1)
        best = max(sorted(scores[index]), key=scores[index].__getitem__)
        completions.append(Completion(best, None if routing is None else rounded_gate(routing)))
    return completions


@torch.no_grad()
def likelihoods(
    model: PromptedCausalLM, prompts: Sequence[list[int]], labels: Sequence[Labels], size: int
) -> list[dict[str, float]]:
    """The log-probability of each label after its prompt, computed in batches of `size` rows."""
    rows: list[Row] = []
    for index, (prompt, tokens) in enumerate(zip(prompts, labels, strict=True)):
        rows += [(index, prompt, list(before)) for before in sorted({tuple(ids[:-1]) for ids in tokens.values()})]
    scores: list[dict[str, float]] = [{} for _ in prompts]
    for batch in (rows[start : start + size] for start in range(0, len(rows), size)):
        for (index, _, before), row in zip(batch, _log_probabilities(model, batch), strict=True):  # row: (C, V)
            for label, ids in labels[index].items():
                if ids[:-1] == before:
                    places = torch.arange(len(ids), device=row.device)
                    scores[index][label] = float(row[places, torch.tensor(ids, device=row.device)].double().sum())
    return scores


def _log_probabilities(model: PromptedCausalLM, rows: Sequence[Row]) -> list[torch.Tensor]:
    """For each row, `(C, V)`: of every token at each position of the label."""
    base, most = model.base_model, max(len(before) for _, _, before in rows) + 1
    ids, mask = padded([prompt + before for _, prompt, before in rows], model.device)
    ends = torch.tensor([ids.shape[1] - len(before) for _, _, before in rows], device=ids.device)
    readable = torch.arange(ids.shape[1], device=ids.device) < ends[:, None]  # (B, L)
    with model.lock, fast_kernels(base):
        inputs = model.decoder_inputs(ids, mask, 1, readable)
        logits = base(**inputs, use_cache=False, **last_logits(base, most)).logits
    return [
        logits[row, -len(before) - 1 :].log_softmax(-1, dtype=torch.float32) for row, (*_, before) in enumerate(rows)
    ]
