"""Exports encoders to other programs' formats: ONNX, OpenVINO, torch.export, transformers, s3prl.

Streaming: these encoders are not causal. A frame of the convolutions covers 400 samples (25 ms), the shortest possible
chunk, and frames come every 320 samples (20 ms). But the positional convolution covers ``conv_pos // 2`` frames on each
side, attention the whole chunk, and the GroupNorm of Base models all its samples: the first frame depends on the last
sample. A stream cut into chunks must wait for the end of each chunk, and its features differ from those of the whole
utterance; no format changes that. For recordings too long for memory use ``SpeechEncoder.stream`` and
``OnnxEncoder.stream``.
"""
