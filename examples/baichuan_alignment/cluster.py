"""The full-size recipes as Slurm jobs: each stage an `sbatch` command that waits for those whose output it reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

BASES = {
    "qwen2_nova_72b": "/models/Qwen2-72B",
    "llama3_pbm_nova_70b": "/models/Meta-Llama-3-70B-Instruct",
}
RECIPES = tuple(BASES)
FIELDS = ("math", "code", "writing")  # one model of each is trained, then all are merged
METHODS = ("linear", "task_arithmetic", "model_stock")
HEAD = """#!/usr/bin/env bash
# The recipe of the Baichuan Alignment report on a cluster: run this in the repository's folder, on the login node.
# Every job waits for those whose output it reads, and is cancelled if one of them fails. Folders: all nodes share them.
# DATA has raw.jsonl and good_pairs.jsonl (prompts, examples of complements), sft_FIELD.jsonl and sft.jsonl (chats),
# preferences.jsonl (pairs with people's scores), prompts.jsonl (with answers), and what cluster_evaluate.yaml names.
# WRITER: endpoint of the model that writes complements. VLLM_PYTHON: interpreter of an environment that has vLLM.
# CPU: sbatch options of jobs without GPUs.
set -euo pipefail
DATA=${DATA:-data} RUNS=${RUNS:-runs} MODELS=${MODELS:-/models}
WRITER=${WRITER:-http://writer:8000#big-model}
VLLM_PYTHON=${VLLM_PYTHON:-/envs/vllm/bin/python}
read -ra CPU <<<"${CPU:---cpus-per-task 16 --mem 64G}"
"""
_ALWAYS = "--parsable --kill-on-invalid-dep=yes"
_GPUS = "--nodes 1 --ntasks-per-node 1 --gpus-per-node 8 --exclusive"
_EVALUATION = "examples/baichuan_alignment/cluster_evaluate.yaml"


@dataclass(frozen=True, slots=True)
class Job:
    """A job: the shell variable with its number, what `sbatch` gets, and the jobs that it waits for."""

    name: str
    arguments: str
    after: tuple[str, ...] = ()

    @property
    def line(self) -> str:
        """The command that submits it."""
        waits = "".join(f":${name}" for name in self.after)
        dependency = f' --dependency "afterok{waits}"' if waits else ""
        return f"{self.name}=$(sbatch {_ALWAYS} --job-name {self.name}{dependency} {self.arguments})"


def commands(recipes: Sequence[str]) -> list[str]:
    """Return a shell script that submits all jobs of these recipes; the augmenting model is trained once."""
    lines = [HEAD, "# Prompt augmentation"]
    lines += [job.line for job in _augmentation()]
    for recipe in recipes:
        lines += ["", f"# {recipe}", *(job.line for job in _recipe(recipe))]
    return lines


def _augmentation() -> list[Job]:
    build = "megatron-align pas build --prompts $DATA/raw.jsonl --examples $DATA/good_pairs.jsonl --out $RUNS/pas_data "
    build += "--generator $WRITER --tokenizer $MODELS/Qwen2-7B-Instruct"
    train = "--nodes 1 examples/launch/slurm.sbatch examples/qwen2_7b/pas.yaml $RUNS/pas "
    train += "--model.path $MODELS/Qwen2-7B-Instruct --data.train $RUNS/pas_data/data.jsonl"
    return [_wrapped("pas_build", build), Job("pas", train, ("pas_build",))]


def _recipe(recipe: str) -> list[Job]:
    """Return the jobs of one recipe, each after those it waits for."""
    run, base = f"$RUNS/{recipe}", BASES[recipe].replace("/models", "$MODELS")

    def name(stage: str) -> str:
        return f"{recipe}_{stage}"

    def training(stage: str, config: str, options: str, *after: str) -> Job:
        arguments = (
            f"--nodes 4 examples/launch/slurm.sbatch examples/{recipe}/{config}.yaml {run}_{stage} {options}"
        )
        return Job(name(stage), arguments, tuple(map(name, after)))

    def evaluation(stage: str, more: str = "", label: str = "", *after: str) -> Job:
        command = f"torchrun --nproc-per-node 8 -m megatron_align.evaluate --config {_EVALUATION} "
        command += f"--model {model(stage)} --rollout.vllm_python $VLLM_PYTHON "
        command += f"--out {run}_evaluations/{stage}{label}{more}"
        waits = (name(stage), *after)
        return Job(name(f"evaluate_{stage}{label}"), f'{_GPUS} --wrap "{command}"', waits)

    def model(stage: str) -> str:
        return f"{run}_{stage}" if stage == "merged" or stage in METHODS else f"{run}_{stage}/hf"

    fields = [f"sft_{field}" for field in FIELDS]
    trained = [
        training(stage, "sft", f"--model.path {base} --data.train $DATA/{stage}.jsonl") for stage in fields
    ]
    merges = []
    for method in METHODS:
        stage = "merged" if method == "model_stock" else method
        of_base = "" if method == "linear" else f" --base {base}"
        command = f"megatron-align merge {method}{of_base} --models {' '.join(map(model, fields))} --out {run}_{stage}"
        merges.append(_wrapped(name(stage), command, *map(name, fields)))
    sample = (
        f"megatron-align sample --models {model('merged')} --prompts $DATA/prompts.jsonl --out {run}_sampled "
    )
    sample += (
        "--check math --format pair --vllm-python $VLLM_PYTHON --vllm-options '--tensor-parallel-size 8'"
    )
    pairs = f'"[$DATA/preferences.jsonl, {run}_sampled/data.jsonl]"'
    on_merged = f"--model.path {model('merged')}"
    ptx = '"{data: $DATA/sft.jsonl, coefficient: 0.1, kind: topk_kl, top_k: 500, samples: 64}"'
    rewards = f'"[{{kind: model, path: {run}_reward/hf}}]"'
    online = f"--nodes 5 examples/launch/slurm_online.sbatch examples/{recipe}/grpo.yaml {run}_grpo {model('merged')} "
    online += f"{on_merged} --data.train $DATA/prompts.jsonl --objective.ptx {ptx} --rewards {rewards}"
    shown = ["reward", "grpo", *fields]
    evaluated = [*fields, "linear", "task_arithmetic", "merged", "grpo"]
    report = f"megatron-align report {' '.join(f'{run}_{stage}' for stage in shown)} "
    report += " ".join(f"{run}_evaluations/{stage}" for stage in (*evaluated, "grpo_augmented"))
    report += f" --out {run}_report"
    reports = [name(f"evaluate_{stage}") for stage in (*evaluated, "grpo_augmented")]
    return [
        *trained,
        *map(evaluation, fields),
        *merges,
        *map(evaluation, ("linear", "task_arithmetic", "merged")),
        Job(name("sampled"), f'{_GPUS} --wrap "{sample}"', (name("merged"),)),
        training("reward", "reward", f"{on_merged} --data.train {pairs}", "merged", "sampled"),
        Job(name("grpo"), online, (name("merged"), name("reward"))),
        evaluation("grpo"),
        evaluation("grpo", " --augment $RUNS/pas/hf", "_augmented", "pas"),
        _wrapped(name("report"), report, *reports),
    ]


def _wrapped(name: str, command: str, *after: str) -> Job:
    """Return a job without GPUs that runs one command."""
    return Job(name, f'"${{CPU[@]}}" --wrap "{command}"', after)
