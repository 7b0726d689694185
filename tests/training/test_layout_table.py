"""Law 1 over the whole table of layouts: TP {1, 2, 4} x PP {1, 2, 4} x CP {1, 2, 4} x DP {1, 2} of up to 8 ranks.

Loss and gradient norm of three steps are those of one rank (1e-5, fp32), for supervised fine-tuning and DPO. Layouts
that share packs on up to 4 ranks run always, the others where slow tests do.
"""

import itertools

import pytest

from tests.harness import training_ranks
from tests.harness.tiny import metrics_of, run_arguments, write_pairs

TABLE = [
    (tensor, pipeline, context, data)
    for tensor, pipeline, context, data in itertools.product((1, 2, 4), (1, 2, 4), (1, 2, 4), (1, 2))
    if 1 < tensor * pipeline * context * data <= 8
]
OBJECTIVES = {"sft": {}, "dpo": {"objective__name": "dpo", "train__global_batch_size": 8}}


def marked(objective, kind, layout):
    tensor, pipeline, context, data = layout
    always = context == 2 and tensor * pipeline * context * data == 4 and kind == "allgather"
    name = f"{objective}-tp{tensor}_pp{pipeline}_{kind if context > 1 else 'cp'}{context}_dp{data}"
    return pytest.param(objective, kind, layout, id=name, marks=() if always else pytest.mark.slow)


@pytest.fixture(scope="module")
def rows_of(pool, tiny_models, chat_file, tmp_path_factory):
    pairs = write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl")

    def run(objective, world=1, **options):
        folder = tmp_path_factory.mktemp("run")
        given = {"train__steps": 3, **OBJECTIVES[objective], **options}
        data = chat_file if objective == "sft" else pairs
        pool.run(world, training_ranks.train, run_arguments(tiny_models(), data, folder, **given))
        return metrics_of(folder)

    return run


@pytest.fixture(scope="module")
def one_rank(rows_of):
    return {objective: rows_of(objective) for objective in OBJECTIVES}


@pytest.mark.parametrize(
    "objective, kind, layout",
    [
        marked(objective, kind, layout)
        for layout in TABLE
        for objective, kind in (("sft", "ulysses"), ("dpo", "allgather"))
    ],
)
def test_layouts_agree(objective, kind, layout, rows_of, one_rank):
    tensor, pipeline, context, data = layout
    options = {"parallel__tensor": tensor, "parallel__pipeline": pipeline, "parallel__context": context}
    if context > 1:
        options["parallel__context_kind"] = kind
    rows = rows_of(objective, tensor * pipeline * context * data, **options)
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row, want in zip(rows, one_rank[objective], strict=True):
        for key in ("loss", "grad_norm"):
            assert row[key] == pytest.approx(want[key], rel=1e-5), (row["step"], key)
