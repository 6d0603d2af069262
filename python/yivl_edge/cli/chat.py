"""``yivl-edge chat``: one question, or a conversation on a terminal."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import threading
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from yivl_edge import ChatResult, Model
from yivl_edge.cli.arguments import add_device, add_threads, integer, number
from yivl_edge.cli.terminal import Progress, is_terminal, note, read_line, visible
from yivl_edge.image import DEFAULT_MAX_PIXELS, load_image

_EXAMPLE = """\
examples:
  yivl-edge chat yi-vl-6b-q4_0.gguf --image photo.jpg --prompt "What is written on the sign?"
  echo "图片里有什么？" | yivl-edge chat yi-vl-6b-q4_0.gguf --image photo.jpg
  yivl-edge chat yi-vl-6b-q4_0.gguf --image photo.jpg
  yivl-edge chat text-q4_0.gguf --mmproj mmproj-f16.gguf --image photo.jpg

Without --prompt, and with a terminal to type on, this is a conversation: /help there lists what else
one can type, Ctrl-C stops an answer, Ctrl-D ends the conversation.
"""

_HELP = """\
/image PATH  start a new conversation about the picture in this file
/reset       forget the conversation; the picture stays
/help        this list
/exit        end (or Ctrl-D)
Ctrl-C stops the answer being given. A question may begin with a slash if a space stands before it."""


class Options(argparse.Namespace):
    """What a conversation can be told."""

    model: str
    mmproj: str | None
    image: str | None
    prompt: str | None
    system: str | None
    max_tokens: int | None
    temperature: float | None
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int | None
    device: str
    gpu_layers: int | None
    n_ctx: int | None
    threads: int | None
    max_image_pixels: int
    timings: bool


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to those of ``yivl-edge``."""
    parser = commands.add_parser(
        "chat",
        help="ask about a picture, or talk without one",
        description="Answers a question, or holds a conversation, about a picture or without one.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("model", metavar="MODEL", help="the model file; of a pair, the text model")
    parser.add_argument("--mmproj", metavar="FILE", help="of a pair, the file with the vision tower")
    parser.add_argument("--image", metavar="PICTURE", help="the picture to talk about")
    parser.add_argument("--prompt", metavar="TEXT", help="ask this one question and exit; or pipe it in")
    add_options(parser)


def add_options(parser: argparse.ArgumentParser, temperature: float | None = None) -> None:
    """Adds what every conversation can be told: how answers are chosen, memory and threads.

    Args:
        parser: Where to.
        temperature: The default; None for the file's.
    """
    default = "the file's, 0.2" if temperature is None else f"{temperature:g}"
    parser.add_argument("--system", metavar="TEXT", help="takes the place of the model's system text")
    parser.add_argument("--timings", action="store_true", help="after each answer, print how long it took")

    sampling = parser.add_argument_group("how the answer is chosen")
    sampling.add_argument(
        "--max-tokens", type=integer(1), metavar="N", help="longest answer (default: the file's, 1024)"
    )
    sampling.add_argument(
        "--temperature",
        type=number(0, 100),
        default=temperature,
        metavar="T",
        help=f"0: always the likeliest token; higher: more varied (default: {default})",
    )
    sampling.add_argument(
        "--top-k",
        type=integer(0),
        default=0,
        metavar="K",
        help="only the K likeliest tokens (default: 0, all)",
    )
    sampling.add_argument(
        "--top-p",
        type=number(0, 1, above=True),
        default=1.0,
        metavar="P",
        help="only the likeliest tokens that together have probability P (default: 1, all)",
    )
    sampling.add_argument(
        "--min-p",
        type=number(0, 1),
        default=0.0,
        metavar="P",
        help="only tokens at least P times as likely as the likeliest (default: 0, all)",
    )
    sampling.add_argument(
        "--repetition-penalty",
        type=number(0, 100, above=True),
        default=1.0,
        metavar="R",
        help="above 1: repeat less (default: 1)",
    )
    sampling.add_argument(
        "--seed", type=integer(0, 2**64 - 1), metavar="N", help="same seed, same answer (default: random)"
    )

    limits = parser.add_argument_group("device, memory and threads")
    add_device(limits)
    limits.add_argument(
        "--n-ctx",
        type=integer(1),
        metavar="N",
        help="context in tokens; less saves memory (default: the model's)",
    )
    add_threads(limits)
    limits.add_argument(
        "--max-image-pixels",
        type=integer(1, 2**63 - 1),
        default=DEFAULT_MAX_PIXELS,
        metavar="N",
        help="refuse pictures of more pixels (default: %(default)s)",
    )


def run(args: Options) -> int:
    """One question if there is one on the command line or in a pipe, a conversation otherwise."""
    question = _question(args)
    progress = Progress()
    try:
        model = Model(
            args.model,
            mmproj=args.mmproj,
            device=args.device,
            n_gpu_layers=args.gpu_layers,
            n_ctx=args.n_ctx,
            n_threads=args.threads,
            max_image_pixels=args.max_image_pixels,
            on_progress=progress,
        )
    finally:
        progress.wipe()
    conversation = Conversation(model, args)
    if args.image is not None:
        conversation.show(args.image)
    if question is None:
        return converse(conversation)
    return 0 if conversation.ask(question) else INTERRUPTED


# As after Ctrl-C anywhere else.
INTERRUPTED = 130


def _text(name: str, text: str) -> str:
    """Text from the command line or a terminal, unless bytes in it are not text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        encoding = sys.getfilesystemencoding()
        raise ValueError(f"{name}: expected text in {encoding}, found other bytes") from None
    return text


def _question(args: Options) -> str | None:
    """The one question to be answered; None for a conversation on the terminal."""
    question = args.prompt
    if question is None:
        if sys.stdin is not None and sys.stdin.isatty():
            return None
        try:
            question = "" if sys.stdin is None else sys.stdin.read().strip()
        except UnicodeDecodeError as error:
            raise ValueError(f"standard input: expected text in {sys.stdin.encoding}: {error}") from None
    if not question.strip():
        raise ValueError("expected a question: give it with --prompt, or pipe it in")
    return _text("question", question)


class Conversation:
    """What has been said about one picture, and how to go on."""

    def __init__(self, model: Model, args: Options) -> None:
        self._model = model
        self._args = args
        self._picture: NDArray[np.uint8] | None = None
        self._turns: list[dict[str, str]] = []
        self._prefill: threading.Thread | None = None
        self._no_prefill = threading.Event()
        self.reset()

    def prefill(self) -> None:
        """Begins to compute what the answer to the next question needs, whatever will be asked; once is enough."""
        if self._prefill is not None:
            return
        self._no_prefill.clear()

        def compute() -> None:
            # What fails here fails again with the question, where it can be told.
            with suppress(Exception):
                self._model.prefill(self._picture, self._turns, cancel=self._no_prefill)

        self._prefill = threading.Thread(target=compute)
        self._prefill.start()

    def end_prefill(self) -> None:
        """Stops that, if it is not done."""
        if self._prefill is not None:
            self._no_prefill.set()
            self._prefill.join()
            self._prefill = None

    def reset(self) -> None:
        """Forgets what has been said; the picture stays."""
        self.end_prefill()
        self._turns = []
        if self._args.system is not None:
            self._turns.append({"role": "system", "content": _text("--system", self._args.system)})

    def show(self, path: str) -> None:
        """Starts anew with a picture. If it cannot be used, everything stays as it was."""
        if self._model.config.vision is None:
            raise ValueError(
                f"{self._args.model} has no vision tower: give the file of its pair with --mmproj"
            )
        # Its pixels are kept, so that the conversation stays about this picture whatever happens to the file.
        self._picture = load_image(path, max_pixels=self._args.max_image_pixels)
        self.reset()

    def ask(self, question: str) -> bool:
        """Prints the answer as it comes, and keeps question and answer for the next turn.

        Returns:
            Whether the answer came to its end; False after Ctrl-C.
        """
        turns = [*self._turns, {"role": "user", "content": question}]
        limit = self._model.n_ctx
        room = limit - self._positions(turns)
        if room < 1:
            answered = any(turn["role"] == "assistant" for turn in turns)
            raise ValueError(
                f"no room for an answer: the conversation takes {limit - room} of {limit} tokens; "
                + ("/reset starts a new one" if answered else "ask a shorter question or raise --n-ctx")
            )
        wanted = self._args.max_tokens or self._model.config.max_tokens
        text, result = self._answer(turns, min(wanted, room))
        if text.strip():
            self.end_prefill()
            self._turns = [*turns, {"role": "assistant", "content": text}]
        if result is None or result.finish_reason == "cancelled":
            note("stopped" if text else "stopped before the answer began")
            return False
        if not text.strip():
            note("the answer is empty")
        elif result.finish_reason == "length":
            note(f"stopped after {wanted} tokens" if wanted <= room else "stopped: the context is full")
        if self._args.timings:
            _print_timings(result)
        return True

    def _positions(self, turns: list[dict[str, str]]) -> int:
        ids = self._model.prompt_ids(turns, self._picture is not None)
        vision = self._model.config.vision
        return len(ids) + (vision.n_patches - 1 if self._picture is not None and vision is not None else 0)

    def _answer(self, turns: list[dict[str, str]], max_tokens: int) -> tuple[str, ChatResult | None]:
        """The answer as far as it was printed, and its result unless it was stopped before it began."""
        args = self._args
        temperature = self._model.config.temperature if args.temperature is None else args.temperature
        progress = Progress()
        # On a terminal a model's control characters must not act; in a file the answer is what it is.
        show = visible if sys.stdout.isatty() else str
        pieces: list[str] = []
        stream = None
        try:
            stream = self._model.chat(
                self._picture,
                turns,
                max_tokens=max_tokens,
                temperature=temperature,
                top_k=args.top_k,
                top_p=args.top_p,
                min_p=args.min_p,
                repetition_penalty=args.repetition_penalty,
                seed=args.seed,
                stream=True,
                on_progress=progress,
            )
            with stream:
                for piece in stream:
                    progress.wipe()
                    pieces.append(piece)
                    print(show(piece), end="", flush=True)
            progress.wipe()
            print(flush=True)
        except KeyboardInterrupt:
            if pieces:
                print(flush=True)
        finally:
            progress.wipe()
        return "".join(pieces), None if stream is None else stream.result


def _print_timings(result: ChatResult) -> None:
    usage, times = result.usage, result.timings
    parts = [
        f"picture {times.preprocess + times.image:.2f} s",
        f"prompt {times.prefill:.2f} s for {usage.prompt_tokens} tokens, {usage.cached_tokens} cached",
        f"first token after {times.first_token:.2f} s",
    ]
    if usage.completion_tokens > 1 and times.decode > 0:
        speed = (usage.completion_tokens - 1) / times.decode
        shown = f"{speed:.3g}" if speed < 999.5 else f"{speed:,.0f}"
        parts.append(f"{usage.completion_tokens} tokens, {shown} a second")
    note("; ".join(parts))


def converse(conversation: Conversation) -> int:
    """Reads questions and commands until /exit or Ctrl-D."""
    _enable_line_editing()
    note("ask away; /help lists what else you can type")
    try:
        return _converse(conversation)
    finally:
        conversation.end_prefill()


def _converse(conversation: Conversation) -> int:
    while True:
        conversation.prefill()
        try:
            line = read_line("> ")
        except KeyboardInterrupt:
            print(file=sys.stderr)
            note("/exit or Ctrl-D ends the conversation")
            continue
        except EOFError:
            print(file=sys.stderr)
            return 0
        try:
            if line.startswith("/"):
                if not _obey(line, conversation):
                    return 0
            elif line.strip():
                conversation.ask(_text("question", line.strip()))
        except (ValueError, OSError) as error:
            note(" ".join(str(error).split()))
        except KeyboardInterrupt:
            note("stopped")


def _obey(line: str, conversation: Conversation) -> bool:
    """Does what a line that begins with a slash says; False at the end of the conversation."""
    command, _, argument = line.strip().partition(" ")
    argument = argument.strip()
    if command == "/exit":
        return False
    if command == "/help":
        print(_HELP, file=sys.stderr)
    elif command == "/reset":
        conversation.reset()
        note("new conversation")
    elif command == "/image" and argument:
        path = _path(argument)
        conversation.show(path)
        note(f"new conversation about {path}")
    elif command == "/image":
        note("expected the path of a picture: /image PATH")
    else:
        note(f"{visible(command)} is no command; /help lists them")
    return True


def _path(text: str) -> str:
    """A path as people type, paste or drop it: with spaces, in quotes, with backslashes, with ~."""
    path = os.path.expanduser(text)
    if os.path.exists(path):
        return path
    try:
        words = shlex.split(text)
    except ValueError:  # a quote without its partner
        return path
    return os.path.expanduser(words[0]) if len(words) == 1 else path


def _enable_line_editing() -> None:
    """Arrow keys, history, Tab for paths, pasting of several lines, where Python has readline."""
    with suppress(ImportError):
        import readline

        # Python's own settings are made for code: Tab indents, and completion begins after the last slash.
        readline.parse_and_bind("tab: complete")
        if is_terminal(sys.stdout):
            readline.parse_and_bind("set enable-bracketed-paste on")
        readline.set_completer_delims(" ")
