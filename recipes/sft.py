r"""Supervised fine-tuning of a quantised model with the stock SFTTrainer. Read it from top to bottom.

    accelerate launch --config_file accelerate_configs/fsdp2.yaml \
        recipes/sft.py --config recipes/llama/8b_nf4_fsdp2.yaml

`--key value` puts a value over the recipe's. The same script runs on one GPU, under DDP and under FSDP: what differs
is the accelerate config.
"""

from __future__ import annotations

import sys
from pathlib import Path

from trl import SFTTrainer

from hf_fsdp_qlora import (
    ConfigError,
    MemoryCallback,
    ThroughputCallback,
    WeightIntegrityCallback,
    load_model,
    prepare_rotary,
)
from hf_fsdp_qlora.callbacks import InterruptCallback
from hf_fsdp_qlora.config import Recipe
from hf_fsdp_qlora.data import load_datasets, load_tokenizer
from hf_fsdp_qlora.distributed import check_same, same_outcome
from hf_fsdp_qlora.train import (
    adapter_config,
    check_run,
    configure_logging,
    numbers,
    optimizer_choice,
    parse_recipe,
    quantization_config,
    resume_point,
    rotary_config,
    save_report,
)


def main(recipe: Recipe) -> int:
    """Train what the recipe says. Returns the exit status: 0, or what the interrupting signal asks for."""
    configure_logging()
    args, model_args, ours = recipe.training_args, recipe.model_args, recipe.qlora_args

    # What can be wrong on one rank alone comes first, and is compared between ranks before any of them goes on.
    with same_outcome("reading the tokenizer, the data and the configs"):
        check_run(recipe)
        tokenizer = load_tokenizer(recipe)
        train_dataset, eval_dataset = load_datasets(recipe, tokenizer)
        checkpoint = resume_point(args)
        quantization, adapter, dtypes = quantization_config(recipe), adapter_config(recipe), numbers(recipe)
        rotating = rotary_config(recipe)
    check_same("the checkpoint to resume from", checkpoint and Path(checkpoint).name)

    model = load_model(
        model_args.model_name_or_path,
        quantization_config=quantization,
        peft_config=adapter,
        rotary=rotating,
        **dtypes,
        fsdp=ours.fsdp_engine,
        offload=ours.offload,
        offload_pin_memory=ours.offload_pin_memory,
        replicate_head=ours.replicate_head,
        embedding_on_host=ours.embedding_on_host,
        adapter_name_or_path=ours.adapter_name_or_path,
        compile_layers=ours.compile_layers,
        checkpoint_layers=ours.checkpoint_layers,
        activation_budget=ours.activation_budget,
        seed=args.seed,
        attn_implementation=model_args.attn_implementation,
        revision=model_args.model_revision,
        trust_remote_code=args.trust_remote_code,
    )
    with same_outcome("saving the load report"):
        save_report(model.load_report, args)

    interrupt = InterruptCallback()
    callbacks = [MemoryCallback(), ThroughputCallback(), interrupt]
    if ours.verify_weights:
        callbacks.append(WeightIntegrityCallback())
    optimizer = optimizer_choice(recipe)
    if rotating is not None:
        rotary = prepare_rotary(model, rotating)
        callbacks.append(rotary.callback)
        optimizer = rotary.optimizer(args)
    trainer = SFTTrainer(
        model=model,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        callbacks=callbacks,
        optimizer_cls_and_kwargs=optimizer,
    )

    trainer.train(resume_from_checkpoint=checkpoint)

    if not interrupt.cut_short:
        trainer.save_model()
        if eval_dataset is not None:
            metrics = trainer.evaluate()
            trainer.log_metrics("eval", metrics)
            trainer.save_metrics("eval", metrics)
        trainer.save_state()
    trainer.accelerator.end_training()
    return interrupt.exit_status


if __name__ == "__main__":
    try:
        sys.exit(main(parse_recipe()))
    except ConfigError as error:
        sys.exit(f"error: {error}")
