"""8-bit, paged and factored optimizers on every engine, and FSDP1's offload with original parameters: what happens?

    PYTHONPATH=. python benchmarks/optimizers_check.py

The rules of validation_rules.py and validation_launch_rules.py rest on what is seen here and in
tests/test_optimizers.py; for these runs they are switched off, so that torch and bitsandbytes say it themselves. Needs
one GPU, which two NCCL ranks share, or two; without one it runs on gloo ranks, where "paged" is ordinary memory and
FSDP1 cannot offload.

Each run's losses, states and peak are printed as soon as it is done, or the error that ended it; at the end all again,
beside the same optimizer on one process. Exit status 1 if a run does not do what the rules say: FSDP1 trains with
bitsandbytes' optimizers, FSDP2 raises with them and with Adafactor, and FSDP1 with everything offloaded trains as one
process does, with flat and with original parameters.

"B" is how far the trained lora_B are from one process's. Losses hardly show wrong gradients in so few steps: where
units compute on the CPU, torch adds the gradients of the step before to those of offloaded original parameters, and
FSDP1's offload is refused. Losses are then 2e-05 off and B is 0.32 off, beside 0.026 with flat parameters.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import torch
from fsdp1_check import FSDP1_ENV, LOSS_LIMIT, loss_error
from launch import FSDP2_ENV, describe_machine
from peft import LoraConfig
from stock_trainer import logged, make_trainer
from stories import Failure, Group, Outcome, Story, tell_all
from tiny_llama import SEQUENCES, SMALL, four_bit, relative_error, save_tiny_llama, tokens
from torch import Tensor

from hf_fsdp_qlora import load_model
from hf_fsdp_qlora.export import gather_adapter

STEPS = 4
B_LIMIT = 0.1
"""Adam makes steps of full size of rounding in small gradients."""
PLAIN = "adamw_torch"
BITSANDBYTES = ("adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit")
ORIGINAL, OFFLOAD = {"FSDP_USE_ORIG_PARAMS": "true"}, {"FSDP_OFFLOAD_PARAMS": "true"}
ENGINES: dict[str, tuple[int, dict[str, str], tuple[str, ...]]] = {
    "fsdp1, offload all": (2, {**FSDP1_ENV, **OFFLOAD}, (PLAIN,)),
    "fsdp1, offload all, use_orig_params": (2, {**FSDP1_ENV, **OFFLOAD, **ORIGINAL}, (PLAIN,)),
    "one process": (1, {}, (PLAIN, *BITSANDBYTES, "adafactor")),
    "ddp": (2, {}, BITSANDBYTES),
    "fsdp1": (2, FSDP1_ENV, BITSANDBYTES),
    "fsdp1, use_orig_params": (2, {**FSDP1_ENV, **ORIGINAL}, BITSANDBYTES),
    "fsdp2": (2, FSDP2_ENV, (*BITSANDBYTES, "adafactor")),
}


def main() -> int:
    print(describe_machine(), flush=True)
    with tempfile.TemporaryDirectory() as name:
        model = Path(name) / "model"
        save_tiny_llama(model, **SMALL)
        # A group ends at its first failure and goes on after it; FSDP2's are expected.
        told = tell_all(
            {
                engine: Group(
                    {optim: story(str(model), f"{name}/{engine}-{optim}", engine, optim) for optim in optims},
                    world_size=ranks, env=env, process_group=ranks > 1,
                )
                for engine, (ranks, env, optims) in ENGINES.items()
                if torch.cuda.is_available() or "offload" not in engine
            }
        )  # fmt: skip
    missed = [key for key, outcome in told.items() if not describe(key, outcome, told["one process", key[1]])]
    print("as the rules say" if not missed else f"NOT as the rules say: {missed}")
    return int(bool(missed))


def story(path: str, output_dir: str, engine: str, optim: str) -> Story:
    return Story(train, (path, output_dir, optim), show=partial(in_words, f"{engine}, {optim}"))


Result = tuple[list[float], set[torch.dtype], float, Tensor]


def train(path: str, output_dir: str, optim: str) -> Result:
    """Losses, dtypes of the states, the peak of memory in GiB, and on rank 0 all lora_B in one vector."""
    from hf_fsdp_qlora import load_checks
    from hf_fsdp_qlora.trainer_compat import patches

    load_checks.LAUNCH_RULES = ()
    patches.TRAINER_RULES = ()
    # Shards of these matrices have more than 4,096 numbers, below which bitsandbytes keeps 32-bit states.
    lora = LoraConfig(r=64, target_modules="all-linear", task_type="CAUSAL_LM")
    model = load_model(path, quantization_config=four_bit(torch.bfloat16), peft_config=lora)
    trainer = make_trainer(
        model, output_dir, tokens(SEQUENCES * STEPS), max_steps=STEPS, save_strategy="no", optim=optim
    )  # fmt: skip
    trainer.train()
    assert trainer.optimizer is not None
    values = [value for state in trainer.optimizer.state.values() for value in state.values()]
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    adapter = gather_adapter(model)
    trained = [adapter[name].flatten() for name in sorted(adapter) if "lora_B" in name]
    return (
        logged(trainer, "loss"), {v.dtype for v in values if isinstance(v, Tensor)}, peak,
        torch.cat(trained) if trained else torch.empty(0),
    )  # fmt: skip


def in_words(what: str, result: Result) -> str:
    losses, dtypes, peak, _ = result
    names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
    return f"{what}: losses {' '.join(f'{loss:.5f}' for loss in losses)}, states {names}, {peak:.2f} GiB"


def describe(key: tuple[str, str], outcome: Outcome, reference: Outcome) -> bool:
    """Print one line. Returns whether the run did what the rules say."""
    engine, optim = key
    if isinstance(outcome, Failure):
        print(f"{engine}, {optim}: raised: {outcome.reason.splitlines()[-1][:200]}")
        return engine == "fsdp2"
    assert not isinstance(reference, Failure)
    losses, dtypes, _, trained = outcome[0]
    gap, b_gap = loss_error(losses, reference[0][0]), relative_error(trained, reference[0][3])
    print(f"{in_words(f'{engine}, {optim}', outcome[0])}, off by {gap:.1e}, B by {b_gap:.1e}")
    small = torch.uint8 in dtypes
    return engine != "fsdp2" and gap < LOSS_LIMIT and b_gap < B_LIMIT and small == ("8bit" in optim)


if __name__ == "__main__":
    raise SystemExit(main())
