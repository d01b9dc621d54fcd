"""A judge for the tests: a function from conversations to scores behind real futures, that can be held up."""

import zlib
from concurrent.futures import Future

from safeshape.types import Judgement, Score


def by_text(messages):
    """A score from 1 to 5 that depends on every character."""
    return 1 + zlib.crc32("|".join(m["content"] for m in messages).encode()) % 5


class Judge:
    """`score`: conversation to 1..5, None (a failed judgement) or an exception. `held`: verdicts wait for release()."""

    def __init__(self, score=by_text, *, held=False, name="test"):
        self.score, self.held, self.name = score, held, name
        self.asked, self._waiting = [], []

    def submit(self, messages):
        future = Future()
        self.asked.append(messages)
        self._waiting.append((messages, future))
        if not self.held:
            self.release()
        return future

    def release(self):
        waiting, self._waiting = self._waiting, []
        for messages, future in waiting:
            if future.set_running_or_notify_cancel():
                try:
                    score = self.score(messages)
                except RuntimeError as error:
                    future.set_exception(error)
                else:
                    future.set_result(Judgement(score=score, error="no verdict" if score is None else None))

    def score_many(self, conversations):
        return map(self._scored, conversations)

    def _scored(self, messages):
        score = self.score(messages)
        p_safe = None if score is None else 1 - (score - 1) / 4
        return Score(
            signal="judge", p_safe=p_safe, scorer=self.identity(), error="no verdict" if score is None else None
        )

    def identity(self):
        return {"judge": self.name}

    def close(self):
        pass


def load(**settings):
    """A judge named in a command: `--judge judging:load`."""
    return Judge(**settings)
