"""Encoders in the forms that other programs read: ONNX, torch.export, transformers, s3prl.

Streaming: these encoders are not causal. A frame of the convolutions sees 400 samples (25 ms), frames follow each other
every 320 samples (20 ms), and 400 samples are the shortest chunk. But the positional convolution sees
``conv_pos // 2`` frames to either side, attention the whole chunk, and the GroupNorm of Base models all of its samples:
the first frame depends on the last sample. If you cut a stream into chunks, you wait for the end of each chunk and get
other features than those of the whole utterance; no format written here changes that. Recordings that are too long for
memory go through ``SpeechEncoder.stream`` and ``OnnxEncoder.stream``.
"""
