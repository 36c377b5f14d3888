"""The eager backend against the definition of the noise, and against itself: pieces, layouts, skips and the fused step."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from clock_cases import LAWS, compare
from contract_cases import CPU_SETS
from numpy import float32 as f32
from torch import Tensor

from deeprelax_cuda import backends
from deeprelax_cuda.backends import cpu, eager
from deeprelax_cuda.noise import DOMAIN_ROUNDING, STREAMS_PER_DOMAIN, Place, philox4x32
from deeprelax_cuda.steps import NARROW, ROLES, STORED, Scalars, Tensors, compute_type, may_write

FAMILIES = ("langevin", "gradient_average")
SEED = 2**63 + 12345
#: Every term of every formula is on; numbers that are exact in float32.
EVERY_TERM = Scalars(
    eta=0.125, k=0.375, s=0.5, a=0.25, c=0.75, wd=0.0625, mu=0.875, damp1=0.5, nesterov=True, maximize=True,
    lr=0.625, mu_o=0.4375, wd_o=0.03125, kr=0.1875, nesterov_o=True, seed=SEED, step=17,
)  # fmt: skip


def but(scalars: Scalars = EVERY_TERM, **changes) -> Scalars:
    return replace(scalars, **changes)


def words(index: int, seed: int, step: int, stream: int) -> tuple[int, int, int, int]:
    q = index // 4
    return philox4x32((q % 2**32, q >> 32, step, stream), (seed % 2**32, seed >> 32))


def normal(index: int, seed: int, step: int, stream: int) -> f32:
    """The normal of one element, in the order of its definition, one float32 operation at a time."""
    w = words(index, seed, step, stream)
    w0, w1 = w[0:2] if index % 4 < 2 else w[2:4]
    constant = [f32(float.fromhex(h)) for h in CONSTANTS.split()]
    (nl2, ka), ln, (s1, s2, s3), (c1, c2, c3) = constant[:2], constant[2:9], constant[9:12], constant[12:]

    v = f32(w0) + f32(0.5)
    i = int(v.view(np.int32)) - 0x4F3504F3
    g = f32(1) - np.uint32((i & 0x7FFFFF) + 0x3F3504F3).view(f32)
    p = ln[6]
    for coefficient in ln[5::-1]:
        p = p * g + coefficient
    rho = np.sqrt(f32(i >> 23) * nl2 + g * (f32(2) + g * p))

    a = f32(np.uint32(w1 << 2 & 0xFFFFFFFF).view(np.int32)) * ka
    z = a * a
    sn = a * (f32(1) + z * (s1 + z * (s2 + z * s3)))
    cs = f32(1) + z * (c1 + z * (c2 + z * c3))
    first, second = ((cs, sn), (-sn, cs), (-cs, -sn), (sn, -cs))[w1 >> 30]
    return rho * (second if index % 2 else first)


CONSTANTS = """
-0x1.62e43p+0  0x1.921fb6p-32
0x1.00003ap+0  0x1.555c5ap-1  0x1.ff8102p-2  0x1.970512p-2  0x1.5fc3fep-2  0x1.4faa02p-2  0x1.adf5bep-3
-0x1.55554p-3  0x1.1105bep-7  -0x1.98dd16p-13
-0x1.ffffbap-2  0x1.553faap-5  -0x1.64782ap-10
"""


def bits(t: Tensor) -> Tensor:
    """The bits of ``t``, so that NaN and the sign of zero count."""
    return t.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def role(dtype: torch.dtype, shapes, generator: torch.Generator, scale: float = 1.0) -> list[Tensor]:
    return [(torch.randn(shape, generator=generator) * scale).to(dtype) for shape in shapes]


def problem(dtype, shapes=((61,), (0,), (5, 7)), masters=False, places=None) -> tuple[Tensors, list[Tensor]]:
    """Random tensors in every role that plays a part, and gradients. With masters the parameters are their rounding."""
    generator = torch.Generator().manual_seed(1)
    wide = compute_type(dtype)
    made = {
        name: role(wide, shapes, generator)
        for name in ("anchors", "averages", "momenta", "outer_momenta", "consensus", "masters")
    }
    params = [master.to(dtype) for master in made["masters"]]
    if not masters:
        made["masters"] = []
    numel = [p.numel() for p in params]
    places = places or [Place(2**33 + 3 + i, max(n, 1), max(n, 1)) for i, n in enumerate(numel)]
    numbers = [5 + i for i in range(len(shapes))]
    return Tensors(params, **made, numbers=numbers, places=places), role(dtype, shapes, generator)


def written(t: Tensors) -> list[Tensor]:
    return [*t.params, *t.anchors, *t.averages, *t.momenta, *t.masters, *t.outer_momenta]


def result(t: Tensors) -> list[Tensor]:
    return [bits(u).clone() for u in written(t)]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


def storage_cases(test):
    """Parametrize over types, rounding and masters, as far as they go together."""
    cases = [(dtype, "nearest", masters) for dtype in STORED for masters in (False, True)]
    cases += [(dtype, "stochastic", False) for dtype in (torch.bfloat16, torch.float32, torch.float64)]
    ids = [f"{str(d).removeprefix('torch.')}-{r}{'-masters' if m else ''}" for d, r, m in cases]
    return pytest.mark.parametrize(("dtype", "rounding", "masters"), cases, ids=ids)(test)


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**40 + 7, 2**64 - 1])
@pytest.mark.parametrize("offset", [0, 1, 2, 3, 2**34 - 5, 2**62 + 1])
def test_normals_are_the_definition(seed, offset):
    step, stream = 2**32 - 1, 0xF0000001
    got = eager.gaussian(53, seed=seed, step=step, stream=stream, offset=offset, device=torch.device("cpu"))
    want = np.array([normal(offset + j, seed, step, stream) for j in range(53)])
    assert got.dtype == torch.float32
    assert np.array_equal(got.numpy(), want)


PLACES = [(0, 1, 1), (3, 1, 5), (2**33 + 1, 5, 7), (2, 7, 8), (6, 16, 1001), (2**40 + 3, 30, 2**31 + 1), (1, 1000, 1000)]


@pytest.mark.parametrize("piece", [2**18, 20])
@pytest.mark.parametrize("place", PLACES, ids=str)
def test_a_place_with_runs_is_a_slice_of_the_whole_tensors_noise(place, piece, monkeypatch):
    monkeypatch.setattr(eager, "PIECE_CPU", piece)
    offset, run, pitch = place
    index = [offset + j // run * pitch + j % run for j in range(64)]
    zeros = [torch.zeros(64) for _ in range(3)]
    noise_only = Scalars(family="gradient_average", s=1.0, seed=SEED, step=9)
    plan = eager.EagerPlan(Tensors([zeros[0]], [zeros[1]], [zeros[2]], numbers=[3], places=[Place(*place)]))
    plan.run([torch.ones(64)], noise_only)
    assert np.array_equal(zeros[0].numpy(), np.array([normal(i, SEED, 9, 3) for i in index]))


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_stochastic_rounding_adds_the_upper_half_of_its_own_word(place):
    offset, run, pitch = place
    index = [offset + j // run * pitch + j % run for j in range(64)]
    upper = [words(i, SEED, 4, DOMAIN_ROUNDING * STREAMS_PER_DOMAIN + 6)[i % 4] >> 16 for i in index]
    anchor = torch.randn(64, generator=torch.Generator().manual_seed(2))
    want = (anchor.numpy().view(np.uint32) + np.array(upper, np.uint32)) >> 16
    param = torch.zeros(64, dtype=torch.bfloat16)
    scalars = Scalars(family="gradient_average", a=0.0, rounding="stochastic", seed=SEED, step=4)
    plan = eager.EagerPlan(Tensors([param], [anchor], [torch.zeros(64)], numbers=[6], places=[Place(*place)]))
    plan.run([torch.zeros_like(param)], scalars)
    assert np.array_equal(param.view(torch.int16).numpy().view(np.uint16), want.astype(np.uint16))


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_bfloat16_at_the_ends_of_its_range(rounding):
    """The largest numbers, infinities, denormals and NaNs (the one of all ones would carry over to -0)."""
    patterns = [0x7F7FFFFF, 0x7F7F8000, 0x7F7F7FFF, 0x7F800000, 0x7FFFFFFF, 0x7F800001, 0x00000001, 0x00018000, 0x00008000, 0]
    word = torch.tensor([p - 2**31 * s for p in patterns for s in (0, 1)] * 50, dtype=torch.int64).to(torch.int32)
    value = word.view(torch.float32)
    param = torch.zeros(value.numel(), dtype=torch.bfloat16)
    plan = eager.EagerPlan(Tensors([param], [value], [torch.zeros_like(value)]))
    plan.run([torch.zeros_like(param)], Scalars(family="gradient_average", rounding=rounding))

    got, finite = param.view(torch.int16).to(torch.int32) << 16, value.isfinite()
    assert torch.equal(param.isnan(), value.isnan())
    assert torch.equal(param.isinf() & value.isinf(), value.isinf())
    assert torch.equal(got < 0, word < 0)
    if rounding == "nearest":
        assert torch.equal(bits(param)[finite], bits(value.bfloat16())[finite])
    else:
        assert param[finite].isfinite().all()
        below = (word[finite] >> 16) << 16
        largest = (below & 0x7FFFFFFF) == 0x7F7F0000
        assert ((got[finite] == below) | ((got[finite] == below + 0x10000) & ~largest)).all()
        assert (got[finite] != below).any()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("found", [2.0, 1.0, float("nan"), float("inf")])
@storage_cases
def test_found_inf_writes_nothing(family, found, dtype, rounding, masters):
    tensors, grads = problem(dtype, masters=masters)
    before = result(tensors)
    scalars = but(family=family, outer=True, rounding=rounding)
    plan = eager.EagerPlan(tensors)
    plan.run(grads, scalars, found_inf=torch.tensor([found]))
    assert same(result(tensors), before)

    plan.run(grads, scalars, found_inf=torch.zeros(1))
    plain, _ = problem(dtype, masters=masters)
    eager.EagerPlan(plain).run(grads, scalars)
    assert same(result(tensors), result(plain))


STEPS = {
    "every term": but(),
    "every term, outer": but(outer=True),
    "outer only": but(inner=False, outer=True),
    "no average": but(a=0.0),
    "no average, outer": but(a=0.0, outer=True),
    "the last sample": but(a=1.0),
    "the last sample, outer": but(a=1.0, outer=True),
    "no term": Scalars(eta=0.125),
    "no term, outer": Scalars(eta=0.125, outer=True, lr=0.5),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scalars", STEPS.values(), ids=STEPS.keys())
def test_found_inf_leaves_what_is_only_read_alone(scalars, family):
    """A write of the same bits would still tell autograd that a tensor has changed."""
    scalars = but(scalars, family=family)
    tensors, grads = problem(torch.bfloat16, masters=True)
    before = {role: [t._version for t in getattr(tensors, role)] for role in ROLES}
    eager.EagerPlan(tensors).run(grads if scalars.inner else [], scalars, found_inf=torch.zeros(1))
    counted = {role for role in ROLES if [t._version for t in getattr(tensors, role)] != before[role]}
    assert counted == scalars.writes


@pytest.mark.parametrize("name", backends.available("cpu"))
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scalars", STEPS.values(), ids=STEPS.keys())
def test_a_step_reads_and_writes_the_roles_that_its_scalars_say(scalars, family, name):
    """A NaN shows in what is written just where its role is read; with terms off, a step may read what it then cannot use."""
    scalars = but(scalars, family=family)

    def outcome(spoiled: str = "") -> dict[str, list[Tensor]]:
        tensors, grads = problem(torch.float32, shapes=((61,),))
        for t in getattr(tensors, spoiled) if spoiled else []:
            t.fill_(float("nan"))
        backends.make_plan(name, tensors).run(grads if scalars.inner else [], scalars)
        return {role: [t.clone() for t in getattr(tensors, role)] for role in ROLES}

    before, _ = problem(torch.float32, shapes=((61,),))
    plain = outcome()
    moved = {role for role in ROLES if not same(plain[role], getattr(before, role))}
    assert moved == scalars.writes - {"masters"}
    assert scalars.writes <= may_write(outer=scalars.outer)
    for role in ROLES:
        spoiled = outcome(role)
        seen = any(not same(spoiled[other], plain[other]) for other in moved)
        assert role in scalars.reads or not seen, role
        if scalars.a == EVERY_TERM.a:
            assert seen or role not in scalars.reads - {"masters"}, role


@pytest.mark.parametrize("dtype", STORED, ids=str)
def test_inv_scale_multiplies_the_gradient_in_the_compute_type(dtype):
    factor = torch.tensor([1 / 3], dtype=compute_type(dtype))
    scaled, grads = problem(dtype)
    eager.EagerPlan(scaled).run(grads, EVERY_TERM, inv_scale=factor)
    plain, _ = problem(compute_type(dtype))
    wide = [g.to(compute_type(dtype)) * factor for g in grads]
    for p, q in zip(plain.params, problem(dtype)[0].params, strict=True):
        p.copy_(q)
    eager.EagerPlan(plain).run(wide, EVERY_TERM)
    assert same([bits(v) for v in scaled.momenta], [bits(v) for v in plain.momenta])
    assert same([bits(p) for p in scaled.params], [bits(p.to(dtype)) for p in plain.params])


@pytest.mark.parametrize("piece", [1, 7, 64])
@pytest.mark.parametrize("family", FAMILIES)
@storage_cases
def test_pieces_do_not_matter(piece, family, dtype, rounding, masters, monkeypatch):
    places = [Place(2**33 + 3, 61, 61), Place(0, 1, 1), Place(5, 7, 1001)]
    outcomes = []
    for size in (2**18, piece):
        monkeypatch.setattr(eager, "PIECE_CPU", size)
        tensors, grads = problem(dtype, masters=masters, places=places)
        eager.EagerPlan(tensors).run(grads, but(family=family, outer=True, rounding=rounding))
        outcomes.append(result(tensors))
    assert same(*outcomes)


@pytest.mark.parametrize("family", FAMILIES)
@storage_cases
def test_channels_last_is_its_contiguous_twin_in_storage_order(family, dtype, rounding, masters):
    shape = (3, 4, 5, 2)
    dense, dense_grads = problem(dtype, shapes=(shape,), masters=masters)

    def twin(tensors: list[Tensor]) -> list[Tensor]:
        return [t.to(memory_format=torch.channels_last, copy=True) for t in tensors]

    def stored(tensors: list[Tensor]) -> list[Tensor]:
        return [t.permute(0, 2, 3, 1) for t in tensors]

    last = Tensors(**{r: twin(getattr(dense, r)) for r in ROLES}, numbers=dense.numbers, places=dense.places)
    last_grads = twin(dense_grads)
    plain = Tensors(
        **{r: [t.clone(memory_format=torch.contiguous_format) for t in stored(getattr(last, r))] for r in ROLES},
        numbers=dense.numbers,
        places=dense.places,
    )
    plain_grads = [t.contiguous().clone() for t in stored(last_grads)]
    before = result(last)

    scalars = but(family=family, outer=True, rounding=rounding)
    eager.EagerPlan(last).run(last_grads, scalars)
    eager.EagerPlan(plain).run(plain_grads, scalars)
    assert not any(map(torch.equal, result(last)[:1], before[:1]))
    assert all(torch.equal(a, bits(b)) for a, b in zip(result(plain), stored(written(last)), strict=True))


@pytest.mark.parametrize("a", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("s", [0.0, 0.5])
@pytest.mark.parametrize("family", FAMILIES)
@storage_cases
def test_the_fused_last_step_is_inner_then_outer(a, s, family, dtype, rounding, masters):
    scalars = but(family=family, a=a, s=s, rounding=rounding)
    fused, grads = problem(dtype, masters=masters)
    eager.EagerPlan(fused).run(grads, but(scalars, outer=True))
    turns, _ = problem(dtype, masters=masters)
    plan = eager.EagerPlan(turns)
    plan.run(grads, scalars)
    plan.run([], but(scalars, inner=False, outer=True))
    assert same(result(fused), result(turns))


@pytest.mark.parametrize("family", FAMILIES)
@storage_cases
def test_every_written_element_moves_and_nothing_else(family, dtype, rounding, masters):
    """Each tensor lies at an odd offset between guard elements; gradients and consensus are only read."""
    source, grads = problem(dtype, masters=masters, shapes=((129,),))
    buffers: list[Tensor] = []

    def guarded(tensors: list[Tensor]) -> list[Tensor]:
        for t in tensors:
            buffer = torch.full((3 + 129 + 5,), 7.0, dtype=t.dtype)
            buffer[3:132] = t
            buffers.append(buffer)
        return [b[3:132] for b in buffers[len(buffers) - len(tensors) :]]

    tensors = Tensors(**{r: guarded(getattr(source, r)) for r in ROLES}, numbers=[0], places=[Place(1, 129, 129)])
    grads = guarded(grads)
    before = [b.clone() for b in buffers]
    eager.EagerPlan(tensors).run(grads, but(family=family, outer=True, rounding=rounding, a=0.25))

    frozen = {t.data_ptr() for t in (*grads, *tensors.consensus)}
    if dtype not in NARROW:
        frozen |= {t.data_ptr() for t in tensors.masters}  # masters change nothing for wide parameters
    if family == "gradient_average":
        frozen |= {t.data_ptr() for t in tensors.momenta}
    for buffer, old in zip(buffers, before, strict=True):
        moved = bits(buffer) != bits(old)
        assert not moved[:3].any()
        assert not moved[132:].any()
        if buffer[3:].data_ptr() in frozen:
            assert not moved.any()
        else:
            assert moved[3:132].float().mean() > 0.95  # a narrow parameter may round back to where it was


@pytest.mark.skipif(not CPU_SETS, reason="there is no native backend to compare with")
@pytest.mark.parametrize("law", LAWS)
def test_a_clock_follows_its_law(law):
    compare({"eager": eager.make_plan, "cpu": cpu.make_plan}, LAWS[law])


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_to_do(family):
    eager.EagerPlan(Tensors([])).run([], but(family=family, outer=True))
    empty, grads = problem(torch.bfloat16, shapes=((0,), (3, 0)))
    eager.EagerPlan(empty).run(grads, but(family=family, outer=True, rounding="stochastic"), found_inf=torch.zeros(1))
    assert eager.gaussian(0, seed=0, step=0, stream=0, offset=2**63 - 1, device=torch.device("cpu")).shape == (0,)


def test_unavailable_gives_the_reason():
    here = torch.device("cpu")
    assert all(eager.unavailable(here, dtype) is None for dtype in STORED)
    assert "torch.int64" in eager.unavailable(here, torch.int64)
    assert "float64" in eager.unavailable(torch.device("mps"), torch.float32)
