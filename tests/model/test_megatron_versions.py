"""What we override, patch or use by a private name exists in the installed megatron-core; nothing else is overridden.

An override of a method that a release dropped never runs, without any error; a private name may go in any release.
Each is listed here with the releases that have it, and the lists are compared with the code in both directions. A
default of megatron-core's that changes is found too: those of 0.16.1 are in ``megatron_defaults.json``.
"""

import ast
import dataclasses
import importlib
import inspect
import json
import pkgutil
import re
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import megatron.core
import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.tensor_parallel import random
from megatron.core.transformer.transformer_config import TransformerConfig
from packaging.version import Version

import megatron_align
from megatron_align.model.freed_output import FreedOutput

INSTALLED = Version(version("megatron-core"))
HERE = Path(__file__).parent
SOURCES = Path(megatron_align.__file__).parent
ALWAYS = "0.16", "1"  # from the first release to before the second
# Class of ours and what it overrides.
OVERRIDES = {
    ("model.attention", "PackParams", "qkv_format"): ALWAYS,
    ("model.head", "VocabularyHead", "forward"): ALWAYS,
    ("model.layer", "Layer", "_forward_attention"): ALWAYS,
    ("model.layer", "Layer", "_forward_mlp"): ALWAYS,
    ("model.layer", "Layer", "_forward_post_mlp"): ALWAYS,
    ("model.layer", "Layer", "forward"): ALWAYS,
    ("model.adapted_linear", "ColumnLinear", "forward"): ALWAYS,
    ("model.adapted_linear", "RowLinear", "forward"): ALWAYS,
    ("model.megatron_versions", "_MergingBlock", "_checkpointed_forward"): ("0.16", "0.18"),
    ("model.policy", "Policy", "_set_attention_backend"): ALWAYS,
    ("model.policy", "Policy", "sharded_state_dict"): ALWAYS,
    ("model.policy", "Policy", "shared_embedding_or_output_weight"): ALWAYS,
    ("training.optimizer", "Optimizer", "get_parameter_state_dp_zero"): ALWAYS,
    ("training.optimizer", "Optimizer", "state_dict"): ALWAYS,
}
PRIVATE_IMPORTS = {
    "dist_checkpointing.strategies.filesystem_async._split_by_size_and_type": ALWAYS,
    "dist_checkpointing.strategies.torch._replace_state_dict_keys_with_sharded_keys": ALWAYS,
    "optimizer._get_param_groups_and_buffers": ALWAYS,
}
# Attributes of its objects that we use and that its documentation does not promise.
ATTRIBUTES = {
    ("optimizer.distrib_optimizer", "DistributedOptimizer"): {
        "buffers": ALWAYS,
        "data_parallel_group_gloo": ALWAYS,
        "gbuf_ranges": ALWAYS,
        "get_grad_stats_parallel_group": ALWAYS,
        "grad_stats_parallel_group": ALWAYS,
        "get_main_grads_for_grad_norm": ("0.16", "0.19"),
        "get_grads_for_grad_norm": ("0.19", "1"),
        "prepare_grads": ALWAYS,
        "step_with_ready_grads": ALWAYS,
        "tp_group": ALWAYS,
        "_get_main_param_and_optimizer_states": ALWAYS,
    },
    ("distributed.param_and_grad_buffer", "_ParamAndGradBuffer"): {
        "buckets": ALWAYS,
        "grad_data": ALWAYS,
        "numel": ALWAYS,
        "numel_unpadded": ALWAYS,
    },
    ("distributed.param_and_grad_buffer", "_ParamAndGradBucket"): {
        "grad_data": ALWAYS,
        "numel_unpadded": ALWAYS,
    },
    ("transformer.transformer_layer", "TransformerLayer"): {
        "input_layernorm": ALWAYS,
        "mlp_bda": ALWAYS,
        "recompute_input_layernorm": ALWAYS,
        "recompute_mlp": ALWAYS,
        "recompute_pre_mlp_layernorm": ALWAYS,
        "self_attn_bda": ALWAYS,
    },
    ("transformer.transformer_block", "TransformerBlock"): {
        "final_layernorm": ALWAYS,
    },
}
# What the CPU seam replaces, and where megatron-core calls it: a replacement that nothing calls can go.
SEAM = {
    "torch.cuda.current_device": ALWAYS,
    "torch.cuda.synchronize": ALWAYS,
    "torch.cuda.current_stream": ("0.16", "1"),
    "torch.cuda.get_rng_state": ALWAYS,
    "torch.cuda.manual_seed": ALWAYS,
    "random._get_cuda_rng_state": ALWAYS,
    "random._set_cuda_rng_state": ALWAYS,
    "torch.Tensor.cuda": ALWAYS,
    "torch.Tensor.type": ALWAYS,
}


def in_range(releases):
    return Version(releases[0]) <= INSTALLED < Version(releases[1])


def expected(table):
    return {entry for entry, releases in table.items() if in_range(releases)}


def our_modules():
    for module in pkgutil.walk_packages(megatron_align.__path__, "megatron_align."):
        if module.name.startswith(("megatron_align.kernels", "megatron_align.tools")):
            continue
        if module.name.startswith("megatron_align.evaluation.lm_eval") and not find_spec("lm_eval"):
            continue  # of an extra, and without megatron-core
        yield importlib.import_module(module.name)


@cache
def our_sources():
    """Return path, text and syntax tree of each of our files."""
    found = []
    for path in sorted(SOURCES.rglob("*.py")):
        if not any((SOURCES / part).is_symlink() for part in path.relative_to(SOURCES).parents if part.name):
            content = path.read_text(encoding="utf-8")
            found.append((path, content, ast.parse(content)))
    return found


def test_each_override_overrides_something():
    found, classes = set(), set()
    for module in our_modules():
        for name, value in vars(module).items():
            if inspect.isclass(value) and (value.__module__, value.__name__) == (module.__name__, name):
                theirs = [base for base in value.__mro__ if base.__module__.startswith("megatron.core")]
                own = {attribute for attribute in vars(value) if not attribute.startswith("__")}
                inherited = {attribute for base in theirs for attribute in vars(base)}
                room = module.__name__.removeprefix("megatron_align.")
                found |= {
                    (room, name, attribute) for attribute in own & inherited if attribute[:5] != "_abc_"
                }
                classes |= {(room, name)} if theirs else set()
    assert {entry[:2] for entry in OVERRIDES} <= classes
    assert found == expected(OVERRIDES)


def test_each_private_import_is_listed_and_exists():
    found = set()
    for _, _, tree in our_sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megatron.core."):
                room = node.module.removeprefix("megatron.core.")
                found |= {f"{room}.{alias.name}" for alias in node.names if alias.name.startswith("_")}
    assert found == expected(PRIVATE_IMPORTS)
    for name in found:
        module, _, function = name.rpartition(".")
        assert callable(getattr(importlib.import_module(f"megatron.core.{module}"), function))


@pytest.mark.parametrize("owner", ATTRIBUTES, ids=lambda owner: owner[1])
def test_each_attribute_that_we_use_exists(owner):
    module, name = owner
    value = getattr(importlib.import_module(f"megatron.core.{module}"), name)
    bases = [base for base in value.__mro__ if base.__module__.startswith("megatron.core")]
    source = "".join(inspect.getsource(inspect.getmodule(base)) for base in bases)
    used = "".join(content for _, content, _ in our_sources())
    for attribute, releases in ATTRIBUTES[owner].items():
        named = rf"self\.{attribute}\b|getattr\(self, '{attribute}'"
        exists = hasattr(value, attribute) or re.search(named, source)
        assert bool(exists) == in_range(releases), attribute
        assert attribute in used, f"{attribute} is used no more: take it from the list"


def test_what_the_seam_replaces_is_called():
    core = Path(megatron.core.__path__[0])
    source = "".join(path.read_text(encoding="utf-8") for path in core.rglob("*.py"))
    seam = ast.parse((SOURCES / "model" / "cpu.py").read_text(encoding="utf-8"))
    targets = [node.targets[0] for node in ast.walk(seam) if isinstance(node, ast.Assign)]
    assert {ast.unparse(target) for target in targets if isinstance(target, ast.Attribute)} == set(SEAM)
    for name in expected(SEAM):
        assert name.removeprefix("random.") in source or f".{name.rpartition('.')[2]}(" in source, name
    assert callable(random._get_cuda_rng_state)


def test_nothing_is_patched_outside_the_seam():
    """No assignment to an attribute of what is imported from megatron-core; ours to our own objects are none.

    A rehearsal patches megatron-core in a process of its own, which trains nothing.
    """
    for path, _, tree in our_sources():
        if path in (SOURCES / "model" / "cpu.py", SOURCES / "rehearsal" / "device.py"):
            continue
        imported = {
            alias.asname or alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megatron")
            for alias in node.names
            if not (node.module or "").startswith("megatron_align")
        }
        for node in ast.walk(tree):
            targets = node.targets if isinstance(node, ast.Assign) else []
            for target in targets:
                if isinstance(target, ast.Attribute):
                    assert ast.unparse(target.value).split(".")[0] not in imported, ast.unparse(node)
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr":
                assert ast.unparse(node.args[0]).split(".")[0] not in imported, ast.unparse(node)


# Defaults that are others than in 0.16.1, with the release in which they changed. None of them is read by what we run:
# all are of mixtures of experts, CUDA graphs or the inference engine.
CHANGED = {
    "moe_hybridep_num_sms": "0.17",
    "cuda_graph_use_single_mempool": "0.18",
    "cuda_graph_scope": "0.18",
    "moe_deepep_num_sms": "0.19",
}
# New options that are not off by default, but belong to features that we leave off.
BELONGING = ("mup_", "moe_", "inference_", "cuda_graph_", "dsa_", "muon_", "lion_", "soap_", "adaptive_muon_",
             "megatron_fsdp_", "fsdp_")  # fmt: skip
# New options that are not off by default, whose value means what 0.16.1 does.
NEUTRAL = {
    "gtp_weight_remat_size": "1",
    "expert_gtp_weight_remat_size": "1",
    "mlp_chunks_for_training": "1",
    "activation_offload_fraction": "1.0",
    "grad_norm_skip_threshold": "inf",
}
OFF = {"False", "None", "()", "0", "0.0", "", "[]", "none"}


def text(field):
    value = field.default
    if value is dataclasses.MISSING:
        made = field.default_factory is not dataclasses.MISSING
        value = field.default_factory() if made else "required"
    return value.__qualname__ if callable(value) else str(value)


@pytest.mark.parametrize("config", [TransformerConfig, DistributedDataParallelConfig, OptimizerConfig])
def test_no_default_changed_unseen(config):
    before = json.loads((HERE / "megatron_defaults.json").read_text(encoding="utf-8"))[config.__name__]
    now = {field.name: text(field) for field in dataclasses.fields(config)}
    changed = {name for name in before.keys() & now.keys() if before[name] != now[name]}
    names = before.keys() & now.keys()
    assert changed == {n for n, first in CHANGED.items() if Version(first) <= INSTALLED and n in names}
    new = {name: value for name, value in now.items() if name not in before and value not in OFF}
    unexplained = {
        name: value
        for name, value in new.items()
        if not name.startswith(BELONGING) and NEUTRAL.get(name) != value
    }
    assert unexplained == {}


def test_a_freed_output_has_the_gradients_of_the_function():
    """Also where several operations saved the output, and a parameter is read by the function."""
    weight = torch.nn.Parameter(torch.randn(6, dtype=torch.float64))

    def function(x):
        return weight * torch.tanh(x)

    def gradients(free):
        weight.grad = None
        x = torch.linspace(-1, 1, 12, dtype=torch.float64).view(2, 6).requires_grad_()
        call = FreedOutput(function)
        y = call.run(x) if free else function(x)
        user = y * y.view(12).view(2, 6) + y.sin()
        if free:
            call.free(user)
            assert y.untyped_storage().size() == 0
        user.square().sum().backward()
        return x.grad, weight.grad.clone()

    for got, want in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(got, want)
