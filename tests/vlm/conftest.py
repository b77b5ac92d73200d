"""Policies on a tiny random Qwen2.5-VL."""

import pytest
from zoo.vlms import build_vlm

from pipelines import VLMPolicy


@pytest.fixture(scope="module")
def pair():
    return build_vlm("qwen2_5_vl")


@pytest.fixture
def make(pair):
    """A policy on the shared random model, whose weights must be left as they are."""

    def build(**options) -> VLMPolicy:
        return VLMPolicy(*pair, **({"max_new_tokens": 6, "batch_size": 16} | options))

    return build


@pytest.fixture
def own():
    """A policy on a model of its own."""

    def build(**options) -> VLMPolicy:
        return VLMPolicy(*build_vlm("qwen2_5_vl"), **({"max_new_tokens": 6, "batch_size": 16} | options))

    return build
