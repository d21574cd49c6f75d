"""The comparisons with the peers, the calls they are made of, and the counts of work."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from reformer_kernels.benchmarks import checks, kernels, peers
from reformer_kernels.benchmarks.sizes import (
    Sizes,
    attention_work,
    full_attention_work,
    hash_work,
    sort_work,
)


def run_checks(peer: str, sizes: Sizes) -> list[checks.Agreement]:
    name = peers.PEERS[peer].title
    return list(checks.check_lsh(sizes, {name: kernels.build_lsh(name, sizes)}))


def test_sdpas_gpu_back_ends() -> None:
    """The same code as on a GPU: torch has a flash back end for the CPU too, and no cuDNN one."""
    small = Sizes(length=40, heads=2, head_dim=16, causal=True)
    q, v = kernels.make_inputs(small)
    chosen, flash = (kernels.build_lsh(name, small) for name in ("torch SDPA", "SDPA flash"))
    assert torch.equal(chosen.inputs[0], q) and torch.equal(flash.inputs[2], v)
    torch.testing.assert_close(flash.forward(), chosen.forward())
    with pytest.raises(
        peers.PeerRefusesError, match="SDPA cuDNN cannot take float32 with heads of 16 on cpu"
    ):
        kernels.build_attention("SDPA cuDNN", small)


@pytest.mark.parametrize("peer", ["hf", "lucidrains"])
@pytest.mark.parametrize("causal", [True, False])
def test_agreement_in_float64(peer: str, causal: bool) -> None:
    """The same comparison at the precision where the peers are exact, factored buckets included."""
    sizes = Sizes(
        batch=2, heads=2, length=512, head_dim=8, n_hashes=2, chunk_length=4, causal=causal, dtype="float64"
    )
    found = run_checks(peer, sizes)
    assert [check.quantity for check in found] == ["equal bucket ids", "largest output difference"]
    assert all(check.ok for check in found), found


def test_agreement_sees_a_wrong_output() -> None:
    sizes = Sizes(heads=1, length=128, head_dim=8, n_hashes=1)
    ours = torch.ones(1, 1, 128, 8)
    theirs = ours.clone()
    theirs[0, 0, 5, 3] += 0.01
    lse = torch.zeros(1, 1, 128)
    assert not checks.compare_outputs("peer", sizes, ours, theirs, lse).ok
    lse[0, 0, 5] = -1e5  # a row that sees only itself is left out
    assert checks.compare_outputs("peer", sizes, ours, theirs, lse).ok


def test_peers_leave_the_global_generator_alone() -> None:
    sizes = Sizes(heads=1, length=128, head_dim=8, n_hashes=1)
    calls = {"Hugging Face": kernels.build_lsh("Hugging Face", sizes)}
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert list(checks.check_lsh(sizes, calls))
    assert torch.equal(torch.get_rng_state(), before)


def test_peer_rows_compute_on_the_same_tensors() -> None:
    sizes = Sizes(heads=2, length=128, head_dim=16, n_hashes=1)
    ours = kernels.build_lsh("trax()", sizes)
    hugging_face = kernels.build_lsh("Hugging Face", sizes)
    assert torch.equal(kernels.merge_heads(ours.inputs[0]), hugging_face.inputs[0])
    assert torch.equal(ours.inputs[0].flatten(0, 1), kernels.build_lsh("reformer_pytorch", sizes).inputs[0])
    assert hugging_face.train is not None
    (out, *gradients), seconds = hugging_face.train()
    assert out.shape == (1, 128, 32)
    assert len(gradients) == 2
    assert all(gradient.abs().sum() > 0 for gradient in gradients)
    assert seconds > 0


def test_work_counts() -> None:
    sizes = Sizes(batch=2, heads=3, length=1024, head_dim=16, n_hashes=4, chunk_length=64, causal=True)
    work = attention_work(sizes, sizes.config("trax"))
    pairs = 2 * 3 * 1024 * 4 * 128  # B * H * L * rounds * chunk * (1 + before + after)
    assert work.flops("forward") == 2 * 2 * pairs * 16
    assert work.flops("backward") == 5 * 2 * pairs * 16
    assert work.flops("forward+backward") == 7 * 2 * pairs * 16
    assert work.bytes("forward") == 2 * 3 * 1024 * 16 * 4 * (4 * 2 + 1)
    short = dataclasses.replace(sizes, length=32)
    assert attention_work(short, short.config("trax")).flops("forward") == 2 * 2 * (2 * 3 * 32 * 32) * 16
    assert full_attention_work(sizes).flops("forward") == 2 * 2 * (2 * 3 * 1024 * 1024 / 2) * 16
    assert hash_work(sizes).flops("forward") == 2 * (2 * 3 * 1024) * 16 * 4 * 16  # 32 buckets: 16 columns
    assert sort_work(sizes).bytes("forward") == 2 * 4 * (2 * 3 * 1024) * 4


def test_every_peer_names_its_package() -> None:
    assert {peer.install_command for peer in peers.PEERS.values()} == {
        "pip install torch",
        "pip install transformers",
        "pip install reformer-pytorch",
    }
