"""What a training loop does with a running server: pause, sleep, new weights.

The names are vLLM's, where it has one: POST /pause, /resume, /sleep, /wake_up; GET /is_paused, /is_sleeping. Weights
come from a folder that the server can read: POST /update_weights {"model": "FOLDER"}.
"""

import asyncio
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from thyme.engine import Engine
from thyme.engine.core import MEMORY_TAGS, MemoryTag
from thyme.model.weights import read_config, restore
from thyme.serve.body import read_body
from thyme.serve.engine_thread import EngineThread
from thyme.serve.errors import ApiError
from thyme.serve.fields import Fields, parse_json

_BODY_BYTES = 1 << 16
PAUSE_MODES = ("keep", "wait", "abort")


class Control:
    """Routes of control.

    Args:
        engine: what is controlled.
        allowed: whether they are served; else each answers 403.
    """

    def __init__(self, engine: EngineThread, *, allowed: bool) -> None:
        self.engine, self.allowed = engine, allowed

    def routes(self) -> list[Route]:
        """All of them."""
        posts = {
            "/pause": self._pause,
            "/resume": self._resume,
            "/sleep": self._sleep,
            "/wake_up": self._wake,
            "/update_weights": self._update_weights,
        }
        gets = {"/is_paused": self._is_paused, "/is_sleeping": self._is_sleeping}
        return [
            *(Route(path, do, methods=["POST"]) for path, do in posts.items()),
            *(Route(path, do, methods=["GET"]) for path, do in gets.items()),
        ]

    async def _pause(self, request: Request) -> Response:
        fields = await self._fields(request)
        mode = fields.choice("mode", request.query_params.get("mode", PAUSE_MODES[0]), PAUSE_MODES)
        fields.finish()
        await asyncio.wrap_future(self.engine.pause(mode))
        return self._state()

    async def _resume(self, request: Request) -> Response:
        (await self._fields(request)).finish()
        await _done(self.engine.resume())
        return self._state()

    async def _sleep(self, request: Request) -> Response:
        fields = await self._fields(request)
        said = request.query_params.get("level", "1")
        fields.integer("level", 1, 1, 1)
        fields.finish()
        if said != "1":
            raise ApiError(422, f"level: {said!r} must be 1: the KV cache is given back, weights stay", param="level")
        tags = _tags(request)
        await _done(self.engine.call(lambda engine: engine.sleep(tags)))
        return self._state()

    async def _wake(self, request: Request) -> Response:
        (await self._fields(request)).finish()
        tags = _tags(request)
        await _done(self.engine.call(lambda engine: engine.wake(tags)))
        return self._state()

    async def _update_weights(self, request: Request) -> Response:
        fields = await self._fields(request)
        folder = fields.text("model", None)
        fields.finish()
        if not folder:
            fields.fail("model", "missing: name the folder of a checkpoint")
        await _done(self.engine.call(lambda engine: update_weights(engine, Path(folder))))
        return self._state()

    async def _is_paused(self, request: Request) -> Response:
        self._require()
        return JSONResponse({"is_paused": self.engine.engine.is_paused})

    async def _is_sleeping(self, request: Request) -> Response:
        self._require()
        return JSONResponse({"is_sleeping": self.engine.engine.is_asleep})

    async def _fields(self, request: Request) -> Fields:
        self._require()
        body = await read_body(request, _BODY_BYTES, 10.0)
        return Fields(parse_json(body) if body.strip() else {})

    def _require(self) -> None:
        if not self.allowed:
            raise ApiError(
                403, "control is off: the server listens beyond this machine, and has no API key (THYME_API_KEY)"
            )

    def _state(self) -> Response:
        engine = self.engine.engine
        state: dict[str, Any] = {"is_paused": engine.is_paused, "is_sleeping": engine.is_asleep}
        return JSONResponse(state | {"weight_version": engine.weight_version})


def _tags(request: Request) -> list[MemoryTag]:
    """What memory a request names (`?tags=weights&tags=kv_cache`); all, where it names none."""
    said = request.query_params.getlist("tags") or MEMORY_TAGS
    if unknown := set(said).difference(MEMORY_TAGS):
        raise ApiError(422, f"tags: {min(unknown)!r} must be one of {', '.join(MEMORY_TAGS)}", param="tags")
    return [tag for tag in MEMORY_TAGS if tag in said]


def update_weights(engine: Engine, folder: Path) -> None:
    """Puts a checkpoint's weights into the engine's model, which must be of the same shape.

    Sequences under way go on with the new weights and the KV they have; each token says which version drew it.

    Raises:
        FileNotFoundError, ValueError: no checkpoint there, or one of another model. Nothing has changed then.
    """
    config = read_config(folder)
    if (config.model_type, config.text, config.vision) != (
        engine.model.config.model_type,
        engine.model.config.text,
        engine.model.config.vision,
    ):
        raise ValueError(f"model: {folder} is another model than the one that is served: start a server of its own")
    restore(engine.model, folder)
    engine.weights_updated()


async def _done(future: Any) -> Any:
    """Its result; what the engine refuses is the client's to mend."""
    try:
        return await asyncio.wrap_future(future)
    except (ValueError, FileNotFoundError) as error:
        raise ApiError(400, str(error)) from error
