"""Parts of pipelines from folders and the hub's cache: variants, shards, memory, and one clear line for each flaw."""

import json
import shutil
import subprocess
import sys
import textwrap

import huggingface_hub
import pytest
import torch
from tiny_pipelines import write_sd3

from senseflow.config import UserError
from senseflow.models import loading
from senseflow.models.identity import identity
from senseflow.models.loading import load_component, load_pipeline_shell
from senseflow.models.sd3 import SD3Adapter

diffusers = pytest.importorskip("diffusers")
SD3 = diffusers.SD3Transformer2DModel
HUB = "owner/sd3"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_sd3(tmp_path_factory.mktemp("loading") / "sd3")


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "sd3")


def load(source, part="transformer", dtype=torch.float32, **kwargs):
    return load_component(SD3, source, part, dtype, **kwargs)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def message(source, *args, **kwargs):
    with pytest.raises(UserError) as raised:
        load(source, *args, **kwargs)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_shards(folder, tmp_path):
    net = load(folder)
    net.save_pretrained(tmp_path / "t" / "transformer", max_shard_size="50KB")
    assert len(list((tmp_path / "t" / "transformer").glob("*.safetensors"))) > 2
    assert same(load(tmp_path / "t"), net)
    shard = sorted((tmp_path / "t" / "transformer").glob("*.safetensors"))[1]
    shard.rename(tmp_path / "away")
    assert f"lacks transformer/{shard.name}" in message(tmp_path / "t")
    (tmp_path / "away").rename(shard)
    shard.write_bytes(shard.read_bytes()[:-7])
    assert "is truncated or corrupt" in message(tmp_path / "t")
    index = tmp_path / "t" / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(index.read_text()[:40])
    assert "index.json is truncated or corrupt" in message(tmp_path / "t")


@pytest.mark.parametrize("size", ["10GB", "50KB"])
def test_variants(folder, tmp_path, size):
    """By name; or, where there are no plain weights, the one that is there, said in a warning."""
    net = load(folder)
    half = load(folder, dtype=torch.float16)
    half.save_pretrained(tmp_path / "t" / "transformer", variant="fp16", max_shard_size=size)
    with pytest.warns(UserWarning, match="no plain weights: its variant fp16 is read"):
        found = load(tmp_path / "t")
    assert found.dtype == torch.float32 and same(found.half(), half)
    load(folder, dtype=torch.bfloat16).save_pretrained(
        tmp_path / "t" / "transformer", variant="bf16", max_shard_size=size
    )
    with pytest.warns(UserWarning, match="its variant bf16 is read"):  # of two, the one in the dtype asked for
        assert same(load(tmp_path / "t", dtype=torch.bfloat16), load(folder, dtype=torch.bfloat16))
    net.save_pretrained(tmp_path / "plain", max_shard_size=size)  # in t it would sweep the variants' shards away
    shutil.copytree(tmp_path / "plain", tmp_path / "t" / "transformer", dirs_exist_ok=True)
    assert same(load(tmp_path / "t"), net)  # plain weights first
    assert same(load(tmp_path / "t", variant="fp16").half(), half)
    assert "lacks transformer/diffusion_pytorch_model.fp8.safetensors" in message(tmp_path / "t", variant="fp8")


def test_a_whole_pipeline_in_one_variant(folder, tmp_path):
    """Encoders too: prompts through fp16 files are prompts through weights rounded to fp16."""
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(folder)
    pipe.save_pretrained(tmp_path / "v", variant="fp16")
    with pytest.warns(UserWarning, match="text_encoder_3 has no plain weights: its variant fp16 is read"):
        cond = SD3Adapter(tmp_path / "v", 64, text_length=16).encode_prompts(["penguin"])
    assert torch.equal(cond.embeds, SD3Adapter(folder, 64, text_length=16).encode_prompts(["penguin"]).embeds)


@pytest.mark.parametrize("changes, text", [
    (dict(_class_name="FluxTransformer2DModel"), "holds a FluxTransformer2DModel, expected SD3Transformer2DModel"),
    (dict(in_channels=8), "pos_embed.proj.weight has shape [32, 16, 2, 2] in its weights, [32, 8, 2, 2] by its config"),
    (dict(num_layers=4), "by its config"),
    (dict(qk_norm=None), "unexpected tensors, first transformer_blocks.0.attn.norm_added_k.weight: its config"),
    (dict(dual_attention_layers=[0]), "transformer"),
])  # fmt: skip
def test_config_and_weights_that_differ(copy, changes, text):
    edit(copy / "transformer" / "config.json", **changes)
    assert text in message(copy)


def test_missing_tensors_are_named(copy):
    from safetensors.torch import load_file, save_file

    file = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["proj_out.bias"]
    save_file(weights, file, metadata={"format": "pt"})
    assert "proj_out.bias" in message(copy)
    weights["proj_out.bias"] = torch.full((64,), float("inf"))
    save_file(weights, file, metadata={"format": "pt"})
    assert "has a NaN or an infinity in proj_out.bias" in message(copy)


def test_missing_parts_are_named(copy):
    (copy / "transformer" / "config.json").write_text("{")
    assert "config.json is no JSON file" in message(copy)
    assert "lacks nothing/config.json" in message(copy, "nothing")
    assert "does not exist: give a diffusers folder" in message(copy / "none" / "here")
    shutil.rmtree(copy / "text_encoder_2")
    with pytest.raises(UserError, match=r"lacks text_encoder_2/config\.json"):
        load_pipeline_shell(diffusers.StableDiffusion3Pipeline, copy, torch.float32, ("transformer", "vae"))
    (copy / "model_index.json").unlink()
    with pytest.raises(UserError, match=r"lacks model_index\.json"):
        load_pipeline_shell(diffusers.StableDiffusion3Pipeline, copy, torch.float32, ("transformer", "vae"))


def rewrite(file, change):
    from safetensors.torch import load_file, save_file

    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


def first(weights):
    return next(k for k in sorted(weights) if "layer" in k)


@pytest.mark.parametrize("flaw, text", [
    (lambda f: rewrite(f / "text_encoder_3" / "model.safetensors", lambda w: w[first(w)].view(-1)[0].fill_(torch.nan)),
     "text_encoder_3 has a NaN or an infinity in encoder"),
    (lambda f: rewrite(f / "text_encoder" / "model.safetensors", lambda w: w.pop(first(w))),
     "text_encoder has 1 missing tensors, first text_model.encoder"),
    (lambda f: edit(f / "text_encoder_2" / "config.json", num_hidden_layers=1),
     "unexpected tensors, first text_model.encoder.layers.1."),
    (lambda f: edit(f / "text_encoder_3" / "config.json", d_ff=48),
     "has shape [64, 32] in its weights, [48, 32] by its config.json"),
    (lambda f: edit(f / "model_index.json", text_encoder_3=["transformers", "CLIPTextModel"]),
     "text_encoder_3 is a CLIPTextModel by model_index.json, expected T5EncoderModel"),
    (lambda f: edit(f / "model_index.json", text_encoder_3=[None, None], tokenizer_3=[None, None]),
     "model_index.json names no text_encoder_3, which StableDiffusion3Pipeline needs"),
    (lambda f: shutil.rmtree(f / "tokenizer_2"), "lacks tokenizer_2/tokenizer.json (or vocab.json"),
    (lambda f: shutil.rmtree(f / "scheduler"), "StableDiffusion3Pipeline does not load: Error no file named scheduler"),
    (lambda f: (f / "model_index.json").write_text("[1]"), "holds no JSON object"),
])  # fmt: skip
def test_flaws_of_what_encodes_prompts_are_named(flaw, text, copy):
    """transformers would go on with random weights, and with a tokenizer that knows no word."""
    flaw(copy)
    with pytest.raises(UserError) as raised:
        load_pipeline_shell(diffusers.StableDiffusion3Pipeline, copy, torch.float32, ("transformer", "vae"))
    assert text in str(raised.value) and "\n" not in str(raised.value)


def test_buffers_are_looked_at_too(copy):
    file = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    rewrite(file, lambda w: w["pos_embed.pos_embed"].view(-1)[5].fill_(torch.inf))
    assert "has a NaN or an infinity in pos_embed.pos_embed" in message(copy)


def test_a_download_leaves_variants_out():
    """Of one file and of shards, as stable-diffusion-3.5-large has them."""
    from huggingface_hub.utils import filter_repo_objects

    files = [f"text_encoder_3/model{v}-0000{i}-of-00002.safetensors" for v in ("", ".fp16") for i in (1, 2)]
    files += ["transformer/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors"]
    kept = list(filter_repo_objects(files, ignore_patterns=list(loading.UNWANTED)))
    assert kept == [f for f in files if "fp16" not in f]


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    """A cache of the hub that holds HUB, and no network."""
    snapshot = tmp_path / "hub" / "models--owner--sd3" / "snapshots" / "abc"
    shutil.copytree(folder, snapshot)
    (tmp_path / "hub" / "models--owner--sd3" / "refs").mkdir()
    (tmp_path / "hub" / "models--owner--sd3" / "refs" / "main").write_text("abc")
    real = huggingface_hub.snapshot_download
    asked = []

    def download(repo, local_files_only=False, **kwargs):
        asked.append((repo, local_files_only, kwargs.get("allow_patterns")))
        return real(repo, local_files_only=local_files_only, cache_dir=tmp_path / "hub", **kwargs)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(loading, "is_local", lambda source: not str(source).startswith("owner/"))
    return snapshot, asked


def test_a_cached_hub_id_needs_no_network(hub, folder):
    _, asked = hub
    adapter = SD3Adapter(HUB, 64, text_length=16)
    assert same(adapter.load_network(torch.float32), load(folder))
    ours = SD3Adapter(folder, 64, text_length=16).encode_prompts(["penguin"])
    assert torch.equal(adapter.encode_prompts(["penguin"]).embeds, ours.embeds)
    assert asked and all(local for _, local, _ in asked)


def test_a_hub_ids_identity_is_of_all_its_encoders(hub, folder):
    """On a machine where a part is not downloaded yet it is asked for: without it a cache would look like another's."""
    snapshot, asked = hub
    adapter = SD3Adapter(HUB, 64, text_length=16)
    assert identity(adapter) == identity(SD3Adapter(folder, 64, text_length=16))
    shutil.rmtree(snapshot / "text_encoder_3")
    with pytest.raises(UserError, match="lacks text_encoder_3, which a cache's settings are"):
        identity(adapter)
    assert "text_encoder_3/*" in asked[-1][2] and "transformer" not in asked[-1][2]


def test_hub_errors_say_what_to_do(hub, monkeypatch):
    """No network; half a cache asks for the missing part alone; a licence; a wrong name."""
    snapshot, asked = hub
    assert "owner/none is not cached here and the hub gives nothing" in message("owner/none")
    assert "give a local folder" in message("owner/none")
    shutil.rmtree(snapshot / "transformer")
    asked.clear()
    assert "owner/sd3 " in message(HUB) or "lacks transformer" in message(HUB)
    assert asked[1] == (HUB, False, ["transformer", "transformer/*"])

    def refuse(error):
        def download(repo, local_files_only=False, **_):
            if local_files_only:
                raise huggingface_hub.errors.LocalEntryNotFoundError("not cached")
            raise error.__new__(error, "refused")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)

    refuse(huggingface_hub.errors.GatedRepoError)
    assert message(HUB) == f"{HUB} needs a licence: {loading.GATED}"
    refuse(huggingface_hub.errors.RepositoryNotFoundError)
    assert "neither a local folder nor a hub id that this HF_TOKEN may read" in message(HUB)
    refuse(huggingface_hub.errors.HfHubHTTPError)
    assert "the hub gives nothing" in message(HUB)


def test_a_name_is_told_from_a_folder(tmp_path):
    assert loading.is_local(tmp_path) and loading.is_local("./a/b") and loading.is_local("a/b/c")
    assert not loading.is_local("stabilityai/stable-diffusion-3.5-large")


MEASURE = """
import sys, threading, torch, diffusers
from senseflow.models.identity import identity
from senseflow.models.loading import load_component

def anonymous():
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith("RssAnon"))

cls = diffusers.SD3Transformer2DModel
load_component(cls, sys.argv[2], "transformer", torch.bfloat16)  # imports, thread pools
before, peak, done = anonymous(), 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, anonymous())

thread = threading.Thread(target=watch)
thread.start()
net = load_component(cls, sys.argv[1], "transformer", torch.bfloat16)
done.set()
thread.join()
sizes = [p.numel() * p.element_size() for p in net.parameters()]
print(peak - before, sum(sizes), max(sizes))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_one_copy_in_memory(folder, tmp_path):
    """fp32 files into bf16: the process's own memory (mapped files left out) grows by the network in bf16 and what one
    tensor needs at a time (its conversion, the look for NaN), not by a second copy, nor one in fp32."""
    torch.manual_seed(0)
    net = SD3(
        num_layers=2, attention_head_dim=64, num_attention_heads=16, joint_attention_dim=64,
        caption_projection_dim=1024, pooled_projection_dim=64, pos_embed_max_size=16,
    )  # fmt: skip
    net.save_pretrained(tmp_path / "big" / "transformer", max_shard_size="60MB")
    del net
    argv = [sys.executable, "-c", textwrap.dedent(MEASURE), str(tmp_path / "big"), str(folder)]
    out = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=300).stdout
    grown, size, largest = map(int, out.split()[-3:])
    print(f"{size / 1e6:.0f} MB, grown by {grown / 1e6:.0f} MB")
    assert size > 80e6
    assert 6 * largest < 0.7 * size  # so that another copy would be seen
    assert grown < size + 6 * largest
