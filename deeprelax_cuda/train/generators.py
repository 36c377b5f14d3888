"""torch's generators as a replica draws from them, by dropout for example."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Generators:
    """Those of this process, for the one replica that is in it; ``with`` it the replica draws."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device if device.type == "cuda" else None

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        """Return where they are."""
        cuda = torch.cuda.get_rng_state(self._cuda) if self._cuda else None
        return {"generator": torch.get_rng_state(), "cuda_generator": cuda}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        torch.set_rng_state(state["generator"])
        if self._cuda and state["cuda_generator"] is not None:
            torch.cuda.set_rng_state(state["cuda_generator"], self._cuda)


class OwnGenerators(Generators):
    """Those of one of several replicas in this process, who draws what it would draw alone in its own.

    They are in the place of torch's while the replica draws. Nobody else does between, so those are not put back.
    """

    def __init__(self, device: torch.device, seed: int) -> None:
        super().__init__(device)
        states: list[Tensor | None] = [torch.Generator().manual_seed(seed).get_state()]
        states.append(torch.Generator(self._cuda).manual_seed(seed).get_state() if self._cuda else None)
        self._state: dict[str, Any] = dict(zip(("generator", "cuda_generator"), states, strict=True))

    def __enter__(self) -> None:
        super().load_state_dict(self._state)

    def __exit__(self, *_: object) -> None:
        self._state = super().state_dict()

    def state_dict(self) -> dict[str, Any]:
        """Return where they are."""
        return dict(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self._state = dict(state)
