"""EncoderConfig: convolution strings, published sizes, bad values."""

from __future__ import annotations

import contextlib

import pytest
import torch
from messages import says

from skill_fairseq.modules.config import (
    EncoderConfig,
    format_conv_layers,
    hubert_base,
    hubert_large,
    parse_conv_layers,
    wavlm_base,
    wavlm_large,
)
from skill_fairseq.modules.encoder import SpeechEncoder

PUBLISHED = [(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512, 2, 2)] * 2


@pytest.mark.parametrize(
    "text",
    [
        "[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2",
        "[(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512,2,2)] + [(512,2,2)]",
        " [ ( 512 , 10 , 5 ) ]+[(512,3,2)]*4+[(512,2,2),(512,2,2),] ",
        "[(512,10,5),(512,3,2),(512,3,2)]+[(512,3,2)]*2+[(512,2,2)]*2",
        "[(512,10,5)] + [(512,3,2), ] * 4\n + [(512,2,2)] * 2",
        PUBLISHED,
        [list(triple) for triple in PUBLISHED],
        str(PUBLISHED),
    ],
)
def test_conv_strings_in_their_usual_forms(text):
    assert parse_conv_layers(text) == PUBLISHED
    assert parse_conv_layers(format_conv_layers(parse_conv_layers(text))) == PUBLISHED


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').mkdir('{folder}')",
        "[(512,10,5)] + [__import__('os').mkdir('{folder}')]",
        "[(512,10,5)] * __import__('os').mkdir('{folder}')",
        "[(512,10,5)][0:1]",
        "[(512,10,5)] * -1",
        "[(512,10,5)] - [(512,3,2)]",
        "[(512,10,5)] +",
        "[(512,10,5)] [(512,3,2)]",
        "[(512,10)]",
        "[(512,10,0)]",
        "[(2**9,10,5)]",
        "[(512,1e1,5)]",
        "[(512,10,5)] * 0",
        "[(512,10,5)(512,3,2)]",
        "[" + "(512,10,5)          " * 40 + "x",  # must not take forever either
        "[]",
        "",
        [],
        [(512, 10)],
        [(512, 10, -5)],
    ],
)
def test_other_conv_strings_are_refused_and_nothing_is_run(text, tmp_path):
    if isinstance(text, str):
        text = text.replace("{folder}", str(tmp_path / "made"))
    with pytest.raises(ValueError, match="conv_feature_layers"):
        parse_conv_layers(text)
    assert not list(tmp_path.iterdir())


def test_a_huge_conv_string_is_refused_without_making_it():
    with pytest.raises(ValueError, match=says("conv_feature_layers", "99999999999", "64")):
        parse_conv_layers("[(512,10,5)] * 99999999999")


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [
        (wavlm_base, 94_381_168),
        (wavlm_large, 315_452_096),
        (hubert_base, 94_370_944),
        (hubert_large, 315_434_112),
    ],
)
def test_published_sizes(preset, parameters):
    # Tensors without memory, if torch has them.
    meta = torch.device("meta") if hasattr(torch.device, "__enter__") else contextlib.nullcontext()
    with meta:
        assert SpeechEncoder(preset()).num_parameters() == parameters


def test_frames_of_the_published_models():
    config = wavlm_base()
    assert (config.receptive_field, config.downsampling) == (400, 320)
    assert [config.num_frames(n) for n in (400, 719, 720, 16000, 250000)] == [1, 1, 2, 49, 780 + 1]
    lengths = [79, 399, 400, 16000]
    frames = config.num_frames(torch.tensor(lengths)).tolist()
    assert frames == [config.num_frames(n) for n in lengths] and frames[1:] == [0, 1, 49]


def test_dictionaries_round_trip():
    config = wavlm_large(
        heads=[None] + [[0, 3]] * 22 + [[]],
        ffn_dims=[None, 0] + [7] * 22,
        conv_channels=[5] * 7,
        normalize=True,
    )
    assert EncoderConfig.from_dict(config.to_dict()) == config and not config.is_full()
    assert wavlm_large().is_full() and wavlm_large() != hubert_large()
    with pytest.raises(ValueError, match=says("fields", "'rotary'")):
        EncoderConfig.from_dict({"rotary": True})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("extractor_mode", "batch_norm"),
        ("padding_rule", "none"),
        ("activation_fn", "swish"),
        ("encoder_layers", 0),
        ("encoder_layers", "12"),
        ("encoder_layers", True),
        ("encoder_attention_heads", 7),
        ("conv_pos_groups", 5),
        ("conv_bias", "yes"),
        ("normalize", "${task.normalize}"),
        ("conv_channels", [512] * 6),
        ("conv_channels", [0] + [512] * 6),
        ("conv_channels", [513] + [512] * 6),
        ("heads", [[0]] * 11),
        ("heads", [[12]] + [[0]] * 11),
        ("heads", [[1, 1]] + [[0]] * 11),
        ("ffn_dims", [3073] + [1] * 11),
        ("ffn_dims", [-1] + [1] * 11),
        ("pruning_units", ["neurons"]),
    ],
)
def test_bad_values_name_the_field_and_the_value(field, value):
    with pytest.raises(ValueError, match=says(f"model.{field}", repr(value))):
        EncoderConfig(**{field: value})
