"""The highest moment while a model is loaded. Arithmetic only; it follows checkpoint.py, weights.py and the backends.

Everything that stays on the GPU is allocated first. On top of it come, one after another:

1. **The stream.** `checkpoint.LOOKAHEAD_BYTES` of slices in the checkpoint's dtype (the one in work is the oldest of
   them), or a single larger slice, and what the backend needs to quantise the slice in work, n being its weights
   (an unquantised tensor is copied in pieces, from the same slices, and needs nothing):

   | format | bytes |
   | --- | --- |
   | 4 bit | codes twice (n: made, and padded to whole rows), three float32 per block (12 n / block: absmax, less its mean, the padded copy) |
   | rotary, bf16 | the rows: n weights |
   | int8 | 8 n (weights and quotients in float32), n of codes, 4 n / block |
   | HQQ | 16 n: hqq's own float32 copy, and its solver's six tensors of 16 bit on CUDA |

   Under DDP and FSDP1 every rank makes a part of the rows and all parts are gathered.
   A pre-quantised folder has codes and statistics in the file: they are read as they are and copied once.
   Rows are fingerprinted `integrity.ROWS_AT_ONCE` at a time, in int64 twice, when the temporaries above are gone but
   for the rows.
2. **The check**: under FSDP2 the rows of one layer gathered as training gathers them, and their fingerprints.
3. FSDP1 only: accelerate broadcasts unit by unit, the root unit (everything outside the decoder layers) last: it is
   whole on the GPU twice, as tensors and as the flat parameter made of them, beside this rank's shard of all.

Left out: magnitudes of DoRA (one dequantised weight), checkpoints in float32.
"""  # noqa: E501

from __future__ import annotations

from hf_fsdp_qlora.formats import RowFormat
from hf_fsdp_qlora.memory_gathered import gathered_row_bytes
from hf_fsdp_qlora.memory_settings import DTYPE_BYTES, MemorySettings, row_format
from hf_fsdp_qlora.model_shape import ModelShape

LOOKAHEAD_BYTES = 256 * 2**20
"""What checkpoint.py reads ahead; equal to its constant, which cannot be imported without torch (tested)."""
ROWS_AT_ONCE = 2048
"""As in integrity.py, likewise."""


def loading_bytes(shape: ModelShape, settings: MemorySettings, static: dict[str, int]) -> int:
    """Predicted `max_memory_allocated` while the model is loaded.

    Args:
        static: what this rank keeps on its GPU, by kind (memory.py); gradients and optimizer state come later.
    """
    kept = sum(static[name] for name in ("weights", "statistics", "other_weights", "replicated", "adapters"))
    if settings.engine == "fsdp1":
        root = shape.outside_numel * DTYPE_BYTES[settings.dtype] if settings.world_size > 1 else 0
        return max(stream_bytes(shape, settings), kept + 2 * root)
    rows = row_format(settings)
    checked = 0
    if rows is not None:
        largest = max(rows.num_rows(layer.numel) for layer in shape.linears)
        checked = gathered_row_bytes(shape, settings) + fingerprint_bytes(rows, largest)
    return kept + max(stream_bytes(shape, settings), checked)


def stream_bytes(shape: ModelShape, settings: MemorySettings) -> int:
    """What reading and quantising needs at its highest, beside what stays."""
    rows, per_weight = row_format(settings), DTYPE_BYTES[settings.dtype]
    if rows is None:
        return LOOKAHEAD_BYTES
    whole = settings.quant_format == "hqq" and settings.method in ("qlora", "new_layers")
    ranks = 1 if whole else settings.world_size // settings.replicas
    replicated = settings.world_size > 1 and settings.engine in ("ddp", "fsdp1")
    highest = 0
    for layer in shape.linears:
        own_rows = -(-rows.num_rows(layer.numel) // ranks)
        numel = min(own_rows * rows.row_size, layer.numel)
        made = own_rows * rows.row_bytes
        read = made if settings.prequantized else numel * per_weight
        work = made if settings.prequantized else _quantizing_bytes(settings, numel)
        stored = fingerprint_bytes(rows, own_rows)
        if replicated:
            stored = max(stored, rows.num_bytes(layer.numel))
        highest = max(highest, max(LOOKAHEAD_BYTES, read) + max(work, made + stored))
    return highest


def fingerprint_bytes(rows: RowFormat, num_rows: int) -> int:
    """int64 words and their products, of as many rows as are looked at together."""
    return min(num_rows, ROWS_AT_ONCE) * rows.code_bytes // 4 * 8 * 2


def _quantizing_bytes(settings: MemorySettings, numel: int) -> int:
    quant_format = settings.rotary_frozen if settings.method == "rotary" else settings.quant_format
    if quant_format == "bf16":
        return numel * DTYPE_BYTES[settings.dtype]
    if quant_format == "int8":
        return 9 * numel + numel // settings.row_block * 4
    if quant_format == "hqq":
        return 16 * numel
    return numel + 12 * (numel // settings.row_block)
