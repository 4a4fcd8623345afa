"""`omniform chat` as people meet it: the command itself in a terminal, typed into, and in a pipe."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from pseudo_terminal import PseudoTerminal
from small_codecs import small_model, small_tokenizers

import omniform
from omniform.errors import OmniformError
from omniform.inference.chat_input import ChatCompleter, make_private, typed_lines
from omniform.inference.terminal import Screen
from omniform.modeling.folder import save_model_folder
from omniform.tokenizers.audio_files import read_audio
from omniform.tokenizers.video_files import read_video

SEED = "4"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of four modalities whose texts are long: nothing ends them at temperature 0."""
    folder = tmp_path_factory.mktemp("stored") / "model"
    network = small_model(small_tokenizers()).network
    settings = {"text": {"temperature": 0.0, "max_new_tokens": 8}, "speech": {"max_new_tokens": 9}}
    save_model_folder(
        folder,
        network.config,
        network.state_dict(),
        small_tokenizers(),
        generation_config={"max_sequence_length": 20_000, "modalities": settings},
        card="A toy.",
    )
    return folder


def chat(folder: Path, cwd: Path, **environ: str) -> PseudoTerminal:
    arguments = ["omniform.cli", "chat", str(folder), "--seed", SEED, "--out-dir", "out"]
    return PseudoTerminal(arguments, cwd, {"OMP_NUM_THREADS": "1", **environ})


def shown_above(terminal: PseudoTerminal, text: str, width: int) -> np.ndarray:
    """Return the pixels of the half blocks above the line that holds `text`."""
    screen = terminal.screen
    end = max(number for number, line in enumerate(screen.display) if text in line)
    start = end
    while start and screen.buffer[start - 1][0].data == "▀":
        start -= 1
    rows = []
    for line in range(start, end):
        cells = [screen.buffer[line][column] for column in range(width)]
        rows += [
            [list(bytes.fromhex(color)) for color in colors]
            for colors in zip(*((c.fg, c.bg) for c in cells), strict=True)
        ]
    return np.array(rows, np.uint8)


def test_a_conversation_in_a_terminal(folder: Path, tmp_path: Path) -> None:
    model = omniform.load(folder)
    with chat(folder, tmp_path) as terminal:
        terminal.wait_for(r"reads and writes text, image, speech, video\..*?Try:.*?to text>")
        assert not (tmp_path / "out").exists()

        terminal.type("/to im\t")
        terminal.wait_for("/to image")
        terminal.type("\r")
        terminal.wait_for(r"from now on\.\s+to image>")
        terminal.type("one\r")
        terminal.wait_for(r"out/001\.png \(image, 16 x 16 pixels\)\s+seed 4, .*?\s+to image>")
        picture = Image.open(tmp_path / "out" / "001.png").convert("RGB")
        assert picture.tobytes() == model.generate("one", "image", seed=4).images[0].convert("RGB").tobytes()
        twice = np.asarray(picture).repeat(2, axis=0).repeat(2, axis=1)
        np.testing.assert_array_equal(shown_above(terminal, "out/001.png", 32), twice)

        terminal.type("/to speech,video\r")
        terminal.wait_for(r"to speech,video>")
        terminal.type("@out/001.png one\r")
        terminal.wait_for(
            r"out/002\.wav \(speech, [0-9.]+ s\)\s+.*?out/003\.mp4 \(video, .*\)\s+seed 4, .*?\s+to speech,video>"
        )
        reply = model.generate([Image.open(tmp_path / "out" / "001.png"), "one"], ["speech", "video"], seed=4)
        sound = read_audio(tmp_path / "out" / "002.wav", reply.speech[0].rate)
        np.testing.assert_allclose(sound, reply.speech[0].samples, atol=2**-15)
        film = read_video(tmp_path / "out" / "003.mp4", fps=None, max_frames=99)
        assert film.frames.shape[:3] == reply.videos[0].frames.shape[:3]
        assert film.fps == reply.videos[0].fps

        terminal.type("/tow text\r")
        terminal.wait_for(r"error: unknown command /tow: did you mean /to\?.*?to speech,video>")
        terminal.type("/to text\r")
        terminal.wait_for(r"from now on\.\s+to text>")

        # The whole reply would take thousands of steps, and then be followed by its seed.
        terminal.type("/set max_new_tokens=15000\r")
        terminal.wait_for(r"max_new_tokens=15000.*?to text>")
        first_words = re.escape("".join(c for c in model.generate("two", seed=4).text[:1] if c.isprintable()))
        terminal.type("two\r")
        terminal.wait_for(rf"two\s+{first_words}")
        terminal.type("\x03")
        terminal.wait_for(r"stopped\s+to text>")
        terminal.type("/save chat.jsonl\r")
        terminal.wait_for(r"3 turns written to chat\.jsonl\s+to text>")
        terminal.type("\x04")
        assert terminal.wait_for_end() == 0
        assert terminal.current_attributes() == terminal.attributes
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["001.png", "002.wav", "003.mp4", "chat.jsonl", "out"]


def test_ctrl_c_empties_a_line_then_warns_then_leaves(tmp_path: Path) -> None:
    notes: list[str] = []
    history = tmp_path / "history"
    history.touch(0o644)
    with create_pipe_input() as keys, create_app_session(input=keys):
        keys.send_text("never sent\x03/to image\rone\x1b\rtwo\r\x03three\r\x03\x03never sent\r")
        lines = list(typed_lines(lambda: "> ", ChatCompleter([], []), history, notes.append))
    assert lines == ["/to image", "one\ntwo", "three"]
    assert len(notes) == 2
    assert "never sent" not in history.read_text()
    assert history.stat().st_mode & 0o777 == 0o600


def test_a_history_is_a_file_of_the_user(tmp_path: Path) -> None:
    for path, message in (
        (tmp_path, "is no plain file"),
        (Path(os.devnull), "is no plain file"),
        (tmp_path / "nowhere" / "history", "cannot be written: No such file or directory"),
    ):
        with pytest.raises(OmniformError, match=f"--history {re.escape(str(path))}:? {message}"):
            make_private(path)
    assert os.stat(os.devnull).st_mode & 0o222
    make_private(tmp_path / "new")
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o600


def test_a_terminal_is_shown_pictures_unless_it_cannot_or_should_not(tmp_path: Path) -> None:
    written = {}
    for environ in ({"TERM": "xterm"}, {"TERM": "xterm", "NO_COLOR": "1"}, {"TERM": "dumb"}):
        master, slave = os.openpty()
        with open(slave, "w", encoding="utf-8") as terminal:
            screen = Screen(terminal, terminal, environ)
            screen.progress("image 1/2")
            screen.picture(Image.new("L", (2, 2)))
            screen.write("text \x1b[2J")
            screen.line("next")
            seen = b""
            while not seen.endswith(b"next\r\n"):
                seen += os.read(master, 2**16)
            written[str(environ)] = seen.decode()
        os.close(master)
    coloured, plain, dumb = written.values()
    assert "▀" in coloured
    assert plain == "\r\x1b[2Kimage 1/2\r\x1b[2Ktext \ufffd[2J\r\nnext\r\n"
    assert dumb == "text \ufffd[2J\r\nnext\r\n"


def omniform_chat(*arguments: str, typed: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "omniform.cli", "chat", *arguments],
        input=typed,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def test_lines_from_a_pipe_are_answered_on_standard_output(folder: Path, tmp_path: Path) -> None:
    typed = "one\n@missing.png\n/to text\none\n/quit\nnever read\n"
    done = omniform_chat(str(folder), "--to", "image", "--seed", SEED, typed=typed, cwd=tmp_path)
    [made] = tmp_path.iterdir()
    assert re.fullmatch(r"chat-\d{8}-\d{6}", made.name)
    assert done.stdout.startswith(f"{made.name}/001.png (image, 16 x 16 pixels)\n")
    assert len(done.stdout.splitlines()) >= 2
    assert "\x1b" not in done.stdout + done.stderr
    assert "error: missing.png: cannot be read" in done.stderr
    assert done.returncode == 2  # one line could not be done
    Image.open(made / "001.png").verify()


def test_without_a_model_it_says_what_to_type(tmp_path: Path) -> None:
    done = omniform_chat(typed="", cwd=tmp_path)
    assert done.returncode == 2
    assert (done.stdout, done.stderr.count("\n")) == ("", 1)
    assert done.stderr.startswith("omniform: chat needs a model folder: omniform chat MODEL")
