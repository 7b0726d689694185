"""Report of the quickstart: a table, ``report.json`` and a plot of the losses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class Exam:
    """Results of one model on the held-out questions."""

    model: str  # "untrained", or the stage that trained it
    asked: int
    right: int
    preferred: int  # questions whose right answer is likelier than a mistake
    margin: float  # mean difference of their log-probs, in nats
    examples: dict[str, str]  # question -> answer, a few of them

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.right / self.asked

    @property
    def preference_accuracy(self) -> float:
        """Share of sums whose right answer is likelier than a mistake."""
        return self.preferred / self.asked


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Losses, rewards, speed and duration of one training stage."""

    name: str
    losses: tuple[float, ...]  # of every step
    tokens_per_second: float  # over all steps; start-up, saving and export not counted
    seconds: float  # of the command, start-up and export included
    rewards: tuple[float, ...] = ()  # mean of every step's rollouts; empty: the stage has none

    @classmethod
    def read(cls, name: str, metrics: Path, seconds: float) -> Stage:
        """Collect the training rows of ``metrics.jsonl``."""
        rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
        rows = [row for row in rows if row.get("split", "train") == "train"]
        return cls(
            name=name,
            losses=tuple(row["loss"] for row in rows),
            rewards=tuple(row["reward"] for row in rows if "reward" in row),
            tokens_per_second=sum(row["tokens"] for row in rows) / sum(row["step_seconds"] for row in rows),
            seconds=seconds,
        )


@dataclass(frozen=True, kw_only=True)
class Report:
    """Results of the quickstart: an exam of the untrained model, then one per stage, in order."""

    exams: Sequence[Exam]
    stages: Sequence[Stage]
    parameters: int
    seconds: float  # of the complete quickstart

    def write(self, path: Path) -> None:
        """Write all numbers as JSON, with shares next to counts and the first and last loss next to the curve."""
        exams = [
            {
                **asdict(exam),
                "accuracy": exam.accuracy,
                "preference_accuracy": exam.preference_accuracy,
            }
            for exam in self.exams
        ]
        stages = [
            {
                **asdict(stage),
                "steps": len(stage.losses),
                "first_loss": stage.losses[0],
                "last_loss": stage.losses[-1],
            }
            for stage in self.stages
        ]
        content = {"parameters": self.parameters, "seconds": self.seconds, "exams": exams, "stages": stages}
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def table(self) -> Table:
        """Return a table with one row per model: before training, and after each stage."""
        table = Table(
            title=f"{self.exams[0].asked} sums the model was never trained on", title_justify="left"
        )
        table.add_column("model")
        for heading in ("accuracy", "prefers", "margin", "first", "last", "tokens/s", "seconds"):
            table.add_column(heading, justify="right")
        table.caption = (
            "first, last: loss of a stage's steps; of grpo the share of right answers that it drew"
        )
        table.caption_justify = "left"
        trained = {stage.name: stage for stage in self.stages}
        for exam in self.exams:
            cells = [exam.model, f"{exam.accuracy:.1%}"]
            cells += [f"{exam.preference_accuracy:.1%}", f"{exam.margin:.2f}"]
            if stage := trained.get(exam.model):
                curve = stage.rewards or stage.losses
                cells += [f"{curve[0]:.3f}", f"{curve[-1]:.3f}"]
                cells += [f"{stage.tokens_per_second:,.0f}", f"{stage.seconds:.0f}"]
            table.add_row(*cells)
        return table

    def show(self, console: Console) -> None:
        """Print the table, as plain text in a pipe or a file."""
        console.print()
        console.print(self.table())
        console.print(f"total: {self.seconds:.0f} s")

    def titles(self) -> list[str]:
        """Return a line per stage: accuracy on unseen sums of the model before it in the table, and after it."""
        before = {after.model: (start, after) for start, after in pairwise(self.exams)}
        return [
            f"{stage.name.upper()}: unseen sums right {before[stage.name][0].accuracy:.1%} before, "
            f"{before[stage.name][1].accuracy:.1%} after"
            for stage in self.stages
        ]

    def draw(self, path: Path) -> None:
        """Plot the loss of every stage as PNG, or the reward where it has one."""
        import matplotlib

        matplotlib.use("Agg")  # no display needed
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(1, len(self.stages), figsize=(6.4 * len(self.stages), 4), squeeze=False)
        for ax, stage, title in zip(axes[0], self.stages, self.titles(), strict=True):
            steps = range(1, len(stage.losses) + 1)
            ax.plot(steps, stage.rewards or stage.losses, color="tab:blue", linewidth=1.5)
            loss = f"training loss (nats per {'pair' if stage.name == 'dpo' else 'token'})"
            ax.set(
                xlabel="optimiser step",
                ylabel="share of right answers" if stage.rewards else loss,
                yscale="log" if stage.name == "sft" else "linear",  # a DPO loss stays near ln 2
                xlim=(1, steps[-1]),
            )
            ax.set_title(title, fontsize=11)
            ax.grid(alpha=0.3, which="both", linewidth=0.5)
            ax.spines[["top", "right"]].set_visible(False)
        figure.tight_layout()
        figure.savefig(path, dpi=150)
        plt.close(figure)
