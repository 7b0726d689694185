"""transformers' model in fp32, to verify ours against: complete, or with the weights of one module at a time."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from megatron_align.errors import InputError, one_line
from megatron_align.hf.baichuan import llama_config, llama_tensors, stored_name
from megatron_align.hf.safetensors import HFWeights
from megatron_align.model.families import ModelShape


def read_hf_config(hf: str | Path, shape: ModelShape) -> PretrainedConfig:
    """Return transformers' configuration of a folder; code that the folder holds is never executed.

    Raises:
        InputError: transformers cannot read it, or only by running the folder's code.
    """
    if shape.norm_head:
        return llama_config(hf)
    try:
        # trust_remote_code: left unset, transformers asks on the terminal, and runs the folder's code after a yes
        return AutoConfig.from_pretrained(hf, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        reason = one_line(error)
        if "trust_remote_code" in reason:
            reason = "it needs the folder's own code, which is never run"
        raise InputError(
            f"transformers cannot read {Path(hf) / 'config.json'}, so there is nothing to verify against: "
            f"{one_line(reason, 300)}"
        ) from error


class HFModel:
    """A transformers model whose weights are loaded module by module with :meth:`fill` and freed with :meth:`empty`.

    Of Baichuan2 it is the Llama that computes the same (``hf/baichuan.py``).

    Args:
        hf: Hugging Face folder.
        weights: of the folder.
        shape: of the folder.
    """

    def __init__(self, hf: str | Path, weights: HFWeights, shape: ModelShape) -> None:
        self.weights, self.shape = weights, shape
        model_class = AutoModelForSequenceClassification if shape.is_reward else AutoModelForCausalLM
        config = read_hf_config(hf, shape)
        with torch.device("meta"):
            self.model: PreTrainedModel = model_class.from_config(
                config, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
            )
        body = self.model.model
        body.rotary_emb = type(body.rotary_emb)(config=config)  # its frequencies are not among the weights
        self.model.eval()

    def fill(self, name: str) -> None:
        """Load a module's weights."""
        module = self.model.get_submodule(name)
        state = {key: self._tensor(f"{name}.{key}".lstrip(".")) for key, _ in module.named_parameters()}
        for key, tensor in state.items():
            owner, _, leaf = key.rpartition(".")
            setattr(module.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))

    def empty(self, name: str) -> None:
        """Free a module's weights."""
        self.model.get_submodule(name).to_empty(device="meta")

    def _tensor(self, name: str) -> Tensor:
        if name == "lm_head.weight" and self.shape.tied_embeddings:
            name = "model.embed_tokens.weight"
        if not self.shape.norm_head:
            return self._read(name)
        stored = stored_name(name)
        return dict(llama_tensors([(stored, self._read(stored))]))[name]

    def _read(self, name: str) -> Tensor:
        return self.weights.tensor(name).float()


def load_hf_model(hf: str | Path, weights: HFWeights, shape: ModelShape) -> PreTrainedModel:
    """Return transformers' model with all weights, loaded by transformers itself where it supports the model."""
    if shape.norm_head:
        converted = HFModel(hf, weights, shape)
        converted.fill("")
        return converted.model
    return AutoModelForCausalLM.from_pretrained(
        hf,
        dtype=torch.float32,
        attn_implementation="eager",
        local_files_only=True,
        trust_remote_code=False,
    ).eval()
