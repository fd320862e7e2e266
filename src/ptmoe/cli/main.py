"""`ptmoe`: every command's typed signature is its options; nothing heavy is imported before a command runs."""

import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="ptmoe",
    help="Tune a frozen language model with a soft prompt composed for each input.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Recipe(str, Enum):
    default = "default"
    paper = "paper"


# Options that several commands share.
Model = Annotated[str, typer.Option(help="nano, a folder, or a Hugging Face Hub repository")]
Revision = Annotated[str | None, typer.Option(help="of a Hub repository")]
Dtype = Annotated[str | None, typer.Option(help="of the frozen base: auto, float32, bfloat16 or float16")]
Quantization = Annotated[str | None, typer.Option(help="of its linear layers: 8bit or 4bit, by bitsandbytes")]
Adapter = Annotated[Path, typer.Argument(help="adapter folder, or a run folder that holds one")]
NumVirtualTokens = Annotated[int | None, typer.Option(help="T, length of the soft prompt")]
NumExperts = Annotated[int | None, typer.Option(help="N, number of expert factors or prompts")]
Rank = Annotated[int | None, typer.Option(help="R, of the prompt's factors")]
Selective = Annotated[bool | None, typer.Option(help="keep the highest-weight expert only")]
Probationary = Annotated[bool | None, typer.Option(help="multiply the kept expert by its router weight")]
DataDir = Annotated[
    str | None, typer.Option(help="a folder or file of the data set's own; by default it is downloaded")
]
SkipBad = Annotated[bool | None, typer.Option("--skip-bad", help="count and list bad records, and go on without them")]
Chat = Annotated[bool | None, typer.Option(help="the tokenizer's chat template; by default for named tasks")]
Ids = Annotated[Path | None, typer.Option(help="a file of example ids, one a line or a JSON list: only these")]
Given = dict[str, Any]


def given(**options: Any) -> Given:
    """The options that were given, without those left at None."""
    return {name: value for name, value in options.items() if value is not None}


@app.command()
def quickstart(
    output_dir: Annotated[Path | None, typer.Option(help="run folder; a new one under runs/ by default")] = None,
    task: Annotated[str, typer.Option(help="a task of nano's world")] = "nano/mixed",
    seed: Annotated[int, typer.Option(help="of the initial prompts, the order of the data and the noise")] = 0,
    recipe: Annotated[Recipe, typer.Option(help="routing options of PT-MoE: ours, or as published")] = Recipe.default,
    steps: Annotated[int | None, typer.Option(help="training steps of each method")] = None,
) -> None:
    """See it learn: tune pt and pt-moe at one parameter budget on nano's mixed world, and compare."""
    from ptmoe.cli.comparison import quickstart as run

    run(output_dir, task=task, seed=seed, recipe=recipe.value, **given(steps=steps))


@app.command()
def train(
    config: Annotated[Path | None, typer.Argument(help="YAML file; options given beside it take precedence")] = None,
    model: Annotated[
        str | None, typer.Option(help="nano (default), a folder, or a Hugging Face Hub repository")
    ] = None,
    revision: Revision = None,
    dtype: Dtype = None,
    quantization: Quantization = None,
    task: Annotated[
        str | None, typer.Option(help="a named task (`ptmoe tasks`), a group, or a mixture: gsm8k=2,mawps=1")
    ] = None,
    data_dir: DataDir = None,
    skip_bad: SkipBad = None,
    data: Annotated[str | None, typer.Option(help="a JSON-lines file, or a folder of them")] = None,
    prompt_key: Annotated[str | None, typer.Option(help="the data's key that holds the prompt")] = None,
    completion_key: Annotated[str | None, typer.Option(help="the data's key that holds the completion")] = None,
    separator: Annotated[str | None, typer.Option(help="put between mapped prompt and completion")] = None,
    chat: Chat = None,
    max_length: Annotated[int | None, typer.Option(help="real tokens of an example; contexts are cut to fit")] = None,
    truncation: Annotated[str | None, typer.Option(help="of too long texts without context: left_out or cut")] = None,
    max_examples: Annotated[int | None, typer.Option(help="train on the first so many")] = None,
    token_cache: Annotated[bool | None, typer.Option(help="keep large data's tokens in files; by default")] = None,
    eval_task: Annotated[str | None, typer.Option(help="tasks to evaluate on when trained: a,b or a group")] = None,
    eval_data_dir: Annotated[str | None, typer.Option(help="where they lie; --data-dir by default")] = None,
    eval_examples: Annotated[int | None, typer.Option(help="the first so many of each")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="of an evaluated answer")] = None,
    output_dir: Annotated[Path | None, typer.Option(help="run folder; a new one under runs/ by default")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the run's last checkpoint")] = False,
    method: Annotated[str | None, typer.Option(help="pt-moe (default), pt, lora, …: `ptmoe params` has all")] = None,
    num_virtual_tokens: NumVirtualTokens = None,
    num_experts: NumExperts = None,
    rank: Rank = None,
    alpha: Annotated[int | None, typer.Option(help="α of LoRA and its kin; 2·rank by default")] = None,
    target_modules: Annotated[
        list[str] | None, typer.Option(help="what LoRA and its kin change; q_proj and v_proj by default")
    ] = None,
    encoder_hidden_size: Annotated[int | None, typer.Option(help="of p-tuning's encoder")] = None,
    position: Annotated[str | None, typer.Option(help="of the prompt: before or after the first token")] = None,
    selective: Selective = None,
    probationary: Probationary = None,
    top_k: Annotated[int | None, typer.Option(help="experts that a selective gate keeps")] = None,
    balance_loss: Annotated[float | None, typer.Option(help="weight of a loss for even use of the experts")] = None,
    router_noise: Annotated[float | None, typer.Option(help="σ of the router's noise in training")] = None,
    recipe: Annotated[Recipe | None, typer.Option(help="routing options of PT-MoE: ours, or as published")] = None,
    init: Annotated[str | None, typer.Option(help="of the prompt: vocabulary, text or random")] = None,
    init_text: Annotated[
        list[str] | None, typer.Option(help="for --init text; given once, or once for each expert of pt-moe")
    ] = None,
    seed: Annotated[int | None, typer.Option()] = None,
    learning_rate: Annotated[float | None, typer.Option(help="by default the method's own")] = None,
    lr_scheduler_type: Annotated[str | None, typer.Option(help="linear, cosine, constant, …")] = None,
    warmup_steps: Annotated[float | None, typer.Option()] = None,
    weight_decay: Annotated[float | None, typer.Option()] = None,
    max_grad_norm: Annotated[float | None, typer.Option()] = None,
    max_steps: Annotated[int | None, typer.Option(help="instead of --num-train-epochs")] = None,
    num_train_epochs: Annotated[float | None, typer.Option()] = None,
    per_device_train_batch_size: Annotated[int | None, typer.Option()] = None,
    gradient_accumulation_steps: Annotated[int | None, typer.Option()] = None,
    tokens_per_batch: Annotated[
        int | None,
        typer.Option(help="as many rows as these tokens hold, virtual ones included, instead of a number of rows"),
    ] = None,
    packing: Annotated[
        bool | None,
        typer.Option(help="rows end to end, without padding [default: where that is exact]", show_default=False),
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None, typer.Option(help="compute the layers again in the backward pass: less memory, a third slower")
    ] = None,
    torch_compile: Annotated[bool | None, typer.Option(help="compile the base's layers (docs/performance.md)")] = None,
    bf16: Annotated[bool | None, typer.Option(help="mixed precision")] = None,
    fp16: Annotated[bool | None, typer.Option(help="mixed precision")] = None,
    logging_steps: Annotated[int | None, typer.Option()] = None,
    save_steps: Annotated[int | None, typer.Option()] = None,
    save_total_limit: Annotated[int | None, typer.Option()] = None,
    report_to: Annotated[str | None, typer.Option(help="none (default), wandb, tensorboard, …")] = None,
) -> None:
    """Train an adapter and write its run folder; `ptmoe train RUN/config.yaml` repeats one."""
    from ptmoe.cli.training import run

    chosen = given(
        model=model,
        revision=revision,
        dtype=dtype,
        quantization=quantization,
        task=task,
        data_dir=data_dir,
        skip_bad=skip_bad,
        chat=chat,
        max_length=max_length,
        data=data,
        prompt_key=prompt_key,
        completion_key=completion_key,
        separator=separator,
        truncation=truncation,
        max_examples=max_examples,
        token_cache=token_cache,
        eval_task=eval_task,
        eval_data_dir=eval_data_dir,
        eval_examples=eval_examples,
        max_new_tokens=max_new_tokens,
        output_dir=None if output_dir is None else str(output_dir),
        seed=seed,
        learning_rate=learning_rate,
        lr_scheduler_type=lr_scheduler_type,
        warmup_steps=warmup_steps,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        max_steps=max_steps,
        num_train_epochs=num_train_epochs,
        per_device_train_batch_size=per_device_train_batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        tokens_per_batch=tokens_per_batch,
        packing=packing,
        gradient_checkpointing=gradient_checkpointing,
        torch_compile=torch_compile,
        bf16=bf16,
        fp16=fp16,
        logging_steps=logging_steps,
        save_steps=save_steps,
        save_total_limit=save_total_limit,
        report_to=report_to,
    )
    fields = given(
        name=method,
        num_virtual_tokens=num_virtual_tokens,
        num_experts=num_experts,
        rank=rank,
        alpha=alpha,
        target_modules=target_modules or None,
        encoder_hidden_size=encoder_hidden_size,
        position=position,
        selective=selective,
        probationary=probationary,
        top_k=top_k,
        balance_loss=balance_loss,
        router_noise=router_noise,
        recipe=None if recipe is None else recipe.value,
        init=init,
        init_text=init_text[0] if init_text and len(init_text) == 1 else init_text or None,
    )
    run(config, chosen, fields, resume=resume)


@app.command()
def generate(
    adapter: Adapter,
    prompt: Annotated[
        list[str] | None, typer.Argument(help="prompts; none reads one a line from standard input")
    ] = None,
    model: Annotated[str | None, typer.Option(help="by default the base that the adapter names")] = None,
    revision: Revision = None,
    dtype: Dtype = None,
    quantization: Quantization = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    num_beams: Annotated[int, typer.Option(min=1)] = 1,
    do_sample: Annotated[bool, typer.Option("--do-sample")] = False,
    temperature: Annotated[float | None, typer.Option()] = None,
    top_p: Annotated[float | None, typer.Option()] = None,
    seed: Annotated[int | None, typer.Option(help="for --do-sample")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="put each prompt in the tokenizer's chat template")] = False,
    show_routing: Annotated[bool, typer.Option("--show-routing", help="say which expert each prompt went to")] = False,
) -> None:
    """Complete prompts with an adapter."""
    from ptmoe.cli.inference import generate as run

    sampling = given(temperature=temperature, top_p=top_p)
    run(
        adapter,
        prompt,
        given(name=model, revision=revision, dtype=dtype, quantization=quantization),
        {"max_new_tokens": max_new_tokens, "num_beams": num_beams, "do_sample": do_sample, **sampling},
        seed=seed,
        chat=chat,
        show_routing=show_routing,
    )


@app.command(name="eval")
def evaluate(
    run: Annotated[
        str | None, typer.Argument(help="run folder, or adapter folder; none evaluates --model alone")
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="a named task, a group (mrqa-in, …) or a JSON-lines file; several times")
    ] = None,
    split: Annotated[str, typer.Option(help="of named tasks")] = "test",
    data_dir: DataDir = None,
    ids: Ids = None,
    examples: Annotated[int | None, typer.Option(min=1, help="the first so many")] = None,
    skip_bad: SkipBad = None,
    model: Annotated[str | None, typer.Option(help="by default the base that the adapter names")] = None,
    revision: Revision = None,
    dtype: Dtype = None,
    quantization: Quantization = None,
    batch_size: Annotated[int, typer.Option(min=1, help="rows at once; changes no answer in float32")] = 32,
    tokens_per_batch: Annotated[
        int | None, typer.Option(min=1, help="instead: as many rows as so many tokens hold, new and virtual ones too")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="of an answer; by default the task's")] = None,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="real tokens of a prompt; contexts are cut from their end")
    ] = None,
    chat: Annotated[bool | None, typer.Option(help="the chat template; by default as the run was trained")] = None,
    output_dir: Annotated[Path | None, typer.Option(help="where eval/ and predictions/ go; RUN by default")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="start over instead of going on")] = False,
) -> None:
    """Answer tasks greedily and grade the answers; a killed evaluation goes on where it stopped."""
    from ptmoe.cli.evaluation import evaluate as go
    from ptmoe.errors import PtmoeError

    if not task:
        raise PtmoeError("nothing to answer: give a task with --task (`ptmoe tasks` lists them)")
    go(
        run,
        task,
        split,
        given(data_dir=data_dir, ids=ids, max_examples=examples),
        given(name=model, revision=revision, dtype=dtype, quantization=quantization),
        {
            "batch_size": batch_size,
            "overwrite": overwrite,
            **given(tokens_per_batch=tokens_per_batch, max_new_tokens=max_new_tokens, max_length=max_length),
        },
        chat=chat,
        output_dir=output_dir,
        skip_bad=bool(skip_bad),
    )


@app.command()
def score(
    task: Annotated[str, typer.Argument(help="a named task or a JSON-lines file")],
    predictions: Annotated[Path, typer.Argument(help="{id: text} as JSON, or JSON lines with an id and a text")],
    split: Annotated[str, typer.Option(help="of a named task")] = "test",
    data_dir: DataDir = None,
    ids: Ids = None,
    examples: Annotated[int | None, typer.Option(min=1, help="the first so many")] = None,
    skip_bad: SkipBad = None,
    missing_as_wrong: Annotated[
        bool, typer.Option("--missing-as-wrong", help="an unanswered example scores 0, as in MRQA's evaluator")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="write the result as JSON")] = None,
) -> None:
    """Grade any system's predictions, without a model."""
    from ptmoe.cli.evaluation import score as run

    run(
        task,
        predictions,
        split,
        given(data_dir=data_dir, ids=ids, max_examples=examples),
        missing_as_wrong=missing_as_wrong,
        skip_bad=bool(skip_bad),
        output=output,
    )


@app.command(
    name="lm-eval",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
def harness(context: typer.Context) -> None:
    """Run EleutherAI's lm_eval with its own options; it knows --model ptmoe --model_args adapter=RUN."""
    from ptmoe.evaluate.harness import main as run

    run(context.args)


@app.command()
def compare(
    plan: Annotated[
        Path | None, typer.Argument(help="YAML file, or a comparison's folder to resume; options take precedence")
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="quickstart, paper-qa, paper-math, ablate-length, -experts, -size, -routing, -init, -noise or "
            "-position; with --model nano on nano's world"
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="nano, a folder, or a Hub repository; by default the preset's, else nano")
    ] = None,
    revision: Revision = None,
    dtype: Dtype = None,
    quantization: Quantization = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help="a method, or with fields pt-moe:rank=8,num_experts=4; several times"),
    ] = None,
    with_base: Annotated[
        bool, typer.Option("--with-base", help="also the untouched base, evaluated once; as --method base")
    ] = False,
    vary: Annotated[
        list[str] | None, typer.Option(help="a field of the methods and its values: rank=4,8,16; several times")
    ] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(help="pick each method's free size to come closest without passing it: 80k, 1.5M; several times"),
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="to train on: a task, a group or a mixture (a,b is one); several times")
    ] = None,
    eval_task: Annotated[
        list[str] | None, typer.Option(help="to evaluate on; by default the training task's own test; several times")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="how many, from 0; or which: 0,3,5")] = None,
    data_dir: DataDir = None,
    eval_data_dir: Annotated[str | None, typer.Option(help="where evaluations lie; --data-dir by default")] = None,
    skip_bad: SkipBad = None,
    max_length: Annotated[int | None, typer.Option(help="real tokens of an example; contexts are cut to fit")] = None,
    max_examples: Annotated[int | None, typer.Option(help="train on the first so many")] = None,
    eval_examples: Annotated[int | None, typer.Option(help="the first so many of each")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="of an evaluated answer")] = None,
    learning_rate: Annotated[
        list[str] | None, typer.Option(help="of all methods, or of one: pt=0.01; by default each method's own")
    ] = None,
    max_steps: Annotated[int | None, typer.Option(help="instead of --num-train-epochs")] = None,
    num_train_epochs: Annotated[float | None, typer.Option()] = None,
    per_device_train_batch_size: Annotated[int | None, typer.Option()] = None,
    gradient_accumulation_steps: Annotated[int | None, typer.Option()] = None,
    output_dir: Annotated[
        Path | None, typer.Option(help="the comparison's folder; by default runs/PRESET-MODEL, or a new one")
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="stop at what cannot be run, instead of leaving it out")
    ] = False,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="cells at once; by default 1, on nano as many as there are cores")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print what would be run, and at what sizes")] = False,
) -> None:
    """Train and evaluate methods × tasks × seeds on equal terms, and report; run again, it goes on where it stopped."""
    from ptmoe.cli.comparison import run

    chosen = given(
        preset=preset,
        model=model,
        revision=revision,
        dtype=dtype,
        quantization=quantization,
        budget=budget,
        tasks=task,
        eval_tasks=eval_task,
        data_dir=data_dir,
        eval_data_dir=eval_data_dir,
        skip_bad=skip_bad,
        max_length=max_length,
        max_examples=max_examples,
        eval_examples=eval_examples,
        max_new_tokens=max_new_tokens,
        max_steps=max_steps,
        num_train_epochs=num_train_epochs,
        per_device_train_batch_size=per_device_train_batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        output_dir=None if output_dir is None else str(output_dir),
        strict=strict or None,
        jobs=jobs,
    )
    run(plan, chosen, method, vary, seeds, learning_rate, with_base=with_base, dry_run=dry_run)


@app.command()
def inspect(
    adapter: Adapter,
    task: Annotated[str, typer.Option(help="a named task or a JSON-lines file whose inputs are routed")],
    split: Annotated[str, typer.Option(help="of a named task")] = "test",
    data_dir: DataDir = None,
    examples: Annotated[int, typer.Option(min=1, help="the first so many")] = 1000,
    model: Annotated[str | None, typer.Option(help="by default the base that the adapter names")] = None,
    revision: Revision = None,
    dtype: Dtype = None,
    quantization: Quantization = None,
    output_dir: Annotated[Path | None, typer.Option(help="where figures go; ADAPTER/inspect by default")] = None,
) -> None:
    """Print and draw what an adapter holds: its experts' use by domain, their similarity, the words they lie near."""
    from ptmoe.cli.inference import inspect as run

    data = given(data_dir=data_dir, max_examples=examples)
    base = given(name=model, revision=revision, dtype=dtype, quantization=quantization)
    run(adapter, task, split, data, base, output_dir)


@app.command()
def params(
    model: Model = "nano",
    revision: Revision = None,
    method: Annotated[str | None, typer.Option(help="one method; all by default")] = None,
    num_virtual_tokens: NumVirtualTokens = None,
    num_experts: NumExperts = None,
    rank: Rank = None,
    budget: Annotated[
        str | None, typer.Option(help="pick each method's free size to come closest without passing it: 80k, 1.5M")
    ] = None,
) -> None:
    """Count each method's trainable parameters on a base, from its config alone."""
    from ptmoe.cli.tables import params as run

    fields = given(num_virtual_tokens=num_virtual_tokens, num_experts=num_experts, rank=rank)
    run(model, revision, method, fields, budget)


tasks_app = typer.Typer(help="List the tasks, or show one's examples.", invoke_without_command=True)
app.add_typer(tasks_app, name="tasks")


@tasks_app.callback()
def tasks(context: typer.Context, data_dir: DataDir = None) -> None:
    """List the named tasks: their splits, licence and source, and what of them is here."""
    if context.invoked_subcommand is None:
        from ptmoe.cli.tables import tasks as run

        run(data_dir)


@tasks_app.command("show")
def tasks_show(
    name: Annotated[str, typer.Argument(help="a named task, a group, a mixture or a JSON-lines file")],
    split: Annotated[str, typer.Option()] = "test",
    data_dir: DataDir = None,
    examples: Annotated[int, typer.Option(min=1)] = 4,
    skip_bad: SkipBad = None,
    model: Model = "nano",
    revision: Revision = None,
    chat: Chat = None,
    max_length: Annotated[int | None, typer.Option(min=1, help="real tokens of an example; contexts are cut")] = None,
    num_virtual_tokens: Annotated[int, typer.Option(min=0, help="T, length of the soft prompt")] = 40,
) -> None:
    """Print examples as the model sees them: the virtual tokens' place, what is cut, what is supervised."""
    from ptmoe.cli.tables import tasks_show as run

    base = given(name=model, revision=revision)
    run(name, split, data_dir, examples, base, chat, max_length, num_virtual_tokens, skip_bad=bool(skip_bad))


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="adapter folder: ours of method pt, or peft's PROMPT_TUNING")],
    target: Annotated[Path, typer.Argument(help="folder to write; must be new or empty")],
    model: Annotated[
        str | None, typer.Option(help="the base, for a folder of peft's; by default the one it names")
    ] = None,
) -> None:
    """Convert a pt adapter to peft's PROMPT_TUNING folder, or back; the logits stay the same."""
    from ptmoe.cli.inference import convert as run

    run(source, target, model)


def main() -> None:
    """Run a command; what the user can mend ends with one message and status 2."""
    try:
        app()
    except Exception as error:
        # Imported here: `ptmoe --help` needs none of it.
        from ptmoe.errors import PtmoeError

        if not isinstance(error, PtmoeError):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
