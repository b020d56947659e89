"""What a run reports: the scalars, their meaning, and the sinks they go to."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pretrain.errors import UserError, writing
from pretrain.json_text import to_json

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console

SCALARS: Mapping[str, str] = {
    "loss/train": "Training loss in nats per token over the tokens since the last log. Regularisers excluded.",
    "loss/validation": "Loss in nats per token on the validation split (its first monitor.evaluate_rows rows).",
    "loss/validation_bits_per_byte": "The same loss in bits per byte of UTF-8 text: independent of the tokenizer.",
    "task/token_accuracy": "Share of right answers on a synthetic task.",
    "task/last_accuracy": "Share of rows whose last answer is right.",
    "task/sequence_accuracy": "Share of rows whose answers are all right.",
    "task/longer_token_accuracy": "Share of right answers at monitor.evaluate_length.",
    "task/longer_last_accuracy": "Share of rows whose last answer is right at monitor.evaluate_length.",
    "task/longer_sequence_accuracy": "Share of rows whose answers are all right at monitor.evaluate_length.",
    "optim/learning_rate": "Learning rate of embeddings and norms; matrices have it times optim.matrix_lr_multiplier.",
    "optim/gradient_norm": "Global L2 norm of the gradient before clipping, in the last step logged.",
    "optim/skipped_steps": "Steps of the run that were passed over, for their gradient was not finite.",
    "speed/tokens_per_second": "Tokens trained per second over all ranks since the last log, pauses included.",
    "speed/step_seconds": "Wall time per optimizer step since the last log.",
    "speed/data_wait_share": "Share of that time that rank 0 waited for data. Above 0.02: raise data.workers.",
    "speed/evaluation_seconds": "Wall time of an evaluation on the validation split.",
    "speed/teraflops_per_rank": "Arithmetic of the model (forward + backward) in 10^12 operations per second and rank.",
    "speed/mfu": "That figure over the device's peak in the run's precision. Only where the peak is known.",
    "memory/resident_gib": "Resident memory of rank 0's process.",
    "memory/gpu_peak_gib": "Peak GPU memory of rank 0 since the last log.",
    "progress/tokens": "Tokens trained since the run began, in millions.",
    "newton/residual_max": "Greatest residual of the recurrences since the last log; states may be off by some times "
    "it. Per layer, and the worst.",
    "newton/residual_mean": "Mean residual of the recurrences. Per layer, and the greatest.",
    "newton/iterations": "Most Newton iterations taken; 0 where a recurrence is solved in time order.",
    "newton/jacobian_norm": "Greatest norm of a recurrence's Jacobian. Above 1 a state can grow.",
    "newton/acted": "Share of forward passes in which model.newton.on_exceed had to act.",
    "newton/clip_saturation": "Share of recurrent weights at model.recurrent_clip.",
    "checkpoint/blocked_seconds": "Time that a save held up training: waits for the save before and for its own copy.",
}
"""Every scalar in TensorBoard, with its help text. tests/ compare this table with the docs."""

_VALIDATION = "validation_"
_LAYER = re.compile(r"/layer_\d+$")


def layer_scalar(name: str, layer: int) -> str:
    """The name of a scalar's series for one layer: `newton/residual_max/layer_03`."""
    return f"{name}/layer_{layer:02d}"


def help_text(name: str, more: Mapping[str, str] | None = None) -> str:
    """What a scalar means; a layer's series has the text of the whole, and an evaluation's that of training.

    more: scalars of the run's objective and of hooks from outside, which are told here by nobody else.

    Raises:
        UserError: nobody says what the scalar means.
    """
    more = more or {}
    known = name.removeprefix(_VALIDATION)
    if known in more:
        return more[known]
    known = _LAYER.sub("", name)
    if known not in SCALARS:
        raise UserError(
            f"the scalar {name} has no help text; say what it means in `scalars` of the class that writes it"
        )
    return SCALARS[known]


Record = dict[str, Any]


class Sink(Protocol):
    def write(self, step: int, record: Record) -> None: ...

    def text(self, step: int, name: str, text: str) -> None: ...

    def image(self, step: int, name: str, image: np.ndarray) -> None: ...

    def sound(self, step: int, name: str, sound: np.ndarray, sample_rate: int) -> None: ...

    def close(self) -> None: ...


class TensorBoardSink:
    """more: see `help_text`."""

    def __init__(self, folder: Path, resume_step: int, more: Mapping[str, str] | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import scalar

        self._scalar, self._more = scalar, more

        self._folder = folder
        with writing(folder):
            older = [path.name for path in folder.glob(f"{EVENTS}*")] if folder.is_dir() else []
            # purge_step hides what a killed run logged beyond the step it resumes from.
            self._writer = SummaryWriter(str(folder), purge_step=resume_step + 1 if resume_step else 0)
            self._file = EventFile.in_place_of_thread(self._writer, older)

    def write(self, step: int, record: Record) -> None:
        with writing(self._folder):
            for name, value in record.items():
                # add_scalar takes no description; the page shows it when one points at a chart's title.
                summary = self._scalar(name, value)
                summary.value[0].metadata.summary_description = help_text(name, self._more)
                self._writer._get_file_writer().add_summary(summary, step)
            self._file.flush_if_due()

    def text(self, step: int, name: str, text: str) -> None:
        with writing(self._folder):
            self._writer.add_text(name, text, step)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """image: uint8, (height, width) or (height, width, 3)."""
        with writing(self._folder):
            self._writer.add_image(name, image, step, dataformats="HW" if image.ndim == 2 else "HWC")

    def sound(self, step: int, name: str, sound: np.ndarray, sample_rate: int) -> None:
        """sound: float32 in [-1, 1], (samples,)."""
        import torch

        with writing(self._folder):
            self._writer.add_audio(name, torch.from_numpy(sound)[None], step, sample_rate)

    def close(self) -> None:
        with writing(self._folder):
            self._writer.close()


EVENTS = "events.out.tfevents."
FLUSH_S = 10.0


class EventFile:
    """Where an event writer's records go, instead of through its thread.

    That thread waits for the wall clock to reach its next flush, an hour if the clock is set back by one, and what it
    finds wrong it prints as a traceback of its own. TensorBoard reads a folder's files in the order of their names,
    which begin with the time: the newest must come last, whatever the clock says.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._held: list[bytes] = []
        self._flushed = time.monotonic()

    @classmethod
    def in_place_of_thread(cls, writer: Any, older: list[str]) -> EventFile:
        """writer: a SummaryWriter that has just been made. older: names of the event files that were there before.

        Private fields of tensorboard's EventFileWriter are set here and nowhere else.
        """
        from tensorboard.summary.writer.record_writer import RecordWriter

        events = writer._get_file_writer().event_writer
        events._async_writer.close()
        path = Path(events._file_name)
        began, _, rest = path.name.removeprefix(EVENTS).partition(".")
        newest = max((_seconds_of(name) for name in older), default=0)
        if int(began) <= newest:
            path = path.rename(path.with_name(f"{EVENTS}{newest + 1:010d}.{rest}"))
        file = cls(path)
        events._file_name, events._async_writer = str(path), RecordWriter(file)
        return file

    def write(self, data: bytes) -> None:
        self._held.append(data)

    def flush_if_due(self) -> None:
        if time.monotonic() - self._flushed >= FLUSH_S:
            self.flush()

    def flush(self) -> None:
        held, self._held = self._held, []
        self._flushed = time.monotonic()
        if held:
            with writing(self._path), self._path.open("ab") as file:
                file.write(b"".join(held))

    def close(self) -> None:
        self.flush()


def _seconds_of(name: str) -> int:
    """When an event file was made, by its name."""
    began = name.removeprefix(EVENTS).partition(".")[0]
    return int(began) if began.isdecimal() else 0


class JsonLinesSink:
    """The same record as text, for programs, `triptych status` and a plain look."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with writing(path):
            self._file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, step: int, record: Record) -> None:
        with writing(self._path):
            self._file.write(to_json({"step": step, **record}) + "\n")

    def text(self, step: int, name: str, text: str) -> None: ...

    def image(self, step: int, name: str, image: np.ndarray) -> None: ...

    def sound(self, step: int, name: str, sound: np.ndarray, sample_rate: int) -> None: ...

    def close(self) -> None:
        with writing(self._path):
            self._file.close()


class ProgressSink:
    """A bar with loss, tokens/s and time left; plain lines where the output is no terminal.

    validated: over how many rows the validation loss is.
    """

    def __init__(self, console: Console, step: int, steps: int, validated: str) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._console = console
        self._steps = steps
        self._validated = validated
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[speed]} tokens/s"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("training", total=steps, completed=step, loss="-", speed="-")
        self._progress.start()

    def write(self, step: int, record: Record) -> None:
        if "loss/train" in record:
            speed = f"{record['speed/tokens_per_second']:,.0f}"
            loss = f"{record['loss/train']:.3f}"
            self._progress.update(self._task, completed=step, loss=loss, speed=speed)
            if not self._console.is_terminal:
                left = (self._steps - step) * record["speed/step_seconds"]
                self._console.print(
                    f"step {step}/{self._steps}  loss {loss}  {speed} tokens/s  {left:.0f} s left"
                )
        if "loss/validation" in record:
            bits = record.get("loss/validation_bits_per_byte")
            per_byte = "" if bits is None else f", {bits:.4f} bits/byte"
            self._console.print(
                f"step {step}: validation loss {record['loss/validation']:.4f} nats/token{per_byte} "
                f"({self._validated})",
                soft_wrap=True,
            )
        bounds = [(name, f"validation_elbo/{name}") for name in ("text", "image", "audio")]
        if any(key in record for _, key in bounds):
            parts = ", ".join(f"{name} {record[key]:.4f}" for name, key in bounds if key in record)
            self._console.print(f"step {step}: validation bound: {parts} nats/token", soft_wrap=True)
        for prefix, label in (("task/", "accuracy"), ("task/longer_", "accuracy at the greater length")):
            if f"{prefix}token_accuracy" in record:
                kinds = ("token", "last", "sequence")
                shares = (f"{kind} {100 * record[f'{prefix}{kind}_accuracy']:.2f} %" for kind in kinds)
                self._console.print(f"step {step}: {label}: {', '.join(shares)}", soft_wrap=True)

    def text(self, step: int, name: str, text: str) -> None:
        from rich.markup import escape

        if name == "config":  # for TensorBoard; here it would push everything else off the screen
            return
        self._console.print(f"[dim]step {step}, {name}:[/dim] {escape(text)}")

    def image(self, step: int, name: str, image: np.ndarray) -> None: ...

    def sound(self, step: int, name: str, sound: np.ndarray, sample_rate: int) -> None: ...

    def close(self) -> None:
        self._progress.stop()


class Reporter:
    """Fan-out to the sinks. Only rank 0 has any."""

    def __init__(self, sinks: list[Sink]) -> None:
        self._sinks = sinks

    def write(self, step: int, record: Record) -> None:
        for sink in self._sinks:
            sink.write(step, record)

    def text(self, step: int, name: str, text: str) -> None:
        for sink in self._sinks:
            sink.text(step, name, text)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """image: uint8, (height, width) or (height, width, 3)."""
        for sink in self._sinks:
            sink.image(step, name, image)

    def sound(self, step: int, name: str, sound: np.ndarray, sample_rate: int) -> None:
        """sound: float32 in [-1, 1], (samples,)."""
        for sink in self._sinks:
            sink.sound(step, name, sound, sample_rate)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()
