"""From tokens that come one by one to text that is never taken back: no half characters, nothing of a stop text."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ptmoe.serve.engine import Token

HALF = "\ufffd"  # what decoders put for bytes that are no character (yet)


@dataclass
class Said:
    """What an answer says next."""

    text: str = ""  # possibly none
    # Those that the text is made of, each with the position in the whole text at which it begins.
    tokens: list[tuple[Token, int]] = field(default_factory=list)
    finish: str | None = None  # `"stop"` or `"length"` with the last piece of an answer; None before


class Text:
    """The text of an answer, which ends before the first of the texts `stop`."""

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self._decode, self._stop = decode, [text for text in stop if text]
        self._ids: list[int] = []
        self._decoded = 0  # ids whose text is in `_held`, or has been said
        self._context = 0  # a few of them before, because a token's text depends on those before it
        self._said, self._held = 0, ""
        self._tokens: list[tuple[Token, int]] = []

    def add(self, token: Token) -> Said:
        """What can be said after one token more; sets `stopped` where a stop text ends the answer with it."""
        self._tokens.append((token, self._said + len(self._held)))
        self._ids.append(token.id)
        return self._say(last=False)

    def end(self, finish: str, token: Token | None = None) -> Said:
        """The rest, with the end token, which has no text."""
        if token is not None:
            self._tokens.append((token, self._said + len(self._held)))
        said = self._say(last=True)
        said.finish = "stop" if self.stopped else finish
        return said

    def _say(self, last: bool) -> Said:
        before = self._decode(self._ids[self._context : self._decoded])
        now = self._decode(self._ids[self._context :])
        if last or not now.endswith(HALF):
            self._held += now[len(before) :]
            if len(now) > len(before):  # behind a token that says nothing, as a special one, a space may be dropped
                self._context = self._decoded
            self._decoded = len(self._ids)
        places = [place for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if places:
            self.stopped = True
            text, self._held = self._held[: min(places)], ""
        else:
            kept = 0 if last else max((_overlap(self._held, stop) for stop in self._stop), default=0)
            text, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        self._said += len(text)
        whole = last and not self.stopped
        tokens = [pair for pair in self._tokens if whole or pair[1] < self._said]
        del self._tokens[: len(tokens)]  # the rest may yet be of a stop text
        return Said(text, tokens)


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` may be the beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
