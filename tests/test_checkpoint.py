"""Crashes at every file-system step, damage to every byte, pruning; and optim.py's exactness."""

import os
import resource
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from senseflow import checkpoint
from senseflow.checkpoint import load_latest, save
from senseflow.config import UserError
from senseflow.optim import Ema, apply_if_finite, clip_grad_norm_, make_adamw, scheduled_lr

FS_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "os.fsync")


def state_of(number: int) -> dict:
    return {"at": number, "nested": {"w": torch.full((5,), number + 0.5), "b": [1.5, None, (2,)]}}


def assert_state(found, iteration: int, number: int) -> None:
    assert found is not None and found[0] == iteration
    assert found[1]["at"] == number
    assert torch.equal(found[1]["nested"]["w"], torch.full((5,), number + 0.5))
    assert found[1]["nested"]["b"] == [1.5, None, (2,)]


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def killed_at(event: int, action) -> bool:
    """Runs action in a child that dies right before its event-th file-system step, buffers and all.
    True when it died, False when the action had fewer steps."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork beside torch's idle threads
        child = os.fork()
    if child == 0:
        seen = 0

        def hook(name: str, _: object) -> None:
            nonlocal seen
            if name in FS_EVENTS:
                if seen == event:
                    os._exit(9)
                seen += 1

        real = os.fsync
        os.fsync = lambda handle: (sys.audit("os.fsync", handle), real(handle))[1]  # has no event
        sys.addaudithook(hook)
        try:
            action()
            os._exit(0)
        except BaseException:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9), "the save itself failed"
    return status == 9


@pytest.mark.parametrize("again", [False, True], ids=["new", "same iteration again"])
def test_crash_at_any_step_leaves_a_whole_checkpoint(tmp_path, again):
    """keep_last = 1 is the hardest: the only other checkpoint is removed by this very save."""
    deaths, outcomes = 0, []
    for event in range(200):
        folder = tmp_path / str(event)
        save(folder, 1, state_of(1), keep_last=1)
        target = 1 if again else 2
        died = killed_at(event, lambda: save(folder, target, state_of(7), 1))  # noqa: B023
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = load_latest(folder)
        assert found is not None
        assert_state(found, *((target, 7) if found[1]["at"] == 7 else (1, 1)))
        outcomes.append(found[1]["at"])
        # And the run goes on from there: the next save clears the ruins.
        save(folder, 3, state_of(3), keep_last=1)
        assert names(folder) == ["step-00000003"]
        if not died:
            break
        deaths += 1
    assert deaths > 10 and outcomes[0] == 1 and outcomes[-1] == 7
    assert outcomes == sorted(outcomes), "once the new one is whole it stays so"


def test_everything_is_on_the_disk_before_the_rename(tmp_path, monkeypatch):
    """A power cut: a rename that overtakes the data would show an empty file."""
    log = []
    real_sync, real_rename = os.fsync, os.rename
    monkeypatch.setattr(
        checkpoint.os,
        "fsync",
        lambda h: (log.append(Path(os.readlink(f"/proc/self/fd/{h}")).name), real_sync(h)),
    )
    monkeypatch.setattr(checkpoint.os, "rename", lambda a, b: (log.append("rename"), real_rename(a, b)))
    save(tmp_path / "c", 4, state_of(4), 2)
    assert log == ["state.pt", "sha256", ".partial-00000004", "rename", "c"]


def test_any_altered_byte_is_noticed(tmp_path):
    save(tmp_path, 1, state_of(1), 3)
    newest = save(tmp_path, 2, state_of(2), 3)
    rng = np.random.default_rng(0)
    for name in ("state.pt", "sha256"):
        file = newest / name
        whole = file.read_bytes()
        for at in range(len(whole)):
            changed = bytearray(whole)
            changed[at] ^= int(rng.integers(1, 256))
            file.write_bytes(changed)
            assert checkpoint._flaw(newest), f"{name}: byte {at}"
        with pytest.warns(UserWarning, match="checksum differs"):
            assert_state(load_latest(tmp_path), 1, 1)
        file.write_bytes(whole)
    assert_state(load_latest(tmp_path), 2, 2)


@pytest.mark.parametrize("name", ["state.pt", "sha256"])
@pytest.mark.parametrize("length", [None, 0, 1, -1])
def test_truncated_or_missing_file(tmp_path, name, length):
    save(tmp_path, 1, state_of(1), 3)
    file = save(tmp_path, 2, state_of(2), 3) / name
    if length is None:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:length])
    with pytest.warns(UserWarning) as said:
        assert_state(load_latest(tmp_path), 1, 1)
    assert len(said) == 1
    text = str(said[0].message)
    assert "step-00000002" in text and "iteration 1 is used instead" in text


def test_several_ruins_make_one_warning(tmp_path):
    for i in (1, 2, 3):
        save(tmp_path, i, state_of(i), 5)
    for i in (2, 3):
        (tmp_path / f"step-{i:08d}" / "state.pt").write_bytes(b"")
    with pytest.warns(UserWarning) as said:
        assert_state(load_latest(tmp_path), 1, 1)
    assert len(said) == 1 and all(f"step-0000000{i}" in str(said[0].message) for i in (2, 3))
    (tmp_path / "step-00000001" / "sha256").unlink()
    with pytest.warns(UserWarning, match="no other is there"):
        assert load_latest(tmp_path) is None


def test_nothing_there(tmp_path):
    assert load_latest(tmp_path) is None
    assert load_latest(tmp_path / "missing") is None
    (tmp_path / "step-notes").mkdir()
    assert load_latest(tmp_path) is None


def test_pruning_keeps_the_newest(tmp_path):
    for i in (1, 2, 10, 3):
        save(tmp_path, i, state_of(i), keep_last=2)
    # 3 was saved last: 10 is whole and not older, so it is not touched.
    assert names(tmp_path) == ["step-00000002", "step-00000003", "step-00000010"]
    save(tmp_path, 123_456_789, state_of(5), keep_last=1)
    assert names(tmp_path) == ["step-123456789"]
    assert_state(load_latest(tmp_path), 123_456_789, 5)


def test_pruning_prefers_a_whole_one_to_newer_ruins(tmp_path):
    """A resume went around the ruins at 8 and 9; the save at 5 must not fall to them."""
    for i in (4, 8, 9):
        save(tmp_path, i, state_of(i), keep_last=3)
    for i in (8, 9):
        (tmp_path / f"step-{i:08d}" / "state.pt").write_bytes(b"cut")
    save(tmp_path, 5, state_of(5), keep_last=1)
    assert names(tmp_path) == ["step-00000005"]


def test_round_trip_of_networks_and_optimizer(tmp_path):
    """A resumed optimizer takes the same next step, bit for bit."""
    nets = [torch.nn.Linear(4, 3) for _ in range(2)]
    opts = [make_adamw(list(n.parameters()), 1e-2, (0.9, 0.99), 1e-8, 0.1) for n in nets]

    def step(i: int) -> None:
        opts[i].zero_grad()
        nets[i](torch.linspace(-1, 1, 8).reshape(2, 4)).square().sum().backward()
        opts[i].step()

    step(0)
    save(tmp_path, 1, {"net": nets[0].state_dict(), "opt": opts[0].state_dict()}, 1)
    found = load_latest(tmp_path)
    assert found
    nets[1].load_state_dict(found[1]["net"])
    opts[1].load_state_dict(found[1]["opt"])
    for i in (0, 1):
        step(i)
    assert all(torch.equal(a, b) for a, b in zip(*(n.parameters() for n in nets), strict=True))


def test_what_could_not_be_read_back_is_refused(tmp_path):
    save(tmp_path, 1, state_of(1), 1)
    with pytest.raises(TypeError, match=r"state\['a'\]\[1\] is a PosixPath"):
        save(tmp_path, 2, {"a": [1, Path("x")]}, 1)
    with pytest.raises(TypeError, match="float64"):
        save(tmp_path, 2, {"a": np.float64(1)}, 1)
    assert names(tmp_path) == ["step-00000001"]


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path):
    save(tmp_path, 1, state_of(1), 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(UserError, match=r"step-00000002 cannot be written: File too large") as e:
            save(tmp_path, 2, {"w": torch.zeros(100_000)}, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(e.value)
    assert names(tmp_path) == ["step-00000001"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written: Not a directory"):
        save(tmp_path / "file" / "c", 1, state_of(1), 1)


# optim.py


def adamw_reference(w, grads, lr, betas, eps, decay) -> np.ndarray:
    """Loshchilov & Hutter's Algorithm 2 in fp64."""
    w, m, v = w.astype(np.float64), 0.0, 0.0
    for t, g in enumerate(grads, start=1):
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        step = m / (1 - betas[0] ** t) / (np.sqrt(v / (1 - betas[1] ** t)) + eps)
        w = w - lr * (step + decay * w)
    return w


def bits(optimizer, params) -> list[bytes]:
    tensors = [*params]
    for p in params:
        tensors += [optimizer.state[p][k] for k in ("step", "exp_avg", "exp_avg_sq")]
    return [t.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes() for t in tensors]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_skipped_update_keeps_every_bit(device, dtype):
    """A skip in the middle: weights, moments and step count as before, then the same as never."""
    runs = []
    for with_skips in (False, True):
        torch.manual_seed(1)
        params = [torch.randn(n, device=device, dtype=dtype).requires_grad_() for n in (7, 130)]
        optimizer = make_adamw(params, 1e-2, (0.9, 0.99), 1e-8, 0.1)
        for i in range(4):
            good = [torch.randn_like(p) for p in params]
            if with_skips and i > 0:
                for bad in (torch.nan, torch.inf):
                    before = bits(optimizer, params)
                    for p in params:
                        p.grad = torch.full_like(p, bad)
                    finite = torch.isfinite(clip_grad_norm_(params, 1.0))
                    apply_if_finite(optimizer, finite)
                    assert bits(optimizer, params) == before
            for p, g in zip(params, good, strict=True):
                p.grad = g
            before = [p.detach().clone() for p in params]
            apply_if_finite(optimizer, torch.tensor(True, device=device))
            assert not any(torch.equal(p, b) for p, b in zip(params, before, strict=True))
        runs.append(bits(optimizer, params))
    assert runs[0] == runs[1]


def test_a_skip_as_the_first_update_of_all(device):
    p = torch.ones(3, device=device).requires_grad_()
    p.grad = torch.full_like(p, torch.nan)
    optimizer = make_adamw([p], 0.1, (0.9, 0.99), 1e-8, 0.1)
    apply_if_finite(optimizer, torch.tensor(False, device=device))
    assert torch.equal(p, torch.ones_like(p))
    state = optimizer.state[p]
    assert not any(state[k].any() for k in ("step", "exp_avg", "exp_avg_sq"))
    assert not hasattr(optimizer, "found_inf"), "an ordinary step() afterwards is not skipped"


def test_an_optimizer_that_would_ignore_the_flag_is_refused():
    p = torch.ones(3).requires_grad_()
    with pytest.raises(TypeError, match="SGD is not fused"):
        apply_if_finite(torch.optim.SGD([p], lr=0.1), torch.tensor(True))


def test_adamw_against_fp64(device):
    rng = np.random.default_rng(0)
    w, grads = rng.normal(size=50), rng.normal(size=(5, 50))
    p = torch.tensor(w, dtype=torch.float32, device=device).requires_grad_()
    optimizer = make_adamw([p], 1e-2, (0.5, 0.9), 1e-6, 0.1)
    for g in grads:
        p.grad = torch.tensor(g, dtype=torch.float32, device=device)
        apply_if_finite(optimizer, torch.tensor(True, device=device))
    expected = adamw_reference(w, grads, 1e-2, (0.5, 0.9), 1e-6, 0.1)
    # 5 steps, a rounding of the weight (up to 4) in each, and of the step itself, far smaller.
    np.testing.assert_allclose(p.detach().cpu(), expected, rtol=0, atol=5 * 4 * 2**-23)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clip_grad_norm(device, dtype):
    torch.manual_seed(2)
    params = [torch.zeros(n, device=device, dtype=dtype).requires_grad_() for n in (3, 4000)]
    params.append(torch.zeros(2, device=device).requires_grad_())  # no gradient
    for p in params[:2]:
        p.grad = torch.randn_like(p)
    before = [p.grad.double() for p in params[:2]]
    truth = sum(float(g.square().sum()) for g in before) ** 0.5
    # The sums are fp32 for bf16 gradients too: a bf16 norm would miss this by 2^-9.
    tolerance = 2**-20
    assert float(clip_grad_norm_(params, 0)) == pytest.approx(truth, rel=tolerance)
    assert all(torch.equal(p.grad.double(), b) for p, b in zip(params, before, strict=False))
    assert float(clip_grad_norm_(params, 2 * truth)) == pytest.approx(truth, rel=tolerance)
    assert all(torch.equal(p.grad.double(), b) for p, b in zip(params, before, strict=False))
    clip_grad_norm_(params, 0.5)
    for p, b in zip(params, before, strict=False):
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(p.grad.double(), b * 0.5 / truth, rtol=2 * eps, atol=0)
    assert float(clip_grad_norm_([params[2]], 1.0)) == 0


def test_warmup():
    assert [scheduled_lr(i, 2.0, 4) for i in (0, 1, 3, 4, 100)] == [0.5, 1.0, 2.0, 2.0, 2.0]
    assert scheduled_lr(0, 2.0, 0) == 2.0
    assert [scheduled_lr(i, 2.0, 0, 8, 0.5) for i in (0, 3, 4, 5, 7)] == [2.0, 2.0, 2.0, 1.5, 0.5]
    assert [scheduled_lr(i, 2.0, 0, 8, 0.5, 0.25) for i in (4, 6, 8)] == [2.0, 1.25, 0.5]
    assert scheduled_lr(7, 2.0, 0, 8, 0.5, 1.0) == scheduled_lr(7, 2.0, 0, 8, 0.0, 0.25) == 2.0


def test_ema_closed_form(tmp_path):
    """Constant p after the start: shadow_n = p + decay^n (p_0 - p), in fp32 for a bf16 network."""
    p = torch.tensor([1.0, -2.0], dtype=torch.bfloat16)
    ema = Ema([p], 0.75)
    p.copy_(torch.tensor([5.0, 2.0]))
    for _ in range(10):
        ema.update([p])
    expected = torch.tensor([5.0, 2.0]) - 4 * 0.75**10
    assert ema.shadow[0].dtype == torch.float32
    torch.testing.assert_close(ema.shadow[0], expected, rtol=10 * 2**-23, atol=0)
    save(tmp_path, 1, ema.state_dict(), 1)
    again = Ema([torch.zeros(2)], 0.75)
    found = load_latest(tmp_path)
    assert found
    again.load_state_dict(found[1])
    out = torch.zeros(2)
    again.copy_to([out])
    assert torch.equal(out, ema.shadow[0])
    with pytest.raises(ValueError, match="other shapes"):
        Ema([torch.zeros(4, 2)], 0.75).load_state_dict(found[1])
