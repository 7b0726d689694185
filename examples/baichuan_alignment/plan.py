"""The stages of the recipe: the command of each, what it needs, and what shows that it is complete.

A command is what a user would type into a shell. It depends on the folder, the seed and the scale alone, so that a
later start of the recipe recognises what an earlier one finished.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from examples.baichuan_alignment.questions import FIELDS, GROUPS, TEMPLATE
from megatron_align.config.yaml_text import read_yaml

HERE = Path(__file__).resolve().parent
METHODS = ("linear", "task_arithmetic", "model_stock")
GOES_ON = "model_stock"  # the merge that later stages start from, as in the report
BASE_SHARES = {
    "sums": 0.6,
    "strings": 0.06,
    "format": 0.03,
}  # of the base's training data: little of what is easy
OWN_SHARE = 0.6  # of a field's model: share of its own field in its training data
TRAINED = ("base", "pas", *(f"sft_{group}" for group in GROUPS), "reward", "grpo")
MERGED = f"merge_{GOES_ON}"
OWN_PAIRS = 8  # passes over the pairs of the merged model's own answers for one over the written pairs
OWN_PAIRS_FROM = 0.5  # scale of the recipe from which the reward model trains on them
GOLDEN = (
    "sums",
    "sorting",
    "strings",
)  # fields that GRPO scores by the golden answer, as the report does where it can
HARD_PROMPTS = "sums=0.6"  # share of the prompts of GRPO: the field with most to gain


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One command of the recipe.

    Args:
        name: also of its folder and its log.
        command: as typed into a shell.
        output: file or folder that exists when the command has succeeded.
        after: names of the stages whose output it reads.
        config: configuration file of a training, whose content is part of the stage's key.
        starts_anew: the command does not continue a killed one: what that left is removed first.
    """

    name: str
    command: str
    output: Path
    after: tuple[str, ...] = ()
    config: Path | None = None
    starts_anew: bool = False


def stages(out: Path, seed: int = 0, held_out: int = 128, scale: float = 1.0) -> tuple[Stage, ...]:
    """Return all stages in an order in which they can run one after the other.

    Args:
        out: folder of the recipe.
        seed: of the questions and of the untrained model.
        held_out: questions of each field that are never trained on.
        scale: share of all steps and data; 1: the complete recipe.
    """
    return _Plan(out, seed, held_out, scale).stages()


def keys(planned: Sequence[Stage]) -> dict[str, str]:
    """Return a hash of each stage's command, its configuration, and all that it comes after."""
    found: dict[str, str] = {}
    for stage in planned:
        config = stage.config.read_text(encoding="utf-8") if stage.config else ""
        content = [stage.command, config, *(found[name] for name in stage.after)]
        found[stage.name] = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    return found


def rewards(model: Path) -> list[dict[str, object]]:
    """Return the rewards of GRPO: the golden answer where one is right, the reward model in the other fields."""
    golden = {"kind": "exact_match", "weight": dict.fromkeys(GOLDEN, 1.0), "category": "field"}
    others = dict.fromkeys((field for field in FIELDS if field not in GOLDEN), 1.0)
    return [{"kind": "model", "path": str(model), "weight": others, "category": "field"}, golden]


class _Plan:
    def __init__(self, out: Path, seed: int, held_out: int, scale: float):
        self.out, self.data = out, out / "data"
        self._seed, self._held_out, self._scale = seed, held_out, scale

    def stages(self) -> tuple[Stage, ...]:
        merges = [self._merge(method) for method in METHODS]
        last = ("grpo", "pas")
        augment = {"--augment": self._hf("pas"), "--augment_template": TEMPLATE}
        return (
            self._questions(),
            self._pas_build(),
            self._train("pas", "data/untrained", "pas_build/data.jsonl", "pas_build"),
            self._evaluate("pas", "complements"),
            self._mix("base", "field", *(f"{field}={share}" for field, share in BASE_SHARES.items())),
            self._train("base", "data/untrained", "mix_base/mixture.json", "mix_base"),
            self._evaluate("base"),
            *(stage for group in GROUPS for stage in self._field(group)),
            *merges,
            *(self._evaluate(merge.name) for merge in merges),
            self._sample(),
            self._reward(),
            self._evaluate("reward", "preferences"),
            self._evaluate(MERGED, "preferences"),
            self._mix("prompts", "field", HARD_PROMPTS, data="prompts"),
            self._grpo(),
            self._evaluate("grpo"),
            self._evaluate("grpo", "answers", "augmented", last, augment),
        )

    def _questions(self) -> Stage:
        options = {
            "--out": self.data,
            "--seed": self._seed,
            "--held-out": self._held_out,
            "--scale": self._scale,
        }
        command = f"python -m examples.baichuan_alignment.questions {_text(options)}"
        return Stage(name="questions", command=command, output=self.data)

    def _pas_build(self) -> Stage:
        script, out = HERE / "scripted.py", self.out / "pas_build"
        options = {
            "--prompts": self.data / "raw.jsonl",
            "--examples": self.data / "examples.jsonl",
            "--out": out,
            "--generator": f"{script}:reply",
            "--quality": f"{script}:quality",
            "--min-quality": 5,
            "--labels": f"{script}:labels",
            "--duplicates": 0.9,
            "--tokenizer": self.data / "untrained",
            "--template": TEMPLATE,
        }
        command = f"megatron-align pas build {_text(options)}"
        return Stage(name="pas_build", command=command, output=out / "data.jsonl", after=("questions",))

    def _mix(self, name: str, by: str, *shares: str, data: str = "chats") -> Stage:
        out = self.out / f"mix_{name}"
        options = {"--data": self.data / f"{data}.jsonl", "--by": by, "--out": out}
        command = f"megatron-align data mix {_text(options)} --share {' '.join(shares)}"
        return Stage(
            name=out.name,
            command=command,
            output=out / "mixture.json",
            after=("questions",),
            starts_anew=True,
        )

    def _field(self, group: str) -> tuple[Stage, ...]:
        """Return the stages of one field's model: its mixture, its training and its evaluation."""
        mix, name = f"mix_{group}", f"sft_{group}"
        trained = self._train(name, "base/hf", f"{mix}/mixture.json", "base", mix)
        return self._mix(group, "group", f"{group}={OWN_SHARE}"), trained, self._evaluate(name)

    def _merge(self, method: str) -> Stage:
        models = [f"sft_{group}" for group in GROUPS]
        base = "" if method == "linear" else f" --base {_quoted(self.out / 'base' / 'hf')}"
        folders = " ".join(_quoted(self._hf(model)) for model in models)
        out = self.out / f"merge_{method}" / "hf"
        # Between their mean, which would equal linear, and their sum, which overshoots: all three share a direction.
        weights = f" --weights {' '.join('0.5' for _ in models)}" if method == "task_arithmetic" else ""
        command = f"megatron-align merge {method}{base} --models {folders}{weights} --out {_quoted(out)}"
        return Stage(name=f"merge_{method}", command=command, output=out, after=("base", *models))

    def _sample(self) -> Stage:
        out = self.out / "sampled"
        options = {
            "--models": self._hf(MERGED),
            "--prompts": self.data / "sample_prompts.jsonl",
            "--out": out,
            "--check": "exact_match",
            "--format": "pair",
            "--max-tokens": 12,
            "--precision": "fp32",
        }
        command = f"megatron-align sample {_text(options)}"
        return Stage(name="sampled", command=command, output=out / "data.jsonl", after=(MERGED, "questions"))

    def _reward(self) -> Stage:
        own = {"path": str(self.out / "sampled" / "data.jsonl"), "weight": OWN_PAIRS}
        # A model of few steps has no right answer, and so no pairs.
        own_pairs = [own] if self._scale >= OWN_PAIRS_FROM else []
        sources = json.dumps([*own_pairs, str(self.data / "pairs.jsonl")])
        return self._train("reward", f"{MERGED}/hf", sources, "sampled", MERGED)

    def _grpo(self) -> Stage:
        ptx = {"data": str(self.data / "chats.jsonl"), "coefficient": 0.1, "kind": "topk_kl", "top_k": 64}
        ptx["samples"] = max(8, round(64 * self._scale))
        more = {
            "--objective.ptx": json.dumps(ptx),
            "--rewards": json.dumps(rewards(self._hf("reward"))),
        }
        return self._train(
            "grpo", f"{MERGED}/hf", "mix_prompts/mixture.json", MERGED, "reward", "mix_prompts", more=more
        )

    def _train(
        self, name: str, model: str, data: str, *after: str, more: Mapping[str, object] | None = None
    ) -> Stage:
        """Return a training stage; ``model`` and ``data`` are paths in the folder, or data a list as JSON."""
        config = HERE / f"{'sft' if name.startswith('sft_') else name}.yaml"
        if data.endswith("mixture.json"):
            given = f'"$(cat {_quoted(self.out / data)})"'
        else:
            given = _quoted(data if data.startswith("[") else self.out / data)
        options = {"--config": config, "--model.path": self.out / model, "--checkpoint.dir": self.out / name}
        command = f"python -m megatron_align.train {_text(options)} --data.train {given}"
        command += f" {_text({**(more or {}), **self._scaled(config)})}".rstrip()
        return Stage(name=name, command=command, output=self._hf(name), after=after, config=config)

    def _scaled(self, config: Path) -> dict[str, object]:
        """Return the options that shorten a training; none of the complete recipe."""
        if self._scale == 1:
            return {}
        options = read_yaml(str(config))
        steps = max(2, round(self._scale * options["train"]["steps"]))
        batch = max(8, round(self._scale * options["train"]["global_batch_size"]))
        return {"--train.steps": steps, "--train.global_batch_size": batch, "--optimizer.warmup_steps": 1}

    def _evaluate(
        self,
        model: str,
        config: str = "answers",
        label: str = "",
        after: tuple[str, ...] = (),
        more: Mapping[str, object] | None = None,
    ) -> Stage:
        out = self.out / "evaluations" / (model if config != "preferences" else f"{model}_preferences")
        out = out.with_name(f"{model}_{label}") if label else out
        options = {"--config": self.data / f"{config}.yaml", "--model": self._hf(model), "--out": out}
        command = f"megatron-align evaluate {_text({**options, **(more or {})})}"
        name = f"evaluate_{out.name}"
        return Stage(
            name=name, command=command, output=out / "results.json", after=after or (model, "questions")
        )

    def _hf(self, name: str) -> Path:
        return self.out / name / "hf"


def _quoted(value: object) -> str:
    return shlex.quote(str(value))


def _text(options: Mapping[str, object]) -> str:
    """Return options as part of a command line."""
    return " ".join(f"{name} {_quoted(value)}" for name, value in options.items())
