"""Callbacks for any `transformers.Trainer`: memory and throughput in the logs, weight integrity, clean interruption.

`MemoryCallback` and `ThroughputCallback` are `LogSource`s: their values are in `trainer.state.log_history` and go to
TensorBoard, W&B and the progress bar with the loss. What must communicate does so at the end of a step, on every rank
alike; logging itself never does.

Left out: profiling, and memory during loading (`load_model` reports that itself).
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from types import FrameType
from typing import Any

import psutil
import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_fsdp_qlora.distributed import world_size
from hf_fsdp_qlora.errors import ConfigError
from hf_fsdp_qlora.integrity import check_integrity
from hf_fsdp_qlora.trainer_compat import LogSource, install

logger = logging.getLogger(__name__)

GIB = 2**30
REPEAT_WINDOW_S = 1.0
"""Signals that follow the first one within this time are its copies: schedulers such as Slurm signal every process of
a job, and the launcher forwards the signal it got to its workers as well."""


class MemoryCallback(LogSource):
    """Logs the memory of every rank, in GiB.

    Keys, for each rank r: `memory/host_rss_gib_rank{r}` (resident set, which counts mapped checkpoint pages too) and,
    on a GPU, `memory/gpu_allocated_gib_rank{r}`, `memory/gpu_reserved_gib_rank{r}` and `memory/gpu_peak_gib_rank{r}`
    (the most that was allocated at once since training began). Gathers four numbers per rank at steps that log.
    """

    def __init__(self) -> None:
        install()
        self._gathered: dict[str, float] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(args.device)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if control.should_log:
            self._gathered = gather_memory(args.device)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.on_step_end(args, state, control)

    def log_values(self, state: TrainerState, logs: dict[str, float]) -> dict[str, float]:
        return self._gathered


def gather_memory(device: torch.device) -> dict[str, float]:
    """The memory of every rank as `MemoryCallback` logs it. Collective.

    Args:
        device: this rank's device, on which the numbers are gathered.

    Returns:
        The same on every rank, in GiB.
    """
    own = {"host_rss_gib": psutil.Process().memory_info().rss / GIB}
    if device.type == "cuda":
        own["gpu_allocated_gib"] = torch.cuda.memory_allocated(device) / GIB
        own["gpu_reserved_gib"] = torch.cuda.memory_reserved(device) / GIB
        own["gpu_peak_gib"] = torch.cuda.max_memory_allocated(device) / GIB
    values = torch.tensor(list(own.values()), dtype=torch.float64, device=device)
    of_all = [torch.empty_like(values) for _ in range(world_size())]
    if world_size() > 1:
        dist.all_gather(of_all, values)
    else:
        of_all = [values]
    return {
        f"memory/{name}_rank{index}": round(value, 3)
        for index, of_rank in enumerate(of_all)
        for name, value in zip(own, of_rank.tolist(), strict=True)
    }


class ThroughputCallback(LogSource):
    """Logs `tokens_per_second` and `samples_per_second` of all ranks together, since the log before.

    Time spent evaluating and saving is not counted. Tokens are those the trainer counted: TRL's `num_tokens` (without
    padding), else the Trainer's `include_num_input_tokens_seen`; without either only samples are logged. A sample is a
    row of a batch: under packing, a packed sequence.
    """

    def __init__(self) -> None:
        install()
        self._samples_per_step = 0
        self._mark_s = self._idle_s = self._step_end_s = 0.0
        self._mark_step = 0
        self._mark_tokens = {"num_tokens": 0.0, "num_input_tokens_seen": 0.0}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._samples_per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        self._mark_s = time.perf_counter()
        self._mark_step = state.global_step
        # Restored when training resumes; TRL's own count starts at 0 with the trainer.
        self._mark_tokens["num_input_tokens_seen"] = float(state.num_input_tokens_seen)
        self._idle_s = 0.0

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._step_end_s = time.perf_counter()

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """What passed since the step ended was not training (a log in between has moved the mark already)."""
        now = time.perf_counter()
        self._idle_s += now - max(self._step_end_s, self._mark_s)
        self._step_end_s = now

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.on_evaluate(args, state, control)

    def log_values(self, state: TrainerState, logs: dict[str, float]) -> dict[str, float]:
        now = time.perf_counter()
        seconds = now - self._mark_s - self._idle_s
        steps = state.global_step - self._mark_step
        counter = "num_tokens" if "num_tokens" in logs else "num_input_tokens_seen"
        counted = float(logs.get(counter, state.num_input_tokens_seen))
        values = {"samples_per_second": round(steps * self._samples_per_step / seconds, 3)}
        if counted > self._mark_tokens[counter]:
            values["tokens_per_second"] = round((counted - self._mark_tokens[counter]) / seconds, 1)
        self._mark_s, self._mark_step, self._idle_s = now, state.global_step, 0.0
        self._mark_tokens[counter] = counted
        return values


class WeightIntegrityCallback(TrainerCallback):
    """Stops a run whose quantised weights are no longer what was loaded.

    Gathers every quantised layer as training does and compares its bytes with the fingerprints taken at load time:
    before the first step, then every `every_n_steps`, and whenever `check` is called.

    Args:
        every_n_steps: optimizer steps between checks; 0 checks before the first step only.
    """

    def __init__(self, every_n_steps: int = 0) -> None:
        if every_n_steps < 0:
            raise ConfigError(f"every_n_steps={every_n_steps} must be 0 (before the first step only) or more.")
        self.every_n_steps = every_n_steps
        self._model: torch.nn.Module | None = None

    def check(self, model: torch.nn.Module | None = None) -> int:
        """Compare now. Collective: call it on every rank.

        Args:
            model: None means the model of the trainer that this callback belongs to, once it trains.

        Returns:
            The number of rows that were compared.

        Raises:
            IntegrityError: bytes differ; on every rank.
        """
        model = self._model if model is None else model
        if model is None:
            raise ConfigError("There is no model to check before training begins; pass one: check(model).")
        started = time.perf_counter()
        rows = check_integrity(model)
        logger.info("%d quantised rows are as loaded (checked in %.1f s)", rows, time.perf_counter() - started)
        return rows

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._model = kwargs["model"]
        self.check()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.every_n_steps and state.global_step % self.every_n_steps == 0:
            self.check()


class InterruptCallback(TrainerCallback):
    """Turns SIGINT and SIGTERM into a checkpoint and an orderly end.

    The step in progress is finished (and an evaluation in progress, with the step after it), the ranks agree on the
    signal (one rank having got it is enough), a checkpoint is saved whatever `save_strategy` says, and
    `trainer.train()` returns. `exit_status` is then 128 + the signal's number. A script should end with
    `sys.exit(callback.exit_status)`, and skip its final save if `cut_short`: a signal during the last step, or later
    (while the best model is loaded), has nothing left to stop. A second signal, more than `REPEAT_WINDOW_S` after the
    first, does at once what it did before training. Handlers are put back when training ends; in a thread other than
    the main one, where Python allows no handlers, nothing is caught.

    Launchers: torchrun, and so `accelerate launch`, runs workers in sessions of their own: Ctrl-C reaches the launcher
    only, which sends SIGINT or SIGTERM on to every worker once and kills what is left with SIGKILL after 30 s. The
    step and the checkpoint must fit in that time; where they do not, signal the workers themselves. The launcher's
    own exit status is 1 in every case. (Source: torch/distributed/elastic/multiprocessing/api.py, torch 2.13.)

    Attributes:
        exit_status: 0, or 128 + the number of the signal that came during training. The same on every rank.
        cut_short: whether it ended training before the last step.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.exit_status = 0
        self.cut_short = False
        self._received = 0
        self._received_s = 0.0
        self._previous: dict[int, Any] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.exit_status = self._received = 0
        self.cut_short = False
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in self.SIGNALS}

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._agree(args):
            self.cut_short = state.global_step < state.max_steps
            logger.warning("Got %s: saving a checkpoint and stopping", self._signal_name())
            control.should_save = True
            control.should_evaluate = False
            control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.cut_short:
            # This is not the end of the run: the Trainer would now load the best model, and with save_total_limit=1
            # delete the checkpoint that was just saved.
            args.load_best_model_at_end = False
            args.save_total_limit = None

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.exit_status:  # the Trainer ends the epoch early, which would evaluate and save once more
            control.should_save = control.should_evaluate = False

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
        # A rank that acted alone on a signal that came after the last step would leave the others in the final save.
        if not self.exit_status and self._agree(args):
            logger.warning("Got %s after the last step: training is complete", self._signal_name())

    def _agree(self, args: TrainingArguments) -> bool:
        """Set `exit_status` on every rank if any of them got a signal. Collective."""
        received = torch.tensor(self._received, device=args.device)
        if world_size() > 1:
            dist.all_reduce(received, op=dist.ReduceOp.MAX)
        number = int(received.item())
        self.exit_status = 128 + number if number else 0
        return number > 0

    def _signal_name(self) -> str:
        return signal.Signals(self.exit_status - 128).name

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._received and time.monotonic() - self._received_s > REPEAT_WINDOW_S:
            signal.signal(number, self._previous[number])
            os.kill(os.getpid(), number)
        elif not self._received:
            self._received, self._received_s = number, time.monotonic()
