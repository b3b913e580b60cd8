"""Make the demo's base model and data from text that every Python has.

The model is a Llama of 1.4 million parameters, pretrained for about half a minute on the standard library's sources;
the fine-tuning data is Python's own language reference (`pydoc_data.topics`), which is a change of domain: code to
prose. Topics share paragraphs, so paragraphs are kept once and then cut into passages, of which some are held out.
Passages are longer than a sequence: every evaluated sequence has the same length, and the mean loss does not depend on
how sequences are spread over processes. Nothing is downloaded, and no text is shipped with the repository.

`python base_model.py FOLDER [--steps N]` does both in a process of its own, which the notebooks use: a notebook that
will fork its workers must not have started threads or a GPU itself.
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB_SIZE = 1024
SEQUENCE_LENGTH = 128
PEAK_RATE = 5e-3
HELD_OUT_EVERY = 5
EVAL_PASSAGES = 48
PASSAGE_CHARACTERS = 1000
"""A passage has at least so many, which is surely more than SEQUENCE_LENGTH tokens."""


def main() -> None:
    """Write train.jsonl, eval.jsonl and base/ into the folder of the command line."""
    parser = argparse.ArgumentParser(description="Make a tiny base model and data to fine-tune it on.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=240, help="of pretraining")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    write_data(args.folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loss = build_base_model(args.folder / "base", steps=args.steps, device=device)
    print(f"A tiny Llama in {args.folder / 'base'}: loss {loss:.2f} on source code after {args.steps} steps")


def write_data(folder: Path) -> None:
    """Write train.jsonl and eval.jsonl, one passage of the language reference a line; every fifth is held out."""
    passages = list(_passages())
    splits = {
        "train": [text for index, text in enumerate(passages) if index % HELD_OUT_EVERY],
        "eval": passages[::HELD_OUT_EVERY][:EVAL_PASSAGES],
    }
    for split, texts in splits.items():
        lines = (json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


def build_base_model(path: Path, *, steps: int = 240, limit_s: float = 60, device: str = "cpu") -> float:
    """Train a tokenizer and a tiny Llama on the standard library's sources and save both.

    Args:
        path: the folder `from_pretrained` will read.
        steps: optimizer steps of pretraining.
        limit_s: seconds after which a slow or busy machine stops earlier.
        device: where to pretrain.

    Returns:
        The mean loss of the last twenty steps.
    """
    text = list(_library_sources())
    tokenizer = _train_tokenizer(text)
    tokenizer.save_pretrained(path)
    eos = tokenizer.eos_token_id
    ids = torch.tensor([token for ids in tokenizer(text)["input_ids"] for token in (*ids, eos)], dtype=torch.int32)
    torch.manual_seed(0)
    model = LlamaForCausalLM(_config(tokenizer))
    model.to(torch.device(device))  # type: ignore[arg-type]  # transformers wraps nn.Module.to untyped
    loss = _pretrain(model, ids, steps, limit_s)
    model.save_pretrained(path)
    return loss


def _passages() -> Iterator[str]:
    topics = (text for _, text in sorted(pydoc_data.topics.topics.items()))
    passage = ""
    for paragraph in dict.fromkeys(paragraph.strip("\n") for text in topics for paragraph in text.split("\n\n")):
        passage += paragraph + "\n\n"
        if len(passage) >= PASSAGE_CHARACTERS:
            yield passage
            passage = ""


def _library_sources(limit_bytes: int = 1_500_000) -> Iterator[str]:
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        source = path.read_text(encoding="utf-8", errors="replace")
        limit_bytes -= len(source)
        if limit_bytes < 0:
            return
        yield source


def _train_tokenizer(text: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def _config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip


def _pretrain(model: LlamaForCausalLM, ids: torch.Tensor, steps: int, limit_s: float, batch_size: int = 8) -> float:
    """AdamW on random windows of `ids`; the rate falls linearly with the steps, or the time, that is left."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    windows = torch.Generator().manual_seed(0)
    losses: list[float] = []
    model.train()
    start = time.monotonic()
    for step in range(steps):
        left = 1 - max(step / steps, (time.monotonic() - start) / limit_s)
        if left <= 0:
            break
        starts = torch.randint(len(ids) - SEQUENCE_LENGTH, (batch_size, 1), generator=windows)
        batch = ids[starts + torch.arange(SEQUENCE_LENGTH)].long().to(model.device)
        for group in optimizer.param_groups:
            group["lr"] = PEAK_RATE * left * min(1.0, (step + 1) / 20)
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-20:]) / len(losses[-20:])


if __name__ == "__main__":
    main()
