"""The proof of the demo: the adapter that was trained sharded, on the stock stack, without this package.

Everything here is transformers, bitsandbytes, PEFT and TRL as they come.
"""

from __future__ import annotations

import torch
from datasets import load_dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer


def stock_eval_loss(base: str, adapter: str, data: str, *, dtype: torch.dtype, output_dir: str) -> float:
    """Held-out loss of a saved adapter on a stock 4-bit model, in this one process.

    Args:
        base: the folder of the 16-bit or 32-bit base model.
        adapter: the folder that the trainer wrote.
        data: a jsonl file with a text column.
        dtype: the dtype of training.
        output_dir: a folder the trainer may use.

    Returns:
        The mean token loss, as the recipe's evaluation computes it.
    """
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    base_model = AutoModelForCausalLM.from_pretrained(base, quantization_config=quantization, dtype=dtype)
    model = PeftModel.from_pretrained(base_model, adapter)
    dataset = load_dataset("json", data_files={"eval": data}, split="eval")
    args = SFTConfig(
        output_dir=output_dir, max_length=128, per_device_eval_batch_size=8, bf16=dtype == torch.bfloat16,
        use_cpu=not torch.accelerator.is_available(), report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = SFTTrainer(
        model, args, train_dataset=dataset, eval_dataset=dataset,
        processing_class=AutoTokenizer.from_pretrained(base),
    )  # fmt: skip
    return trainer.evaluate()["eval_loss"]
