"""The backend of vLLM servers that this process keeps: they start and stop with it.

Not here: keeping them (supervisor.py), asking them (upstream.py).
"""

from typing import Any

from crystallm_kit.server.supervisor import Supervisor
from crystallm_kit.server.upstream import UpstreamBackend
from crystallm_kit.server.vllm_wire import Wire


class SupervisedBackend(UpstreamBackend):
    """Completions of the servers of a supervisor. Settings are those of UpstreamBackend."""

    def __init__(self, supervisor: Supervisor, wire: Wire, **settings: Any) -> None:
        super().__init__(supervisor.urls, wire, **settings)
        self.supervisor = supervisor
        self._is_kept = False

    @property
    def n_restarts(self) -> int:
        """How often a server was started anew."""
        return self.supervisor.n_restarts

    async def start(self) -> None:
        """Start the servers; return when the first can be asked. Started twice is started once.

        Raises:
            EngineFailed: If none of them starts; the message holds the end of a log.
        """
        if not self._is_kept:
            await self.supervisor.start()
            self._is_kept = True
        await super().start()

    async def close(self) -> None:
        """Close all connections and stop the servers."""
        await super().close()
        self._is_kept = False
        await self.supervisor.close()
