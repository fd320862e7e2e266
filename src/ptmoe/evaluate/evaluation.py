"""Answer every example of a task, grade the answers, and record which expert each input was routed to."""

import hashlib
import json
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from transformers import PreTrainedTokenizerBase

from ptmoe import __version__
from ptmoe.errors import PtmoeError
from ptmoe.evaluate.choices import choose, labels_by_task
from ptmoe.evaluate.generation import Completion, complete
from ptmoe.evaluate.routing import expert_similarity, has_one_expert, summarise_routing
from ptmoe.evaluate.together import from_first, gathered
from ptmoe.fast.paths import is_sharded
from ptmoe.methods.base import quantization_of
from ptmoe.models.causal import PromptedCausalLM
from ptmoe.models.decoding import Decoder
from ptmoe.runs.environment import rank, world_size
from ptmoe.runs.folders import evaluation_file, predictions_file
from ptmoe.runs.predictions import PredictionsFile
from ptmoe.runs.records import EvaluationSummary, Prediction
from ptmoe.tasks import Example, Task
from ptmoe.tasks.metrics import mark
from ptmoe.tasks.problems import BadRecordError
from ptmoe.tasks.scoring import grading_task, overall, summarise
from ptmoe.tasks.tokens import Prompt, TextCheck, answer_limits, completion_text, decoded, encode_prompts

ENTRIES = 64  # of each of the base's parameters, that tell bases of one name apart
T = TypeVar("T")


@dataclass(frozen=True)
class Evaluation:
    """A task's predictions, in the order in which they were answered.

    Attributes:
        task: the task that was evaluated.
        split: its split.
        predictions: at least one.
        seconds: of this evaluation, without those of an interrupted one that it resumed.
        settings: what decided the predictions.
        expert_similarity: cosines of the expert prompts `(N, N)`.
        soft_gate: whether the gate mixes all experts.
        one_expert: whether the router chooses the same one whatever it reads.
    """

    task: Task
    split: str
    predictions: list[Prediction]
    seconds: float
    settings: dict[str, Any]
    expert_similarity: list[list[float]] | None = None
    soft_gate: bool = False
    one_expert: bool = False

    @property
    def metrics(self) -> dict[str, float]:
        """All metrics, in percent."""
        return overall(self.task, *self._columns)

    def summary(self) -> EvaluationSummary:
        """What `eval/TASK.json` holds."""
        predictions = self.predictions
        gates, domains = [each.gate for each in predictions], [each.domain for each in predictions]
        return EvaluationSummary(
            **summarise(self.task, self.split, *self._columns),
            file=None if self.task.file == self.task.name else self.task.file,
            cut=sum(each.cut > 0 for each in predictions),
            unanswered=sum(not each.answered for each in predictions),
            routing=summarise_routing(
                gates,
                domains,
                similarity=self.expert_similarity,
                soft_gate=self.soft_gate,
                one_expert=self.one_expert,
            ),
            seconds=round(self.seconds, 3),
            settings=self.settings,
        )

    @property
    def _columns(self) -> tuple[list[dict[str, float]], list[tuple[str | None, list[str]]], list[str]]:
        """Of each prediction its scores, what was answered to which references, and its domain."""
        answers = [(each.completion if each.answered else None, each.references) for each in self.predictions]
        return [each.scores for each in self.predictions], answers, [each.domain for each in self.predictions]

    def write(self, folder: Path) -> None:
        """`eval/TASK.json` in a run folder."""
        self.summary().write(evaluation_file(folder, self.task.name, self.split))


def evaluate(
    model: PromptedCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    task: Task | None = None,
    split: str = "test",
    score: Literal["answers", "choices"] = "answers",
    batch_size: int = 64,
    tokens_per_batch: int | None = None,
    max_new_tokens: int | None = None,
    max_length: int | None = None,
    chat: bool = False,
    folder: Path | None = None,
    overwrite: bool = False,
    together: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Answers to `examples`, graded as the task says.

    Args:
        model: with its active adapter.
        tokenizer: the base's.
        examples: at least one.
        task: how they are graded; by default as the task that they name.
        split: that they are of, for the names of the files.
        score: what counts as an answer: what the model writes, greedily, or that of the task's labels which it finds
            most likely (`ptmoe.evaluate.choices`).
        batch_size: rows at once; in float32 it changes no answer (`ptmoe.evaluate.generation`).
        tokens_per_batch: instead of `batch_size`, as many rows at once as so many positions hold: rows × (the longest
            prompt + virtual tokens + `max_new_tokens`).
        max_new_tokens: of each written answer; by default the task's.
        max_length: real tokens that a prompt may have; by default what the base has positions for. A context is cut
            from its end; an example that does not fit without it is not answered and scores 0.
        chat: put prompts in the tokenizer's chat template.
        folder: a run folder, for `predictions/TASK.jsonl`, appended to after each batch and resumed if it exists, and
            `eval/TASK.json`; by default nothing is written.
        overwrite: start over.
        together: the processes of this launch, which all call this, take the batches in turns; each returns all
            predictions, and the first writes what it would write alone.
        progress: called with the examples done and all of them, after each batch.

    Raises:
        PtmoeError: no example, tasks that are graded in different ways, a limit that leaves no room, a prompt that
            needs more than `tokens_per_batch`, a folder with predictions of another evaluation, or choices of a task
            without labels.
    """
    if not examples:
        raise PtmoeError("no examples to evaluate")
    started = time.monotonic()
    task = task or grading_task(",".join(dict.fromkeys(example.task for example in examples)))
    labels: dict[str, dict[str, list[int]]] = {}
    if score == "choices":
        labels = labels_by_task(task, examples, tokenizer, chat=chat)
        max_new_tokens = max(len(ids) for tokens in labels.values() for ids in tokens.values())
    whole = task.grader == "verbatim" and not labels  # an answer that is cut cannot be right
    lengths = [_answer_lengths(example, tokenizer, chat) for example in examples] if whole else [(0, 0)]
    usual = max(task.max_new_tokens, *map(max, lengths))
    new, room = answer_limits(model.max_positions, model.num_virtual_tokens, usual, max_new_tokens, max_length)
    needed = [*map(min, lengths)]
    if over := sum(need > new for need in needed):
        warnings.warn(
            f"{over:,} of {len(needed):,} right answers have more than max_new_tokens={new:,} tokens, up to "
            f"{max(needed):,}: none that is written can be right",
            stacklevel=2,
        )
    rows = list(encode_prompts(examples, tokenizer, chat=chat, room=room))
    if change := next(filter(None, map(TextCheck(tokenizer, chat=chat).look, examples)), ""):
        warnings.warn(change, stacklevel=2)
    # The longest first: what does not fit into memory shows at once, and the time left is never underestimated.
    rows.sort(key=lambda row: -(2**62) if row[1] is None else -len(row[1].ids))
    if tokens_per_batch is None:
        batches = batches_within(rows, [1] * len(rows), batch_size)
    else:
        added = model.num_virtual_tokens + new
        needs = [0 if prompt is None else len(prompt.ids) + added for _, prompt in rows]
        most = max(needs)
        if most > tokens_per_batch:
            raise PtmoeError(
                f"tokens_per_batch={tokens_per_batch}: example {rows[needs.index(most)][0].id!r} needs {most}, "
                f"{most - added} of its prompt, {model.num_virtual_tokens} virtual and {new} new ones; raise it"
            )
        batches = batches_within(rows, needs, tokens_per_batch)
    settings = {
        **_identity(model, rows),
        "task": task.name,
        "split": split,
        "max_new_tokens": new,
        "max_length": room,
        "chat": chat,
        **({"score": score} if labels else {}),
    }
    count, own = (world_size(), rank()) if together else (1, 0)
    if count > 1 and any(other != settings for other in gathered(settings)):
        raise PtmoeError(f"the {count} processes were given different models or data: start all with the same")
    similarity, soft, alike = None, False, False
    if model.uses_adapter:
        similarity, soft = expert_similarity(model.encoder), model.method_config.soft_gate
        alike = has_one_expert(model.encoder)
    file, done = None, list[Prediction]()
    if folder is not None:
        path = predictions_file(folder, task.name, split)
        ids = [example.id for example, _ in rows]
        file = PredictionsFile(path, settings, ids, overwrite=overwrite and own == 0)
        done = file.resume() if count == 1 else from_first(file.resume)
        if overwrite and own == 0:  # its predictions are gone, and the disk has taken the beginning of the new ones
            evaluation_file(folder, task.name, split).unlink(missing_ok=True)
    progress = progress or (lambda done, total: None)
    progress(len(done), len(rows))
    was_training = model.training
    model.eval()
    try:
        decoder, end = None if labels else Decoder(model), 0
        for first in range(0, len(batches), count):
            turn = batches[first : first + count]
            start, end = end, end + sum(map(len, turn))
            if end <= len(done):
                continue
            # An interrupted turn is computed whole: its rows are batched as they would have been.
            batch = turn[own] if own < len(turn) else []
            fitting = [(example, prompt.ids) for example, prompt in batch if prompt is not None]
            prompts = [ids for _, ids in fitting]
            completions = []
            if fitting and decoder is None:
                completions = choose(model, prompts, [labels[example.task] for example, _ in fitting])
            elif fitting:
                options: dict[str, Any] = {"max_new_tokens": new, "until": task.until, "decoder": decoder}
                completions = complete(model, tokenizer, prompts, **options)
            answered = _predictions(tokenizer, task, batch, completions, chat)
            fresh = answered if count == 1 else [each for part in gathered(answered) for each in part]
            fresh = fresh[max(0, len(done) - start) :]
            if file is not None and own == 0:
                file.append(fresh)
            done += fresh
            progress(len(done), len(rows))
    finally:
        model.train(was_training)
    evaluation = Evaluation(task, split, done, time.monotonic() - started, settings, similarity, soft, alike)
    if folder is not None and own == 0:
        evaluation.write(folder)
    return evaluation


def batches_within(items: Iterable[T], needs: Iterable[int], budget: int, *, padded: bool = True) -> list[list[T]]:
    """`items` in batches of as many as `budget` holds.

    Args:
        items: in order.
        needs: of each item, at most `budget`; those with 0 are not counted.
        budget: of each batch.
        padded: each item of a batch takes what the largest of them needs, instead of what it needs itself.
    """
    batches: list[list[T]] = [[]]
    count = most = total = 0
    for item, need in zip(items, needs, strict=True):
        count, most, total = count + (need > 0), max(most, need), total + need
        if (count * most if padded else total) > budget:
            batches.append([])
            count, most, total = 1, need, need
        batches[-1].append(item)
    return batches


def _answer_lengths(example: Example, tokenizer: PreTrainedTokenizerBase, chat: bool) -> tuple[int, int]:
    """Tokens of the shortest right answer, alone and behind what stands before it in training: a space, or what a chat
    template writes, such as reasoning."""
    first, before = next(iter(example.references), ""), ""
    with suppress(BadRecordError):  # a template that no model can be taught in
        before = completion_text(example, tokenizer, chat=chat).rpartition(first)[0] if first else ""

    def shortest(lead: str) -> int:
        texts = (f"{lead}{text}" for text in example.references)
        return min((len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts), default=0)

    return shortest(""), shortest(before)


def _identity(model: PromptedCausalLM, rows: Sequence[tuple[Example, Prompt | None]]) -> dict[str, Any]:
    """The model, and the questions it is asked, as it reads them."""
    adapter = None
    if model.uses_adapter:
        tensors = hashlib.sha256(model.method_config.model_dump_json().encode())
        for name, tensor in sorted(model.encoder.tensors().items()):
            tensors.update(name.encode() + tensor.detach().float().cpu().contiguous().numpy().tobytes())
        adapter = tensors.hexdigest()[:16]
    weights, data = hashlib.sha256(), hashlib.sha256()
    for name, parameter in () if is_sharded(model.base_model) else model.base_model.named_parameters():
        entries = parameter.detach().flatten()[:: max(1, parameter.numel() // ENTRIES)][:ENTRIES]
        weights.update(name.encode() + (b"" if entries.is_meta else entries.float().cpu().numpy().tobytes()))
    for example, prompt in rows:
        asked = [example.id, example.domain, example.input, example.references, prompt and prompt.ids]
        data.update(json.dumps(asked).encode())
    quantization = quantization_of(model.base_model)
    return {
        "version": __version__,
        "base": model.name_or_path,
        "revision": model.identity.revision,
        "weights": weights.hexdigest()[:16],
        "dtype": str(model.dtype).removeprefix("torch."),
        **({} if quantization is None else {"quantization": quantization}),
        "adapter": adapter,
        "examples": len(rows),
        "data": data.hexdigest()[:16],
    }


def _predictions(
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    rows: Sequence[tuple[Example, Prompt | None]],
    completions: Sequence[Completion],
    chat: bool,
) -> list[Prediction]:
    """The graded answers to a batch; `completions` are those of the prompts that fit."""
    answers = iter(completions)
    predictions = []
    for example, prompt in rows:
        completion = Completion("", None) if prompt is None else next(answers)
        scores = mark(task.grader, completion.text, example.references)
        rewritten = prompt is not None and (prompt.is_cut or example.messages or chat)
        predictions.append(
            Prediction(
                id=example.id,
                prompt=decoded(tokenizer, prompt.ids) if prompt and rewritten else example.input,
                completion=completion.text,
                references=list(example.references),
                scores=scores if prompt else dict.fromkeys(scores, 0.0),
                domain=example.domain,
                gate=completion.gate,
                cut=sum(prompt.cut) if prompt else 0,
                answered=prompt is not None,
            )
        )
    return predictions
