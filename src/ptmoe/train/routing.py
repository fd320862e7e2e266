"""Routing that does not collapse: what training, and only training, does for the router.

Three things, each an option of a routed method's config (`ptmoe.methods.routing.RoutedConfig`):

- `router_standardize`: before the first step the mean input embeddings of some training examples define the router's
  coordinates; when training ends they are folded into `W` and `b`.
- `router_init="gradient"`: the router starts by sending inputs whose loss asks for the same change of the prompt to the
  same expert; with `router_test`, all inputs to one expert where nothing shows that they ask for different changes.
- `routing_anneal`: the gate starts soft, so that every expert learns from every input, and hardens to the chosen one
  when the routing has settled: when the router's largest probability is near 1, the soft gate is nearly the hard one.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerState, TrainingArguments

from ptmoe.errors import PtmoeError
from ptmoe.fast.paths import is_sharded
from ptmoe.methods.inputs import mean_input
from ptmoe.methods.routing import RoutedConfig, RoutedEncoder
from ptmoe.models.causal import PromptedCausalLM, readable_tokens
from ptmoe.train.memory import Parts
from ptmoe.train.steps import Progress

EXAMPLES = 512  # at most, for the statistics and the initial routing
START_SHARE = 0.03  # of the training's examples: at most as many are differentiated for the initial routing
SETTLED = 0.95  # mean of the largest probability from which on the gate hardens,
EARLIEST, LATEST = 0.3, 0.6  # but between these fractions of the training steps,
HARDENING = 0.2  # and over this fraction of them
RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
# Of `router_test`. A split that is not needed costs little and one that is missing much, so the test is lenient, and
# not made on fewer examples than it can tell anything from (docs/findings.md).
PERMUTATIONS, SIGNIFICANT, TELLING = 199, 0.1, 24
CONFIDENCE = 0.9  # of the initial routing
RESTARTS, ROUNDS = 10, 50  # of k-means


class RoutingCallback(TrainerCallback):
    """Trains the router of any `RoutedEncoder`. `ptmoe train` has it; add it to any other `transformers.Trainer`. A
    trained adapter that is trained further keeps its router's start and its hard gate.

    Args:
        progress: gets the examples done and all examples of the router's start, and None; by default a bar of `tqdm`
            shows them where the trainer shows its own.
        say: gets a line of text if the start cannot be made, or sends all inputs to one expert; by default a warning.
    """

    def __init__(self, progress: Progress | None = None, say: Callable[[str], None] = warnings.warn) -> None:
        self.progress, self.say = progress, say

    def on_init_end(self, args: TrainingArguments, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if not args.label_smoothing_factor or not isinstance(model, PromptedCausalLM):
            return
        config = model.method_config
        if config.reads_input or config.adds_loss:
            # `Trainer` would take the labels out of training's batches, and out of those of `evaluate`, too.
            lacks = "the router would read the answers" if config.reads_input else "its own loss is left out"
            raise PtmoeError(
                f"label_smoothing_factor={args.label_smoothing_factor:g} keeps the labels from {config.method}, so "
                f"{lacks}: leave it out"
            )

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: Any,
        model: PromptedCausalLM,
        train_dataloader: Any = None,
        **_: Any,
    ) -> None:
        encoder = model.encoder
        if not isinstance(encoder, RoutedEncoder):
            return
        encoder.has_callback = True
        config, split = encoder.config, split_step(encoder.config, state)
        further = encoder.trained and state.global_step == 0  # and not resumed
        encoder.alone = encoder.router.is_constant  # of a resumed run; a new one's is random
        if state.global_step == 0:
            encoder.together = not further and split > 0
        if state.global_step > 0:  # resumed: the checkpoint has all of it
            if config.router_standardize and encoder.router.mean is None:
                raise PtmoeError(
                    f"the checkpoint of step {state.global_step} lacks the statistics of the router's inputs, so "
                    "training cannot go on from it: start again, with another output_dir"
                )
            return
        if config.router_standardize:
            batches = self._batches(EXAMPLES, args, model, train_dataloader)
            means = torch.cat([mean_inputs(model, batch) for batch in batches])
            encoder.router.standardize(means, learning_rate=args.learning_rate, keep=further)
        if further:
            return
        if config.routing_anneal:
            encoder.hardness = 0.0
        if not encoder.together:
            self._start(args, state, model, train_dataloader)

    def _batches(
        self, count: int, args: TrainingArguments, model: PromptedCausalLM, loader: Any
    ) -> list[dict[str, Tensor]]:
        # As many rows at once as in training: more might not fit in memory.
        sampled = sample_batches(loader.dataset, loader.collate_fn, args.per_device_train_batch_size, count)
        return [send_to_device(batch, model.device) for batch in sampled]

    def _start(self, args: TrainingArguments, state: TrainerState, model: PromptedCausalLM, loader: Any) -> None:
        """Let the gradients at the prompt of this moment say which inputs share an expert."""
        encoder = model.encoder
        assert isinstance(encoder, RoutedEncoder)
        experts = encoder.config.num_experts
        if encoder.config.router_init != "gradient" or experts == 1:
            return
        chosen = self._batches(start_examples(args, state, loader), args, model, loader)
        count = sum(len(batch["input_ids"]) for batch in chosen)  # fewer than asked for where there are no more
        if count < 2 * experts:
            if state.is_world_process_zero:
                self.say(
                    f"the router starts at random: {count} examples ({START_SHARE:.0%} of those that training reads, "
                    f"or all there are) are too few to start {experts} experts from"
                )
            return
        means = torch.cat([mean_inputs(model, batch) for batch in chosen])
        shown = self._shown(chosen, args, state)
        gradients = torch.cat(list(gradients_of(model, shown)))
        chance = start_router(encoder, means, gradients, torch.Generator().manual_seed(args.seed))
        if args.world_size > 1:  # a test that rounding decides would part the processes
            for parameter in encoder.router.parameters():
                torch.distributed.broadcast(parameter.data, 0)
        encoder.alone = encoder.router.is_constant
        if encoder.alone and state.is_world_process_zero:
            self.say(
                f"one expert for all inputs: {count} examples do not show that some need another prompt than "
                f"others (p = {chance:.2g}); router_test=false routes all the same"
            )

    def _shown(
        self, batches: list[dict[str, Tensor]], args: TrainingArguments, state: TrainerState
    ) -> Iterator[dict[str, Tensor]]:
        """The batches, while the first process shows how many examples are done."""
        total, done = sum(len(batch["input_ids"]) for batch in batches), 0
        hidden = args.disable_tqdm or self.progress is not None or not state.is_world_process_zero
        with tqdm(total=total, desc="router start", unit="example", disable=hidden, leave=False) as bar:
            for batch in batches:
                if self.progress is not None and state.is_world_process_zero:
                    self.progress(done, total, None)
                yield batch
                done += len(batch["input_ids"])
                bar.update(len(batch["input_ids"]))
        if self.progress is not None and state.is_world_process_zero:
            self.progress(total, total, None)

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: Any,
        model: PromptedCausalLM,
        train_dataloader: Any = None,
        **_: Any,
    ) -> None:
        encoder = model.encoder
        if not isinstance(encoder, RoutedEncoder):
            return
        split = split_step(encoder.config, state)
        if encoder.together and state.global_step >= split:
            encoder.together, encoder.confidence = False, 0.0
            self._start(args, state, model, train_dataloader)
        if encoder.config.routing_anneal and not encoder.together:
            steps = state.max_steps - split
            progress = (state.global_step - split) / steps
            settled = progress >= EARLIEST and float(encoder.confidence) >= SETTLED
            if encoder.hardness > 0 or settled or progress >= LATEST:
                encoder.hardness = min(1.0, encoder.hardness + 1 / (HARDENING * steps))

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, model: PromptedCausalLM, **_: Any) -> None:
        encoder = model.encoder
        if isinstance(encoder, RoutedEncoder) and encoder.config.routing_anneal:
            parts = [torch.as_tensor(part, dtype=torch.float, device=args.device) for part in encoder.of_step]
            of_step = torch.stack(parts)
            if args.world_size > 1:  # all harden at the same step, whatever rows each has seen
                torch.distributed.all_reduce(of_step)
            encoder.end_step(*of_step)

    def on_train_end(self, args: Any, state: Any, control: Any, model: PromptedCausalLM, **_: Any) -> None:
        if isinstance(model.encoder, RoutedEncoder):
            model.encoder.finish_training()


def split_step(config: RoutedConfig, state: TrainerState) -> int:
    """The step before which the experts are trained as one: at the latest the last, for some step has to part them."""
    steps = int(state.max_steps)
    return min(round(config.split_after * steps), steps - 1)


def start_examples(args: TrainingArguments, state: TrainerState, loader: Any) -> int:
    """How many examples the router's start differentiates: `START_SHARE` of those that training reads, at most
    `EXAMPLES`. A sampled example has the mean length, so this bounds the share of the work as well."""
    accumulated = args.gradient_accumulation_steps
    try:
        steps = max(-(-len(loader) // accumulated), 1)  # of an epoch, which is empty where no batch is whole
        rows = len(loader.dataset) / steps  # of a step; an epoch's last one may be smaller
    except TypeError:  # a stream
        rows = args.per_device_train_batch_size * args.world_size * accumulated
    return min(EXAMPLES, int(START_SHARE * state.max_steps * rows))


def sample_batches(
    data: Any, collate: Callable[[Any], dict[str, Tensor]], size: int, count: int = EXAMPLES
) -> list[dict[str, Tensor]]:
    """Up to `count` evenly spaced examples of a data set, or the first ones of a stream, in batches of `size`; uses
    no randomness."""
    if isinstance(data, IterableDataset):  # it has `__getitem__` too, and no length
        examples = list(islice(data, count))
    else:
        count = min(count, len(data))
        examples = [data[i * len(data) // count] for i in range(count)]
    return [collate(examples[start : start + size]) for start in range(0, len(examples), size)]


def mean_inputs(model: PromptedCausalLM, batch: dict[str, Tensor]) -> Tensor:
    """`(B, H)`, the mean embedding of each row's tokens that the router may read."""
    ids, mask, labels = batch["input_ids"], batch.get("input_mask"), batch.get("labels")
    real = batch.get("attention_mask", torch.ones_like(ids))
    if mask is not None:
        mask = mask.bool() & real.bool()
    elif labels is not None:
        mask = readable_tokens(real, labels)
    else:
        raise PtmoeError(
            "training examples with neither labels nor input_mask do not say what the router may read: give them "
            "labels, -100 at the prompt"
        )
    return mean_input(model.adapters.embed(ids), mask)


def prompt_gradients(model: PromptedCausalLM, batch: dict[str, Tensor]) -> Tensor:
    """`(B, T·H)`, the direction in which each row's loss changes with its prompt, at the mean of the expert prompts.

    All rows get that one prompt, or they would differ by where an untrained router has sent them.
    """
    encoder = model.encoder
    assert isinstance(encoder, RoutedEncoder)
    prompt, copies = encoder.mean_prompt(len(batch["input_ids"]))
    was_training = model.training
    model.eval()  # no dropout
    try:
        with encoder.register_forward_hook(lambda *_: prompt):
            loss = model(**batch, skip_logits=True).loss
        assert loss is not None
        (gradient,) = torch.autograd.grad(loss, copies)
    finally:
        model.train(was_training)
    return nn.functional.normalize(gradient.flatten(1).float(), dim=1)


def gradients_of(model: PromptedCausalLM, batches: Iterable[dict[str, Tensor]]) -> Iterator[Tensor]:
    """As `prompt_gradients`, of several batches, in parts where memory cannot hold one whole."""
    parts, compute = Parts(), partial(prompt_gradients, model)
    for batch in batches:
        if is_sharded(model.base_model):  # other processes would wait for the second part
            yield compute(batch)
        else:
            yield from parts.computed(batch, compute)


@torch.no_grad()
def start_router(encoder: RoutedEncoder, means: Tensor, gradients: Tensor, generator: torch.Generator) -> float:
    """Set the router to send inputs whose loss asks for the same change of the prompt to the same expert.

    An example's own gradient is mostly about its answer. What the *input* says about it is its ridge regression on the
    router's input; in the leading directions of that prediction k-means finds the groups, and because prediction,
    projection and distance are linear in the router's input (up to a term that all experts share), so is the router:

        ẑ = x M V_q,    ℓ_k = (ẑ · c_k - |c_k|²/2) / τ

    Without a bias the regression has no intercept and the centres have unit length, so the router needs none.

    If no ridge predicts the examples that it is not fitted to better than the mean does, the router is left as it was.
    With the config's `router_test` and `TELLING` examples all inputs go to one expert instead, unless a permutation
    test at `SIGNIFICANT` finds that the input says anything about the gradient.

    Args:
        means: `(examples, H)`, mean input embeddings, of at least two examples for each expert.
        gradients: `(examples, T·H)`, as from `prompt_gradients`.
        generator: of the random starts of k-means.

    Returns:
        The test's p, the chance that inputs which say nothing predict as well; 1 without a test.
    """
    router, experts = encoder.router, encoder.config.num_experts
    inputs = means if router.mean is None or router.scale is None else (means - router.mean) / router.scale  # (n, H)
    shift = torch.zeros_like(inputs[0]) if router.bias is None else inputs.mean(0)
    centred, targets = inputs - shift, gradients - gradients.mean(0)
    test = encoder.config.router_test and len(means) >= TELLING
    weights, chance = _ridge(centred, targets, router.bias is not None, PERMUTATIONS if test else 0)
    if test and (weights is None or chance > SIGNIFICANT):
        router.choose_always(0)
        return chance
    if weights is None:
        return chance
    predicted = centred @ (centred.T @ weights) @ targets  # (n, T·H)
    directions = torch.linalg.svd(predicted, full_matrices=False).Vh[: experts - 1]  # (q, T·H)
    project = centred.T @ weights @ (targets @ directions.T)  # (H, q): x - shift to ẑ
    centres = _k_means(centred @ project, experts, generator)  # (N, q)
    if router.bias is None:
        centres = nn.functional.normalize(centres, dim=1)
    slope, offset = centres @ project.T, -centres.square().sum(1) / 2
    temperature = _temperature(centred @ slope.T + offset)
    # Router.published() subtracts the raw mean itself; what remains of the inputs' mean goes into the bias.
    router.start(slope / temperature, (offset - slope @ shift) / temperature)
    return chance


def _ridge(inputs: Tensor, targets: Tensor, intercept: bool, permutations: int) -> tuple[Tensor | None, float]:
    """The ridge regression with the least leave-one-out error, and a permutation test of it.

    Args:
        inputs: `(n, H)`, centred if there is an intercept.
        targets: `(n, D)`, centred.
        intercept: whether the regression has one, which each example that is left out changes as well.
        permutations: of the targets among the inputs, for the test, always the same.

    Returns:
        `(K + λI)⁻¹ (n, n)` of that ridge, or None if none is better than the mean; and the share of permutations,
        the given order among them, whose best error is no larger.
    """
    kernel, count = (inputs @ inputs.T).cpu().double(), len(inputs)
    products = (targets @ targets.T).cpu().double()  # all that the error needs of the targets
    scale, least = kernel.diagonal().mean(), products.trace() * (count / (count - 1)) ** 2  # the mean's error
    if scale == 0 or least == 0:  # all examples are the same
        return None, 1.0
    inverses, forms = [], []
    for ridge in RIDGES:
        inverse = torch.linalg.inv(kernel + ridge * scale * torch.eye(count, dtype=kernel.dtype))
        residuals = left_out_residuals(inverse, ridge * scale, intercept)
        inverses.append(inverse)
        forms.append((residuals.T @ residuals).flatten())  # of the products: the error, the sum of squared residuals
    quadratic = torch.stack(forms)  # (ridges, n²)
    errors = quadratic @ products.flatten()
    found = errors.min()
    as_good, generator = 1, torch.Generator().manual_seed(0)
    for _ in range(permutations):
        order = torch.randperm(count, generator=generator)
        as_good += bool((quadratic @ products[order][:, order].flatten()).min() <= found)
    best = inverses[int(errors.argmin())].to(inputs) if found < least else None
    return best, as_good / (permutations + 1)


def left_out_residuals(inverse: Tensor, ridge: Tensor | float, intercept: bool) -> Tensor:
    """`(n, n)`, which takes targets `(n, D)` to the errors of ridge regression in each one, fitted to all others.

    The hat matrix is I - λ(K + λI)⁻¹, and with an intercept, of centred inputs and targets, that plus 11ᵀ/n: what is
    left out moves the intercept as well. `inverse` is (K + λI)⁻¹, `(n, n)`, and `ridge` is λ.
    """
    own = inverse.diagonal() - (1 / (len(inverse) * ridge) if intercept else 0)
    return inverse / own[:, None]


def _k_means(points: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """The centres `(clusters, q)` of the best of several k-means of `points (n, q)`, each started by k-means++."""
    best, least = points[:clusters], torch.inf
    for _ in range(RESTARTS):
        chosen = [int(torch.randint(len(points), (), generator=generator))]
        for _ in range(clusters - 1):
            distance = torch.cdist(points, points[chosen]).amin(1).square().cpu() + 1e-12
            chosen.append(int(torch.multinomial(distance, 1, generator=generator)))
        centres = points[chosen]
        for _ in range(ROUNDS):
            nearest = torch.cdist(points, centres).argmin(1)
            members = nn.functional.one_hot(nearest, clusters).to(points.dtype)  # (n, clusters)
            sizes = members.sum(0)[:, None]
            centres = torch.where(sizes > 0, members.T @ points / sizes.clamp(min=1), centres)
        error = float(torch.cdist(points, centres).amin(1).square().sum())
        if error < least:
            best, least = centres, error
    return best


def _temperature(logits: Tensor) -> float:
    """The temperature at which the mean of the largest probability is `CONFIDENCE`, by bisection."""
    low, high = -30.0, 30.0  # of its logarithm
    for _ in range(60):
        middle = (low + high) / 2
        confident = (logits / torch.e**middle).softmax(1).amax(1).mean() > CONFIDENCE
        low, high = (middle, high) if confident else (low, middle)
    return float(torch.e**high)
