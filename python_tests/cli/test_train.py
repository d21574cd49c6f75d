"""`reformer-kernels train`: it learns, resumes exactly, leaves cleanly, and says what is wrong."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner, Result

from reformer_kernels import ReformerConfig, ReformerLM
from reformer_kernels.cli import app
from reformer_kernels.cli.arguments import printable
from reformer_kernels.cli.train import Interrupt
from reformer_kernels.models import CheckpointError
from reformer_kernels.training.byte_model import byte_config, byte_model
from reformer_kernels.training.checkpoint import Recipe, read_checkpoint
from reformer_kernels.training.text import Text, TextError, load_text
from reformer_kernels.training.trainer import DivergedError, Trainer

TINY = Recipe(seq_len=64, batch=2, layers=1, dim=16, heads=2, hashes=2, chunk=8, lr=1e-2, steps=8)
OPTIONS = [
    "--seq-len",
    "64",
    "--batch",
    "2",
    "--layers",
    "1",
    "--dim",
    "16",
    "--heads",
    "2",
    "--hashes",
    "2",
    "--chunk",
    "8",
    "--sample-length",
    "20",
]
FILES = ["config.json", "model.safetensors", "training.json", "training.safetensors"]
LINE = b"the quick brown fox jumps over the lazy dog; "


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_bytes(LINE * 100)
    return file


def invoke(*arguments: object) -> Result:
    result = CliRunner().invoke(app, ["train", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def plain(text: str) -> str:
    return " ".join(text.replace("│", " ").split())


def test_it_learns_and_writes_a_sample(text_file: Path) -> None:
    result = invoke(text_file, *OPTIONS, "--steps", 60, "--eval-every", 30, "--lr", 0.02)
    assert result.exit_code == 0, result.output
    found = [float(number) for number in re.findall(r"held-out (\d+\.\d+) bits per byte", result.output)]
    assert found[0] == pytest.approx(8.0, abs=0.01)
    assert len(found) == 3
    assert found[-1] < 4.0
    assert "tokens/s" in result.output
    assert "the model's own" in result.output
    assert list(text_file.parent.iterdir()) == [text_file]  # nothing was to be saved


def losses(trainer: Trainer, until: int) -> list[float]:
    found = []
    while trainer.step < until:
        found.append(trainer.train_step())
        trainer.evaluate(1)  # must not disturb the run
    return found


def test_a_resumed_run_has_the_same_losses_and_weights(text_file: Path, tmp_path: Path) -> None:
    text = load_text(text_file, TINY.seq_len)
    whole = Trainer(TINY, text)
    expected = losses(whole, TINY.steps)
    assert len(set(expected)) == TINY.steps

    stopped = Trainer(TINY, text)
    first = losses(stopped, 3)
    path = tmp_path / "run"
    stopped.save(path)
    torch.manual_seed(99)  # as in another process
    assert read_checkpoint(path).recipe == TINY
    resumed = Trainer.resume(path, text)
    assert first + losses(resumed, TINY.steps) == expected
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name
    assert sorted(file.name for file in path.iterdir()) == FILES


def test_interrupting_saves_and_the_same_command_goes_on(text_file: Path, tmp_path: Path) -> None:
    """The real process, the real signal; then the end of the run equals one never stopped."""
    path = tmp_path / "run"
    base = [sys.executable, "-m", "reformer_kernels", "train", str(text_file), *OPTIONS]
    steps = ["--steps", "2000", "--eval-every", "1"]
    process = subprocess.Popen(
        [*base, *steps, "--checkpoint", str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not (path / "training.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    stopped = re.search(r"Stopped after step (\d+) of 2000; saved", out)
    assert stopped is not None, out
    step = int(stopped[1])
    assert read_checkpoint(path).step == step > 0
    assert read_checkpoint(path).recipe.steps == 2000
    assert sorted(file.name for file in path.iterdir()) == FILES

    total = step + 3  # the rest of the run in few steps; the learning rate follows the new total
    result = invoke(text_file, "--checkpoint", path, "--resume", "--steps", total, "--sample-length", 0)
    assert result.exit_code == 0, result.output
    assert f"Resuming {path} after step {step}" in plain(result.output).replace("\n", "")
    assert read_checkpoint(path).step == total

    # A finished run has nothing left to resume.
    result = invoke(text_file, "--checkpoint", path, "--resume")
    assert result.exit_code == 2
    assert f"has finished its {total} steps" in plain(result.output)


def test_runs_interrupted_at_the_same_time_save_new_folders(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda format: "reformer-train-now")
    real = Trainer.train_step

    def step(trainer: Trainer) -> float:
        if trainer.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return real(trainer)

    monkeypatch.setattr(Trainer, "train_step", step)
    for seed, name in enumerate(("reformer-train-now", "reformer-train-now-2", "reformer-train-now-3")):
        result = invoke(text_file, *OPTIONS, "--steps", 50, "--seed", seed)
        assert result.exit_code == 130
        assert f"saved {name}." in plain(result.output)
        saved = read_checkpoint(tmp_path / name)
        assert (saved.step, saved.recipe.seed) == (3, seed)
    monkeypatch.setattr(os, "fsync", full_disk)
    result = invoke(text_file, *OPTIONS, "--steps", 50)
    assert result.exit_code == 1
    assert "cannot save the checkpoint to reformer-train-now-4 (No space left on device)" in plain(
        result.output
    )
    assert len(list(tmp_path.iterdir())) == 4  # and no empty folder


def test_a_second_interrupt_leaves_at_once() -> None:
    interrupt = Interrupt()
    with interrupt.watch():
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is not interrupt.handle


def test_a_failed_save_keeps_the_old_checkpoint(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(TINY, load_text(text_file, TINY.seq_len))
    path = tmp_path / "run"
    trainer.save(path)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    trainer.train_step()
    real = os.fsync
    for room in range(4):
        calls = iter(range(4))

        def fsync(descriptor: int, room: int = room, calls: Iterator[int] = calls) -> None:
            real(descriptor) if next(calls) < room else full_disk(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match="No space left"):
            trainer.save(path)
        assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    # The command trains on past a save that failed, and says at the end that there is no checkpoint.
    monkeypatch.setattr(os, "fsync", full_disk)
    result = invoke(text_file, *OPTIONS, "--steps", 2, "--eval-every", 1, "--checkpoint", tmp_path / "new")
    assert result.exit_code == 1
    for start in ("Not saved: ", "Stopped: "):
        assert f"{start}cannot save the checkpoint to" in plain(result.output)
    assert "Traceback" not in result.output and not list((tmp_path / "new").iterdir())


def full_disk(descriptor: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "--steps must be positive, got 0"),
        (["--lr", "-1"], "--lr must be positive, got -1.0"),
        (["--lr", "nan"], "--lr must be positive, got nan"),
        (["--seed", "-1"], "--seed must be from 0"),
        (["--dim", "30", "--heads", "4"], "--dim must be a multiple of --heads"),
        (["--chunk", "100000000", "--seq-len", "64"], "--chunk must be at most 16777216, got 100000000"),
        (["--sample-length", "-1"], "--sample-length must be at least 0"),
        (["--backend", "fast"], "--backend must be one of"),
        (["--resume"], "--resume needs --checkpoint FOLDER"),
        (["--checkpoint", "/nowhere/x"], "--checkpoint: the folder /nowhere does not exist"),
        (["--checkpoint", __file__], "--checkpoint must name a folder, got the file"),
        (["--resume", "--checkpoint", "missing"], "there is no folder missing"),
        (["--seq-len", "4096"], "sequences of 4096 need at least 8194"),
    ],
)
def test_bad_arguments_end_with_code_2_and_a_reason(
    text_file: Path, options: list[str], message: str
) -> None:
    result = invoke(text_file, *options)
    assert result.exit_code == 2
    assert message in plain(result.output)
    assert "Traceback" not in result.output


def test_bad_texts(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="neither a file nor a folder"):
        load_text(tmp_path / "nothing", 64)
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(TextError, match="holds no text"):
        load_text(tmp_path / "empty", 64)
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(TextError, match="holds no text"):
        load_text(folder, 64)
    (folder / "binary").write_bytes(b"\0" * 1000)
    (folder / ".hidden").write_bytes(LINE * 100)
    with pytest.raises(TextError, match="holds no text"):
        load_text(folder, 64)
    (folder / "a.txt").write_bytes(b"x" * 129)
    with pytest.raises(TextError, match=r"129 bytes; sequences of 64 need at least 130"):
        load_text(folder, 64)
    (folder / "a.txt").write_bytes(b"x" * 130)
    text = load_text(folder, 64)
    assert (text.train.numel(), text.held_out.numel()) == (65, 65)
    Trainer(TINY, text).train_step()  # the shortest text that is accepted does train


def test_a_folder_is_read_in_the_same_order_each_time(tmp_path: Path) -> None:
    for name in ("a", "b", "c", "d"):
        (tmp_path / f"{name}.txt").write_bytes(name.encode() * 100)
    first, second = load_text(tmp_path, 32), load_text(tmp_path, 32)
    assert first.sha256 == second.sha256
    assert first.size == 4 * 100 + 3


def test_the_default_text_is_the_standard_library() -> None:
    text = load_text(None, 4096)
    assert text.size > 2_000_000
    assert "standard library" in text.name
    assert b"import" in bytes(text.held_out[:200_000].tolist())


def test_bad_checkpoints(text_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    trainer = Trainer(TINY, load_text(text_file, TINY.seq_len))
    trainer.train_step()
    trainer.save(path)

    def refused(*options: object) -> str:
        result = invoke(text_file, "--checkpoint", path, *options)
        assert result.exit_code == 2
        assert "Traceback" not in result.output
        return plain(result.output)

    def damaged(name: str, output: str) -> bool:
        return f"{name}isdamaged" in output.replace(" ", "")  # the path may be broken anywhere

    assert "is not empty; continue from it with --resume or replace the checkpoint" in refused()
    message = refused("--resume", "--dim", 32)
    assert "was trained with --dim 16, got --dim 32" in message

    other = tmp_path / "other.txt"
    other.write_bytes(LINE * 101)
    result = invoke(other, "--checkpoint", path, "--resume")
    assert result.exit_code == 2
    assert "was trained on another text" in plain(result.output)

    for name in ("model.safetensors", "training.safetensors"):
        whole = (path / name).read_bytes()
        (path / name).write_bytes(whole[: len(whole) // 2])
        assert damaged(name, refused("--resume"))
        (path / name).write_bytes(whole)
    state = json.loads((path / "training.json").read_text())

    def refused_with(**values: object) -> str:
        (path / "training.json").write_text(json.dumps(state | values))
        return refused("--resume")

    assert "is not of reformer-kernels train" in refused_with(format="other")
    assert "its model and training.json are of different steps" in refused_with(model_sha256="")
    assert "trained with SGD; torch" in refused_with(optimizers=["SGD"])
    assert "steps must be an integer from 1 to 2147483647, got 0" in refused_with(recipe={"steps": 0})
    assert "unexpected keyword" in refused_with(recipe={"colour": 1})
    assert "step must be an integer" in refused_with(step=None)
    (path / "training.json").write_text("{}")
    assert "is not of reformer-kernels train" in refused("--resume")

    tensors = safetensors.torch.load((path / "training.safetensors").read_bytes())
    first = next(name for name in tensors if name.endswith("exp_avg"))
    for wrong in (
        {first: torch.zeros(3)},
        {"random_state": torch.zeros(3)},
        {"optimizer.5.0.x": torch.zeros(1)},
    ):
        data = safetensors.torch.save(tensors | wrong)
        (path / "training.safetensors").write_bytes(data)
        assert "does not fit its model" in refused_with(sha256=hashlib.sha256(data).hexdigest())

    for name in ("training.json", "training.safetensors"):
        (path / name).unlink()
    assert "holds a model but no run to resume" in refused("--resume")
    file = tmp_path / "old.pt"
    torch.save({"format": 2, "recipe": {"seq_len": 64}}, file)
    result = invoke(text_file, "--checkpoint", file, "--resume")
    assert result.exit_code == 2 and "must name a folder, got the file" in plain(result.output)


def test_a_checkpoint_runs_no_code(tmp_path: Path, text_file: Path) -> None:
    class Malice:
        def __reduce__(self) -> tuple:
            return (os.mkdir, (str(tmp_path / "ran"),))

    path = tmp_path / "run"
    trainer = Trainer(TINY, load_text(text_file, TINY.seq_len))
    for name in ("training.json", "training.safetensors"):
        trainer.save(path)
        (path / name).write_bytes(pickle.dumps(Malice()))
        with pytest.raises(CheckpointError, match="damaged"):
            Trainer.resume(path, trainer.text)
    assert not (tmp_path / "ran").exists()


def test_an_empty_folder_takes_a_checkpoint_and_overwriting_keeps_other_files(
    text_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "run"
    path.mkdir()
    call = (text_file, *OPTIONS, "--steps", 1, "--sample-length", 0, "--checkpoint", path)
    assert invoke(*call).exit_code == 0
    (path / "notes.txt").write_text("mine")
    assert invoke(*call).exit_code == 2
    assert invoke(*call, "--overwrite").exit_code == 0
    assert (path / "notes.txt").read_text() == "mine"


def test_without_muon_the_run_says_so(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on torch before 2.9; a run that Muon began is not continued without it."""
    text, path = load_text(text_file, TINY.seq_len), tmp_path / "run"
    if hasattr(torch.optim, "Muon"):
        trainer = Trainer(TINY, text)
        assert trainer.optimizer_names == ("AdamW", "Muon") and trainer.note is None
        trainer.save(path)
        monkeypatch.delattr(torch.optim, "Muon")
        with pytest.raises(CheckpointError, match="was trained with AdamW and Muon"):
            Trainer.resume(path, text)
    result = invoke(text_file, *OPTIONS, "--steps", 60, "--sample-length", 0)
    assert result.exit_code == 0
    assert "has no torch.optim.Muon (2.9 and later have it): AdamW updates all" in plain(result.output)
    held_out = [float(bits) for bits in re.findall(r"held-out (\d+\.\d+) bits per byte", result.output)]
    assert held_out[-1] < 5.0
    trainer = Trainer(TINY, text)
    expected = losses(trainer, 3)
    trainer = Trainer(TINY, text)
    assert losses(trainer, 1) == expected[:1]
    trainer.save(path)
    assert losses(Trainer.resume(path, text), 3) == expected[1:]


def test_divergence_stops_before_the_weights_are_spoilt(text_file: Path) -> None:
    trainer = Trainer(TINY, load_text(text_file, TINY.seq_len))
    with torch.no_grad():
        trainer.model.head.bias.fill_(float("inf"))
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    with pytest.raises(DivergedError, match="try a smaller --lr"):
        trainer.train_step()
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_the_model_sees_no_later_byte_and_is_reversible() -> None:
    model = byte_model(byte_config(dim=16, layers=2, heads=2, n_hashes=2, chunk_length=8, seq_len=60)).eval()
    assert model.config.residual == "float"
    tokens = torch.randint(256, (1, 60), generator=torch.Generator().manual_seed(1))
    # The first guess of every byte is 1 in 256.
    assert model(tokens, labels=tokens).item() == pytest.approx(math.log(256))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    changed = tokens.clone()
    changed[0, 40] = (changed[0, 40] + 1) % 256
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :40], after[:, :40], rtol=1e-5, atol=1e-4)
    assert not torch.allclose(before[:, 40], after[:, 40])


def generated(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["generate", *map(str, arguments)])


def test_generate_goes_on_from_a_checkpoint(text_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    assert invoke(text_file, *OPTIONS, "--steps", 5, "--checkpoint", path).exit_code == 0
    call = (path, "--prompt", "the quick é", "--length", 40)
    first, second = generated(*call), generated(*call)
    assert first.exit_code == 0, first.output
    assert first.stdout == second.stdout and first.stdout.startswith("the quick é")
    assert "bytes/s" in first.stderr
    assert generated(*call, "--seed", 1).stdout != first.stdout
    model, prompt = ReformerLM.load(path), "the quick é".encode()
    options = ("--temperature", 0, "--hashes", 1)
    for more, beams in ((options, 1), ((*options, "--beams", 3), 3)):
        expected = model.generate(torch.tensor([list(prompt)]), 40, n_hashes=1, beams=beams)[0]
        written = printable(prompt + bytes(expected.tolist()))
        assert generated(*call, *more).stdout == written + "\n"


def test_generate_stopped_by_ctrl_c(text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Trainer(TINY, load_text(text_file, TINY.seq_len)).save(tmp_path / "run")

    def stream(*_: object, **__: object) -> Iterator[torch.Tensor]:
        yield torch.tensor([97])
        raise KeyboardInterrupt

    monkeypatch.setattr(ReformerLM, "stream", stream)
    result = generated(tmp_path / "run", "--prompt", "b")
    assert result.exit_code == 130 and result.stdout == "ba\n"


def test_generate_says_what_is_wrong(text_file: Path, tmp_path: Path) -> None:
    path, other, half = tmp_path / "run", tmp_path / "other", tmp_path / "half"
    Trainer(TINY, load_text(text_file, TINY.seq_len)).save(path)
    ReformerLM(ReformerConfig(vocab_size=10, d_model=8, layers=("lsh",), causal=True)).save(other)
    Trainer(TINY, load_text(text_file, TINY.seq_len)).save(half)
    (half / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:1000])
    for arguments, message in [
        ((tmp_path / "none", "--prompt", "a"), "there is no folder"),
        ((text_file, "--prompt", "a"), "is a file; a model is a folder"),
        ((half, "--prompt", "a"), "model.safetensors is damaged"),
        ((other, "--prompt", "a"), "is a model of 10 tokens, not of the 256 bytes"),
        ((path, "--prompt", ""), "--prompt must hold at least one byte"),
        ((path, "--prompt", "a", "--length", 0), "--length must be positive"),
        ((path, "--prompt", "a", "--temperature", -1), "temperature must be a finite number"),
        ((path, "--prompt", "a", "--beams", 2), "temperature must be 0"),
        ((path, "--prompt", "a", "--top-p", 2), "top_p must be above 0"),
    ]:
        result = generated(*arguments)
        assert result.exit_code == 2, result.output
        assert message.replace(" ", "") in plain(result.output).replace(" ", "")  # lines break anywhere
        assert "Traceback" not in result.output


def test_batches_depend_on_seed_and_step_alone() -> None:
    data = torch.arange(5000).remainder(251).to(torch.uint8)
    text = Text("numbers", data[:4000], data[4000:], "")
    trainer = Trainer(TINY, text)
    inputs, targets = trainer.batch_of(3)
    torch.manual_seed(8)
    again, _ = trainer.batch_of(3)
    assert torch.equal(inputs, again)
    assert not torch.equal(inputs, trainer.batch_of(4)[0])
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
