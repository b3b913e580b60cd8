"""What is known not to work together on a machine. One rule is one function: the facts of `env` in, a sentence or None
out; it says what is wrong, why it hurts and what to do.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import metadata
from typing import Any

Facts = dict[str, Any]
MIN_KERNEL = (5, 5)
MIN_SHARED_MEMORY_GIB = 1.0


def find_problems(facts: Facts) -> list[str]:
    """What the rules find in the facts of `env.environment`."""
    return [sentence for rule in RULES if (sentence := rule(facts)) is not None]


def versions_are_new_enough(facts: Facts) -> str | None:
    """Against the package's own requirements."""
    from packaging.requirements import Requirement

    wrong = []
    for line in metadata.requires("hf-fsdp-qlora") or ():
        needed = Requirement(line)
        found = facts["packages"].get(needed.name)
        if needed.marker is None and found is not None and not needed.specifier.contains(found, prereleases=True):
            wrong.append(f"{needed.name} {found} (needed: {needed.specifier})")
    return f"Other versions than this package needs: {', '.join(wrong)}. Install them again." if wrong else None


def torch_sees_the_gpus(facts: Facts) -> str | None:
    """A CUDA build of torch that finds no device: the driver is missing or older than the build."""
    cuda = facts["system"]["torch_cuda"]
    if cuda is None or facts["gpus"]:
        return None
    return f"torch is built for CUDA {cuda} but finds no GPU: there is none, it is hidden, or its driver is older."


def gpus_compute_in_bfloat16(facts: Facts) -> str | None:
    """bfloat16 needs compute capability 8.0; below, it is emulated. float16 over 4-bit weights is refused."""
    old = sorted({gpu["name"] for gpu in facts["gpus"] if float(gpu["compute_capability"]) < 8})
    return f"{', '.join(old)}: no bfloat16 in hardware. Use precision: fp32." if old else None


def triton_can_launch(facts: Facts) -> str | None:
    """Without it 4-bit weights are dequantised by bitsandbytes' kernels, and TRL's loss and torch.compile fail."""
    lacks = facts["system"].get("triton_lacks")
    if not facts["gpus"] or lacks is None:
        return None
    return (
        f"Triton cannot launch kernels here: {lacks}. compile_layers needs it, and 4-bit weights are slower without."
    )


def gpus_are_alike(facts: Facts) -> str | None:
    """FSDP and DDP give every rank the same work."""
    kinds = sorted({f"{gpu['name']} ({gpu['memory_gib']} GiB)" for gpu in facts["gpus"]})
    if len(kinds) < 2:
        return None
    return f"Different GPUs: {', '.join(kinds)}. Shards are equal, so the smallest memory and the slowest card count."


def shared_memory_is_large_enough(facts: Facts) -> str | None:
    """NCCL passes data between processes through /dev/shm; containers often get 64 MiB."""
    free = facts["free"].get("shared_memory_gib")
    if len(facts["gpus"]) < 2 or free is None or free >= MIN_SHARED_MEMORY_GIB:
        return None
    return f"/dev/shm has {free} GiB free: NCCL fails or hangs. Start the container with --ipc=host or --shm-size=8g."


def kernel_is_new_enough(facts: Facts) -> str | None:
    """accelerate warns below 5.5: processes can hang (accelerate/utils/other.py, check_os_kernel)."""
    found = re.match(r"Linux-(\d+)\.(\d+)", facts["system"]["platform"])
    if found is None or (int(found[1]), int(found[2])) >= MIN_KERNEL:
        return None
    return f"Linux {found[1]}.{found[2]}: processes can hang below 5.5. Update the kernel."


def cards_can_talk(facts: Facts) -> str | None:
    """accelerate refuses RTX 40 cards without P2P unless NCCL is told (accelerate/utils/environment.py)."""
    if len(facts["gpus"]) < 2:
        return None
    from accelerate.utils import check_cuda_p2p_ib_support

    if check_cuda_p2p_ib_support():
        return None
    return (
        "These GPUs or their driver have no peer-to-peer copies. accelerate launch sets NCCL_P2P_DISABLE=1 and "
        "NCCL_IB_DISABLE=1 by itself; set them where you launch in another way."
    )


RULES: tuple[Callable[[Facts], str | None], ...] = (
    versions_are_new_enough, torch_sees_the_gpus, gpus_compute_in_bfloat16, triton_can_launch,
    gpus_are_alike, shared_memory_is_large_enough, kernel_is_new_enough, cards_can_talk,
)  # fmt: skip
