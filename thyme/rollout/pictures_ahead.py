"""Pictures of questions that are soon asked, decoded and cut into patches in threads while others decode tokens."""

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from PIL import Image

from thyme import trace
from thyme.model.image_processor import ImageInputs
from thyme.model.processor import Processor
from thyme.rollout.types import Question

THREADS = 2


class PicturesAhead:
    """Prepares each picture once for all that wait for it, in the order in which they were asked for.

    Args:
        processor: of the engine's model.
    """

    def __init__(self, processor: Processor) -> None:
        self._processor = processor
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="thyme-rollout-pictures")
        self._pictures: dict[int, Future[ImageInputs]] = {}  # by the picture's id()
        self._wanted: dict[int, tuple[Question, list[Future[ImageInputs]]]] = {}  # by the question's id()

    def want(self, questions: Iterable[Question]) -> None:
        """These are asked soon, beside those that were not taken yet."""
        for question in questions:
            if id(question) not in self._wanted:
                self._wanted[id(question)] = question, [self._prepare(picture) for _, picture in question.pictures]
        used = {id(future) for _, futures in self._wanted.values() for future in futures}
        self._pictures = {key: future for key, future in self._pictures.items() if id(future) in used}

    def is_ready(self, question: Question) -> bool:
        """Whether `take` would not wait."""
        return id(question) in self._wanted and all(future.done() for future in self._wanted[id(question)][1])

    def take(self, question: Question) -> tuple[ImageInputs, ...]:
        """The pictures of a question; waits for them. They are forgotten with the next `want` that does not ask for
        them.

        Raises:
            ValueError: one that can't be used.
        """
        self.want([question])
        _, futures = self._wanted.pop(id(question))
        return tuple(future.result() for future in futures)

    def close(self) -> None:
        """Waits for what is under way, and drops the rest."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _prepare(self, picture: Image.Image) -> Future[ImageInputs]:
        def prepared() -> ImageInputs:
            with trace.span("pictures", "prepare"):
                picture.load()  # decoded once, here: the executor's thread reads it too
                return self._processor.preprocess(picture)

        if id(picture) not in self._pictures:
            self._pictures[id(picture)] = self._threads.submit(prepared)
        return self._pictures[id(picture)]
