"""Where offloaded shards lie: in slabs, and still what FSDP2 takes for its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from hf_fsdp_qlora import QuantizedLinear, load_model
from hf_fsdp_qlora.allocation import materialize
from hf_fsdp_qlora.host_memory import ALIGNMENT, allocate_in_slabs
from hf_fsdp_qlora.integrity import check_integrity
from hf_fsdp_qlora.sharding import local_tensor
from tests.distributed import run_distributed
from tests.loading_story import CPU, FSDP2, LORA, batch, nf4
from tests.tiny_models import save_tiny_model


def ranges(tensors: list[Tensor]) -> list[tuple[int, int]]:
    return sorted((t.data_ptr(), t.data_ptr() + t.numel() * t.itemsize) for t in tensors if t.numel())


def test_slabs_hold_every_tensor_once_and_waste_little() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 60, (200,), generator=generator).tolist()
    dtypes = [torch.float32, torch.bfloat16, torch.uint8]
    wanted = [torch.empty(n, 33, dtype=dtypes[i % 3], device="meta") for i, n in enumerate(rows)]
    slab_bytes = 2**16
    made = allocate_in_slabs(wanted, pin=False, slab_bytes=slab_bytes)
    assert [(t.shape, t.dtype, t.device.type) for t in made] == [(t.shape, t.dtype, "cpu") for t in wanted]
    assert all(t.is_contiguous() and t.storage_offset() * t.itemsize % ALIGNMENT == 0 for t in made)
    taken = ranges(made)
    assert all(end <= start for (_, end), (start, _) in zip(taken, taken[1:], strict=False)), "two tensors overlap"
    slabs = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in made}
    needed = sum(-(-t.numel() * t.itemsize // ALIGNMENT) * ALIGNMENT for t in wanted)
    assert len(slabs) == -(-needed // slab_bytes) > 5 and max(slabs.values()) <= slab_bytes
    assert sum(slabs.values()) == needed, "slabs are as long as what lies in them"


def test_tensor_larger_than_a_slab_gets_its_own() -> None:
    small, large = allocate_in_slabs([torch.empty(10), torch.empty(3000)], pin=False, slab_bytes=4096)
    assert large.numel() == 3000 and small.untyped_storage().data_ptr() != large.untyped_storage().data_ptr()


def layout(path: str, offload: str) -> dict[str, Any]:
    """Storages of the shards on this rank, before and after a step, and that nothing was copied in between."""
    model: Any = load_model(path, quantization_config=nf4(), peft_config=LORA, offload=offload)
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    frozen = {id(p): p for p in model.parameters() if not p.requires_grad}

    def places() -> list[tuple[int, int]]:
        local = [local_tensor(p) for p in frozen.values()]
        return [(t.untyped_storage().data_ptr(), t.data_ptr()) for t in local]

    before = places()
    model.train()
    loss = model(**batch()).loss
    loss.backward()
    shards = [local_tensor(p) for layer in layers for p in (layer.weight, layer.weight_stats)]
    even = [layer.num_rows % torch.distributed.get_world_size() == 0 for layer in layers for _ in range(2)]
    return {
        "loss": loss.item(), "rows": check_integrity(model), "stayed": before == places(), "even": even,
        "storages": [t.untyped_storage().data_ptr() for t in shards],
        "trained": {local_tensor(p).untyped_storage().data_ptr() for p in model.parameters() if p.requires_grad},
        "others": {storage for storage, _ in before},
    }  # fmt: skip


@pytest.mark.parametrize("offload", ["base", "all"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_offloaded_shards_share_slabs_and_give_the_same_loss(ranks: int, offload: str, tmp_path: Path) -> None:
    path = str(save_tiny_model(tmp_path, "llama"))
    plain = run_distributed(layout, path, "none", world_size=ranks, env=FSDP2)
    for seen, expected in zip(run_distributed(layout, path, offload, world_size=ranks, env=FSDP2), plain, strict=True):
        assert (seen["loss"], seen["rows"]) == (expected["loss"], expected["rows"]) and seen["stayed"]
        in_slab = {storage for storage, even in zip(seen["storages"], seen["even"], strict=True) if even}
        alone = [storage for storage, even in zip(seen["storages"], seen["even"], strict=True) if not even]
        assert len(in_slab) == (ranks < 3) and not in_slab & seen["trained"]  # on 3 ranks no layer divides evenly
        assert not in_slab & set(alone) and bool(alone) == (ranks > 1)
        if offload == "all" and ranks == 1:  # norms, embedding and head too: 3 tensors of 2 layers and the rest
            assert seen["others"] == in_slab
        assert len(set(expected["storages"])) == len(expected["storages"]), "without offload nothing is shared"


def pinned(path: str, pin_memory: bool) -> list[bool]:
    """On a GPU: whether each frozen shard is pinned after a step that every shard went through."""
    torch.distributed.init_process_group("cuda:nccl,cpu:gloo")
    model: Any = load_model(
        path, quantization_config=nf4(), peft_config=LORA, offload="all", offload_pin_memory=pin_memory
    )  # fmt: skip
    model.train()
    model(**{key: value.cuda() for key, value in batch().items()}).loss.backward()
    check_integrity(model)
    return [local_tensor(p).is_pinned() for p in model.parameters() if not p.requires_grad]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("pin_memory", [True, False])
def test_shards_are_pinned_on_a_gpu_unless_asked_not_to(pin_memory: bool, tmp_path: Path) -> None:
    env = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    path = str(save_tiny_model(tmp_path))
    [seen] = run_distributed(pinned, path, pin_memory, world_size=1, env=env, process_group=False)
    assert seen and set(seen) == {pin_memory}


def refuse(path: str) -> str:
    with pytest.raises(ValueError, match="offload_pin_memory=False with FSDP1") as caught:
        load_model(path, quantization_config=nf4(), peft_config=LORA, offload="base", offload_pin_memory=False)
    return str(caught.value)


def test_fsdp1_cannot_do_without_pinning(tmp_path: Path) -> None:
    env = {**CPU, "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}
    for message in run_distributed(refuse, str(save_tiny_model(tmp_path)), env=env):
        assert "Leave it out" in message


def host_shards_of_a_device_mesh() -> str:
    mesh = DeviceMesh("meta", torch.arange(1))  # any device that is not the host's
    linear = torch.nn.Linear(8, 4, bias=False, device="meta")
    sharded = DTensor.from_local(linear.weight.detach(), mesh, [Shard(0)], run_check=False)
    linear.weight = torch.nn.Parameter(sharded, requires_grad=False)
    materialize(linear, torch.device("cpu"), rows_device=torch.device("cpu"))
    return local_tensor(linear.weight).device.type


def test_host_shards_stay_on_the_host_whatever_the_mesh_is_on() -> None:
    assert run_distributed(host_shards_of_a_device_mesh, world_size=1) == ["cpu"]
