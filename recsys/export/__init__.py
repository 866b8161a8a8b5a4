"""Rankers for other runtimes: torch.export, AOTInductor, ONNX."""
