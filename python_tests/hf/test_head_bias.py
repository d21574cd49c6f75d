"""The two biases that the head of a language model has in transformers from 5.24 on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from python_tests.hf.test_accelerate import LM, make, tokens
from python_tests.hf.test_checkpoint import HAS_DECODER_BIAS
from reformer_kernels import hf


@pytest.mark.skipif(not HAS_DECODER_BIAS, reason="this version of transformers has one bias")
def test_of_two_biases_the_one_that_transformers_adds_counts(tmp_path: Path) -> None:
    theirs = make(LM, is_decoder=True)
    theirs.save_pretrained(tmp_path)
    ours = hf.from_pretrained(tmp_path)
    with torch.no_grad():
        theirs.lm_head.bias.fill_(3)
        theirs.lm_head.decoder.bias.normal_()
    hf.load_state_dict(ours, theirs.state_dict())
    ids = tokens(1, 8)  # one chunk: nothing is hashed
    torch.testing.assert_close(ours(ids), theirs(ids).logits)
