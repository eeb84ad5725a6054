"""Flat buckets: the module's values, names and state_dict stay; its memory is one padded run per dtype."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from senseflow_kernels import _launch
from senseflow_kernels.buckets import ALIGN, Buckets
from senseflow_kernels.lerp import Lerp, join_fp32, split_fp32

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(7, 5).bfloat16()
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.norm = nn.LayerNorm(5)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.to(DEVICE)

    def forward(self, x):
        return self.norm(self.a(x.bfloat16()).float()) * self.scale


def gaps(b):
    """What of the flats belongs to no parameter."""
    inside = [torch.zeros(len(f), dtype=torch.bool) for f in b.flats]
    for s in b.slots:
        inside[s.bucket][s.offset : s.offset + s.numel] = True
    return [f[~i.to(f.device)] for f, i in zip(b.flats, inside, strict=True)]


def test_module_keeps_values_names_strides_and_gradients():
    net = Net()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    strides = {k: v.stride() for k, v in net.named_parameters()}
    objects, x = dict(net.named_parameters()), torch.randn(2, 7, device=DEVICE)
    out = net(x)
    b = Buckets(net.named_parameters())
    assert all(net.get_parameter(k) is p and p.stride() == strides[k] for k, p in objects.items())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert torch.equal(net(x), out)
    net(x).sum().backward()
    assert net.a.weight.grad.shape == (5, 7)
    assert [f.dtype for f in b.flats] == [torch.float32, torch.bfloat16]
    assert [s.name for s in b.slots] == [*objects]
    b.check(net.named_parameters())


def test_memory_is_shared_both_ways_and_through_load_state_dict():
    net, other = Net(), Net()
    b = Buckets(net.named_parameters())
    b.views()["norm.bias"].fill_(3)
    assert (net.norm.bias == 3).all()
    net.load_state_dict(other.state_dict())
    b.check(net.named_parameters())
    assert torch.equal(b.views()["conv.weight"], other.conv.weight)
    net.load_state_dict(other.state_dict(), assign=True)
    with pytest.raises(RuntimeError, match="scale left its bucket"):
        b.check(net.named_parameters())


@settings(max_examples=50)
@given(
    st.lists(st.tuples(st.integers(0, 200), st.sampled_from([torch.float32, torch.bfloat16])), max_size=6),
    st.integers(1, 4),
)
def test_layout(sizes, factor):
    """Starts and ends aligned, no overlap, gaps zero, nothing but the padding added."""
    named = [(str(i), torch.randn(n).to(d)) for i, (n, d) in enumerate(sizes)]
    values = [t.clone() for _, t in named]
    b = Buckets(named, pad=ALIGN * factor)
    ends = [0] * len(b.flats)
    for slot, (_, t), value in zip(b.slots, named, values, strict=True):
        assert slot.offset == ends[slot.bucket] and slot.offset % ALIGN == 0
        ends[slot.bucket] += -(-slot.numel // ALIGN) * ALIGN
        assert torch.equal(t, value) and b.flats[slot.bucket].dtype == value.dtype
        assert slot.numel == 0 or t.data_ptr() == b.flats[slot.bucket][slot.offset :].data_ptr()
    for flat, end in zip(b.flats, ends, strict=True):
        assert len(flat) % (ALIGN * factor) == 0 and 0 <= len(flat) - end < ALIGN * factor
        assert flat.data_ptr() % 16 == 0
    assert all((g == 0).all() for g in gaps(b))


def test_twin_is_zero_and_apart():
    b = Buckets(Net().named_parameters())
    twin = b.like(torch.float32)
    assert b.same_layout(twin) and all(f.dtype == torch.float32 and not f.any() for f in twin.flats)
    twin.flats[1].fill_(1)
    assert (twin.views()["a.weight"] == 1).all() and not (b.views()["a.weight"] == 1).any()
    assert [f.dtype for f in b.like().flats] == [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("mode", ["nearest", "split", "stochastic"])
def test_lerp_is_one_launch_a_bucket_and_leaves_the_padding(mode):
    """The same values as the parameters moved one by one, in every mode."""
    nets, thetas = (Net(), Net()), Net()
    nets[1].load_state_dict(nets[0].state_dict())
    params, ends = [*nets[1].parameters()], [*thetas.parameters()]
    theta = Buckets(thetas.named_parameters())
    b = Buckets(nets[0].named_parameters())
    low = b.like(torch.int16) if mode == "split" else None
    ema = b.like(torch.float32)
    lows = [torch.zeros_like(p, dtype=torch.int16) if p.dtype == torch.bfloat16 else None for p in params]
    flat = Lerp(b, theta, mode, low=low, ema=ema, ema_decay=0.9, seed=3)
    apart = Lerp(params, ends, mode, low=lows if low else None, seed=3)
    for _ in range(2):
        before = _launch.launches["lerp"]
        flat.step(0.9)
        assert _launch.launches["lerp"] == before + len(b.flats)
        apart.step(0.9)
    for p, q in zip(nets[0].parameters(), params, strict=True):
        assert torch.equal(p, q)
    torch.testing.assert_close(ema.views()["scale"], 0.19 * thetas.scale, rtol=1e-6, atol=0)
    assert all((g == 0).all() for bucket in (b, ema) for g in gaps(bucket))
    if low:
        exact = join_fp32(b.flats[1], low.flats[1])
        assert torch.equal(split_fp32(exact)[0], b.flats[1]) and low.flats[1].any()


def test_errors():
    w = torch.zeros(8)
    for named, match in (
        ([("a", w), ("b", w)], "a and b share memory"),
        ([("a", w), ("b", w[4:])], "a and b share memory"),
        ([("a", w[::2])], "a is not dense"),
        ([("a", torch.zeros(1).expand(3))], "a is not dense"),
        ([("a", w.to_sparse())], "a is not dense"),
        ([("a", torch.zeros(3, device="meta"))], "a is on meta: give it memory first"),
        ([w], r"expected \(name, tensor\) pairs, .*, got Tensor"),
        ({"a": w}, r"expected \(name, tensor\) pairs, .*, got str"),
        ([("a", w), ("a", torch.zeros(3))], "names given twice"),
    ):
        with pytest.raises(ValueError, match=match):
            Buckets(named)
    with pytest.raises(ValueError, match="pad must be"):
        Buckets([("a", w)], pad=24)
    net = Net()
    b = Buckets(net.named_parameters())
    with pytest.raises(ValueError, match="same layout"):
        Lerp(b, [*Net().parameters()], "nearest")
    with pytest.raises(ValueError, match="same layout"):
        Lerp(b, Buckets([("a", w)]), "nearest")
    assert Buckets([]).flats == []
