"""Several threads load and run encoders: each gets the same results as alone."""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest
import torch

from skill_fairseq import load_encoder


@pytest.fixture(autouse=True)
def switching() -> Iterator[None]:
    """Makes threads switch often."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


def together(*work: Callable[[], Any]) -> None:
    """Runs functions in parallel; raises the first error."""
    errors: list[BaseException] = []

    def guarded(one: Callable[[], Any]) -> None:
        try:
            one()
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(one,)) for one in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_loading_files_with_objects(small: Any, tmp_path: Path) -> None:
    encoder = small.random_encoder()
    path = tmp_path / "fairseq.pt"
    state = {f"speech_encoder.{name}": value for name, value in encoder.state_dict().items()}
    cfg = {"model": {**encoder.config.to_dict(), "_name": "wavlm"}, "task": {"normalize": False}}
    # Many objects of a class that must be allowed: a late lookup fails if another thread removed the permission.
    extra = [argparse.Namespace(number=i) for i in range(200)]
    torch.save({"model": state, "cfg": cfg, "args": argparse.Namespace(a=1), "extra": extra}, path)

    def load() -> None:
        for _ in range(8):
            assert torch.equal(load_encoder(path).transformer.layer_norm.bias, encoder.transformer.layer_norm.bias)

    together(*[load] * 6)


def test_forwards_while_the_encoder_is_prepared_and_forgets(small: Any) -> None:
    encoder = small.random_encoder()
    source = small.waves()
    with torch.no_grad():
        wanted = encoder(source).x

    def forward() -> None:
        with torch.no_grad():
            for _ in range(25):
                assert torch.equal(encoder(source).x, wanted)

    def prepare() -> None:
        for _ in range(200):
            encoder.prepare()
            encoder.feature_extractor._prepared = encoder.transformer.pos_conv._prepared = None

    together(forward, forward, prepare)
