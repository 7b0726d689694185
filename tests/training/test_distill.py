"""Distillation: exactly 0 where the teacher is the policy, the full divergence with k = V (judge: transformers in
float64), the same on every layout (1e-5); the teacher's columns are kept, checked, and continued after a kill.
"""

import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from megatron_align.data.store import TokenStore
from megatron_align.errors import InputError
from megatron_align.model.parallel import RankInfo
from megatron_align.objectives.configuration import parse
from megatron_align.training.setup import prepare_run
from tests.harness import training_ranks
from tests.harness.marks import mark_slow
from tests.harness.pool import RankFailed
from tests.harness.runs import remembered_runs
from tests.harness.tiny import change_tensors, numbers, run_arguments, write_chat
from tests.training.test_preference_layout import LAYOUTS

VOCABULARY = 259
DIVERGENCES = {
    "reverse": {"divergence": "reverse", "top_k": 20},
    "forward": {"divergence": "forward", "top_k": VOCABULARY, "temperature": 2.0},
    "js": {"divergence": "js", "top_k": 3, "js_beta": 0.3},
}
CASES = [("reverse", "tp2_pp2")]
SLOW = [(name, layout) for name in DIVERGENCES for layout in LAYOUTS if (name, layout) not in CASES]


@pytest.fixture(scope="module")
def teacher(tiny_models, tmp_path_factory):
    """The model with other weights."""
    folder = tmp_path_factory.mktemp("teacher") / "hf"
    shutil.copytree(tiny_models(), folder)
    draw = torch.Generator().manual_seed(7)

    def change(tensors):
        for name in sorted(tensors):
            noise = torch.randn(tensors[name].shape, generator=draw)
            tensors[name] += 0.3 * tensors[name].std() * noise

    change_tensors(folder, change)
    return folder


@pytest.fixture(scope="module")
def arguments(tiny_models, chat_file, teacher):
    def of(folder, divergence="reverse", **options):
        given = {f"objective__{name}": value for name, value in DIVERGENCES[divergence].items()}
        return run_arguments(
            tiny_models(),
            chat_file,
            folder,
            **{"objective__name": "distill", "reference__path": teacher, **given, **options},
        )

    return of


@pytest.fixture(scope="module")
def train(pool, arguments, tmp_path_factory):
    return remembered_runs(pool, tmp_path_factory, arguments)


@pytest.mark.parametrize("divergence, layout", mark_slow([*CASES, *SLOW], SLOW))
def test_layouts_agree(divergence, layout, train):
    world, options = LAYOUTS[layout]
    short = {"train__steps": 3}
    rows, wanted = train(divergence, world, **options, **short), train(divergence, **short)
    assert len(rows) == 3
    for row, want in zip(rows, wanted, strict=True):
        assert want["loss"] > 0
        for name in ("loss", "grad_norm"):
            assert row[name] == pytest.approx(want[name], rel=1e-5), (row["step"], name)


STILL = [
    (divergence, world, p) for divergence, world in (("reverse", 1), ("js", 2)) for p in ("fp32", "bf16")
]


@pytest.mark.parametrize(
    "divergence, world, precision",
    mark_slow(STILL, [("reverse", 1, "fp32"), ("js", 2, "bf16"), ("js", 2, "fp32")]),
)
def test_a_policy_that_is_its_teacher_does_not_move(divergence, world, precision, train, tiny_models):
    options = {"parallel__tensor": world, "train__precision": precision, "train__steps": 2}
    options["optimizer__weight_decay"] = 0  # which moves weights without a gradient
    for row in train(divergence, world, reference__path=tiny_models(), **options):
        assert row["loss"] == 0.0
        assert row["grad_norm"] == 0.0


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_loss_is_that_of_full_logits(divergence, train, tiny_models, teacher, tmp_path):
    """All samples are in the first step. Over k = V tokens nothing is renormalised, as the judge does not."""
    chat = write_chat(tmp_path / "chat.jsonl", samples=12, seed=5)
    options = {"data__train": chat, "objective__top_k": VOCABULARY, "objective__temperature": 1.5}
    [row] = train(divergence, train__steps=1, data__cache=tmp_path / "cache", **options)
    [file] = (tmp_path / "cache").glob("*/manifest.json")
    store = TokenStore(file.parent)
    policy, other = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64) for path in (tiny_models(), teacher)
    )
    total, count = 0.0, 0
    for i in range(len(store)):
        sample = store.sample(i)
        tokens = torch.from_numpy(sample.tokens_L.astype(np.int64))[None]
        rows = torch.from_numpy(np.flatnonzero(sample.scored_L) - 1)
        with torch.no_grad():
            p, q = (model(tokens).logits[0, rows].div(1.5).log_softmax(-1) for model in (policy, other))
        beta = DIVERGENCES[divergence].get("js_beta", {"forward": 0.0, "reverse": 1.0}.get(divergence))
        total += trl_divergence(p, q, beta).item()
        count += len(rows)
    assert row["loss"] == pytest.approx(total / count, rel=2e-5)


def trl_divergence(student, teacher, beta):
    """Return the sum that TRL's GKDTrainer computes from log-probs of all tokens."""
    if beta in (0.0, 1.0):
        first, second = (student, teacher) if beta == 0.0 else (teacher, student)
        return F.kl_div(first, second, reduction="sum", log_target=True)
    mixture = torch.logaddexp(student + np.log(1 - beta), teacher + np.log(beta))
    parts = (F.kl_div(mixture, one, reduction="sum", log_target=True) for one in (teacher, student))
    return beta * next(parts) + (1 - beta) * next(parts)


def test_the_teachers_columns_are_kept_and_checked(pool, arguments, tmp_path):
    """A run like the first computes nothing again; after a kill the rows that do not count are computed again."""
    cache = tmp_path / "cache"
    options = {"data__cache": cache, "train__steps": 3}
    pool.run(1, training_ranks.train, arguments(tmp_path / "first", **options))
    [rows] = cache.glob("reference_*.rows")
    checksums = rows.with_suffix(".bin")
    stamps = [file.stat().st_mtime_ns for file in (rows, checksums)]
    content = rows.read_bytes()
    pool.run(1, training_ranks.train, arguments(tmp_path / "second", **options))
    assert [file.stat().st_mtime_ns for file in (rows, checksums)] == stamps
    assert numbers(tmp_path / "second") == numbers(tmp_path / "first")

    saved = checksums.read_bytes()
    checksums.unlink()  # killed before the first save
    rows.write_bytes(content[: len(content) // 2])
    pool.run(1, training_ranks.train, arguments(tmp_path / "third", **options))
    assert rows.read_bytes() == content
    assert checksums.read_bytes() == saved
    assert not rows.with_suffix(".lock").exists()

    place = next(i for i, byte in enumerate(content) if byte)
    for broken, reason in (
        (
            content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :],
            "CRC-32 mismatch at completion",
        ),
        (content[:-1], f"must have {len(content)} bytes, got {len(content) - 1}"),
    ):
        rows.write_bytes(broken)
        with pytest.raises(RankFailed, match=f"{reason}.*delete it and {checksums.name}"):
            pool.run(1, training_ranks.train, arguments(tmp_path / "broken", **options))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"objective__top_k": 260}, "top_k must be at most the vocabulary of 259, got 260"),
        ({"objective__top_k": 0}, "top_k must be at least 1, got 0"),
        ({"objective__temperature": 0}, "temperature must be positive"),
        ({"objective__js_beta": 0.5}, "js_beta belongs to divergence js; got 0.5 with divergence reverse"),
        ({"objective__divergence": "js", "objective__js_beta": 1.0}, r"js_beta must be in \(0, 1\).*got 1.0"),
        (
            {"reference__mode": "live"},
            "needs reference.path, the teacher, and reference.mode cached; got .* 'live'",
        ),
    ],
)
def test_what_does_not_fit_is_refused(options, message, arguments, tmp_path):
    with pytest.raises(InputError, match=message):
        prepare_run(parse(arguments(tmp_path / "run", **options)), RankInfo(0, 0, 1), tmp_path / "scratch")


def test_a_distillation_without_a_teacher_is_refused(tiny_models, chat_file, tmp_path):
    given = run_arguments(tiny_models(), chat_file, tmp_path, objective__name="distill")
    with pytest.raises(InputError, match=r"needs reference.path, the teacher.*got path null"):
        parse(given)
