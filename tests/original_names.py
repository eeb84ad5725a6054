"""Names and shapes of the public single-file checkpoints, as their first publishers wrote them: SAI's SD 3.5, BFL's
FLUX, LDM's SDXL U-Net and VAE. Written from those formats, not from any model built here."""

from __future__ import annotations

Shapes = dict[str, tuple[int, ...]]


def linear(name: str, out: int, into: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (out, into)} | ({f"{name}.bias": (out,)} if bias else {})


def conv(name: str, out: int, into: int, kernel: int) -> Shapes:
    return {f"{name}.weight": (out, into, kernel, kernel), f"{name}.bias": (out,)}


def norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def sd35(depth: int, dual: int, positions: int) -> Shapes:
    """depth: blocks, and heads of 64; dual: how many of the first blocks have a second attention."""
    d = 64 * depth
    found: Shapes = {"pos_embed": (1, positions**2, d)} | conv("x_embedder.proj", d, 16, 2)
    for name, into in (("t_embedder", 256), ("y_embedder", 2048)):
        found |= linear(f"{name}.mlp.0", d, into) | linear(f"{name}.mlp.2", d, d)
    found |= linear("context_embedder", d, 4096)
    for i in range(depth):
        for side in ("x_block", "context_block"):
            at, last = f"joint_blocks.{i}.{side}", side == "context_block" and i == depth - 1
            attentions = ["attn", "attn2"] if side == "x_block" and i < dual else ["attn"]
            for attention in attentions:
                found |= linear(f"{at}.{attention}.qkv", 3 * d, d)
                found |= {f"{at}.{attention}.ln_{k}.weight": (64,) for k in "qk"}
                found |= {} if last else linear(f"{at}.{attention}.proj", d, d)
            chunks = 2 if last else 6 + 3 * (len(attentions) - 1)
            found |= linear(f"{at}.adaLN_modulation.1", chunks * d, d)
            found |= {} if last else linear(f"{at}.mlp.fc1", 4 * d, d) | linear(f"{at}.mlp.fc2", d, 4 * d)
    found |= linear("final_layer.linear", 64, d) | linear("final_layer.adaLN_modulation.1", 2 * d, d)
    return {f"model.diffusion_model.{k}": v for k, v in found.items()}


def flux(double: int = 19, single: int = 38, d: int = 3072) -> Shapes:
    found = linear("img_in", d, 64) | linear("txt_in", d, 4096)
    for name, into in (("time_in", 256), ("vector_in", 768), ("guidance_in", 256)):
        found |= linear(f"{name}.in_layer", d, into) | linear(f"{name}.out_layer", d, d)
    for i in range(double):
        for side in ("img", "txt"):
            at = f"double_blocks.{i}.{side}"
            found |= linear(f"{at}_mod.lin", 6 * d, d) | linear(f"{at}_attn.qkv", 3 * d, d)
            found |= {f"{at}_attn.norm.{k}_norm.scale": (128,) for k in ("query", "key")}
            found |= linear(f"{at}_attn.proj", d, d) | linear(f"{at}_mlp.0", 4 * d, d) | linear(f"{at}_mlp.2", d, 4 * d)
    for i in range(single):
        at = f"single_blocks.{i}"
        found |= linear(f"{at}.modulation.lin", 3 * d, d) | linear(f"{at}.linear1", 7 * d, d)
        found |= linear(f"{at}.linear2", d, 5 * d)
        found |= {f"{at}.norm.{k}_norm.scale": (128,) for k in ("query", "key")}
    return found | linear("final_layer.linear", 64, d) | linear("final_layer.adaLN_modulation.1", 2 * d, d)


def klein(double: int = 5, single: int = 20, d: int = 3072, text: int = 7680) -> Shapes:
    """FLUX.2: no biases, one modulation for all blocks, gated feed-forwards of 3 d."""

    def plain(name: str, out: int, into: int) -> Shapes:
        return linear(name, out, into, bias=False)

    found = plain("img_in", d, 128) | plain("txt_in", d, text)
    found |= plain("time_in.in_layer", d, 256) | plain("time_in.out_layer", d, d)
    for name, chunks in (
        ("double_stream_modulation_img", 6), ("double_stream_modulation_txt", 6), ("single_stream_modulation", 3)
    ):  # fmt: skip
        found |= plain(f"{name}.lin", chunks * d, d)
    for i in range(double):
        for side in ("img", "txt"):
            at = f"double_blocks.{i}.{side}"
            found |= plain(f"{at}_attn.qkv", 3 * d, d) | plain(f"{at}_attn.proj", d, d)
            found |= {f"{at}_attn.norm.{k}_norm.scale": (128,) for k in ("query", "key")}
            found |= plain(f"{at}_mlp.0", 6 * d, d) | plain(f"{at}_mlp.2", d, 3 * d)
    for i in range(single):
        at = f"single_blocks.{i}"
        found |= plain(f"{at}.linear1", 9 * d, d) | plain(f"{at}.linear2", d, 4 * d)
        found |= {f"{at}.norm.{k}_norm.scale": (128,) for k in ("query", "key")}
    return found | plain("final_layer.linear", 128, d) | plain("final_layer.adaLN_modulation.1", 2 * d, d)


def _res(at: str, into: int, out: int) -> Shapes:
    found = norm(f"{at}.in_layers.0", into) | conv(f"{at}.in_layers.2", out, into, 3)
    found |= linear(f"{at}.emb_layers.1", out, 1280) | norm(f"{at}.out_layers.0", out)
    found |= conv(f"{at}.out_layers.3", out, out, 3)
    return found | (conv(f"{at}.skip_connection", out, into, 1) if into != out else {})


def _spatial(at: str, d: int, depth: int) -> Shapes:
    found = norm(f"{at}.norm", d) | linear(f"{at}.proj_in", d, d) | linear(f"{at}.proj_out", d, d)
    for i in range(depth):
        block = f"{at}.transformer_blocks.{i}"
        for attention, into in (("attn1", d), ("attn2", 2048)):
            found |= linear(f"{block}.{attention}.to_q", d, d, False)
            found |= linear(f"{block}.{attention}.to_k", d, into, False)
            found |= linear(f"{block}.{attention}.to_v", d, into, False)
            found |= linear(f"{block}.{attention}.to_out.0", d, d)
        found |= linear(f"{block}.ff.net.0.proj", 8 * d, d) | linear(f"{block}.ff.net.2", d, 4 * d)
        for k in (1, 2, 3):
            found |= norm(f"{block}.norm{k}", d)
    return found


def sdxl(base: int = 320, depths: tuple[int, ...] = (0, 2, 10)) -> Shapes:
    found = linear("time_embed.0", 4 * base, base) | linear("time_embed.2", 4 * base, 4 * base)
    found |= linear("label_emb.0.0", 4 * base, 2816) | linear("label_emb.0.2", 4 * base, 4 * base)
    found |= conv("input_blocks.0.0", base, 4, 3)
    widths, skips, width, at = [base, 2 * base, 4 * base], [base], base, 0
    for level, out in enumerate(widths):
        for _ in range(2):
            at += 1
            found |= _res(f"input_blocks.{at}.0", width, out)
            found |= _spatial(f"input_blocks.{at}.1", out, depths[level]) if depths[level] else {}
            width = out
            skips.append(width)
        if level < 2:
            at += 1
            found |= conv(f"input_blocks.{at}.0.op", width, width, 3)
            skips.append(width)
    found |= _res("middle_block.0", width, width) | _spatial("middle_block.1", width, depths[-1])
    found |= _res("middle_block.2", width, width)
    at = -1
    for level in (2, 1, 0):
        for i in range(3):
            at += 1
            found |= _res(f"output_blocks.{at}.0", width + skips.pop(), widths[level])
            width = widths[level]
            found |= _spatial(f"output_blocks.{at}.1", width, depths[level]) if depths[level] else {}
            if level and i == 2:
                found |= conv(f"output_blocks.{at}.2.conv", width, width, 3)
    found |= norm("out.0", base) | conv("out.2", 4, base, 3)
    return {f"model.diffusion_model.{k}": v for k, v in found.items()}


def _vae_res(at: str, into: int, out: int) -> Shapes:
    found = norm(f"{at}.norm1", into) | conv(f"{at}.conv1", out, into, 3)
    found |= norm(f"{at}.norm2", out) | conv(f"{at}.conv2", out, out, 3)
    return found | (conv(f"{at}.nin_shortcut", out, into, 1) if into != out else {})


def _vae_mid(at: str) -> Shapes:
    found = _vae_res(f"{at}.block_1", 512, 512) | _vae_res(f"{at}.block_2", 512, 512) | norm(f"{at}.attn_1.norm", 512)
    for name in ("q", "k", "v", "proj_out"):
        found |= conv(f"{at}.attn_1.{name}", 512, 512, 1)
    return found


def vae(channels: int, quant: bool) -> Shapes:
    """Of LDM, SAI and BFL alike; quant: with the 1x1 convolutions around the latents that SDXL still has."""
    widths = [128, 256, 512, 512]
    found, width = conv("encoder.conv_in", 128, 3, 3), 128
    for level, out in enumerate(widths):
        for i in range(2):
            found |= _vae_res(f"encoder.down.{level}.block.{i}", width, out)
            width = out
        found |= conv(f"encoder.down.{level}.downsample.conv", out, out, 3) if level < 3 else {}
    found |= _vae_mid("encoder.mid") | norm("encoder.norm_out", 512) | conv("encoder.conv_out", 2 * channels, 512, 3)
    found |= conv("decoder.conv_in", 512, channels, 3) | _vae_mid("decoder.mid")
    for level in (3, 2, 1, 0):
        for i in range(3):
            found |= _vae_res(f"decoder.up.{level}.block.{i}", width, widths[level])
            width = widths[level]
        found |= conv(f"decoder.up.{level}.upsample.conv", width, width, 3) if level else {}
    found |= norm("decoder.norm_out", 128) | conv("decoder.conv_out", 3, 128, 3)
    if quant:
        found |= conv("quant_conv", 2 * channels, 2 * channels, 1) | conv("post_quant_conv", channels, channels, 1)
    return {f"first_stage_model.{k}": v for k, v in found.items()}
