"""`reformer-kernels train`: it learns, resumes exactly, leaves cleanly, and says what is wrong."""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from reformer_kernels import ReformerConfig, ReformerLM
from reformer_kernels.cli import app
from reformer_kernels.cli.arguments import printable
from reformer_kernels.cli.train import Interrupt
from reformer_kernels.training.language_model import byte_model
from reformer_kernels.training.text import Text, TextError, load_text
from reformer_kernels.training.trainer import CheckpointError, DivergedError, Recipe, Trainer, read_checkpoint

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
    assert list(text_file.parent.glob("*.pt")) == []  # nothing was to be saved


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
    path = tmp_path / "run.pt"
    stopped.save(path)
    torch.manual_seed(99)  # as in another process
    recipe, state = read_checkpoint(path)
    assert recipe == TINY
    resumed = Trainer(recipe, text)
    resumed.restore(state, path)
    assert first + losses(resumed, TINY.steps) == expected
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name
    assert list(tmp_path.glob(".*tmp")) == []


def test_interrupting_saves_and_the_same_command_goes_on(text_file: Path, tmp_path: Path) -> None:
    """The real process, the real signal; then the end of the run equals one never stopped."""
    path, whole_path = tmp_path / "run.pt", tmp_path / "whole.pt"
    base = [sys.executable, "-m", "reformer_kernels", "train", str(text_file), *OPTIONS]
    steps = ["--steps", "2000", "--eval-every", "1"]
    process = subprocess.Popen(
        [*base, *steps, "--checkpoint", str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    stopped = re.search(r"Stopped after step (\d+) of 2000; saved", out)
    assert stopped is not None, out
    step = int(stopped[1])
    recipe, state = read_checkpoint(path)
    assert state["step"] == step > 0
    assert recipe.steps == 2000

    total = step + 3  # the rest of the run in few steps; the learning rate follows the new total
    result = invoke(text_file, "--checkpoint", path, "--resume", "--steps", total, "--sample-length", 0)
    assert result.exit_code == 0, result.output
    assert f"Resuming {path} after step {step}" in plain(result.output).replace("\n", "")
    assert read_checkpoint(path)[1]["step"] == total

    # A finished run has nothing left to resume.
    result = invoke(text_file, "--checkpoint", path, "--resume")
    assert result.exit_code == 2
    assert f"has finished its {total} steps" in plain(result.output)
    assert not whole_path.exists()


def test_interrupted_without_a_checkpoint_it_saves_a_new_file(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    real = Trainer.train_step

    def step(trainer: Trainer) -> float:
        if trainer.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return real(trainer)

    monkeypatch.setattr(Trainer, "train_step", step)
    result = invoke(text_file, *OPTIONS, "--steps", 50)
    assert result.exit_code == 130
    (saved,) = tmp_path.glob("reformer-train-*.pt")
    assert read_checkpoint(saved)[1]["step"] == 3


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
    path = tmp_path / "run.pt"
    trainer.save(path)
    before = path.read_bytes()

    def half(state: object, file: Path) -> None:
        Path(file).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="no space"):
        trainer.save(path)
    assert path.read_bytes() == before
    assert sorted(tmp_path.iterdir()) == sorted([path, text_file])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "--steps must be positive, got 0"),
        (["--lr", "-1"], "--lr must be positive, got -1.0"),
        (["--lr", "nan"], "--lr must be positive, got nan"),
        (["--seed", "-1"], "--seed must be from 0"),
        (["--dim", "30", "--heads", "4"], "--dim must be a multiple of --heads"),
        (["--sample-length", "-1"], "--sample-length must be at least 0"),
        (["--backend", "fast"], "--backend must be one of"),
        (["--resume"], "--resume needs --checkpoint FILE"),
        (["--checkpoint", "/nowhere/x.pt"], "--checkpoint: the folder /nowhere does not exist"),
        (["--resume", "--checkpoint", "missing.pt"], "there is no checkpoint missing.pt"),
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
    path = tmp_path / "run.pt"
    trainer = Trainer(TINY, load_text(text_file, TINY.seq_len))
    trainer.train_step()
    trainer.save(path)

    def refused(*options: object) -> str:
        result = invoke(text_file, "--checkpoint", path, *options)
        assert result.exit_code == 2
        assert "Traceback" not in result.output
        return plain(result.output)

    assert "exists; go on from it with --resume or replace it with --overwrite" in refused()
    message = refused("--resume", "--dim", 32)
    assert "was trained with --dim 16, got --dim 32" in message

    other = tmp_path / "other.txt"
    other.write_bytes(LINE * 101)
    result = invoke(other, "--checkpoint", path, "--resume")
    assert result.exit_code == 2
    assert "was trained on another text" in plain(result.output)

    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "is damaged or no checkpoint" in refused("--resume")
    path.write_bytes(b"")
    assert "is damaged or no checkpoint" in refused("--resume")
    torch.save({"weights": torch.zeros(2)}, path)
    assert "is not a checkpoint of this version of reformer-kernels train" in refused("--resume")
    torch.save({"format": 2, "recipe": {"seq_len": 64}}, path)
    assert "is not complete" in refused("--resume")

    state = torch.load(trainer_path(trainer, tmp_path), weights_only=True)
    state["state_dict"]["head.bias"] = torch.zeros(3)
    torch.save(state, path)
    assert "does not fit this model" in refused("--resume")


def trainer_path(trainer: Trainer, folder: Path) -> Path:
    path = folder / "good.pt"
    trainer.save(path)
    return path


def test_a_checkpoint_runs_no_code(tmp_path: Path, text_file: Path) -> None:
    class Malice:
        def __reduce__(self) -> tuple:
            return (os.mkdir, (str(tmp_path / "ran"),))

    path = tmp_path / "run.pt"
    torch.save({"format": 1, "recipe": Malice()}, path)
    with pytest.raises(CheckpointError, match="damaged"):
        read_checkpoint(path)
    assert not (tmp_path / "ran").exists()


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
    model = byte_model(dim=16, layers=2, heads=2, n_hashes=2, chunk_length=8, seq_len=60).eval()
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
    path = tmp_path / "run.pt"
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
    Trainer(TINY, load_text(text_file, TINY.seq_len)).save(tmp_path / "run.pt")

    def stream(*_: object, **__: object) -> Iterator[torch.Tensor]:
        yield torch.tensor([97])
        raise KeyboardInterrupt

    monkeypatch.setattr(ReformerLM, "stream", stream)
    result = generated(tmp_path / "run.pt", "--prompt", "b")
    assert result.exit_code == 130 and result.stdout == "ba\n"


def test_generate_says_what_is_wrong(text_file: Path, tmp_path: Path) -> None:
    path, other = tmp_path / "run.pt", tmp_path / "other.pt"
    Trainer(TINY, load_text(text_file, TINY.seq_len)).save(path)
    ReformerLM(ReformerConfig(vocab_size=10, d_model=8, layers=("lsh",), causal=True)).save(other)
    (tmp_path / "half.pt").write_bytes(path.read_bytes()[:1000])
    for arguments, message in [
        ((tmp_path / "none.pt", "--prompt", "a"), "there is no checkpoint"),
        ((tmp_path / "half.pt", "--prompt", "a"), "is damaged or no checkpoint"),
        ((other, "--prompt", "a"), "is a model of 10 tokens, not of the 256 bytes"),
        ((path, "--prompt", ""), "--prompt must hold at least one byte"),
        ((path, "--prompt", "a", "--length", 0), "--length must be positive"),
        ((path, "--prompt", "a", "--temperature", -1), "temperature must be a finite number"),
        ((path, "--prompt", "a", "--beams", 2), "temperature must be 0"),
        ((path, "--prompt", "a", "--top-p", 2), "top_p must be above 0"),
    ]:
        result = generated(*arguments)
        assert result.exit_code == 2, result.output
        assert message in plain(result.output)
        assert "Traceback" not in result.output


def test_batches_depend_on_seed_and_step_alone() -> None:
    data = torch.arange(5000).remainder(251).to(torch.uint8)
    text = Text("numbers", data[:4000], data[4000:], "")
    trainer = Trainer(TINY, text)
    inputs, targets = trainer._batch(3)
    torch.manual_seed(8)
    again, _ = trainer._batch(3)
    assert torch.equal(inputs, again)
    assert not torch.equal(inputs, trainer._batch(4)[0])
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
