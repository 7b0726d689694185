"""The texts that two models are compared on: random tokens, and real text (built-in or the user's)."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from megatron_align.data.formats.files import read_file
from megatron_align.data.tokenize.record_tokenizer import RecordTokenizer
from megatron_align.data.tokenize.tokenizer import TOKENIZER_FILES, load_tokenizer
from megatron_align.errors import InputError
from megatron_align.model.families import ModelShape

RECORDS = 16  # of --data
TEXT_TOKENS = 512  # of each text, from its start
RANDOM_LENGTHS = (1, 7, 130, 38, 512)
# Scripts, digits, code and symbols, which tokenizers split in different ways.
SENTENCES = (
    "The quick brown fox jumps over the lazy dog, and it does so 1,234 times a day.",
    "Der Wind blies über die Dächer der alten Stadt, während drüben die Glocken läuteten.",
    "El niño preguntó por qué el cielo es azul; nadie supo contestarle enseguida.",
    "Ils ont déjà goûté le café de l'hôtel, mais ils préfèrent celui d'en face.",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "今天天气很好，我们一起去公园散步，然后在湖边喝茶。",
    "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。",
    "다람쥐 헌 쳇바퀴에 타고파. 오늘은 비가 와서 집에서 책을 읽었다.",
    "كان الطقس جميلا هذا الصباح فخرجنا نمشي على شاطئ البحر.",
    "आज सुबह मौसम अच्छा था, इसलिए हम नदी के किनारे टहलने गए।",
    "def area(r: float) -> float:\n    return 3.14159 * r ** 2  # πr²\n",
    "E = mc², ∑ 1/n² = π²/6 ≈ 1.6449; 🙂👍🏽 — done\t(100 %)\n\n",
)


def choose_texts(
    hf: str | Path, data: str | None, shape: ModelShape
) -> tuple[dict[str, list[Tensor]], list[str]]:
    """Return the texts to compare as tokens, by kind, and notes about them for the report."""
    longest = min(TEXT_TOKENS, shape.max_positions)
    draw = torch.Generator().manual_seed(0)
    texts = {
        "random tokens": [
            torch.randint(shape.vocab_size, (min(length, longest),), generator=draw)
            for length in RANDOM_LENGTHS
        ]
    }
    if data is None and not any(next(Path(hf).glob(name), None) for name in TOKENIZER_FILES):
        return texts, [f"no tokenizer in {hf}: logits were compared on random tokens only"]
    tokenizer = load_tokenizer(str(hf))
    if data is None:
        kind, tokens = "built-in sentences", [tokenizer(text)["input_ids"] for text in SENTENCES]
    else:
        template = RecordTokenizer(tokenizer)
        kind = data
        tokens = [template.sample(record).tokens_L for record in islice(read_file(data)[1], RECORDS)]
    texts[kind] = [torch.as_tensor(ids, dtype=torch.int64)[:longest] for ids in tokens if len(ids)]
    highest = max((int(text.max()) for text in texts[kind]), default=0)
    if highest >= shape.vocab_size:
        raise InputError(
            f"tokenizer does not fit the model's vocabulary of {shape.vocab_size}: it produces token {highest} in {hf}"
        )
    return texts, []
