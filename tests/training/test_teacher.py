"""A teacher of another shape: the loss is that of full logits over the tokens that both models have (judge:
transformers in float64), the same on every layout (1e-5); its memory is free when the policy is built, and counted in
plans. What the layout cannot divide, or cannot read the data, is refused in one line.
"""

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_align.cost.placement import Placement, SecondShapes
from megatron_align.cost.search import memory_before, memory_of
from megatron_align.cost.work import flops_of, full_packs, pass_flops, scoring_passes, step_flops
from megatron_align.data.store import TokenStore
from megatron_align.errors import InputError, TrainingFault
from megatron_align.model.families import padded_vocab, read_shape
from megatron_align.model.parallel import RankInfo
from megatron_align.objectives.configuration import parse
from megatron_align.rollout.types import Completion, Prompt
from megatron_align.training.dry_run import describe
from megatron_align.training.known_tokens import require_scorable_tokens
from megatron_align.training.setup import prepare_run
from tests.harness import training_ranks
from tests.harness.marks import mark_slow
from tests.harness.tiny import make_model, make_reward, metrics_of, run_arguments, write_chat
from tests.training.test_distill import trl_divergence
from tests.training.test_preference_layout import LAYOUTS

ROWS = 264  # of the teacher's embedding
TEACHER = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": ROWS,
    "initializer_range": 0.3,
}
STUDENTS = {"fewer rows": "qwen2_tied", "more rows": "qwen2_untied"}
CASES = [("fewer rows", "tp2_pp2")]
SLOW = [
    (s, layout)
    for s in STUDENTS
    for layout in (None, *LAYOUTS)
    if layout != "vpp2" and (s, layout) not in CASES
]
TEMPERATURE, BETA = 1.5, 0.3


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A Llama with scaled RoPE, half the depth, another width and untied embeddings."""
    return make_model(tmp_path_factory.mktemp("models") / "teacher", "llama3", **TEACHER)


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return write_chat(tmp_path_factory.mktemp("data") / "chat.jsonl", samples=12, seed=5)


def arguments(student, teacher, chat, folder, **options):
    given = {
        "objective__name": "distill",
        "objective__divergence": "js",
        "objective__js_beta": BETA,
        "objective__top_k": 259,
        "objective__temperature": TEMPERATURE,
        "reference__path": teacher,
        "train__steps": 1,
        "train__self_check": False,
        **options,
    }
    return run_arguments(student, chat, folder, **given)


@pytest.fixture(scope="module")
def trained(pool, tiny_models, teacher, chat, tmp_path_factory):
    """``trained(student, layout)`` -> its rows, the folder of its tokenised data, and who was alive; made once."""
    done = {}

    def run(student, layout):
        if (student, layout) not in done:
            folder = tmp_path_factory.mktemp("run")
            world, options = (1, {}) if layout is None else LAYOUTS[layout]
            options = {"objective__top_k": 259 if student == "fewer rows" else ROWS, **options}
            given = arguments(tiny_models(STUDENTS[student]), teacher, chat, folder / "run", **options)
            alive = pool.run(
                world, training_ranks.references_alive, [*given, f"--data.cache={folder / 'cache'}"]
            )
            done[student, layout] = metrics_of(folder / "run"), folder / "cache", alive
        return done[student, layout]

    return run


def models(*folders):
    return [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64) for folder in folders]


@torch.no_grad()
def judged(student, teacher, cache):
    """Return the mean divergence of full logits over the tokens that both models have."""
    [file] = cache.glob("*/manifest.json")
    store, total, count = TokenStore(file.parent), 0.0, 0
    judges = models(student, teacher)
    for i in range(len(store)):
        sample = store.sample(i)
        tokens = torch.from_numpy(sample.tokens_L.astype(np.int64))[None]
        rows = torch.from_numpy(np.flatnonzero(sample.scored_L) - 1)
        logits = [model(tokens).logits[0, rows] / TEMPERATURE for model in judges]
        shared = min(each.shape[1] for each in logits)
        p, q = (each[:, :shared].log_softmax(-1) for each in logits)
        total, count = total + trl_divergence(p, q, BETA).item(), count + len(rows)
    return total / count


@pytest.mark.parametrize("student, layout", mark_slow([*CASES, *SLOW], SLOW))
def test_the_loss_is_that_of_full_logits_on_every_layout(student, layout, trained, tiny_models, teacher):
    [row], cache, alive = trained(student, layout)
    assert row["loss"] == pytest.approx(judged(tiny_models(STUDENTS[student]), teacher, cache), rel=1e-5)
    assert row["loss"] > 0.01
    assert alive == [[0]] * len(alive)  # no teacher is in memory when the policy is built


@pytest.mark.slow
@pytest.mark.parametrize("layout", [None, "tp2_sp", "ulysses2", "allgather2_pp2"])
def test_on_policy_the_teacher_normalises_over_all_of_its_tokens(
    layout, pool, tiny_models, teacher, tmp_path
):
    """``kl`` of given completions is the mean of log policy - log teacher, each over its own vocabulary."""
    file, folder = tmp_path / "ranked.jsonl", tmp_path / "run"
    records = [
        {
            "prompt": f"{i} + {7 * i}",
            "completions": [{"content": "ab" * (i + k + 1), "score": k} for k in range(2)],
        }
        for i in range(8)
    ]
    file.write_text("\n".join(map(json.dumps, records)))
    world, options = (1, {}) if layout is None else LAYOUTS[layout]
    pool.run(
        world,
        training_ranks.train,
        run_arguments(
            tiny_models(),
            file,
            folder,
            objective__name="grpo",
            objective__beta=1.0,
            objective__kl_in="token_reward",
            objective__gamma=0.0,
            objective__advantage="reinforce",
            objective__normalize_advantages=False,
            objective__loss_type="bnpo",
            rollout__engine="data",
            reference__mode="live",
            reference__path=teacher,
            train__global_batch_size=8,
            train__steps=1,
            **options,
        ),
    )
    [file] = folder.rglob("manifest.json")
    store, found, judges = TokenStore(file.parent), [], models(tiny_models(), teacher)
    for i in range(len(store)):
        sample = store.sample(i)
        start = sample.prompt_length
        for length in sample.completion_lengths:
            text = [*sample.tokens_L[: sample.prompt_length], *sample.tokens_L[start : start + length]]
            tokens = torch.tensor([text], dtype=torch.int64)
            with torch.no_grad():
                logprobs = [model(tokens).logits[0].log_softmax(-1) for model in judges]
            for row in range(sample.prompt_length - 1, len(text) - 1):
                found.append(float(logprobs[0][row, text[row + 1]] - logprobs[1][row, text[row + 1]]))
            start += length
    [row] = metrics_of(folder)
    assert row["kl"] == pytest.approx(np.mean(found), rel=1e-5)


REFUSED = {
    "heads": (
        {"parallel__tensor": 4},
        {"num_attention_heads": 6, "num_key_value_heads": 2},
        4,
        "reference.path, a model of 2 layers: parallel.tensor must divide the model's 6 attention heads, got 4",
    ),
    "layers": (
        {"parallel__pipeline": 2},
        {"num_hidden_layers": 3},
        2,
        "reference.path, a model of 3 layers: parallel.pipeline x virtual_pipeline must divide the model's 3 layers",
    ),
    "context": (
        {"parallel__context": 4, "parallel__context_kind": "ulysses"},
        {"num_attention_heads": 6},
        4,
        "reference.path, a model of 2 layers: parallel.context_kind: ulysses needs attention heads",
    ),
    "fewer rows than tokens": (
        {},
        {"vocab_size": 250},
        1,
        "reference.path must have a row for every token of the data, got 250 rows for token 25[0-9] of data.train",
    ),
    "fewer positions than tokens": (
        {},
        {"max_position_embeddings": 16},
        1,
        "reference.path must have a position for every token of a sample, got 16 positions for",
    ),
    "more columns than shared tokens": (
        {"objective__top_k": 260},
        {},
        1,
        "objective.top_k must be at most the vocabulary of 259, got 260",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(name, tiny_models, chat, tmp_path):
    options, changes, ranks, message = REFUSED[name]
    teacher = make_model(tmp_path / "teacher", "llama3", **{**TEACHER, **changes})
    given = arguments(tiny_models(), teacher, chat, tmp_path / "run", **options)
    with pytest.raises(InputError, match=message):
        prepare_run(parse(given), RankInfo(0, 0, ranks), tmp_path / "scratch")


def test_other_models_are_refused(tiny_models, teacher, chat, tmp_path):
    other = shutil.copytree(teacher, tmp_path / "other")
    content = json.loads((other / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(content))
    cases = {
        other: "reference.path must have model.path's tokenizer.*2 tokens differ",
        make_reward(
            tmp_path / "reward", "qwen2"
        ): "reference.path must hold a language model, got Qwen2ForSequence",
        tmp_path / "nowhere": "nowhere",
    }
    for path, message in cases.items():
        given = arguments(tiny_models(), path, chat, tmp_path / "run")
        with pytest.raises(InputError, match=message):
            prepare_run(parse(given), RankInfo(0, 0, 1), tmp_path / "scratch")


def test_a_token_that_the_teacher_lacks_ends_the_run():
    answer = Completion(token_ids=(3, 300), logprobs=(), text="", finish_reason="stop", weight_version=0)
    prompts = [Prompt([1], 0, "line 7 of prompts.jsonl")]
    require_scorable_tokens([[answer]], prompts, {"reference.path": 301})
    with pytest.raises(
        TrainingFault, match="token 300 to line 7 of prompts.jsonl, for which reference.path has no"
    ):
        require_scorable_tokens([[answer]], prompts, {"reference.path": 300})


def test_plans_count_the_teacher(tiny_models, teacher, chat, tmp_path):
    """Its weights to the byte, before training where its columns are cached; live its own operations."""
    config = parse(arguments(tiny_models(), teacher, chat, tmp_path / "run"))
    policy, shape = read_shape(tiny_models()), read_shape(teacher)
    placement = Placement.of_run(config, policy, 1, SecondShapes(reference=shape))
    [model] = models(teacher)
    padding = 2 * (padded_vocab(ROWS, 1) - ROWS) * shape.hidden_size  # of embedding and head
    weights = 4 * (sum(parameter.numel() for parameter in model.parameters()) + padding)
    [before] = memory_before(config, placement)
    assert before.parameters == weights
    assert memory_before(config, Placement.of_run(config, policy, 1)) == ()

    online = [
        "--objective.name=grpo",
        "--objective.beta=0.1",
        "--rollout.engine=data",
        "--reference.mode=live",
    ]
    given = ["--model.path=m", "--data.train=d", "--checkpoint.dir=c", "--train.steps=1", *online]
    live = parse([*given, f"--reference.path={teacher}"])
    assert memory_before(live, placement) == ()
    assert memory_of(live, placement, 1)[0].reference == weights
    [work] = full_packs(live)(placement)
    policy_alone = step_flops(placement, work, scoring_passes(live) - 1).model
    own = pass_flops(Placement.of_run(live, shape, 1), work).model
    assert flops_of(live, placement, work).model == policy_alone + own > policy_alone

    text = describe(prepare_run(config, RankInfo(0, 0, 1), tmp_path / "scratch"))
    assert (
        f"reference  LlamaForCausalLM, {model.num_parameters() / 1e9:.3g} billion weights, 2 layers" in text
    )
    assert "before training the reference takes up to" in text
