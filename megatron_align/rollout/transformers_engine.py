"""Generation with transformers' model in this process: continuous batches with a key/value cache.

Prompts are computed longest first, each once for all its samples. A row that has ended leaves the batch; when half of
the rows have left, prompts that wait are computed and join the rest. Rows are padded on the left, and positions are
explicit, so neighbours do not change a row's numbers beyond rounding.

Shapes: B rows of the batch, G prompts that join it, L cached tokens with padding, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

from megatron_align.config.rollout import BATCH_TOKENS
from megatron_align.data.tokenize.tokenizer import load_tokenizer
from megatron_align.errors import InputError, one_line
from megatron_align.hf.baichuan import llama_config, llama_tensors
from megatron_align.hf.load import HEAD, open_hf
from megatron_align.model.families import ModelShape, read_shape, rows
from megatron_align.model.families.adapter import Adapter
from megatron_align.rollout.adapters import EngineAdapters
from megatron_align.rollout.decoding import Decoder, Row
from megatron_align.rollout.engine import UNKNOWN_VERSION, LiveAdapter, OnToken
from megatron_align.rollout.sampling import draw, uniforms
from megatron_align.rollout.types import Completion, Prompt, Sampling, require_fitting

LEAST_FILL = 0.75  # share of a group's longest prompt that its shortest one has
_LIVE = "live"


class TransformersEngine:
    """An :class:`.Engine` around transformers' model.

    Args:
        model: a causal language model; it stays on its device, in its dtype.
        tokenizer: of the model.
        batch_tokens: most tokens in the cache of one batch; a single prompt may take more.
        is_baichuan: the model is the Llama that computes what Baichuan2 does, and new weights are Baichuan2's.

    Attributes:
        context: most tokens of a prompt with its completion.
        end_ids: tokens that end a completion: those of the generation config, and the tokenizer's EOS.
    """

    shared, served, has_own_base = False, "", False

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_tokens: int = BATCH_TOKENS,
        *,
        is_baichuan: bool = False,
    ) -> None:
        self.model, self.tokenizer, self.batch_tokens = model.eval(), tokenizer, batch_tokens
        self.weight_version, self._is_baichuan = 0, is_baichuan
        self._base: object | None = None
        self._adapters: EngineAdapters | None = None
        self.context = int(model.config.max_position_embeddings)
        self.end_ids = _end_ids(model, tokenizer)

    @classmethod
    def from_folder(cls, folder: str | Path, dtype: torch.dtype, device: torch.device) -> TransformersEngine:
        """Load a Hugging Face folder.

        Raises:
            InputError: transformers cannot load it as a language model.
        """
        shape = _require_language_model(folder)
        disable_progress_bar()
        if shape.norm_head:
            engine = cls.from_assets(folder, dtype, device)
            weights = open_hf(folder)[0]
            names = [
                name for row in rows(shape) for name in row.hf
            ]  # a folder may hold tables that are no weights
            engine.update_weights(((name, weights.tensor(name)) for name in names), version=0)
            return engine
        tokenizer = load_tokenizer(str(folder))
        try:
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise InputError(f"{folder}: transformers could not load the model: {one_line(error)}") from error
        return cls(model.to(device), tokenizer)

    @classmethod
    def from_assets(cls, assets: str | Path, dtype: torch.dtype, device: torch.device) -> TransformersEngine:
        """Build the model of a folder with config and tokenizer; :meth:`update_weights` gives it weights.

        Raises:
            InputError: it is no language model.
        """
        shape = _require_language_model(assets)
        config = (
            llama_config(assets)
            if shape.norm_head
            else AutoConfig.from_pretrained(assets, local_files_only=True, trust_remote_code=False)
        )
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
        model.to_empty(device=device)
        model.tie_weights()
        body = model.model
        body.rotary_emb = type(body.rotary_emb)(config=config).to(device)  # its frequencies are not weights
        if (Path(assets) / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(assets, local_files_only=True)
        return cls(model, load_tokenizer(str(assets)), is_baichuan=shape.norm_head)

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, on_token: OnToken | None = None
    ) -> list[list[Completion]]:
        """See :class:`.Engine`."""
        require_fitting(prompts, self.context)
        decoder = Decoder(self.tokenizer, self.end_ids, sampling)
        results: list[list[Completion | None]] = [[None] * sampling.completions for _ in prompts]
        waiting = deque(sorted(range(len(prompts)), key=lambda i: (-len(prompts[i].token_ids), i)))
        batch = _Batch(self.model)
        capacity = 0
        while waiting or batch.rows:
            if waiting and 2 * len(batch.rows) <= capacity:
                for joining in _of_similar_length(self._joining(prompts, waiting, sampling, batch), prompts):
                    rows = self._rows(joining, prompts, sampling)
                    batch.join([prompts[i].token_ids for i in joining], rows)
                capacity = max(len(batch.rows), 1)
            self._step(batch, sampling, decoder, on_token)
            for row in batch.drop_finished():
                results[row.prompt][row.sample] = decoder.completion(row, self.weight_version)
        return [[completion for completion in of_prompt if completion] for of_prompt in results]

    @torch.no_grad()
    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See :class:`.Engine`; the version changes when every tensor has been replaced."""
        parameters = dict(self.model.named_parameters())
        tied = HEAD not in parameters
        missing = set(parameters)
        self.weight_version, self._base = UNKNOWN_VERSION, None
        if self._adapters is not None:
            self._adapters.use(None)
        for name, tensor in llama_tensors(tensors) if self._is_baichuan else tensors:
            if name == HEAD and tied:
                continue  # equal to the embedding, whose tensor comes too
            if name not in parameters:
                raise InputError(f"the engine's model has no tensor {name}: it is another architecture")
            if parameters[name].shape != tensor.shape:
                found = f"{list(tensor.shape)} for {list(parameters[name].shape)}"
                raise InputError(f"the engine's tensor {name} must keep its shape, got {found}")
            parameters[name].copy_(tensor)
            missing.discard(name)
        if missing:
            raise InputError(
                f"the engine's weights must all be replaced, missing {', '.join(sorted(missing))}"
            )
        self.weight_version = version

    def refuses_adapter(self, adapter: Adapter) -> str | None:
        """See :class:`.Engine`: adapters of every kind are loaded."""
        return None

    def holds_base(self, base: object) -> bool:
        """See :class:`.Engine`."""
        return self._base is base

    def update_base(self, tensors: Iterable[tuple[str, Tensor]], base: object) -> None:
        """See :class:`.Engine`."""
        self.update_weights(tensors, UNKNOWN_VERSION)
        self._base = base

    @torch.no_grad()
    def update_adapter(self, live: LiveAdapter, version: int) -> None:
        """See :class:`.Engine`; A and B are added to the outputs of their modules, the base stays as it is."""
        self.weight_version = UNKNOWN_VERSION
        if self._adapters is None:
            self._adapters = EngineAdapters(self.model, {})
        self._adapters.replace(_LIVE, live.adapter, live.tensors)
        self._adapters.use(_LIVE)
        self.weight_version = version

    def close(self) -> None:
        """Free the model's memory."""
        self.model.to("meta")

    def _joining(
        self, prompts: Sequence[Prompt], waiting: deque[int], sampling: Sampling, batch: _Batch
    ) -> list[int]:
        """Take the prompts from ``waiting`` that fit into the batch; at least one if the batch is empty."""
        joining: list[int] = []
        longest = batch.tokens + max((row.limit - len(row.token_ids) for row in batch.rows), default=0)
        while waiting:
            needed = len(prompts[waiting[0]].token_ids) + sampling.max_tokens
            rows = len(batch.rows) + (len(joining) + 1) * sampling.completions
            if rows * max(longest, needed) > self.batch_tokens and (joining or batch.rows):
                break
            longest = max(longest, needed)
            joining.append(waiting.popleft())
        return joining

    def _rows(self, joining: Sequence[int], prompts: Sequence[Prompt], sampling: Sampling) -> list[Row]:
        rows = []
        for i in joining:
            limit = min(sampling.max_tokens, self.context - len(prompts[i].token_ids))
            for sample in range(sampling.completions):
                count = limit if sampling.temperature else 0
                rows.append(Row(i, sample, uniforms(sampling.seed, prompts[i].key, sample, count), limit))
        return rows

    def _step(self, batch: _Batch, sampling: Sampling, decoder: Decoder, on_token: OnToken | None) -> None:
        """Draw a token for every row, and compute the logits of the next one for rows that continue."""
        uniform_B = torch.tensor([row.uniform() for row in batch.rows], dtype=torch.float64)
        token_B, logprob_B = draw(batch.logits_BV, sampling, uniform_B)
        if logprob_B.isnan().any():
            dtype = str(self.model.dtype).removeprefix("torch.")
            raise InputError(
                f"the model's log-probs must be finite, got NaN: its weights are corrupt, or too large for {dtype}"
            )
        for row, token, logprob in zip(batch.rows, token_B.tolist(), logprob_B.tolist(), strict=True):
            decoder.add(row, token, logprob)
            if on_token is not None:
                on_token(row.prompt, row.sample, token)


class _Batch:
    """Rows in progress: their cache, mask and the logits of each one's next token."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model, self._device = model, next(model.parameters()).device
        self.rows: list[Row] = []
        self.logits_BV = torch.empty(0)
        self._cache = DynamicCache()
        self._mask_BL = torch.empty(0, 0, dtype=torch.long, device=self._device)

    @property
    def tokens(self) -> int:
        """Cached tokens of a row, padding included."""
        return self._mask_BL.shape[1]

    def join(self, prompts: Sequence[Sequence[int]], rows: list[Row]) -> None:
        """Compute prompts and add their rows, the same number for each prompt."""
        if not prompts:
            return
        longest = max(map(len, prompts))
        tokens_GL = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask_GL = torch.zeros_like(tokens_GL)
        for g, prompt in enumerate(prompts):
            tokens_GL[g, longest - len(prompt) :] = torch.as_tensor(prompt)
            mask_GL[g, longest - len(prompt) :] = 1
        cache = DynamicCache()
        mask_GL = mask_GL.to(self._device)
        logits_GV = self._forward(tokens_GL.to(self._device), mask_GL, cache)
        repeats = len(rows) // len(prompts)
        cache.batch_repeat_interleave(repeats)
        mask_BL, logits_BV = (x.repeat_interleave(repeats, dim=0) for x in (mask_GL, logits_GV))
        if self.rows:
            cache, mask_BL = _joined((self._cache, self._mask_BL), (cache, mask_BL))
            logits_BV = torch.cat([self.logits_BV, logits_BV])
        self.rows, self._cache, self._mask_BL, self.logits_BV = self.rows + rows, cache, mask_BL, logits_BV

    def drop_finished(self) -> list[Row]:
        """Remove and return the finished rows; compute the next logits of the others."""
        finished = [row for row in self.rows if row.finish_reason is not None]
        if finished:
            kept = [b for b, row in enumerate(self.rows) if row.finish_reason is None]
            self.rows = [self.rows[b] for b in kept]
            self._keep(torch.tensor(kept, dtype=torch.long, device=self._device))
        if self.rows:
            last_B = torch.tensor([[row.token_ids[-1]] for row in self.rows], device=self._device)
            self._mask_BL = F.pad(self._mask_BL, (0, 1), value=1)
            self.logits_BV = self._forward(last_B, self._mask_BL, self._cache)
        return finished

    def _keep(self, kept_B: Tensor) -> None:
        """Keep some rows, and the columns that one of them uses."""
        self._mask_BL = self._mask_BL[kept_B]
        if not len(kept_B):
            self._cache, self._mask_BL = DynamicCache(), self._mask_BL[:, :0]
            return
        unused = int(self._mask_BL.argmax(1).min())
        self._mask_BL = self._mask_BL[:, unused:]
        for layer in self._cache.layers:
            layer.keys, layer.values = (x[kept_B, :, unused:] for x in (layer.keys, layer.values))

    def _forward(self, tokens_BL: Tensor, mask_BL: Tensor, cache: DynamicCache) -> Tensor:
        positions_BL = (mask_BL.cumsum(1) - 1).clamp(min=0)[:, -tokens_BL.shape[1] :]
        output = self._model(
            input_ids=tokens_BL,
            attention_mask=mask_BL,
            position_ids=positions_BL,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]


def _of_similar_length(joining: Sequence[int], prompts: Sequence[Prompt]) -> list[list[int]]:
    """Split prompts, longest first, into groups that are computed together with little padding."""
    groups: list[list[int]] = []
    for i in joining:
        longest = len(prompts[groups[-1][0]].token_ids) if groups else 0
        if len(prompts[i].token_ids) >= LEAST_FILL * longest and groups:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _joined(
    one: tuple[DynamicCache, Tensor], other: tuple[DynamicCache, Tensor]
) -> tuple[DynamicCache, Tensor]:
    """Return the caches and masks of two batches as one, the shorter padded on the left."""
    length = max(mask.shape[1] for _, mask in (one, other))
    joined = DynamicCache()
    for index, layers in enumerate(zip(one[0].layers, other[0].layers, strict=True)):
        keys, values = (
            torch.cat([F.pad(x, (0, 0, length - x.shape[2], 0)) for x in parts])
            for parts in ([layer.keys for layer in layers], [layer.values for layer in layers])
        )
        joined.update(keys, values, index)
    return joined, torch.cat([F.pad(mask, (length - mask.shape[1], 0)) for _, mask in (one, other)])


def _end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    configured = model.generation_config.eos_token_id if model.generation_config else None
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(int(i) for i in (*ids, tokenizer.eos_token_id) if i is not None)


def _require_language_model(folder: str | Path) -> ModelShape:
    shape = read_shape(folder)
    if shape.is_reward:
        raise InputError(f"{folder}: generation needs a language model, got {shape.architecture}")
    return shape
