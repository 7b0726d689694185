"""Law 13 for a run: every option of every section changes what it should, or is refused in that combination.

The options are the declared ones, of nested mappings and of every kind of reward too; those of objectives have
``tests/objectives/test_options_used.py``, those of commands ``tests/tools/test_options_used.py``. What an option
changes is looked at where that is cheap: what a dry run says, the samples of each step, tokenised data, rates,
adapters, rewards, and two short runs that differ in many options of which each has a trace of its own.
"""

import json
from contextlib import ExitStack
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from megatron_align.config.rewards import KINDS, EndpointReward, ModelReward, RewardConfig
from megatron_align.config.rewards import build_rewards as read_rewards
from megatron_align.config.run import SECTIONS
from megatron_align.config.validation import SamplesConfig
from megatron_align.cost.placement import Placement
from megatron_align.cost.search import memory_of
from megatron_align.data.batching.rollout_order import train_order
from megatron_align.data.batching.sampler import step_order
from megatron_align.data.store import TokenStore
from megatron_align.data.tokenize.cache_key import StoreSpec
from megatron_align.data.tokenize.prepare import prepare
from megatron_align.errors import InputError
from megatron_align.hf.adapter_options import resolve_adapter
from megatron_align.model.families import read_shape
from megatron_align.model.parallel import RankInfo
from megatron_align.objectives.configuration import parse
from megatron_align.objectives.policy_gradient import PolicyGradientObjective
from megatron_align.rollout.prompt_table import open_prompts
from megatron_align.rollout.prompts import PromptRecord
from megatron_align.rollout.rewards import endpoint
from megatron_align.rollout.rewards.scoring import build_rewards, combine, score_rewards
from megatron_align.rollout.types import Completion
from megatron_align.training import generation, reward_model
from megatron_align.training.dry_run import describe
from megatron_align.training.generation import sampling_of
from megatron_align.training.learning_rate import learning_rate
from megatron_align.training.rollout_servers import endpoint_of
from megatron_align.training.samples import Samples
from megatron_align.training.setup import one_epoch, prepare_run
from tests.harness import training_ranks
from tests.harness.options import options_of, without_one_entry, wrong_test
from tests.harness.tiny import (
    make_adapter,
    make_model,
    make_reward,
    metrics_of,
    run_arguments,
    write_chat,
    write_pairs,
)

DPO = {"objective__name": "dpo", "data__train": "pairs.jsonl"}
GRPO = {"objective__name": "grpo", "data__train": "prompts.jsonl", "rewards": "[{kind: length, max: 3}]"}
GRPO |= {"train__global_batch_size": 2, "rollout__max_tokens": 8}
VLLM = {**GRPO, "rollout__engine": "vllm", "rollout__url": "http://127.0.0.1:1"}
STARTED = {**GRPO, "rollout__engine": "vllm", "rollout__vllm_python": "python"}
TENSOR, PIPELINE, CONTEXT = ({f"parallel__{kind}": 2} for kind in ("tensor", "pipeline", "context"))
LORA = {"model__adapter": {"rank": 3}}
LAYERED = {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2}
PLAIN = "{% for m in messages %}{{ m.content }}{% endfor %}"
CLOCK = "{{ strftime_now('%Y') }}" + PLAIN


def configured(place, options):
    """Return the configuration of a run in ``place``; mappings become mappings of the option."""
    options = {"data__train": "chat.jsonl", "data__cache": place / "cache", **options}
    given = {}
    for name, value in options.items():
        for inner in ("data__train", "data__validation", "data__chat_template"):
            value = place / value if name == inner and (place / str(value)).is_file() else value
        given[name] = json.dumps(value, default=str) if isinstance(value, (dict, list)) else value
    return parse(run_arguments(place / "model", place / "chat.jsonl", place / "run", **given))


def checked(place, options):
    ranks = options.pop("ranks", 1)
    config = configured(place, options)
    layout = config.parallel
    ranks *= layout.tensor * layout.pipeline * layout.context
    return prepare_run(config, RankInfo(0, 0, ranks), place / "cache")


def said(place, options):
    """What a dry run says."""
    return describe(checked(place, options))


def staged(place, options):
    """The bytes of each stage's weights, of which a dry run's table shows the GiB."""
    setup = checked(place, options)
    placement = Placement.of_run(setup.config, setup.shape, setup.rank_info.world_size)
    return [stage.parameters for stage in memory_of(setup.config, placement, 1)]


def set_up(place, options):
    """The adapter, the tensors that are not trained, and where the weights come from."""
    setup = checked(place, options)
    return setup.adapter, setup.frozen, setup.weights, setup.config.model.adapter


def resolved(place, options):
    """The adapter as it is built, and how it starts."""
    config = configured(place, options)
    return resolve_adapter(config.model.adapter, read_shape(place / "model")), config.model.adapter.init


def stored(place, options):
    """Tokens and trained tokens of every sample, and where the store lies."""
    spec = StoreSpec.of_run(configured(place, options), "train", str(place / "model"))
    store = TokenStore(prepare(spec))
    samples = [store.sample(i) for i in range(len(store))]
    return [(s.tokens_L.tolist(), s.scored_L.tolist()) for s in samples], store.path.parent


def ordered(place, options):
    """The samples of every step."""
    config = configured(place, options)
    spec = StoreSpec.of_run(config, "train", str(place / "model"))
    order = train_order(TokenStore(prepare(spec)), config)
    return [order.samples(step).tolist() for step in range(order.steps)]


def validated(place, options):
    """The samples of every step of a validation."""
    config = configured(place, options)
    store = TokenStore(prepare(StoreSpec.of_run(config, "validation", str(place / "model"))))
    order = step_order(store, config.data, one_epoch(config.train), config.data.validation)
    return [order.samples(step).tolist() for step in range(order.steps)]


def prompted(place, options):
    """The tokens of the prompts of an online run, and how they are answered."""
    config = configured(place, options)
    prompts = open_prompts(config.data, config.rollout, str(place / "model"))
    tokens = [prompts.sample(i).tokens_L.tolist() for i in range(len(prompts))]
    return tokens, sampling_of(config.rollout, prompts.completions, config.train.seed)


def asked(place, options):
    """How a server is reached."""
    return endpoint_of(configured(place, options).rollout, "http://127.0.0.1:1")


def served(place, options):
    """The servers of a run and how its engine is built; one that the run starts is only noted."""
    config = configured(place, options)
    setup = SimpleNamespace(assets=place / "model", weights=place / "model", folder=place)
    run = SimpleNamespace(_trainer=SimpleNamespace(config=config, setup=setup), _opened=ExitStack())
    with (
        mock.patch.object(generation, "shared_server") as started,
        mock.patch.object(generation, "VLLMEngine") as engine,
    ):
        started.return_value.__enter__.return_value = "http://127.0.0.1:3"
        servers = generation.EngineRollouts._servers(run)
        generation.build_engine(run._trainer, servers)
    [built] = engine.call_args_list
    return started.call_args_list, [server.url for server in built.args[0]], built.kwargs


def rates(place, options):
    config = configured(place, options)
    return [learning_rate(config.optimizer, step, 5) for step in range(1, 6)]


def drawn(place, options):
    """How the answers of ``validation.generate`` are drawn."""
    given = options.get("validation__generate", {})
    return Samples(None, SamplesConfig(**{"prompts": "p", **given}))._sampling


def answered(text):
    return Completion(
        token_ids=tuple(range(len(text))),
        logprobs=(0.0,) * len(text),
        text=text,
        finish_reason="stop",
        weight_version=0,
    )


def scored(place, options):
    """The values of rewards and their weighted sum, of two prompts with two answers each."""
    rewards = build_rewards(read_rewards([options["reward"]]))
    texts = [("a 12", "12"), ("It is 7, I\nthink", "7 7 7 and more")]
    groups = [
        (
            PromptRecord(raw=raw, where=f"p:{i}", prompt="q"),
            [answered(text) for text in some],
        )
        for i, (some, raw) in enumerate(zip(texts, RAW, strict=True))
    ]
    values = score_rewards(rewards, groups)
    return values, [each.tolist() for each in combine(rewards, values, [record for record, _ in groups])]


CHECKS = {
    "instruction_id_list": ["punctuation:no_comma", "change_case:english_lowercase"],
    "kwargs": [{}, {}],
}
RAW = [
    {"answer": "12", "category": "a", "kind": "b", **CHECKS},
    {"answer": "7", "category": "b", "kind": "a", **CHECKS},
]


def corrected(place, options):
    """The weights of tokens whose log-probs differ between trainer and engine."""
    section = SimpleNamespace(rollout=configured(place, options).rollout)
    difference_N, length_C = torch.tensor([-2.0, 0.1, 1.5, 0.9]), torch.tensor([2, 2])
    return PolicyGradientObjective._correction(section, difference_N, length_C, torch.ones(4) > 0).tolist()


def requested(place, options):
    """How a server of rewards is reached, with how many completions, and how many requests at once."""
    scorer = endpoint.EndpointScorer(EndpointReward(**options["reward"]))
    group = (PromptRecord(raw={}, where="p:1", prompt="q"), [answered("a")] * 8)
    with mock.patch.object(endpoint, "concurrently", return_value=[[0.0] * 8]) as requests:
        scorer.score([group])
    _, batches, workers = requests.call_args.args
    return scorer._endpoint, [len(batch) for batch in batches], workers


def judge(place, options):
    """The set-up of a reward model, with what its tokenizer is built of."""
    given = ModelReward(**options["reward"])
    with mock.patch.object(reward_model, "RecordTokenizer", lambda *of: (of[0].name_or_path, *of[1:])):
        setup = reward_model.RewardModelSetup.of(given, capacity=64)
    return setup.tokenizer, setup.capacity, setup.dtype, setup.shape


def built(place, options):
    """megatron-core's configuration of the model."""
    return sorted((name, str(value)) for name, value in vars(checked(place, options).megatron).items())


# How it is seen: what is looked at, the option's value off its default, and the options beside it. Where a mapping is
# changed, the value is the complete mapping.
OFF = {
    "model.path": (set_up, {"model__path": "other"}, {}),
    "model.adapter": (set_up, {"model__adapter": {"rank": 3}}, {}),
    "model.freeze": (set_up, {"model__freeze": ["embed_tokens.*"]}, {}),
    "data.train": (stored, {"data__train": "more.jsonl"}, {}),
    "data.shape": (stored, {"data__shape": "prompt_completion"}, {"data__train": "both.jsonl"}),
    "data.columns": (stored, {"data__columns": {"prompt": "other"}}, {"data__train": "columns.jsonl"}),
    "data.chat_template": (stored, {"data__chat_template": "plain.jinja"}, {}),
    "data.template_date": (
        stored,
        {"data__template_date": "2001-01-01"},
        {"data__chat_template": "clock.jinja"},
    ),
    "data.train_turns": (stored, {"data__train_turns": "last"}, {}),
    "data.drop_fields": (stored, {"data__drop_fields": ["name"]}, {"data__train": "named.jsonl"}),
    "data.on_bad_record": (stored, {"data__on_bad_record": "skip"}, {"data__train": "bad.jsonl"}),
    "data.too_long": (stored, {"data__too_long": "drop"}, {"data__sequence_length": 60}),
    "data.cache": (stored, {"data__cache": "elsewhere"}, {}),
    "data.sequence_length": (said, {"data__sequence_length": 512}, {}),
    "data.packing": (said, {"data__packing": False}, {}),
    "data.share_prefix": (said, {"data__share_prefix": False}, DPO),
    "data.shuffle": (ordered, {"data__shuffle": False}, {}),
    "data.train.path": (ordered, {"data__train": [{"path": "more.jsonl"}]}, {}),
    "data.train.weight": (ordered, {"data__train": [{"path": "chat.jsonl", "weight": 0.5}]}, {}),
    "data.validation.path": (
        validated,
        {"data__validation": [{"path": "more.jsonl"}]},
        {"data__validation": [{"path": "chat.jsonl"}]},
    ),
    "data.validation.weight": (
        validated,
        {"data__validation": [{"path": "chat.jsonl", "weight": 2.0}]},
        {"data__validation": [{"path": "chat.jsonl"}]},
    ),
    "reference.mode": (said, {"reference__mode": "live"}, DPO),
    "parallel.tensor": (said, TENSOR, {"ranks": 2}),
    "parallel.pipeline": (said, PIPELINE, {"ranks": 2}),
    "parallel.context": (said, CONTEXT, {"ranks": 2}),
    "parallel.context_kind": (said, {"parallel__context_kind": "ulysses"}, CONTEXT),
    "parallel.virtual_pipeline": (said, {"parallel__virtual_pipeline": 2}, PIPELINE),
    "parallel.first_stage_layers": (staged, {"parallel__first_stage_layers": 1}, PIPELINE),
    "parallel.last_stage_layers": (staged, {"parallel__last_stage_layers": 1}, PIPELINE),
    "parallel.count_embedding": (
        said,
        {"parallel__count_embedding": True},
        {**PIPELINE, "parallel__count_loss": True},
    ),
    "parallel.count_loss": (
        said,
        {"parallel__count_loss": True},
        {**PIPELINE, "parallel__count_embedding": True},
    ),
    "parallel.overlap_p2p": (built, {"parallel__overlap_p2p": True}, LAYERED),
    "parallel.sequence": (said, {"parallel__sequence": False}, TENSOR),
    "optimizer.lr": (rates, {"optimizer__lr": 0.5}, {}),
    "optimizer.warmup_steps": (rates, {"optimizer__warmup_steps": 2}, {}),
    "optimizer.schedule": (rates, {"optimizer__schedule": "linear"}, {}),
    "train.global_batch_size": (ordered, {"train__global_batch_size": 3}, {}),
    "train.global_batch_tokens": (
        ordered,
        {"train__global_batch_tokens": 300},
        {"train__global_batch_size": "null"},
    ),
    "train.steps": (ordered, {"train__steps": 3}, {}),
    "train.epochs": (ordered, {"train__epochs": 1}, {"train__steps": "null"}),
    "train.seed": (ordered, {"train__seed": 7}, {}),
    "train.precision": (said, {"train__precision": "bf16"}, {}),
    "train.recompute_layers": (said, {"train__recompute_layers": 2}, {}),
    "train.recompute_modules": (said, {"train__recompute_modules": ["mlp"]}, {}),
    "validation.tasks": (
        said,
        {"validation__tasks": [{"name": "chats", "kind": "loss", "data": "more.jsonl"}]},
        {},
    ),
    "rollout.completions": (said, {"rollout__completions": 5}, GRPO),
    "rollout.prompts": (said, {"rollout__prompts": 4}, {**GRPO, "train__global_batch_size": "null"}),
    "rollout.max_tokens": (said, {"rollout__max_tokens": 9}, GRPO),
    "rollout.temperature": (prompted, {"rollout__temperature": 0.5}, GRPO),
    "rollout.top_p": (prompted, {"rollout__top_p": 0.5}, GRPO),
    "rollout.top_k": (prompted, {"rollout__top_k": 5}, GRPO),
    "rollout.stop": (prompted, {"rollout__stop": ["."]}, GRPO),
    "rollout.as_chat": (prompted, {"rollout__as_chat": True}, GRPO),
    "rollout.request_timeout": (asked, {"rollout__request_timeout": 9}, VLLM),
    "rollout.request_retries": (asked, {"rollout__request_retries": 9}, VLLM),
    "rollout.url": (served, {"rollout__url": "http://127.0.0.1:2"}, VLLM),
    "rollout.weights_folder": (served, {"rollout__weights_folder": "elsewhere"}, VLLM),
    "rollout.vllm_python": (served, {"rollout__vllm_python": "other"}, STARTED),
    "rollout.vllm_options": (served, {"rollout__vllm_options": ["--max-model-len", "9"]}, STARTED),
    "rollout.dynamic_sampling": (said, {"rollout__dynamic_sampling": {}}, GRPO),
    "rollout.dynamic_sampling.max_batches": (
        said,
        {"rollout__dynamic_sampling": {"max_batches": 3}},
        {**GRPO, "rollout__dynamic_sampling": {}},
    ),
    **{
        f"rollout.correction.{option}": (
            corrected,
            {"rollout__correction": {option: value}},
            {**GRPO, "rollout__correction": {}},
        )
        for option, value in {"mode": "sequence_mask", "cap": 1.2, "floor": 0.5}.items()
    },
    "rollout.off_policy_steps": (said, {"rollout__off_policy_steps": 1}, GRPO),
    **{
        f"validation.generate.{option}": (
            drawn,
            {"validation__generate": {"temperature": 0.7, option: value}},
            {"validation__generate": {"temperature": 0.7}},
        )
        for option, value in {"temperature": 0.5, "top_p": 0.5, "top_k": 5, "seed": 7}.items()
    },
    **{
        f"model.adapter.{option}": (
            resolved,
            {"model__adapter": {**beside, option: value}},
            {"model__adapter": beside},
        )
        for option, value, beside in (
            ("rank", 3, {}),
            ("alpha", 3.0, {}),
            ("targets", ["q_proj"], {}),
            ("dropout", 0.1, {}),
            ("dora", True, {}),
            ("rslora", True, {}),
            ("init", "pissa", {}),
            ("modules_to_save", ["norm"], {}),
            ("ensure_weight_tying", True, {"modules_to_save": ["embed_tokens"]}),
            ("path", "adapter", {}),
        )
    },
    **{
        f"rewards.{option}": (scored, {"reward": {**beside, **changed}}, {"reward": beside})
        for option, changed, beside in (
            ("name", {"name": "other"}, {"kind": "length", "max": 3}),
            ("kind", {"kind": "contains"}, {"kind": "exact_match"}),
            ("weight", {"weight": 2.0}, {"kind": "length", "max": 3}),
            ("category", {"category": "kind"}, {"kind": "length", "max": 3, "weight": {"a": 2.0}}),
            ("normalize", {"normalize": "group"}, {"kind": "length", "max": 3}),
            ("length.unit", {"unit": "words"}, {"kind": "length", "max": 3}),
            ("length.min", {"min": 3}, {"kind": "length", "max": 9}),
            ("length.max", {"max": 9}, {"kind": "length", "max": 3}),
            ("length.ramp", {"ramp": 5}, {"kind": "length", "max": 3}),
            ("regex.pattern", {"pattern": "[a-e]"}, {"kind": "regex", "pattern": "7"}),
            ("regex.fullmatch", {"fullmatch": True}, {"kind": "regex", "pattern": "12"}),
            ("math.extract", {"extract": r"(\d+),"}, {"kind": "math"}),
            ("exact_match.extract", {"extract": r"\d+"}, {"kind": "exact_match"}),
            ("contains.extract", {"extract": "[a-e]"}, {"kind": "contains"}),
        )
    },
    **{
        f"rewards.endpoint.{option}": (
            requested,
            {"reward": {"url": "http://a/b", option: value}},
            {"reward": {"url": "http://a/b"}},
        )
        for option, value in {
            "url": "http://b/c",
            "timeout": 9.0,
            "retries": 9,
            "batch_size": 3,
            "workers": 2,
            "key_variable": "OTHER",
        }.items()
    },
    **{
        f"rewards.model.{option}": (
            judge,
            {"reward": {"path": "reward", option: value}},
            {"reward": {"path": "reward"}},
        )
        for option, value in {
            "path": "other_reward",
            "chat_template": "plain.jinja",
            "template_date": "2001-01-01",
            "precision": "bf16",
            "sequence_length": 32,
        }.items()
    },
    **{
        f"rewards.{option}": (scored, {"reward": {**beside, **changed}}, {"reward": beside})
        for option, changed, beside in (
            ("ifeval.metric", {"metric": "instruction_strict"}, {"kind": "ifeval"}),
        )
    },
}
# A test that runs on every commit sees it.
SHOWN = {
    "model.linear": "tests/model/test_te_linear.py::test_what_cannot_run_is_refused_in_one_line",
    **{
        f"{name}": "tests/training/test_apex.py::test_each_switch_is_checked_before_the_ranks_meet"
        for name in (
            "optimizer.implementation",
            "critic.optimizer.implementation",
            "train.gradient_accumulation_fusion",
        )
    },
    "train.fp8": "tests/model/test_fp8.py::test_what_does_not_fit_is_refused_by_the_configuration",
    "train.fp8.recipe": "tests/model/test_fp8.py::"
    "test_run_and_plan_pad_packs_to_what_the_recipe_needs_of_each_rank",
    "model.attention": "tests/model/test_flash.py::test_a_run_has_the_numbers_of_a_run_without_it",
    "data.validation": "tests/training/test_validation.py::test_validation_equals_training_over_all_samples",
    "reference.path": "tests/training/reference/test_cache.py::test_a_reference_of_its_own",
    "reference.sync_steps": "tests/training/reference/test_moving.py::"
    "test_a_run_moves_it_to_the_gathered_weights_by_its_alpha",
    "reference.mixup_alpha": "tests/training/reference/test_moving.py::"
    "test_a_run_moves_it_to_the_gathered_weights_by_its_alpha",
    "parallel.timeout_seconds": "tests/training/test_hang.py::test_a_killed_rank",
    "parallel.overlap_param_gather": "tests/training/reference/test_moving.py::"
    "test_a_run_moves_it_to_the_gathered_weights_by_its_alpha",
    "parallel.overlap_grad_reduce": "tests/training/test_overlap.py::test_a_gradient_is_reduced_in_several_buckets",
    "train.early_stopping": "tests/training/test_best.py::test_no_improvement_ends_the_run_as_a_complete_one",
    "train.early_stopping.metric": "tests/training/test_best.py::test_a_metric_that_the_validation_lacks_is_refused",
    "train.early_stopping.patience": "tests/training/test_best.py::"
    "test_no_improvement_ends_the_run_as_a_complete_one",
    "train.early_stopping.mode": "tests/training/test_best.py::test_no_improvement_ends_the_run_as_a_complete_one",
    "train.on_nonfinite": "tests/monitoring/test_health.py::test_stopping_says_what_and_where",
    "train.self_check": "tests/training/test_self_check.py::test_another_plan",
    "checkpoint.keep_best": "tests/training/test_best.py::test_the_best_checkpoint_is_saved_and_kept",
    "checkpoint.async_save": "tests/training/test_checkpoint_hook.py::test_an_update_waits_for_the_copy",
    "checkpoint.resume": "tests/training/test_resume.py::test_resume_never_refuses_a_used_folder",
    "checkpoint.resume_allow": "tests/training/test_resume.py::test_a_wanted_change_is_gone_on_with",
    "checkpoint.push_to_hub": "tests/hf/test_hub.py::test_an_upload_is_refused_at_the_start_where_it_cannot_be_made",
    "logging.wandb": "tests/monitoring/test_logger.py::test_wandb_has_one_page_per_folder",
    "logging.mlflow": "tests/monitoring/test_logger.py::test_mlflow_goes_on_in_its_own_run",
    "rollout.engine": "tests/training/test_rollout_servers.py::"
    "test_a_run_without_its_server_ends_before_the_ranks_meet",
    "rollout.correction": "tests/objectives/test_policy_gradient_objective.py::"
    "test_the_engines_correction_changes_the_loss",
    "rollout.mismatch_stop": "tests/training/test_online_refused.py::"
    "test_an_engine_that_differs_too_much_stops_the_run",
    "rollout.dynamic_sampling.exhausted": "tests/training/test_dynamic_sampling.py::"
    "test_at_the_bound_the_first_without_signal_fill_the_set_or_the_run_stops",
    "rollout.dynamic_sampling.reward": "tests/training/test_dynamic_sampling.py::"
    "test_rewards_that_are_not_compared_are_refused",
    "critic.path": "tests/training/test_ppo.py::"
    "test_the_critic_starts_from_the_first_reward_model_that_fits_else_from_the_policy",
}

SHOWN |= {
    f"rewards.{option}": f"tests/{test}"
    for option, test in {
        "model.too_long": "training/test_rewards.py::test_what_does_not_fit_is_not_scored_with_too_long_skip",
        "function.path": "rollout/rewards/test_scoring.py::test_files_and_functions_that_are_not_there",
        "function.timeout": "rollout/rewards/test_scoring.py::"
        "test_a_function_that_takes_too_long_is_tried_again_then_named",
        "function.retries": "rollout/rewards/test_scoring.py::"
        "test_a_function_that_raises_is_tried_again_then_named_with_its_line",
    }.items()
}
# Options that one of the two runs below shows.
OF_RUNS = [
    *(
        f"{section}.{option}"
        for section in ("optimizer",)
        for option in ("weight_decay", "betas", "eps", "clip_grad")
    ),
    "critic.optimizer",
    *(f"critic.optimizer.{option}" for option in ("lr", "weight_decay", "betas", "eps", "warmup_steps")),
    *(f"critic.optimizer.{option}" for option in ("schedule", "clip_grad")),
    *(f"checkpoint.{option}" for option in ("dir", "save_every", "keep", "keep_every", "export_hf")),
    *(f"logging.{option}" for option in ("tensorboard", "timing_every", "profile_steps")),
    "train.validate_every",
    *(f"validation.generate.{option}" for option in ("prompts", "limit", "every", "max_tokens", "as_chat")),
    "validation.generate",
]
# Why nothing is to be seen.
EXCEPT = {
    "model.adapter.kind": "lora is the only one",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with models, data and templates that the options above name."""
    folder = tmp_path_factory.mktemp("options")
    make_model(folder / "model")
    make_model(folder / "other", num_hidden_layers=2)
    make_adapter(folder / "adapter", folder / "model")
    make_reward(folder / "reward", "qwen2")
    make_reward(folder / "other_reward", "llama")
    write_chat(folder / "chat.jsonl", samples=10)
    write_chat(folder / "more.jsonl", samples=12, seed=3)
    write_pairs(folder / "pairs.jsonl", samples=10)
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "name": "n"}]
    plain = {"messages": [turns[0], {"role": "assistant", "content": "a"}]}
    for name, records in {
        "prompts": [{"prompt": f"What is {i}?"} for i in range(4)],
        "both": [{**plain, "prompt": "p", "completion": "c"}],
        "columns": [{"prompt": "p", "other": "another", "completion": "c"}],
        "named": [{"messages": turns}],
        "bad": [plain, {"messages": []}],
        "questions": [{"prompt": f"{i}?"} for i in range(6)],
        "ranked": [
            {"prompt": f"{i}?", "completions": [{"content": c, "score": len(c)} for c in ("a", "bbb")]}
            for i in range(4)
        ],
    }.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "clock.jinja").write_text(CLOCK)
    (folder / "plain.jinja").write_text(PLAIN)
    return folder


def declared():
    """Return every option of every section, and of every kind of reward."""
    names = [name for section, kind in SECTIONS.items() for name in options_of(kind, section)]
    common = list(options_of(RewardConfig, "rewards"))
    for kind, options in KINDS.items():
        own = (name.replace("rewards.", f"rewards.{kind}.") for name in options_of(options, "rewards"))
        names += [name for name in own if name.replace(f".{kind}.", ".") not in common]
    return [*names, *common]


def outcome(probe, place, options):
    try:
        return probe(place, dict(options))
    except InputError as error:
        return f"refused: {error}"


def test_every_option_has_an_entry():
    runs = dict.fromkeys(OF_RUNS)
    assert without_one_entry(declared(), OFF, SHOWN, runs, EXCEPT) == []
    assert [line for option, test in SHOWN.items() if (line := wrong_test(option, test))] == []


@pytest.mark.parametrize("option", OFF)
def test_a_value_off_the_default_changes_what_it_should(option, place, monkeypatch):
    monkeypatch.chdir(place)
    probe, changed, beside = OFF[option]
    plain, off = (outcome(probe, place, options) for options in (beside, {**beside, **changed}))
    assert not (isinstance(off, str) and off.startswith("refused")), off
    assert off != plain


def test_every_option_of_the_optimizers_acts(pool, place, tmp_path):
    """All off their defaults, and other ones for the critic: the two optimizers have them, and the rates follow."""
    policy = {"lr": 2e-3, "weight_decay": 0.3, "betas": [0.8, 0.9], "eps": 1e-4, "clip_grad": 0.5}
    critic = {"lr": 3e-3, "weight_decay": 0.4, "betas": [0.7, 0.95], "eps": 1e-5, "clip_grad": 0.25}
    critic |= {"warmup_steps": 1, "schedule": "linear"}
    options = {f"optimizer__{name}": value for name, value in policy.items()}
    options |= {"objective__name": "ppo", "rollout__engine": "data", "critic__optimizer": json.dumps(critic)}
    options |= {"train__global_batch_size": 2, "train__steps": 3}
    arguments = run_arguments(place / "other", place / "ranked.jsonl", tmp_path / "run", **options)
    config = parse(arguments)
    [seen] = pool.run(1, training_ranks.optimizers_in_use, arguments)
    expected = [
        [
            {
                "weight_decay": section.weight_decay,
                "betas": tuple(section.betas),
                "eps": section.eps,
                "clip_grad": section.clip_grad,
                "lr": learning_rate(section, step, 3),
            }
            for step in (1, 2, 3)
        ]
        for section in (config.optimizer, config.critic.optimizer)
    ]
    assert sorted(seen, key=lambda steps: steps[0]["weight_decay"]) == expected


def traces(run):
    """Return what options of a run leave in its folder."""
    names = {path.name for path in run.iterdir()}
    rows = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows]
    return {
        "checkpoint.dir": str(run),
        "checkpoint.save_every": "step_000004" in names,
        "checkpoint.keep": "step_000003" in names,
        "checkpoint.keep_every": "step_000002" in names,
        "checkpoint.export_hf": "hf" in names,
        "logging.tensorboard": "tensorboard" in names,
        "logging.timing_every": [row["step"] for row in metrics_of(run, "timing")],
        "logging.profile_steps": "profile" in names,
        "train.validate_every": [row["step"] for row in metrics_of(run, "validation")],
        "validation.generate": bool(rows),
        "validation.generate.prompts": {str(row["prompt"]) for row in rows},
        "validation.generate.limit": steps.count(5),
        "validation.generate.every": sorted(set(steps)),
        "validation.generate.max_tokens": max((row["tokens"] for row in rows), default=0),
        "validation.generate.as_chat": {type(row["prompt"]) for row in rows},
    }


def test_every_option_of_what_a_run_writes_has_its_trace(pool, place, tmp_path):
    """Two runs: all of these options have their defaults in one, and none has in the other."""
    usual = {"data__validation": place / "more.jsonl"}
    usual |= {"train__global_batch_size": 4, "logging__tensorboard": True, "checkpoint__export_hf": True}
    usual |= {"validation__generate": json.dumps({"prompts": str(place / "prompts.jsonl")})}
    off = {"checkpoint__save_every": 1, "checkpoint__keep": 3, "checkpoint__keep_every": 2}
    off |= {"checkpoint__export_hf": False, "logging__tensorboard": False, "logging__timing_every": 2}
    off |= {"logging__profile_steps": "[2, 2]", "train__validate_every": 2}
    answers = {"limit": 2, "every": 2, "max_tokens": 4, "as_chat": True}
    answers["prompts"] = str(place / "questions.jsonl")
    found = []
    for name, options in (
        ("usual", usual),
        ("off", {**usual, **off, "validation__generate": json.dumps(answers)}),
    ):
        arguments = run_arguments(place / "other", place / "chat.jsonl", tmp_path / name, **options)
        pool.run(1, training_ranks.train, arguments)
        found.append(traces(tmp_path / name))
    before, after = found
    same = [name for name in before if before[name] == after[name]]
    assert same == ["validation.generate"]  # without it there are no answers
    assert {*before, *(name for name in OF_RUNS if "optimizer" in name)} == set(OF_RUNS)


def test_a_dropped_option_is_found(place, monkeypatch):
    """Without it no test above could fail: an option that is read and not used, and one without an entry."""
    monkeypatch.chdir(place)
    probe, changed, beside = OFF["optimizer.warmup_steps"]
    monkeypatch.setitem(globals(), "learning_rate", lambda config, step, steps: config.lr)
    assert outcome(probe, place, beside) == outcome(probe, place, {**beside, **changed})
    assert without_one_entry([*declared(), "train.new"], OFF, SHOWN, dict.fromkeys(OF_RUNS), EXCEPT) == [
        "train.new needs an entry"
    ]
    assert wrong_test("data.gone", SHOWN["data.validation"]).endswith("does not name gone")
    assert wrong_test("data.validation", "tests/training/test_validation.py::test_gone") == (
        "tests/training/test_validation.py has no test_gone"
    )
