"""Whatever a watch must notice between two steps, in both of its implementations."""

from __future__ import annotations

import gc
import weakref
from array import array
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deeprelax_cuda import native, watch
from deeprelax_cuda.watch import NativeWatch, PythonWatch, Watch, make_watch


def without_private_functions(*tensors: Any) -> Watch:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watch, "_address_function", lambda: 0)
        return NativeWatch(Tensor.__dlpack_c_exchange_api__, *tensors)


KINDS: dict[str, Callable[..., Watch]] = {"python": PythonWatch}
if native.module is not None:
    KINDS["native"] = lambda *tensors: NativeWatch(Tensor.__dlpack_c_exchange_api__, *tensors)
    KINDS["native, public functions alone"] = without_private_functions


class Scene:
    """Parameters of two groups, one of them frozen, with gradients and state."""

    def __init__(self, kind: str) -> None:
        self.memory = torch.zeros(64)
        self.groups = [
            [nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.tensor(1.0))],
            [
                nn.Parameter(torch.ones(8, 6, 1, 1)),
                nn.Parameter(torch.ones(3, dtype=torch.bfloat16)),
                nn.Parameter(torch.ones(0)),
                nn.Parameter(torch.ones(2, 2)),
            ],
        ]
        self.large, self.largest = nn.Parameter(torch.ones(2000)), nn.Parameter(torch.ones(3000))
        self.groups[0] += [self.large, self.largest]
        self.frozen = nn.Parameter(torch.ones(5), requires_grad=False)
        self.groups[1].append(self.frozen)
        self.square = self.groups[1][3]
        self.trained = [p for group in self.groups for p in group if p is not self.frozen]
        self.state: dict[Tensor, dict[str, Any]] = defaultdict(dict)
        for p in self.trained:
            p.grad = torch.ones_like(p)
            anchor = p.detach().to(torch.float32, copy=True)
            self.state[p] = {"anchor": anchor, "average": anchor.clone(), "period_steps": 0}
        self.idle = nn.Parameter(torch.ones(3, 3))
        self.groups[1].append(self.idle)
        self.state[self.idle] = {"anchor": torch.ones(3, 3)}
        self.written = [*self.trained, *(t for own in self.state.values() for t in own.values() if isinstance(t, Tensor))]
        self.state["mine"] = 7  # something of the user's
        self.watch = KINDS[kind](self.groups, self.state, self.written)

    def look(self) -> Any:
        return self.watch.look(self.groups, self.state)


@pytest.fixture(params=KINDS)
def scene(request: pytest.FixtureRequest) -> Scene:
    return Scene(request.param)


def test_the_native_watch_is_there_where_its_needs_are() -> None:
    p = nn.Parameter(torch.ones(1))
    p.grad = torch.ones(1)
    assert isinstance(make_watch([[p]], {}, [p]), NativeWatch if "native" in KINDS else PythonWatch)
    meta = nn.Parameter(torch.ones(1, device="meta"))
    assert isinstance(make_watch([[meta]], {}, [meta]), PythonWatch), "DLPack cannot describe it"


def test_nothing_has_changed(scene: Scene) -> None:
    for _ in range(3):
        look = scene.look()
        assert [g is p.grad for g, p in zip(look.grads, [*scene.trained, scene.frozen, scene.idle], strict=True)] == [True] * 10
        assert look.fit
        assert look.addresses == array("Q", [p.grad.data_ptr() for p in scene.trained]).tobytes()
        scene.state[scene.trained[0]]["period_steps"] += 1  # a count
        for p in scene.trained:  # new gradients every time
            p.grad = torch.ones_like(p)


def lay_out(p: nn.Parameter, data: Tensor) -> None:
    """Let the parameter see its memory in another way, and get a gradient."""
    p.grad, p.data = None, data
    p.grad = torch.ones_like(p)


CHANGES: dict[str, Callable[[Scene], object]] = {
    "gradient came": lambda s: setattr(s.frozen, "grad", torch.ones(5)),
    "gradient went": lambda s: setattr(s.groups[0][1], "grad", None),
    "parameter exchanged": lambda s: s.groups[0].__setitem__(0, nn.Parameter(s.groups[0][0].detach())),
    "parameter went": lambda s: s.groups[1].pop(),
    "parameter came": lambda s: s.groups[0].append(nn.Parameter(torch.ones(1))),
    "parameter moved to the other group": lambda s: s.groups[0].append(s.groups[1].pop(0)),
    "order": lambda s: s.groups[0].reverse(),
    "group went": lambda s: s.groups.pop(),
    "group came": lambda s: s.groups.append([]),
    "memory exchanged": lambda s: setattr(s.groups[0][0], "data", s.groups[0][0].detach().clone()),
    "memory of a frozen one": lambda s: setattr(s.frozen, "data", s.frozen.detach().clone()),
    "laid out anew under the old gradient": lambda s: setattr(s.square, "data", s.square.data.t()),
    "transposed": lambda s: lay_out(s.groups[0][0], s.groups[0][0].data.t()),
    "shape": lambda s: lay_out(s.groups[1][0], s.groups[1][0].data.view(6, 8, 1, 1)),
    "dimensions": lambda s: lay_out(s.groups[1][0], s.groups[1][0].data.view(8, 6)),
    "type": lambda s: lay_out(s.groups[1][1], s.groups[1][1].data.view(torch.float16)),
    "state exchanged": lambda s: s.state[s.groups[0][1]].update(anchor=s.state[s.groups[0][1]]["anchor"].clone()),
    "state renamed": lambda s: s.state[s.groups[0][1]].update(other=s.state[s.groups[0][1]].pop("anchor")),
    "state went": lambda s: s.state[s.groups[0][1]].pop("average"),
    "state came": lambda s: s.state[s.groups[0][1]].update(momentum=torch.ones(())),
    "dict exchanged": lambda s: s.state.update({s.groups[0][1]: dict(s.state[s.groups[0][1]])}),
    "dict came": lambda s: s.state[s.frozen],
    "dict went": lambda s: s.state.pop(s.groups[1][2]),
    "idle parameter laid out anew": lambda s: setattr(s.idle, "data", s.idle.data.t()),
    "idle parameter cut short": lambda s: setattr(s.idle, "data", s.idle.data[:1]),
    "large parameter cut short under the old gradient": lambda s: setattr(s.large, "data", s.large.data[:7]),
    "state of a large one moved": lambda s: setattr(
        s.state[s.large]["anchor"], "data", s.state[s.large]["anchor"].data.clone()
    ),
    "state of the largest moved": lambda s: setattr(
        s.state[s.largest]["average"], "data", s.state[s.largest]["average"].data.clone()
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_change_is_noticed(scene: Scene, change: Callable[[Scene], object]) -> None:
    assert scene.look() is not None
    keep = [list(scene.trained), dict(scene.state)]
    change(scene)
    assert scene.look() is None
    del keep


#: Gradients of the parameter of shape (2, 3), and whether they can be read as they are.
GRADIENTS: dict[str, tuple[Callable[[Scene], Tensor], bool]] = {
    "offset in a larger buffer": (lambda s: s.memory[3:9].view(2, 3), True),
    "transposed": (lambda s: torch.ones(3, 2).t(), False),
    "expanded": (lambda s: torch.ones(1, 1).expand(2, 3), False),
    "imaginary part": (lambda s: torch.ones(2, 3, dtype=torch.complex64).conj().imag, False),
    "zeros without memory": (lambda s: torch._efficientzerotensor(2, 3), False),
    "sparse": (lambda s: torch.ones(2, 3).to_sparse(), False),
    "its own parameter": (lambda s: s.groups[0][0].detach(), False),
    "an anchor": (lambda s: s.state[s.groups[0][0]]["anchor"], False),
    "the end of a larger parameter": (lambda s: s.groups[1][0].detach().view(-1)[-6:].view(2, 3), False),
    "the middle of a larger parameter": (lambda s: s.groups[1][0].detach().view(-1)[3:9].view(2, 3), False),
    "another gradient": (lambda s: s.groups[1][0].grad.view(-1)[:6].view(2, 3), True),
}


@pytest.mark.parametrize(("make", "fit"), GRADIENTS.values(), ids=GRADIENTS.keys())
def test_gradients_that_can_be_read_as_they_are(scene: Scene, make: Callable[[Scene], Tensor], fit: bool) -> None:
    assert scene.look().fit
    scene.trained[0].grad = make(scene)
    for _ in range(2):  # once new, once known
        look = scene.look()
        assert look.grads[0] is scene.trained[0].grad
        assert look.fit is fit
    scene.trained[0].grad = torch.ones(2, 3)
    assert scene.look().fit


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_that_is_a_negation_is_not_read_as_it_is(kind: str) -> None:
    """Of one element: the only one that can be laid out like a parameter, unless somebody forces it."""
    scene = Scene(kind)
    p = scene.groups[0][1]
    p.grad = torch.tensor(1.0 + 1.0j).conj().imag
    assert p.grad.is_neg()
    assert not scene.look().fit
    p.grad = torch.tensor(1.0)
    assert scene.look().fit
    forced = torch._neg_view(torch.ones(2, 3))
    scene.trained[0].grad = forced
    scene.watch = KINDS[kind](scene.groups, scene.state, scene.written)
    assert not scene.look().fit, "where one was there when note was taken, all are asked"
    scene.trained[0].grad = torch._neg_view(torch.ones(2, 3))
    assert not scene.look().fit


def test_sizes_of_one_have_no_stride(scene: Scene) -> None:
    p = scene.groups[1][0]
    p.grad = torch.ones(8, 6, 1, 1).as_strided((8, 6, 1, 1), (6, 1, 77, 5))
    assert scene.look().fit
    p.grad = torch.ones(48).as_strided((8, 6, 1, 1), (1, 8, 1, 1))
    assert not scene.look().fit


def test_gradients_are_not_held(scene: Scene) -> None:
    scene.look()
    gradient = weakref.ref(scene.trained[0].grad)
    scene.trained[0].grad = None
    gc.collect()
    assert gradient() is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_cycle_through_a_watch_is_collected(kind: str) -> None:
    """A hook of a parameter may refer to the optimizer, which refers to the watch, and this to the parameter."""
    p = nn.Parameter(torch.ones(2))
    p.owner = KINDS[kind]([[p]], {p: {"anchor": torch.ones(2)}}, [p])
    alive = weakref.ref(p)
    del p
    gc.collect()
    assert alive() is None


def test_the_private_function_is_there() -> None:
    """Where torch has it no more, steps on many tiny tensors get slower; then look for what took its place."""
    assert watch._address_function() != 0


def test_errors_of_a_property_come_through() -> None:
    class Strange(nn.Parameter):
        broken = False

        @property
        def grad(self) -> Tensor:  # type: ignore[override]
            if Strange.broken:
                raise RuntimeError("no gradient today")
            return torch.ones(2)

    p = Strange(torch.ones(2))
    for kind in KINDS.values():
        seer = kind([[p]], {}, [p])
        Strange.broken = True
        with pytest.raises(RuntimeError, match="no gradient today"):
            seer.look([[p]], {})
        Strange.broken = False
        assert seer.look([[p]], {}) is not None
