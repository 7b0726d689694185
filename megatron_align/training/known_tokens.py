"""Check that the tokens of completions are known: to the policy, and to the models that score them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_align.errors import TrainingFault
from megatron_align.rollout.types import Completion, Prompt


def require_known_tokens(
    answers: Sequence[Sequence[Completion]], prompts: Sequence[Prompt], vocabulary: int
) -> None:
    """Check that completions are of the model's vocabulary.

    Raises:
        TrainingFault: naming the first prompt with another token.
    """
    for prompt, completions in zip(prompts, answers, strict=True):
        for token in (token for completion in completions for token in completion.token_ids):
            if not 0 <= token < vocabulary:
                raise TrainingFault(
                    f"an engine must answer with tokens of the model's vocabulary of {vocabulary}, got token {token} "
                    f"for {prompt.where}: its server holds another model"
                )


def require_scorable_tokens(
    answers: Sequence[Sequence[Completion]], prompts: Sequence[Prompt], vocabularies: Mapping[str, int]
) -> None:
    """Check that the models that score the policy's completions have a row for every token.

    Args:
        answers: completions of each prompt.
        prompts: that were answered.
        vocabularies: rows of each model that has fewer than the policy, by its option.

    Raises:
        TrainingFault: naming the first prompt with another token.
    """
    for name, rows in vocabularies.items():
        for prompt, completions in zip(prompts, answers, strict=True):
            highest = max((token for each in completions for token in each.token_ids), default=0)
            if highest >= rows:
                raise TrainingFault(
                    f"the policy answered with token {highest} to {prompt.where}, for which {name} has no row: it has "
                    f"{rows}; start from a policy that has learnt not to use tokens beyond its tokenizer's"
                )
