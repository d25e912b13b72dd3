"""The benchmark of frozen teachers runs on tiny input and prints each way of asking."""

import pytest


@pytest.fixture
def teacher_inference(monkeypatch, pytestconfig):
    monkeypatch.syspath_prepend(str(pytestconfig.rootpath))
    from benchmarks import teacher_inference

    return teacher_inference


def test_each_way_has_a_row(teacher_inference, capsys):
    teacher_inference.main(["cifar/resnet8@32", "--batches", "4", "--rounds", "1"])
    printed = capsys.readouterr().out
    assert printed.startswith("cifar/resnet8@32, 4 images, cpu")
    for row in (
        "float32  ",
        "autocast bf16, channels_last",
        "bf16 weights  ",
        "bf16 weights, channels_last, BN folded (9)",
        "bf16 weights, channels_last, BN folded, inference mode",
    ):
        assert f"\n{row}" in printed
