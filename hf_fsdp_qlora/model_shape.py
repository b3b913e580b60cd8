"""The sizes of a model that memory depends on, read from its config alone.

The parameters are counted on transformers' own model, built on the meta device, so that nothing is assumed about an
architecture; what each layer keeps for backward depends on what its layers are *for*, which their names tell.
transformers is imported inside the function: the planner's arithmetic works from a `ModelShape` without torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hf_fsdp_qlora.errors import ConfigError

ATTENTION_IN = ("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value")
ATTENTION_OUT = ("o_proj", "dense")
MLP_IN = ("gate_proj", "up_proj", "gate_up_proj", "dense_h_to_4h")
MLP_OUT = ("down_proj", "dense_4h_to_h")


@dataclass(frozen=True)
class LinearShape:
    """One linear layer of a decoder layer. `name` is relative to the decoder layer, such as "self_attn.q_proj"."""

    name: str
    out_features: int
    in_features: int
    has_bias: bool

    @property
    def numel(self) -> int:
        """Elements of its weight."""
        return self.out_features * self.in_features

    @property
    def leaf(self) -> str:
        return self.name.rpartition(".")[2]


@dataclass(frozen=True)
class ModelShape:
    """A decoder-only model.

    Attributes:
        name: what the user called it.
        layers_path: module path of the list of decoder layers ("model.layers").
        linears: the linear layers of one decoder layer.
        layer_other_numel: its other parameters (norms, biases).
        embedding_numel: elements of the input embedding, once where it is tied to the head.
        head_numel: elements of the head where it has a weight of its own, else 0.
        outside_other_numel: all other parameters outside the decoder layers.
        wide_norms: norms over the hidden size in one decoder layer; each keeps a float32 copy of its input.
        norm_ends_layer: the MLP's output goes through a norm, whose backward is then the layer's first.
        qk_norm_width: width of the query and key norms together (0 without them): float32 copies of that width.
        eager_attention: transformers picks its eager attention, which keeps the scores of all pairs of tokens.
        softcaps_attention: scores go through a tanh first.
    """

    name: str
    model_type: str
    layers_path: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    linears: tuple[LinearShape, ...]
    layer_other_numel: int
    embedding_numel: int
    head_numel: int
    outside_other_numel: int
    wide_norms: int
    norm_ends_layer: bool
    qk_norm_width: int
    eager_attention: bool
    softcaps_attention: bool

    @property
    def total_numel(self) -> int:
        """All parameters."""
        return self.num_layers * self.layer_numel + self.outside_numel

    @property
    def layer_numel(self) -> int:
        """Parameters of one decoder layer."""
        return sum(linear.numel for linear in self.linears) + self.layer_other_numel

    @property
    def outside_numel(self) -> int:
        """Parameters outside the decoder layers."""
        return self.embedding_numel + self.head_numel + self.outside_other_numel

    @property
    def query_width(self) -> int:
        """Values of all query heads per token."""
        return self.num_heads * self.head_dim

    @property
    def key_width(self) -> int:
        """Values of all key heads per token, and of all value heads."""
        return self.num_key_value_heads * self.head_dim

    def targeted(self, target_modules: str | Sequence[str]) -> dict[str, int]:
        """In how many decoder layers each targeted linear layer has a LoRA layer, by `LinearShape.name`.

        Args:
            target_modules: "all-linear", a regular expression for whole module names, or ends of module names.

        Raises:
            ConfigError: nothing matches.
        """
        counts = {
            linear.name: sum(
                _is_target(f"{self.layers_path}.{index}.{linear.name}", target_modules)
                for index in range(self.num_layers)
            )
            for linear in self.linears
        }
        if not any(counts.values()):
            names = ", ".join(sorted(linear.leaf for linear in self.linears))
            raise ConfigError(f"target_modules={target_modules!r} matches nothing; {self.name} has {names}.")
        return {name: count for name, count in counts.items() if count}


def model_shape(
    model: str | os.PathLike[str] | Any, *, attn_implementation: str | None = None, **hub_kwargs: Any
) -> ModelShape:
    """Read the sizes of a model.

    Args:
        model: a folder or hub id (only `config.json` is read), or a transformers config object.
        attn_implementation: as in `from_pretrained`; None is what transformers picks.
        hub_kwargs: revision, token, trust_remote_code, ... for `AutoConfig.from_pretrained`.

    Raises:
        ConfigError: the config cannot be read, or the model is of a kind the planner does not know.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

    is_config = isinstance(model, PretrainedConfig)
    try:
        config: Any = model if is_config else AutoConfig.from_pretrained(model, **hub_kwargs)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"The config of {str(model)!r} cannot be read. Give a folder with a config.json, or a hub id that this "
            f"machine can reach. transformers says: {str(error).strip().splitlines()[0]}"
        ) from error
    trust = bool(hub_kwargs.get("trust_remote_code"))
    with torch.device("meta"):
        skeleton: Any = AutoModelForCausalLM.from_config(
            config, trust_remote_code=trust, attn_implementation=attn_implementation or config._attn_implementation
        )
    return shape_of(skeleton, config.model_type if is_config else str(model))


def shape_of(model: Any, name: str) -> ModelShape:
    """The sizes of a transformers model; parameters may be on the meta device."""
    from torch import nn

    config = model.config.get_text_config()
    classes = set(model._no_split_modules or ())
    layers = [(path, module) for path, module in model.named_modules() if type(module).__name__ in classes]
    counts = {sum(parameter.numel() for parameter in module.parameters()) for _, module in layers}
    if len(counts) != 1:
        raise ConfigError(f"{name} has {len(counts)} kinds of decoder layers; the planner needs equal ones.")
    path, layer = layers[0]
    linears = tuple(
        LinearShape(linear_name, module.out_features, module.in_features, module.bias is not None)
        for linear_name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    )
    unknown = [x.name for x in linears if x.leaf not in (*ATTENTION_IN, *ATTENTION_OUT, *MLP_IN, *MLP_OUT)]
    if unknown or not linears:
        raise ConfigError(f"{name}: the planner does not know what {', '.join(unknown) or 'its layers'} are for.")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    layer_numel = counts.pop()
    outside = sum(parameter.numel() for parameter in model.parameters()) - len(layers) * layer_numel
    head_numel = 0 if head is embedding or config.tie_word_embeddings else head.numel()
    norms = {key: module for key, module in layer.named_modules() if "norm" in key and list(module.parameters())}
    narrow = {key: module for key, module in norms.items() if re.search(r"(^|\.)(q|k)_norm$", key)}
    key_values = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return ModelShape(
        name=name,
        model_type=config.model_type,
        layers_path=path.rpartition(".")[0],
        num_layers=len(layers),
        hidden_size=config.hidden_size,
        intermediate_size=next(linear.in_features for linear in linears if linear.leaf in MLP_OUT),
        num_heads=config.num_attention_heads,
        num_key_value_heads=key_values,
        head_dim=head_dim,
        vocab_size=embedding.shape[0],
        max_positions=getattr(config, "max_position_embeddings", 0) or 0,
        linears=linears,
        layer_other_numel=layer_numel - sum(linear.numel for linear in linears),
        embedding_numel=embedding.numel(),
        head_numel=head_numel,
        outside_other_numel=outside - embedding.numel() - head_numel,
        wide_norms=len(norms) - len(narrow),
        norm_ends_layer="post_feedforward_layernorm" in norms,
        qk_norm_width=(config.num_attention_heads + key_values) * head_dim if narrow else 0,
        eager_attention=config._attn_implementation == "eager",
        softcaps_attention=getattr(config, "attn_logit_softcapping", None) is not None,
    )


def _is_target(name: str, target_modules: str | Sequence[str]) -> bool:
    if target_modules == "all-linear":
        return True
    if isinstance(target_modules, str):
        return re.fullmatch(target_modules, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in target_modules)
