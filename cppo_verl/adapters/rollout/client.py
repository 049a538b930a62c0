"""How agent loops reach the vLLM servers: through verl's load balancer, or straight to the only server there is."""

from typing import Any

from omegaconf import DictConfig
from ray.actor import ActorHandle
from verl.workers.rollout.llm_server import LLMServerClient


class DirectClient(LLMServerClient):
    """verl's client where one server serves all: there is nothing to balance.

    The balancer costs two Ray calls a response, one of which brings the server's handle along, and a process.
    """

    def __init__(self, config: DictConfig, address: str, server: ActorHandle, **kwargs: Any) -> None:
        super().__init__(config=config, **{**kwargs, "load_balancer_handle": None})
        self._address, self._server = address, server

    async def _acquire_server(self, request_id: str, **extra: Any) -> tuple[str, ActorHandle]:
        return self._address, self._server

    def _release_server(self, server_id: str, request_id: str | None = None) -> None:
        """Nothing was counted."""
