"""Triton kernels, each with a plain-PyTorch reference. Import them as ``megatron_align.kernels``.

The folder is at the top level of the repository and ``megatron_align/kernels`` links to it. In the repository root
``transformers`` can therefore import it as top-level ``kernels``, meaning Hugging Face's package of that name: under
that name this file loads the real package instead, and is empty if that is not installed.
"""

if __name__ == "kernels":
    import importlib.machinery
    import importlib.util
    import sys
    from pathlib import Path

    _root = Path(__file__).resolve().parent.parent
    _spec = importlib.machinery.PathFinder.find_spec(
        "kernels", [entry for entry in sys.path if Path(entry or ".").resolve() != _root]
    )
    if _spec is not None and _spec.loader is not None:
        sys.modules["kernels"] = _module = importlib.util.module_from_spec(_spec)
        _spec.loader.exec_module(_module)
else:
    from megatron_align.kernels.packed_attention import (
        PackedLayout,
        packed_attention,
        packed_attention_reference,
    )
    from megatron_align.kernels.rms_norm import (
        add_rms_norm,
        add_rms_norm_reference,
        rms_norm,
        rms_norm_reference,
    )
    from megatron_align.kernels.rope import rope, rope_reference
    from megatron_align.kernels.swiglu import swiglu, swiglu_reference
    from megatron_align.kernels.token_logprobs import (
        MAXIMUM,
        RECOMPUTED,
        TokenScores,
        column_logits,
        column_logits_reference,
        combine_sums,
        slab_loss,
        slab_loss_reference,
        slab_rows,
        token_logprobs,
        token_logprobs_reference,
        token_scores,
        token_scores_reference,
        top_logits,
    )

    __all__ = [
        "MAXIMUM",
        "RECOMPUTED",
        "PackedLayout",
        "TokenScores",
        "add_rms_norm",
        "add_rms_norm_reference",
        "column_logits",
        "column_logits_reference",
        "combine_sums",
        "packed_attention",
        "packed_attention_reference",
        "rms_norm",
        "rms_norm_reference",
        "rope",
        "rope_reference",
        "slab_loss",
        "slab_loss_reference",
        "slab_rows",
        "swiglu",
        "swiglu_reference",
        "token_logprobs",
        "token_logprobs_reference",
        "token_scores",
        "token_scores_reference",
        "top_logits",
    ]
