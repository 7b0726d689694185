"""Rewards by an HTTP server: POST ``{prompts, completions, columns}``, answered by ``{"rewards": [...]}``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from megatron_align.config.rewards import EndpointReward
from megatron_align.errors import InputError, TrainingFault, one_line, shown
from megatron_align.rollout.endpoint import Endpoint, RequestFailed, concurrently
from megatron_align.rollout.prompts import PromptRecord
from megatron_align.rollout.rewards.base import Group, Values, checked, flat
from megatron_align.rollout.rewards.columns import arguments, column_names
from megatron_align.rollout.types import Completion


class EndpointScorer:
    """Sends completions in batches, several at once; a request that fails is repeated, then ends the run by name.

    Args:
        config: url, batches, timeout and retries.
    """

    def __init__(self, config: EndpointReward):
        self.name, self.config = config.label, config
        self._columns: tuple[str, ...] = ()
        parts = urlsplit(config.url)
        self._path = parts.path or "/"
        self._endpoint = Endpoint(
            f"{parts.scheme}://{parts.netloc}",
            key_variable=config.key_variable,
            timeout_seconds=config.timeout,
            tries=config.retries + 1,
        )

    def check(self, records: Sequence[PromptRecord]) -> None:
        """Note the fields of the records; see :meth:`.Reward.check`."""
        self._columns = column_names(records, self.name)

    def score(self, groups: Sequence[Group]) -> Values:
        """See :meth:`.Reward.score`."""
        scored, size = flat(groups), self.config.batch_size
        batches = [scored[start : start + size] for start in range(0, len(scored), size)]
        try:
            values = [
                value
                for of_batch in concurrently(self._ask, batches, self.config.workers)
                for value in of_batch
            ]
        except RequestFailed as error:
            raise TrainingFault(f"reward {self.name}: {error}") from error
        return checked(self.name, values, groups)

    def close(self) -> None:
        """Nothing is held."""

    def _ask(self, scored: Sequence[tuple[PromptRecord, Completion]]) -> list[Any]:
        given, columns = arguments(scored, self._columns)
        body = {"prompts": given["prompts"], "completions": given["completions"], "columns": columns}
        try:
            answer = self._endpoint.post(self._path, body)
        except TypeError as error:  # of json: a field of a Parquet file, a date for instance
            raise InputError(
                f"reward {self.name}: a prompt's record is not JSON: {one_line(error)}"
            ) from error
        values = answer.get("rewards")
        if not isinstance(values, list) or len(values) != len(scored):
            got = f"{len(values)} of them" if isinstance(values, list) else shown(answer)
            raise InputError(
                f"reward {self.name}: {self.config.url} must answer {{rewards: [...]}} with a number or null for each "
                f"of the request's {len(scored)} completions, got {got}"
            )
        return values
