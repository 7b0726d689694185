"""Compare what the report claims of its last stages, on the merged model of a finished recipe, over several seeds.

    python -m examples.baichuan_alignment.compare --recipe runs/baichuan_alignment --out runs/compare --seeds 1 2 3

GRPO with the KL over the likeliest tokens, with cross-entropy, and without a term on supervised data (PTX); DPO on the
same questions; reward models with and without the term of absolute scores. The same command continues after a kill.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from examples.baichuan_alignment.plan import HERE, MERGED, Stage, rewards
from examples.baichuan_alignment.questions import FIELDS
from examples.baichuan_alignment.results import read_scores
from examples.baichuan_alignment.runner import Runner, StageFailed
from megatron_align.errors import InputError, require

PTX = {"coefficient": 0.1, "samples": 64}
GRPO = ("grpo, PTX-KL", "grpo, PTX cross-entropy", "grpo, no PTX")
POLICIES = (*GRPO, "dpo")
REWARDS = ("reward, alpha 0", "reward, alpha 0.5")


def stages(recipe: Path, out: Path, seeds: Sequence[int], policies: Sequence[str] = POLICIES) -> list[Stage]:
    """Return a training and an evaluation of each variant and seed."""
    sampled = json.dumps([str(recipe / "sampled" / "data.jsonl"), str(recipe / "data" / "pairs.jsonl")])
    ptx = {**PTX, "data": str(recipe / "data" / "chats.jsonl")}
    kinds: dict[str, dict[str, object] | None] = {
        GRPO[0]: {**ptx, "kind": "topk_kl", "top_k": 64},
        GRPO[1]: {**ptx, "kind": "nll"},
        GRPO[2]: None,
    }
    found = []
    for seed in seeds:
        for name in (*policies, *REWARDS):
            more: dict[str, object] = {"--train.seed": seed}
            if name in kinds:
                config, data = "grpo", (recipe / "mix_prompts" / "mixture.json").read_text(encoding="utf-8")
                more["--rewards"] = json.dumps(rewards(recipe / "reward" / "hf"))
                more |= {"--objective.ptx": json.dumps(kinds[name])} if kinds[name] else {}
            else:
                config, data = name.partition(",")[0], sampled
                more |= {"--objective.alpha": name.split()[-1]} if name in REWARDS else {}
            found += _variant(recipe, folder(out, name, seed), config, {"--data.train": data, **more})
    return found


def folder(out: Path, name: str, seed: int) -> Path:
    """Return the folder of a variant with a seed."""
    return out / f"{name.replace(',', '').replace(' ', '_')}_{seed}"


def _variant(recipe: Path, out: Path, config: str, options: Mapping[str, object]) -> tuple[Stage, Stage]:
    file = HERE / f"{config}.yaml"
    given = {"--config": file, "--model.path": recipe / MERGED / "hf", "--checkpoint.dir": out, **options}
    tasks = recipe / "data" / f"{'preferences' if config == 'reward' else 'answers'}.yaml"
    evaluation = out / "evaluation"
    scored = {"--config": tasks, "--model": out / "hf", "--out": evaluation}
    return (
        Stage(
            name=out.name,
            command=f"python -m megatron_align.train {_text(given)}",
            output=out / "hf",
            config=file,
        ),
        Stage(
            name=f"evaluate_{out.name}",
            command=f"megatron-align evaluate {_text(scored)}",
            output=evaluation / "results.json",
            after=(out.name,),
        ),
    )


def _text(options: Mapping[str, object]) -> str:
    return " ".join(f"{name} {shlex.quote(str(value))}" for name, value in options.items())


def lines(recipe: Path, out: Path, seeds: Sequence[int], policies: Sequence[str] = POLICIES) -> list[str]:
    """Return a row of each variant: mean and deviation over the seeds of each field's share, and of their mean."""
    rows = [("merged, before", [read_scores(recipe / "evaluations" / MERGED)])]
    rows += [
        (name, [read_scores(folder(out, name, seed) / "evaluation") for seed in seeds]) for name in policies
    ]
    for name in REWARDS:
        rows.append(
            (name, [read_scores(folder(out, name, seed) / "evaluation", "preferences") for seed in seeds])
        )
    found = [f"{'':24}" + "".join(f"{field:>15}" for field in (*FIELDS, "mean"))]
    for name, scores in rows:
        of_fields = [[one[field].share for one in scores] for field in FIELDS]
        means = [statistics.fmean(one[field].share for field in FIELDS) for one in scores]
        cells = [f"{statistics.fmean(s):.1%} ± {statistics.pstdev(s):.1%}" for s in (*of_fields, means)]
        found.append(f"{name:24}" + "".join(f"{cell:>15}" for cell in cells))
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run with command-line arguments; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m examples.baichuan_alignment.compare", allow_abbrev=False)
    add = parser.add_argument
    add("--recipe", type=Path, default=Path("runs/baichuan_alignment"), help="folder of a finished recipe")
    add("--out", type=Path, default=Path("runs/compare"), help="folder to write")
    add(
        "--seeds",
        type=int,
        nargs="+",
        default=[1, 2, 3],
        metavar="N",
        help="of the trainings (default: 1 2 3)",
    )
    add(
        "--policies",
        nargs="+",
        choices=POLICIES,
        default=POLICIES,
        metavar="NAME",
        help=f"of {', '.join(POLICIES)}",
    )
    add("--jobs", type=int, default=2, metavar="N", help="stages that run at once (default: 2)")
    options = parser.parse_args(arguments)
    recipe, out = options.recipe.resolve(), options.out.resolve()
    try:
        require(
            (recipe / "reward" / "hf").is_dir(),
            f"--recipe must be the folder of a finished recipe, got {recipe}",
        )
        planned = stages(recipe, out, options.seeds, options.policies)
        for number, finished in enumerate(Runner(out, planned, options.jobs).run(lambda names: None), 1):
            took = "before" if finished.seconds is None else f"{finished.seconds:.0f} s"
            print(f"[{number:2}/{len(planned)}] {finished.stage.name:40} {took}", flush=True)
        print("\n".join(lines(recipe, out, options.seeds, options.policies)))
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except StageFailed as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
