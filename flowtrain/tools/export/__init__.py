"""Models as graphs for other programs: ONNX files, and programs of `torch.export`."""
