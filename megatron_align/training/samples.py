"""Answers of the model during training: a few prompts, into the log and samples.jsonl."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch.distributed as dist

from megatron_align.config.validation import SamplesConfig
from megatron_align.data.tokenize.chat_template import load_chat_template
from megatron_align.data.tokenize.template_clock import parse_date
from megatron_align.data.tokenize.tokenizer import load_tokenizer
from megatron_align.errors import InputError, TrainingFault, one_line, require
from megatron_align.monitoring.logger import RunLog
from megatron_align.monitoring.metrics_file import MetricsFile, keep_until
from megatron_align.rollout.prompts import PromptRecord, PromptTokenizer, read_prompts
from megatron_align.rollout.types import Completion, Prompt, Sampling, require_fitting
from megatron_align.training.hooks import Hook
from megatron_align.training.trainer import Trainer

SAMPLES = "samples.jsonl"
_SHOWN = 300  # characters of a prompt's end and of an answer in the log


class Samples(Hook):
    """Answers the prompts of ``validation.generate`` when it is due and after the last step.

    Rank 0 generates, with a copy of the model that it holds only meanwhile; the other ranks help to gather the weights.
    It must come before checkpoints, see :class:`.Validation`.
    """

    def __init__(self, log: RunLog, config: SamplesConfig):
        self._log, self._config = log, config
        self._sampling = Sampling(
            max_tokens=config.max_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            seed=config.seed,
        )
        self._records: list[PromptRecord] = []
        self._prompts: list[Prompt] = []
        self._file: MetricsFile | None = None

    def start(self, trainer: Trainer) -> None:
        """Read and tokenise the prompts, and drop the answers of steps that a resumed run makes again.

        Raises:
            InputError: bad prompts, or a model that cannot generate.
        """
        super().start(trainer)
        setup, data = trainer.setup, trainer.config.data
        require(
            not setup.shape.is_reward,
            f"validation.generate needs a language model, got {setup.shape.architecture}",
        )
        template = load_chat_template(data.chat_template) if data.chat_template else None
        now = parse_date(data.template_date) if data.template_date else None
        tokenizer = PromptTokenizer(load_tokenizer(str(setup.assets)), template, now)
        config = self._config
        self._records = list(read_prompts(config.prompts, as_chat=config.as_chat, limit=config.limit))
        self._prompts = [tokenizer.prompt(record, key) for key, record in enumerate(self._records)]
        require_fitting(self._prompts, setup.shape.max_positions, "prompts of validation.generate")
        if dist.get_rank() == 0:
            keep_until(setup.folder / SAMPLES, trainer.step)
            self._file = MetricsFile(setup.folder / SAMPLES)

    def end_step(self, step: int) -> bool:
        """See :class:`Hook`."""
        every = self._config.every or self.trainer.config.train.validate_every
        if step == self.trainer.steps or (every is not None and step % every == 0):
            with self.trainer.watchdog.patient(f"answering prompts after step {step}"):
                self._answer(step)
        return False

    def _answer(self, step: int) -> None:
        """Generate and write the answers. Collective.

        Raises:
            TrainingFault: on every rank: rank 0 could not, or the folder is another run's by now.
        """
        self.trainer.setup.require_folder()
        fault: str | None = None
        engine = None
        if dist.get_rank() == 0:
            try:
                engine = self.trainer.live_engine()
            except (InputError, OSError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
                fault = one_line(error)
        self.trainer.update_engine(engine)
        if engine is not None:
            try:
                answers = engine.generate(self._prompts, self._sampling)
                self._write(step, [completion for [completion] in answers])
            except (InputError, OSError, RuntimeError) as error:
                fault = one_line(error)
            engine.close()
        faults = [fault]
        dist.broadcast_object_list(faults, src=0)
        if faults[0] is not None:
            raise TrainingFault(f"validation.generate failed after step {step}: {faults[0]}")

    def _write(self, step: int, completions: list[Completion]) -> None:
        assert self._file is not None, "rank 0 writes"
        for record, completion in zip(self._records, completions, strict=True):
            prompt = record.prompt_field()
            row: dict[str, Any] = {
                "step": step,
                "prompt": prompt,
                "completion": completion.text,
                "finish_reason": completion.finish_reason,
                "tokens": len(completion.token_ids),
            }
            if refusal := self._file.add(row):
                self._log.message(f"warning: {SAMPLES}: {refusal}; its rows wait in memory")
            asked = prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
            self._log.message(f"step {step}: {_one_line(asked[-_SHOWN:])} -> {_one_line(completion.text)}")
        with suppress(OSError):  # the warning has said so
            self._file.sync()

    def close(self, error: BaseException | None) -> None:
        """Write the answers that a full disk refused, unless the folder is another run's by now."""
        if self._file is None:
            return
        try:
            self._file.close(discard=self.trainer.setup.taken_by() is not None)
        except OSError as refusal:
            self._log.message(f"warning: {SAMPLES}: {refusal.strerror}; its last rows are lost")


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN else f"{line[:_SHOWN]}..."
