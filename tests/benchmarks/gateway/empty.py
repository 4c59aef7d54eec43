"""The floor: deployments that answer nothing, in the same Serve and with the same options as the gateway.

Their requests are the gateway's, byte for byte but for the path.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fastapi import FastAPI
from ray import serve

FASTAPI, ASGI = "empty-fastapi", "empty-asgi"

_Message = MutableMapping[str, Any]
_HEADERS = [(b"content-type", b"application/json"), (b"content-length", b"2")]
_api = FastAPI()


class _App:
    # A plain function would be taken by Serve for one that makes the app.
    async def __call__(
        self, scope: _Message, receive: Callable[[], Awaitable[_Message]], send: Callable[[_Message], Awaitable[None]]
    ) -> None:
        if scope["type"] == "lifespan":
            while (await receive())["type"] == "lifespan.startup":
                await send({"type": "lifespan.startup.complete"})
            await send({"type": "lifespan.shutdown.complete"})
            return
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        await send({"type": "http.response.body", "body": b"{}"})


@serve.ingress(_api)
class _EmptyFastAPI:
    # As for a route that declares nothing: its answer is not validated.
    @_api.post("/predict", response_model=None)
    async def predict(self) -> dict[str, str]:
        return {}


@serve.ingress(_App())
class _EmptyASGI:
    pass


def deploy() -> None:
    """Starts both, one replica each."""
    for name, made in ((FASTAPI, _EmptyFastAPI), (ASGI, _EmptyASGI)):
        deployment = serve.deployment(
            name=name,
            num_replicas=1,
            max_ongoing_requests=256,
            max_queued_requests=1024,
            ray_actor_options={"num_cpus": 0.25},
            logging_config={"enable_access_log": False, "log_level": "WARNING"},
        )(made)
        serve.run(deployment.bind(), name=name, route_prefix=f"/{name}")
