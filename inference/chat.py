"""`omniform chat`: prompts with files in, replies of any modality out, one after another."""

import os
import secrets
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from threading import Event as Flag
from types import FrameType
from typing import Any

import numpy as np
from PIL import Image

from omniform.errors import OmniformError
from omniform.inference.chat_commands import (
    COMMANDS,
    parse_assignments,
    parse_command,
    parse_names,
    parse_seed,
    parse_switch,
    split_prompt,
    split_words,
    to_path,
)
from omniform.inference.chat_input import ChatCompleter, make_private, plain_lines, typed_lines
from omniform.inference.chat_transcript import FiledPart, Turn, as_messages, write_transcript
from omniform.inference.destination import reserve_file
from omniform.inference.generate import Model, load
from omniform.inference.part_files import default_suffix, read_part, write_part
from omniform.inference.protocol import (
    ANY,
    ContentPart,
    DataPart,
    Done,
    ImagePart,
    PartDone,
    SpanProgress,
    SpeechPart,
    TextDelta,
    TextPart,
    VideoPart,
)
from omniform.inference.sampling import sampling_settings
from omniform.inference.terminal import Screen
from omniform.modeling.generation_config import SamplingSettings

SETTINGS = (*(field.name for field in fields(SamplingSettings)), "negative_prompt", "max_parts")


class Chat:
    """A conversation with a model: `handle` takes one line at a time.

    Args:
        screen: where replies and remarks go.
        to: modalities to answer with, or ["any"]; text unless given, or else the model's first modality.
        out_dir: folder for the pictures, sounds and videos of replies, made when the first one comes; a new
            chat-DATE-TIME in the current folder unless given.
        seed: of every reply; each has a new one unless given.

    Attributes:
        n_errors: how many lines could not be done.
    """

    def __init__(
        self, model: Model, screen: Screen, to: str | None = None, out_dir: Path | None = None, seed: int | None = None
    ) -> None:
        self.model, self.screen, self.seed = model, screen, seed
        others = [name for name in model.modalities if name != "text"]
        usual = "text" if "text" in model.modalities else model.modalities[0]
        if model.network.config.subsets and others:  # what is typed is text, and each modality comes once
            usual = others[0]
        self.to = self._parse_to(usual if to is None else to)
        self.out_dir = out_dir or Path(time.strftime("chat-%Y%m%d-%H%M%S"))
        self.settings: dict[str, Any] = {}
        self.turns: list[Turn] = []
        self.waiting: list[FiledPart] = []
        self.n_errors = 0
        self._keep = False
        self._prompt: list[FiledPart] = []
        self._transcript: Path | None = None

    def handle(self, line: str) -> bool:
        """Answer a prompt or do what a command says; return whether the chat goes on.

        What is wrong with a line is printed, and the chat goes on.
        """
        try:
            command = parse_command(line)
            if command is None:
                self._ask(line)
                return True
            name, arguments = command
            if name == "quit":
                return False
            getattr(self, f"_do_{name}")(arguments)
        except OmniformError as error:
            self._complain(error)
        return True

    def prompt_message(self) -> str:
        """Return what stands before the line that is typed: what it is answered with, and how many files wait."""
        files = f" +{len(self.waiting)} file{'s' * (len(self.waiting) > 1)}" if self.waiting else ""
        return f"to {','.join(self.to)}{files}> "

    def _ask(self, line: str) -> None:
        pieces = [
            FiledPart(TextPart(piece)) if isinstance(piece, str) else FiledPart(read_part(piece, self.model), piece)
            for piece in split_prompt(line)
        ]
        if prompt := [*self.waiting, *pieces]:
            self._prompt = prompt
            self._reply(prompt)

    def _reply(self, prompt: list[FiledPart]) -> None:
        seed = secrets.randbits(32) if self.seed is None else self.seed
        last = self.turns[-1] if self.turns and self.turns[-1].prompt is prompt else None
        earlier = [turn for turn in self.turns if turn is not last] if self._keep else []
        start = time.monotonic()
        try:
            events = self.model.stream(as_messages(earlier, prompt), self.to, seed=seed, **self.settings)
        except OmniformError as error:
            if not self.settings:
                raise
            name = next(iter(self.settings))
            raise OmniformError(f"{error} (/settings shows what is set; /set {name}= takes {name} back)") from error
        if last is not None:
            last.replaced = True
        self.turns.append(turn := Turn(prompt, self.to, seed, self.settings, []))
        self.waiting = [filed for filed in self.waiting if not any(filed is sent for sent in prompt)]
        try:
            with _flag_on_ctrl_c() as stop:
                for event in events:
                    if stop.is_set():
                        raise KeyboardInterrupt
                    if isinstance(event, TextDelta):
                        self.screen.write(event.text)
                    elif isinstance(event, SpanProgress):
                        self.screen.progress(f"{event.modality} {event.step}/{event.n_steps}")
                    elif isinstance(event, PartDone):
                        turn.reply.append(self._show(event.part))
                    elif isinstance(event, Done) and event.reply.through:
                        self.screen.note(f"by way of: {', '.join(map(_describe, event.reply.through))}")
        except KeyboardInterrupt:
            turn.stopped = True
            raise
        self.screen.note(f"seed {seed}, {time.monotonic() - start:.1f} s")

    def _show(self, part: ContentPart) -> FiledPart:
        """Show a part that is complete, and write it to a file unless it is text."""
        if isinstance(part, TextPart):
            self.screen.end_line()
            if not part.text:
                self.screen.note("(a text without a character)")
            elif part.finish_reason == "length":
                self.screen.note("(cut: it reached max_new_tokens, or the model's room for a prompt and its reply)")
            return FiledPart(part)
        if (picture := _picture(part)) is not None:
            self.screen.picture(picture)
        if isinstance(part, DataPart) and part.json is not None:
            self.screen.line(part.json)
        path = None
        try:
            path = reserve_file(self.out_dir, default_suffix(part.modality))
            write_part(part, path)
        except OmniformError as error:
            if path is not None:
                path.unlink(missing_ok=True)
            self._complain(error)
            return FiledPart(part)
        self.screen.line(f"{path} ({_describe(part)})")
        return FiledPart(part, path)

    def _complain(self, error: OmniformError) -> None:
        self.n_errors += 1
        self.screen.note(f"error: {error}")

    def _parse_to(self, given: str) -> list[str]:
        names = parse_names(given, self.model.modalities, ANY)
        self.model.targets(names)  # not every model has learnt to choose
        return names

    def _do_to(self, arguments: str) -> None:
        self.to = self._parse_to(arguments)
        self.screen.note(f"Replies are {', '.join(self.to)} from now on.")

    def _do_attach(self, arguments: str) -> None:
        words = split_words(arguments) or [""]
        paths = [to_path(word.removeprefix("@"), "/attach ") for word in words]
        self.waiting += [FiledPart(read_part(path, self.model), path) for path in paths]
        self.screen.note(f"{len(self.waiting)} waiting for the next prompt; an empty line sends them alone.")

    def _do_set(self, arguments: str) -> None:
        given = parse_assignments(arguments, SETTINGS)
        checked = {name: value for name, value in given.items() if name in SamplingSettings.__dataclass_fields__}
        sampling_settings("/set", **{name: value for name, value in checked.items() if value is not None})
        settings = {**self.settings, **given}
        self.settings = {name: value for name, value in settings.items() if value is not None}
        self._do_settings("")

    def _do_settings(self, arguments: str) -> None:
        values: dict[str, Any] = {"to": ",".join(self.to), "seed": "new each time" if self.seed is None else self.seed}
        values |= {"keep": "on" if self._keep else "off", **self.settings, "out_dir": self.out_dir}
        self.screen.note(", ".join(f"{name}={value}" for name, value in values.items()))
        for name, own in self.model.defaults.items():
            unset = {key: value for key, value in vars(own).items() if key not in self.settings and value is not None}
            self.screen.note(f"{name}, the model's own: {', '.join(f'{k}={v}' for k, v in unset.items())}")

    def _do_seed(self, arguments: str) -> None:
        self.seed = parse_seed(arguments)
        self.screen.note("Every reply has a new seed." if self.seed is None else f"Every reply has seed {self.seed}.")

    def _do_again(self, arguments: str) -> None:
        if not self._prompt:
            raise OmniformError("/again answers the last prompt anew, and there is none yet: type one")
        self._reply(self._prompt)

    def _do_keep(self, arguments: str) -> None:
        self._keep = parse_switch(arguments)
        self.screen.note(
            "The model reads the earlier turns before each prompt. One that learnt single prompts may answer worse."
            if self._keep
            else "The model reads each prompt by itself."
        )

    def _do_clear(self, arguments: str) -> None:
        self.turns, self.waiting, self._prompt = [], [], []
        self.screen.note("Earlier turns are forgotten.")

    def _do_save(self, arguments: str) -> None:
        words = split_words(arguments)
        path = to_path(words[0] if len(words) == 1 else "", "/save ")
        if path.exists() and path != self._transcript:
            raise OmniformError(f"{path} exists already: choose another name")
        write_transcript(self.turns, path)
        self._transcript = path
        self.screen.note(f"{len(self.turns)} turns written to {path}")

    def _do_help(self, arguments: str) -> None:
        width = max(len(command.usage) for command in COMMANDS.values())
        for command in COMMANDS.values():
            self.screen.note(f"{command.usage:{width}}  {command.meaning}")
        self.screen.note(f"Settings: {', '.join(SETTINGS)}.")
        self.screen.note(
            "Alt-Enter starts a new line, Tab completes, Ctrl-C stops a reply. @@ and // stand for @ and /."
        )


def run_chat(
    folder: Path,
    to: str | None = None,
    out_dir: Path | None = None,
    seed: int | None = None,
    history: Path | None = None,
) -> int:
    """Chat with the model of a folder, and return the exit status.

    In a terminal until its user leaves, with status 0. Lines from elsewhere are answered until their end or /quit, and
    the status is 2 if one of them could not be done.

    Args:
        history: file for the lines that are typed; None keeps them in memory only.

    Raises:
        OmniformError: no model folder, a modality that it has not, or a history that is no file of the user's.
    """
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    in_terminal = sys.stdin.isatty() and (sys.stdout.isatty() or sys.stderr.isatty())
    if in_terminal and history is not None:
        make_private(history)  # what is wrong with it is told before the model is loaded
    screen = Screen(sys.stdout, sys.stderr, os.environ)
    screen.progress(f"loading {folder}")
    chat = Chat(load(folder), screen, to, out_dir, seed)
    screen.note(f"{folder} reads and writes {', '.join(chat.model.modalities)}.")
    if not in_terminal:
        for line in plain_lines(sys.stdin):
            if not chat.handle(line):
                break
        return 2 if chat.n_errors else 0
    for line in _what_to_try(folder, chat.model.modalities):
        screen.note(line)
    completer = ChatCompleter([*chat.model.modalities, ANY], SETTINGS)
    for line in typed_lines(chat.prompt_message, completer, history, screen.note):
        try:
            if not chat.handle(line):
                break
        except KeyboardInterrupt:
            screen.note("stopped")
    return 0


def _what_to_try(folder: Path, modalities: Sequence[str]) -> list[str]:
    other = next((name for name in modalities if name != "text"), "")
    found = (
        [("a handwritten seven", f"or whatever it learnt: see {folder / 'README.md'}")] if "text" in modalities else []
    )
    if other:
        found += [(f"/to {other}", f"answers are {other} from now on, and are written to files")]
        found += [("/again", "another answer to the same prompt"), ("@FILE", "a file as the prompt, or within one")]
    width = max(len(typed) for typed, _ in found)
    lines = [f"  {typed:{width}}  {meaning}" for typed, meaning in found]
    return ["Try:", *lines, "/help lists all commands. Ctrl-C stops a reply, Ctrl-D leaves."]


@contextmanager
def _flag_on_ctrl_c() -> Iterator[Flag]:
    """Let Ctrl-C raise a flag, so that what is being written is finished first; another one interrupts at once."""
    flag = Flag()

    def ask(number: int, frame: FrameType | None) -> None:
        if flag.is_set():
            raise KeyboardInterrupt
        flag.set()

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, before)


def _picture(part: ContentPart) -> Image.Image | None:
    """Return what can be shown of a part: of a video its first, middle and last frame, side by side."""
    if isinstance(part, ImagePart):
        return part.image
    if isinstance(part, VideoPart):
        frames = part.video.frames
        strip = np.concatenate([frames[0], frames[len(frames) // 2], frames[-1]], axis=1)
        return Image.fromarray(strip.squeeze(-1) if strip.shape[-1] == 1 else strip)
    return None


def _describe(part: ContentPart) -> str:
    if isinstance(part, TextPart):
        return " ".join(part.text.split())
    if isinstance(part, ImagePart):
        return f"image, {part.image.width} x {part.image.height} pixels"
    if isinstance(part, SpeechPart):
        return f"speech, {part.audio.seconds:.2f} s"
    if isinstance(part, VideoPart):
        return f"video, {part.video.seconds:.2f} s, {len(part.video.frames)} frames"
    return part.modality
