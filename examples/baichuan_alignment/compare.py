"""Compare what the report claims of its last stages, on the merged model of a finished recipe, over several seeds.

    python -m examples.baichuan_alignment.compare --recipe runs/baichuan_alignment --out runs/compare --seeds 1 2 3

GRPO with the KL over the likeliest tokens, with cross-entropy, and without a term on supervised data (PTX); PPO with
the same prompts, rewards and KL; DPO and KTO on the same questions; reward models with and without the term of absolute
scores, on so few pairs that they can overfit. The same command continues after a kill.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from examples.baichuan_alignment import compare_data
from examples.baichuan_alignment.plan import HERE, MERGED, Stage, rewards
from examples.baichuan_alignment.questions import FIELDS, TEMPLATE
from examples.baichuan_alignment.results import Scores, read_scores
from examples.baichuan_alignment.runner import Runner, StageFailed
from megatron_align.errors import InputError, require

PTX = {"coefficient": 0.1, "samples": 64}
GRPO = ("grpo, PTX-KL", "grpo, PTX cross-entropy", "grpo, no PTX")
PPO = "ppo, PTX-KL"
OFFLINE = ("dpo", "kto")
POLICIES = (*GRPO, PPO, *OFFLINE)
REWARDS = ("reward, alpha 0", "reward, alpha 0.5")
AUGMENTED = GRPO[0]  # whose answers are also evaluated with PAS, as in the recipe
DATA = "data"
REWARD_STEPS, REWARD_BATCH = 96, 64
PASS = compare_data.PAIRS // REWARD_BATCH  # steps of a pass over the pairs


def stages(
    recipe: Path,
    out: Path,
    seeds: Sequence[int],
    policies: Sequence[str] = POLICIES,
    more: Mapping[str, object] | None = None,
) -> list[Stage]:
    """Return the data's stage, and a training and an evaluation of each variant and seed.

    Args:
        recipe: folder of a finished recipe.
        out: folder of the comparison.
        seeds: of the trainings.
        policies: variants that are trained, besides the reward models.
        more: options of each training of a policy.
    """
    data = f"python -m examples.baichuan_alignment.compare_data {_text({'--recipe': recipe, '--out': out / DATA})}"
    found = [Stage(name=DATA, command=data, output=out / DATA)]
    for seed in seeds:
        for name in (*REWARDS, *policies):
            options = (
                _of_reward(recipe, out, name)
                if name in REWARDS
                else {**_of_policy(recipe, out, name), **(more or {})}
            )
            found += _variant(recipe, out, (name, seed), options)
    return found


def folder(out: Path, name: str, seed: int) -> Path:
    """Return the folder of a variant with a seed."""
    return out / f"{name.replace(',', '').replace(' ', '_')}_{seed}"


def _of_policy(recipe: Path, out: Path, name: str) -> dict[str, object]:
    cache = {"--data.cache": out / "cache"}  # of all seeds: they read the same data
    if name in OFFLINE:
        return {"--data.train": compare_data.mixture(recipe, out / DATA, name), **cache}
    data = (recipe / "mix_prompts" / "mixture.json").read_text(encoding="utf-8")
    options: dict[str, object] = {
        **cache,
        "--data.train": data,
        "--rewards": json.dumps(rewards(recipe / "reward" / "hf")),
    }
    if name == GRPO[2]:
        return options
    kind = {"kind": "nll"} if name == GRPO[1] else {"kind": "topk_kl", "top_k": 64}
    ptx = {**PTX, "data": str(recipe / "data" / "chats.jsonl"), **kind}
    return {**options, "--objective.ptx": json.dumps(ptx)}


def _of_reward(recipe: Path, out: Path, name: str) -> dict[str, object]:
    held_out = [str(recipe / "data" / "preferences" / f"{field}.jsonl") for field in FIELDS]
    return {
        "--data.train": out / DATA / compare_data.FEW,
        "--data.validation": json.dumps(held_out),
        "--objective.alpha": name.split()[-1],
        "--train.global_batch_size": REWARD_BATCH,
        "--train.steps": REWARD_STEPS,
        "--train.validate_every": PASS,
    }


def _variant(
    recipe: Path, out: Path, variant: tuple[str, int], options: Mapping[str, object]
) -> tuple[Stage, ...]:
    name, seed = variant
    kind = name.partition(",")[0]
    own, file = folder(out, name, seed), HERE / f"{kind}.yaml"
    given = {"--config": file, "--model.path": recipe / MERGED / "hf", "--checkpoint.dir": own}
    train = Stage(
        name=own.name,
        command=f"python -m megatron_align.train {_text({**given, **options, '--train.seed': seed})}",
        output=own / "hf",
        after=() if kind in ("grpo", "ppo") else (DATA,),
        config=file,
    )
    tasks = out / DATA / compare_data.TASKS if kind == "reward" else recipe / "data" / "answers.yaml"
    evaluations = [_evaluation(own, tasks, "evaluation", {})]
    if name == AUGMENTED:
        augment = {"--augment": recipe / "pas" / "hf", "--augment_template": TEMPLATE}
        evaluations.append(_evaluation(own, tasks, "augmented", augment))
    return (train, *evaluations)


def _evaluation(own: Path, tasks: Path, label: str, more: Mapping[str, object]) -> Stage:
    scored = {"--config": tasks, "--model": own / "hf", "--out": own / label}
    return Stage(
        name=f"{label}_{own.name}",
        command=f"megatron-align evaluate {_text({**scored, **more})}",
        output=own / label / "results.json",
        after=(own.name,),
    )


def _text(options: Mapping[str, object]) -> str:
    return " ".join(f"{name} {shlex.quote(str(value))}" for name, value in options.items())


def scores(
    recipe: Path, out: Path, seeds: Sequence[int], policies: Sequence[str] = POLICIES
) -> dict[str, list[Scores]]:
    """Return each variant's scores over the seeds, first those of the merged model before."""
    found = {"merged, before": [read_scores(recipe / "evaluations" / MERGED)]}
    for name in policies:
        found[name] = [read_scores(folder(out, name, seed) / "evaluation") for seed in seeds]
        if name == AUGMENTED:
            with_pas = [read_scores(folder(out, name, seed) / "augmented") for seed in seeds]
            found[f"{name}, with PAS"] = with_pas
    for name in REWARDS:
        found[name] = [read_scores(folder(out, name, seed) / "evaluation", "preferences") for seed in seeds]
    return found


def lines(found: Mapping[str, Sequence[Scores]]) -> list[str]:
    """Return a row of each variant: mean and deviation over the seeds of each field's share, and of their mean."""
    rows = [f"{'':24}" + "".join(f"{field:>15}" for field in (*FIELDS, "mean"))]
    for name, seeds in found.items():
        of_fields = [[one[field].share for one in seeds] for field in FIELDS]
        means = [statistics.fmean(one[field].share for field in FIELDS) for one in seeds]
        cells = [f"{statistics.fmean(s):.1%} ± {statistics.pstdev(s):.1%}" for s in (*of_fields, means)]
        rows.append(f"{name:24}" + "".join(f"{cell:>15}" for cell in cells))
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Run with command-line arguments; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m examples.baichuan_alignment.compare", allow_abbrev=False)
    add = parser.add_argument
    add("--recipe", type=Path, default=Path("runs/baichuan_alignment"), help="folder of a finished recipe")
    add("--out", type=Path, default=Path("runs/compare"), help="folder to write")
    about = "of the trainings (default: 1 2 3)"
    add("--seeds", type=int, nargs="+", default=[1, 2, 3], metavar="N", help=about)
    about = f"of {', '.join(POLICIES)} (default: all)"
    add("--policies", nargs="+", choices=POLICIES, default=POLICIES, metavar="NAME", help=about)
    add("--steps", type=int, default=80, metavar="N", help="of each training of a policy (default: 80)")
    about = "learning rate of the policies (default: 2e-4, as the recipe's GRPO)"
    add("--lr", type=float, default=2e-4, metavar="RATE", help=about)
    add("--jobs", type=int, default=2, metavar="N", help="stages that run at once (default: 2)")
    options = parser.parse_args(arguments)
    recipe, out = options.recipe.resolve(), options.out.resolve()
    try:
        require(options.steps >= 1, f"--steps must be at least 1, got {options.steps}")
        require(
            (recipe / "reward" / "hf").is_dir(),
            f"--recipe must be the folder of a finished recipe, got {recipe}",
        )
        more = {"--train.steps": options.steps, "--optimizer.lr": options.lr}
        planned = stages(recipe, out, options.seeds, options.policies, more)
        for number, finished in enumerate(Runner(out, planned, options.jobs).run(lambda names: None), 1):
            took = "before" if finished.seconds is None else f"{finished.seconds:.0f} s"
            print(f"[{number:2}/{len(planned)}] {finished.stage.name:40} {took}", flush=True)
        print("\n".join(lines(scores(recipe, out, options.seeds, options.policies))))
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except StageFailed as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print("stopped: the same command continues", file=sys.stderr, flush=True)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
