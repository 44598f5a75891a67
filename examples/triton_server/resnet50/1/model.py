"""The Python backend's model: prepared images (N, 3, H, W) float32 -> logits (N, 1000) float32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import triton_python_backend_utils as server  # the server brings it

import resnet_fused


class TritonPythonModel:
    """One instance of the model; the server calls it by these names."""

    def initialize(self, args: dict[str, str]) -> None:
        arch = json.loads(args["model_config"])["parameters"]["arch"]["string_value"]
        weights = Path(args["model_repository"], args["model_version"], "weights.pth")
        gpu = args["model_instance_kind"] == "GPU"
        device = int(args["model_instance_device_id"])
        self.device = torch.device("cuda", device) if gpu else torch.device("cpu")
        self.model = getattr(resnet_fused, arch)(weights=weights).eval().to(self.device)

    def execute(self, requests: list[Any]) -> list[Any]:
        """The requests that the server has gathered, as one batch; all have images of one size."""
        asked = [server.get_input_tensor_by_name(request, "images") for request in requests]
        images = [torch.from_numpy(tensor.as_numpy()) for tensor in asked]
        with torch.inference_mode():
            logits = self.model(torch.cat(images).to(self.device)).float().cpu()
        parts = logits.split([len(part) for part in images])
        return [server.InferenceResponse([server.Tensor("logits", part.numpy())]) for part in parts]
