"""Generation by vLLM servers: their OpenAI-compatible completions, and the routes that replace their weights.

Prompts are sent as token ids, one request for each sample with a seed of its own, so that results do not depend on how
requests meet in the server. The routes of new weights exist only in servers started with ``VLLM_SERVER_DEV_MODE=1``;
weights travel as a folder of safetensors that the servers can read. Servers keep the version of their weights, which is
compared before and after each batch of requests, and is part of the keys of their prefix caches.

Adapters travel alone, as PEFT folders, to servers that were started with their base and load them: each version has a
name of its own, which requests ask for, and which a server that was restarted no longer knows.
"""

from __future__ import annotations

import hashlib
import tempfile
import uuid
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from megatron_align.errors import InputError, TrainingFault, listed, one_line, require
from megatron_align.hf.adapter import write_adapter
from megatron_align.hf.writer import save_tensors
from megatron_align.model.families.adapter import EMBED_TOKENS, LM_HEAD, Adapter
from megatron_align.rollout.endpoint import (
    VLLM_KEY_VARIABLE,
    Endpoint,
    FailureBudget,
    RequestFailed,
    concurrently,
)
from megatron_align.rollout.engine import UNKNOWN_VERSION, LiveAdapter, OnToken
from megatron_align.rollout.types import Completion, FinishReason, Prompt, Sampling, require_fitting
from megatron_align.storage.atomic_write import naming_file

WORKERS = 64  # requests at once to each server
# Sent with every request: a server fills in what is left out from the model's generation_config.json, or from its own
# --override-generation-config, and draws from another distribution.
_NEUTRAL = {
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "n": 1,
    "min_tokens": 0,
    "ignore_eos": False,
}


class VLLMEngine:
    """An :class:`.Engine` of one or several vLLM servers that hold the same model.

    Log-probs are vLLM's ``processed_logprobs``: start servers with ``--logprobs-mode processed_logprobs``. With top-p
    or top-k these are of the truncated distribution, so :meth:`generate` then returns NaN.

    Args:
        urls: of the servers, ``http://host:port``; their key is read from the environment variable VLLM_API_KEY.
        tokenizer: of the model.
        workers: requests at once to each server.
        weights_folder: where new weights are written for the servers to read, on a file system that they share unless
            they run on this machine; None: the machine's folder for temporary files.
        adapters: the servers hold the base of the trained adapter and load adapters: they were started with
            ``--enable-lora``, ``--max-lora-rank`` of at least its rank, and ``VLLM_ALLOW_RUNTIME_LORA_UPDATING=True``.
            False: merged weights are sent.

    Attributes:
        context: most tokens of a prompt with its completion, as the servers say.
        model: name of the model in the servers.
        served: name that requests ask for: the model's, or that of the loaded adapter.

    Raises:
        InputError: a server does not answer, or they hold different models.
    """

    shared, has_own_base = True, True

    def __init__(
        self,
        urls: Sequence[str | Endpoint],
        tokenizer: PreTrainedTokenizerBase,
        workers: int = WORKERS,
        weights_folder: str | Path | None = None,
        *,
        adapters: bool = False,
    ) -> None:
        require(bool(urls), "the vllm engine needs the url of a server, got none")
        self.tokenizer, self.workers, self.weights_folder = tokenizer, workers, weights_folder
        self.weight_version, self.adapters = 0, adapters
        self._updated = False  # by this process; other ranks only know the version
        self._run = uuid.uuid4().hex[:8]  # servers may be shared with other runs
        self._adapter_folder: tempfile.TemporaryDirectory[str] | None = None
        self.servers = [
            url if isinstance(url, Endpoint) else Endpoint(url, VLLM_KEY_VARIABLE) for url in urls
        ]
        cards = [_model_card(server) for server in self.servers]
        self.model, self.context = cards[0]
        self.served = self.model
        for server, card in zip(self.servers, cards, strict=True):
            require(
                card == cards[0],
                f"all vllm servers must hold one model, got {card} at {server.url} for {cards[0]}",
            )

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, on_token: OnToken | None = None
    ) -> list[list[Completion]]:
        """See :class:`.Engine`; tokens are reported when their completion is complete.

        Raises:
            InputError: a prompt is too long, or a server fails after all tries.
            TrainingFault: a server has weights of another version than :meth:`update_weights` gave it.
        """
        require_fitting(prompts, self.context)
        self._require_version()
        jobs = [(i, k) for i in range(len(prompts)) for k in range(sampling.completions)]

        def one(job: tuple[int, int]) -> Completion:
            i, k = job
            server = self.servers[(i * sampling.completions + k) % len(self.servers)]
            return self._completion(server, prompts[i], k, sampling)

        results: list[list[Completion]] = [[] for _ in prompts]
        budget = FailureBudget(0)
        try:
            for (i, k), completion in zip(
                jobs, concurrently(one, jobs, self.workers * len(self.servers)), strict=True
            ):
                results[i].append(completion)
                for token in completion.token_ids if on_token else ():
                    assert on_token is not None, "checked in the line above"
                    on_token(i, k, token)
        except RequestFailed as error:
            budget.spend(error)
        self._require_version()
        return results

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See :class:`.Engine`: writes a folder, lets every server reload it, and clears their prefix caches.

        Each tensor is a file of its own, so that one at a time is in memory. Without a cleared cache a server would
        answer from keys and values of the old weights.

        Raises:
            InputError: a server has no such routes, or fails.
            OSError: the folder could not be written.
        """
        self.weight_version = UNKNOWN_VERSION
        with tempfile.TemporaryDirectory(prefix="megatron_align_weights_", dir=self.weights_folder) as folder:
            Path(folder).chmod(0o755)  # servers may belong to another user
            for number, (name, tensor) in enumerate(tensors):
                file = Path(folder) / f"model-{number:05d}.safetensors"
                with naming_file("weights for the vllm servers", file):
                    save_tensors({name: tensor}, file)
            for server in self.servers:
                reload = {"method": "reload_weights", "kwargs": {"weights_path": folder}}
                self._administer(server, "/collective_rpc", reload)
                self._administer(server, "/reset_prefix_cache", {})
                self._administer(server, "/update_weight_version", {"new_version": str(version)})
        self.weight_version, self.served, self._updated = version, self.model, True

    def refuses_adapter(self, adapter: Adapter) -> str | None:
        """See :class:`.Engine`: vLLM loads LoRA of the transformer's linear layers."""
        if not self.adapters:
            return "the servers of the vllm engine are not said to load adapters (adapters=True)"
        if adapter.dora:
            return "vllm loads no DoRA adapters"
        if ends := sorted(adapter.modules & {EMBED_TOKENS, LM_HEAD}):
            return f"vllm loads adapters of linear layers of the transformer only, this one has {', '.join(ends)}"
        if adapter.saved:
            return f"vllm loads no modules_to_save, this adapter has {listed(sorted(adapter.saved))}"
        return None

    def holds_base(self, base: object) -> bool:
        """See :class:`.Engine`: the servers were started with the base."""
        return True

    def update_base(self, tensors: Iterable[tuple[str, Tensor]], base: object) -> None:
        """Fail: the servers were started with the base."""
        raise AssertionError("the servers hold the base")

    def update_adapter(self, live: LiveAdapter, version: int) -> None:
        """See :class:`.Engine`: writes a PEFT folder, lets every server load it, and unload the one before.

        The folder is kept until the next: a server may read it again.

        Raises:
            InputError: a server has no such routes, or refuses the adapter.
            OSError: the folder could not be written.
        """
        self.weight_version, before = UNKNOWN_VERSION, self.served
        folder = tempfile.TemporaryDirectory(prefix="megatron_align_adapter_", dir=self.weights_folder)
        Path(folder.name).chmod(0o755)  # servers may belong to another user
        name = f"policy-{self._run}-{version}"
        path = Path(folder.name) / name
        tensors = {key: tensor.detach().cpu() for key, tensor in live.tensors.items()}
        write_adapter(path, tensors, live.adapter, live.shape, self.model, None)
        for server in self.servers:
            self._load(server, "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path)})
            if before not in (self.model, name):
                self._load(server, "/v1/unload_lora_adapter", {"lora_name": before})
        if self._adapter_folder is not None:
            self._adapter_folder.cleanup()
        self._adapter_folder = folder
        self.weight_version, self.served, self._updated = version, name, True

    def close(self) -> None:
        """Leave the servers as they are, but for this run's adapter: others may use them."""
        if self._adapter_folder is not None:
            for server in self.servers:
                with suppress(InputError):  # a server that is gone has unloaded it
                    self._load(server, "/v1/unload_lora_adapter", {"lora_name": self.served})
            self._adapter_folder.cleanup()
            self._adapter_folder, self.served = None, self.model

    def _completion(self, server: Endpoint, prompt: Prompt, sample: int, sampling: Sampling) -> Completion:
        answer = server.post("/v1/completions", self._request(prompt, sample, sampling))
        try:
            choice = answer["choices"][0]
            reason: FinishReason = "length" if choice["finish_reason"] == "length" else "stop"
            token_ids = tuple(int(token) for token in choice["token_ids"])
            logprobs = tuple(float(value) for value in choice["logprobs"]["token_logprobs"])
            text = str(choice["text"])
        except (LookupError, TypeError, ValueError) as error:
            raise RequestFailed(
                f"{server.url}/v1/completions must answer choices with token_ids (vLLM's return_token_ids), logprobs, "
                f"got {str(answer)[:200]}"
            ) from error
        if len(token_ids) != len(logprobs):
            raise RequestFailed(
                f"{server.url}/v1/completions answered {len(token_ids)} tokens with {len(logprobs)} log-probs"
            )
        truncates = sampling.top_p < 1 or sampling.top_k > 0
        return Completion(
            token_ids=token_ids,
            logprobs=(float("nan"),) * len(token_ids) if truncates else logprobs,
            text=text,
            finish_reason=reason,
            weight_version=self.weight_version,
        )

    def _request(self, prompt: Prompt, sample: int, sampling: Sampling) -> dict[str, Any]:
        request: dict[str, Any] = {
            "model": self.served,
            "prompt": [int(token) for token in prompt.token_ids],
            "max_tokens": min(sampling.max_tokens, self.context - len(prompt.token_ids)),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            **_NEUTRAL,
            "logprobs": 0,
            "return_token_ids": True,
            "seed": request_seed(sampling.seed, prompt.key, sample),
        }
        if self.weight_version:
            request["cache_salt"] = f"weights of version {self.weight_version}"
        return request | ({"stop": list(sampling.stop)} if sampling.stop else {})

    def _require_version(self) -> None:
        """Check that the servers still have the weights of the last update."""
        if not (self._updated or self.weight_version):
            return
        if self.served != self.model:
            self._require_adapter()
            return
        for server in self.servers:
            try:
                found = server.get("/weight_info").get("weight_version")
            except RequestFailed as error:
                raise InputError(f"the vllm server must say which weights it has: {error}") from error
            if found != str(self.weight_version):
                raise TrainingFault(
                    f"the vllm server {server.url} must have the weights of version {self.weight_version}, it has "
                    f"version {found}: it was restarted, or another run updates it; give each run servers of its own"
                )

    def _require_adapter(self) -> None:
        """Check that the servers still have the adapter of the last update."""
        for server in self.servers:
            try:
                found = [str(card["id"]) for card in server.get("/v1/models")["data"]]
            except (RequestFailed, LookupError, TypeError) as error:
                raise InputError(
                    f"the vllm server must say which adapters it has: {one_line(error)}"
                ) from error
            if self.served not in found:
                raise TrainingFault(
                    f"the vllm server {server.url} must have the adapter {self.served}, it has {', '.join(found)}: it "
                    "was restarted, or something else unloaded the adapter; resume from the last checkpoint"
                )

    def _load(self, server: Endpoint, path: str, body: dict[str, Any]) -> None:
        try:
            server.post(path, body, text=True)
        except RequestFailed as error:
            raise InputError(
                "the vllm server must load the adapter, which needs VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its "
                f"environment, --enable-lora and --max-lora-rank of at least its rank: {error}"
            ) from error

    def _administer(self, server: Endpoint, path: str, body: dict[str, Any]) -> None:
        try:
            server.post(path, body)
        except RequestFailed as error:
            raise InputError(
                f"the vllm server must take new weights, which needs VLLM_SERVER_DEV_MODE=1 in its environment: {error}"
            ) from error


def request_seed(seed: int, key: int, sample: int) -> int:
    """Return the seed of one request, 63 bits: a function of the run's seed, the prompt's key and the sample."""
    digest = hashlib.sha256(f"{seed}/{key}/{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _model_card(server: Endpoint) -> tuple[str, int]:
    """Return name and context of the model that a server holds."""
    try:
        card = server.get("/v1/models")["data"][0]
        return str(card["id"]), int(card["max_model_len"])
    except RequestFailed as error:
        raise InputError(f"the vllm engine needs a running server: {error}") from error
    except (LookupError, TypeError, ValueError) as error:
        raise InputError(
            f"{server.url}/v1/models must name a model with max_model_len, as vLLM does"
        ) from error
