"""The training loop on a toy: exact resume from everywhere, orderly stops, and errors instead of silence."""

import errno
import json
import os
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import nn

from vismodal import files, runs
from vismodal.callbacks import Callback, Every, Log, Progress, Track, read_log
from vismodal.draw import generator, seed_of, shuffled
from vismodal.errors import InputError
from vismodal.resume import Checkpoints
from vismodal.train import Micro, Outcome, Plan, fit

ROOT = Path(__file__).resolve().parent.parent
# equal to the bit means with the same number of threads
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}


class Toy:
    """A tiny trainable thing with dropout, so that global randomness matters too."""

    def __init__(self, width: int = 4, dead: tuple[str, ...] = ()) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(3, width), nn.Dropout(0.5), nn.Linear(width, 1))
        self.dead = list(dead)
        self.named_parameters = self.net.named_parameters
        self.state_dict = self.net.state_dict
        self.load_state_dict = self.net.load_state_dict

    def unused(self) -> list[str]:
        return self.dead

    def penalty(self) -> torch.Tensor | None:
        return None

    def advance(self, step: int, steps: int) -> None:
        pass


def toy_loss(toy: Toy, batch: int = 2, at=None):
    """Mean squared error on keyed rows of five data points; `at(micro)` may interfere."""
    data = torch.arange(15.0).reshape(5, 3) / 15

    def loss(micro: Micro):
        if at:
            at(micro)
        places = micro.positions(batch)
        x = data[[shuffled(micro.seed, "data", 5, p) for p in places]]
        noise = torch.stack([torch.randn(3, generator=micro.generator("noise", p)) for p in places])
        value = (toy.net(x + 0.1 * noise) - x.sum(1, keepdim=True)).square().mean()
        return {"loss": value, "twice": 2 * value}

    return loss


def train(folder: Path | None, toy: Toy | None = None, *, at=None, batch=2, make=torch.optim.AdamW, **options):
    """One call of fit on a fresh toy; the plan's own options are steps, accumulate, ..."""
    toy = toy or Toy()
    optimizer = make(toy.net.parameters(), lr=0.05)
    callbacks = options.pop("callbacks", ())
    every, identity = options.pop("every", 1), options.pop("identity", {})
    checkpoints = Checkpoints(folder / "checkpoints", identity, every) if folder else None
    plan = Plan(**{"steps": 6, "accumulate": 3, "warmup": 2, **options})
    log = folder / "metrics.jsonl" if folder else None
    outcome = fit(
        toy_loss(toy, batch, at), toy, optimizer, plan=plan, checkpoints=checkpoints, log=log, callbacks=callbacks
    )
    return outcome, toy


def equal(a: Toy, b: Toy) -> bool:
    return all(torch.equal(x, b.state_dict()[name]) for name, x in a.state_dict().items())


def rows(folder: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in read_log(folder / "metrics.jsonl")]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# -- draws and plans -------------------------------------------------------------------------------------------------


def test_draws_depend_on_their_key_alone():
    assert seed_of(0, "noise", 1) == seed_of(0, "noise", 1) == 1975832920945326368  # pinned: old runs must resume
    assert len({seed_of(*key) for key in [(0, "noise", 1), (1, "noise", 0), (0, "noise", 11), (0, "noise1", 1)]}) == 4
    a = torch.randn(3, generator=generator(0, "x", 1))
    torch.randn(5)
    assert torch.equal(a, torch.randn(3, generator=generator(0, "x", 1)))


def test_shuffled_reading_is_a_permutation_in_each_epoch():
    epochs = [[shuffled(0, "photos", 6, 6 * e + i) for i in range(6)] for e in range(3)]
    assert all(sorted(epoch) == list(range(6)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3


def test_positions_are_disjoint_over_steps_and_processes():
    micros = [Micro(0, 0, index, rank, 2) for index in range(3) for rank in range(2)]
    assert [p for micro in micros for p in micro.positions(2)] == list(range(12))


def test_rate_warms_up_and_falls():
    assert [Plan(10, warmup=3).rate(s) for s in (0, 1, 2, 3, 9)] == [0.25, 0.5, 0.75, 1, 1]
    assert Plan(10, schedule="linear").rate(5) == 0.5
    assert Plan(10, schedule="cosine").rate(5) == pytest.approx(0.5)
    with pytest.raises(InputError, match="accumulate must be at least 1, not 0"):
        Plan(10, accumulate=0)


# -- what training is ------------------------------------------------------------------------------------------------


def test_it_is_the_plain_loop():
    """Against the loop written out: keyed dropout, mean over micro-batches, clipping, AdamW, warm-up."""
    _, toy = train(None, steps=3)
    plain = Toy()
    optimizer = torch.optim.AdamW(plain.net.parameters(), lr=0.05)
    for step in range(3):
        optimizer.zero_grad()
        for i in range(3):
            torch.manual_seed(seed_of(0, "global", 3 * step + i, 0))
            (toy_loss(plain)(Micro(0, step, 3 * step + i))["loss"] / 3).backward()
        nn.utils.clip_grad_norm_(plain.net.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 0.05 * min(1, (step + 1) / 3)
        optimizer.step()
    assert equal(toy, plain)


def test_accumulation_draws_the_rows_of_one_large_batch():
    seen: dict[int, list[int]] = {}
    for accumulate, batch in ((1, 6), (3, 2)):
        note = lambda m, b=batch, a=accumulate: seen.setdefault(a, []).extend(m.positions(b))  # noqa: E731
        train(None, at=note, accumulate=accumulate, batch=batch, steps=2)
    assert seen[1] == seen[3] == list(range(12))


def test_the_callers_randomness_is_untouched():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    train(None, steps=2)
    assert torch.equal(torch.rand(2), expected)


def test_log_callbacks_and_bar(tmp_path, capsys):
    called: list[int] = []
    outcome, _ = train(tmp_path, steps=4, callbacks=[Progress(), Every(2, called.append), Every(0, called.append)])
    assert called == [0, 2, 4]
    logged = read_log(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in logged] == [1, 2, 3, 4]
    assert logged[-1]["twice"] == pytest.approx(2 * logged[-1]["loss"])
    assert logged[0]["lr"] == pytest.approx(0.05 / 3) and logged[0]["gradient"] > 0
    assert outcome == Outcome(4, {k: v for k, v in logged[-1].items() if k not in ("step", "seconds")})
    bar = capsys.readouterr().err
    assert "4/4" in bar and "loss=" in bar


def test_a_file_asks_for_one_more_call(tmp_path):
    called: list[int] = []
    ask = tmp_path / "now"

    class Ask(Callback):
        def after(self, step, metrics):
            if step in (2, 5):
                ask.touch()

    train(None, steps=6, callbacks=[Ask(), Every(4, called.append, ask)])
    assert called == [0, 2, 4, 5] and not ask.exists()
    called.clear()
    train(None, steps=2, callbacks=[Every(0, called.append, ask), Ask()])
    assert called == [] and not ask.exists()  # nobody waits for it any more


def test_trackers_get_scalars():
    class Accelerator:
        def __init__(self):
            self.seen = []
            self.trackers = [self]

        def init_trackers(self, project, config):
            self.seen.append((project, config))

        def log(self, values, step):
            self.seen.append((step, values["loss"] > 0))

        def finish(self):
            self.seen.append("end")

        def end_training(self):
            pytest.fail("accelerate destroys the process group there, which later runs need")

    outside = Accelerator()
    train(None, steps=2, callbacks=[Track(outside, "toy", {"sites": ("a", "b"), "rate": 0.1, "none": None})])
    config = {"sites": "('a', 'b')", "rate": 0.1, "none": "None"}
    assert outside.seen == [("toy", config), (1, True), (2, True), "end"]
    assert outside.trackers == []


# -- exact resume ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [torch.optim.AdamW, lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9)])
def test_resume_is_exact_from_every_micro_batch(tmp_path, make):
    """Stopped before each of the 18 micro-batches: within an epoch (5 rows), within an accumulation, at a boundary."""
    _, whole = train(tmp_path / "whole", make=make)
    for stop in range(18):
        folder = tmp_path / str(stop)

        def interrupt(micro: Micro, stop=stop) -> None:
            if micro.index == stop:
                raise KeyboardInterrupt

        outcome, _ = train(folder, at=interrupt, make=make, every=0)
        assert outcome.stopped and outcome.step == stop // 3
        outcome, resumed = train(folder, make=make, every=0)
        assert not outcome.stopped and outcome.step == 6
        assert equal(whole, resumed), stop
        assert rows(folder) == rows(tmp_path / "whole")


def test_resume_starts_from_the_last_checkpoint_after_a_crash(tmp_path):
    _, whole = train(tmp_path / "whole")

    class Boom(Exception):
        pass

    def crash(micro: Micro) -> None:
        if micro.index == 13:
            raise Boom

    with pytest.raises(Boom):
        train(tmp_path / "run", at=crash, every=3)
    # step 3 was due, step 4 is the last good state, saved on the way out
    assert names(tmp_path / "run/checkpoints") == ["step-0000003.safetensors", "step-0000004.safetensors"]
    assert equal(whole, train(tmp_path / "run")[1])


def test_a_finished_run_is_extended_exactly(tmp_path):
    _, whole = train(tmp_path / "whole", steps=9)
    train(tmp_path / "run", steps=5)
    assert equal(whole, train(tmp_path / "run", steps=9)[1])
    with pytest.raises(InputError, match="has made 9 steps already, more than steps=5; write 9 or more"):
        train(tmp_path / "run", steps=5)


SCRIPT = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_train import train
from vismodal import files

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

how, folder = sys.argv[1], Path(sys.argv[2])
if how == "saving":   # the temporary file is written, the name not yet given, at the fourth checkpoint
    real, count = files.os.replace, []
    def replace(source, target):
        count.append(target)
        return die() if len(count) == 5 else real(source, target)   # the first is metrics.jsonl
    files.os.replace = replace
train(folder, at=lambda m: die() if how == "training" and m.index == 13 else None)
"""


@pytest.mark.parametrize(("how", "kept"), [("training", 4), ("saving", 3)])
def test_resume_is_exact_after_kill_9(tmp_path, how, kept):
    _, whole = train(tmp_path / "whole")
    folder = tmp_path / "run"
    code = SCRIPT.format(tests=str(ROOT / "tests"))
    done = subprocess.run([sys.executable, "-c", code, how, folder], env=ENVIRONMENT)
    assert done.returncode == -signal.SIGKILL
    leftovers = list((folder / "checkpoints").glob(".*"))
    assert len(leftovers) == (how == "saving")
    newest = Checkpoints(folder / "checkpoints").newest()
    assert newest is not None and newest.name == f"step-{kept:07d}.safetensors"
    assert equal(whole, train(folder)[1])
    assert rows(folder) == rows(tmp_path / "whole")
    assert not list((folder / "checkpoints").glob(".*"))


def test_a_broken_newest_file_is_passed_over(tmp_path):
    _, whole = train(tmp_path / "whole")
    train(tmp_path / "run", steps=4)
    newest = tmp_path / "run/checkpoints/step-0000004.safetensors"
    newest.write_bytes(newest.read_bytes()[:-7])  # as a disk may leave it
    assert equal(whole, train(tmp_path / "run")[1])


def test_old_checkpoints_go_only_when_the_new_one_stands(tmp_path, monkeypatch):
    train(tmp_path, steps=4)
    folder = tmp_path / "checkpoints"
    before = names(folder)
    assert before == ["step-0000003.safetensors", "step-0000004.safetensors"]

    real = Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        if self.suffix != ".safetensors":
            return real(self, data)
        with self.open("wb") as file:
            file.write(data[:100])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.Path, "write_bytes", full)
    with pytest.raises(InputError, match=r"cannot write .*step-0000005.safetensors: No space left on device"):
        train(tmp_path, steps=6)
    assert names(folder) == before
    monkeypatch.undo()
    assert equal(train(tmp_path, steps=6)[1], train(None, steps=6)[1])


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    train(tmp_path, steps=2, identity={"model": "a", "sites": ("attn.q",)})
    train(tmp_path, steps=3, identity={"model": "a", "sites": ("attn.q",)})
    with pytest.raises(InputError, match="other settings: model was 'a' and is now 'b'") as caught:
        train(tmp_path, steps=4, identity={"model": "b", "sites": ("attn.q",)})
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    train(tmp_path, steps=2)
    with pytest.raises(InputError, match=r"holds another adapter: 0.bias is \(4,\) there and \(5,\) here"):
        train(tmp_path, Toy(width=5), steps=3)
    with pytest.raises(InputError, match="of the optimiser AdamW, this run has SGD"):
        train(tmp_path, steps=3, make=torch.optim.SGD)
    path = tmp_path / "checkpoints/step-0000009.safetensors"
    files.write_tensors(path, {"x": torch.zeros(1)})
    with pytest.raises(InputError, match="is no checkpoint of this version"):
        train(tmp_path, steps=9)


def test_checkpoints_hold_no_pickle_and_no_random_state(tmp_path):
    from safetensors import safe_open

    train(tmp_path, steps=2)
    with safe_open(tmp_path / "checkpoints/step-0000002.safetensors", "pt") as file:
        names = set(file.keys())
        header = json.loads(file.metadata()["vismodal_training"])
    assert {n.split(".")[0] for n in names} == {"adapter", "optimizer"} and "optimizer.0.weight.exp_avg" in names
    assert set(header) == {"format", "step", "identity", "optimizer", "extra", "threads"}


# -- stopping --------------------------------------------------------------------------------------------------------


def raise_signal(number=signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves(tmp_path, number):
    _, whole = train(None)
    before = signal.getsignal(number)
    outcome, _ = train(tmp_path, at=lambda m: raise_signal(number) if m.index == 10 else None, every=0)
    assert outcome.stopped and outcome.step == 3
    assert signal.getsignal(number) is before
    assert equal(whole, train(tmp_path)[1])


def test_a_signal_within_the_update_waits_for_its_end(tmp_path):
    _, whole = train(None)

    class Slow(torch.optim.AdamW):
        def step(self, closure=None):
            if self.state and not hasattr(self, "told"):
                self.told = True
                raise_signal()
            super().step(closure)

    Slow.__name__ = "AdamW"
    outcome, _ = train(tmp_path, make=Slow, every=0)
    assert outcome.stopped and outcome.step == 2
    assert equal(whole, train(tmp_path)[1])


def test_a_signal_while_saving_waits_too_and_then_skips_the_rest(tmp_path, monkeypatch):
    called = []
    real = files.os.replace

    def replace(source, target):
        if "0000002" in str(target):
            raise_signal()
        real(source, target)

    monkeypatch.setattr(files.os, "replace", replace)
    outcome, _ = train(tmp_path, callbacks=[Every(2, called.append)])
    assert outcome.stopped and outcome.step == 2 and called == [0]
    assert (tmp_path / "checkpoints/step-0000002.safetensors").exists()


def test_a_signal_ends_a_long_callback_at_once(tmp_path):
    class Sampling(Callback):
        ended = False

        def after(self, step, metrics):
            if step == 4:
                raise_signal()
                pytest.fail("the signal was ignored")

        def end(self):
            self.ended = True

    sampling = Sampling()
    outcome, _ = train(tmp_path, callbacks=[sampling], every=0)
    assert outcome.stopped and outcome.step == 4 and sampling.ended
    assert (tmp_path / "checkpoints/step-0000004.safetensors").exists()


# -- errors instead of silence ---------------------------------------------------------------------------------------


def test_nan_loss_stops_and_keeps_the_last_good_state(tmp_path):
    toy = Toy()

    def poison(micro: Micro) -> None:
        if micro.step == 3:
            with torch.no_grad():
                toy.net[0].weight.mul_(1)  # values stay; the loss below does the harm
            raise_nan.append(True)

    raise_nan: list[bool] = []
    clean = toy_loss(toy, at=poison)

    def loss(micro: Micro):
        values = clean(micro)
        return {"loss": values["loss"] * float("nan")} if raise_nan else values

    optimizer = torch.optim.AdamW(toy.net.parameters(), lr=0.05)
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(InputError, match=r"loss is nan .*at step 4; the state after step 3 is in .*Lower the learning"):
        fit(loss, toy, optimizer, plan=Plan(6, 3, warmup=2), checkpoints=checkpoints)
    assert checkpoints.newest() == tmp_path / "step-0000003.safetensors"
    assert equal(toy, train(None, steps=3)[1])  # the poisoned update was never made


def test_an_infinite_gradient_of_a_finite_loss_stops_too():
    toy = Toy()

    def loss(micro: Micro):
        return {"loss": sum(p.abs().sqrt().sum() * 0 + (p * 0).sum().sqrt() for p in toy.net.parameters())}

    with pytest.raises(InputError, match="gradient is nan at step 1"):
        fit(loss, toy, torch.optim.SGD(toy.net.parameters(), lr=1), plan=Plan(2))


def test_dead_sites_stop_the_first_step_with_their_list(tmp_path):
    with pytest.raises(InputError, match=r"9 sites .*first step: s0, s1, .*s7 and 1 more\. Leave them out"):
        train(tmp_path, Toy(dead=tuple(f"s{i}" for i in range(9))))
    assert not (tmp_path / "checkpoints").exists()


def test_a_site_may_get_its_gradient_within_the_patience():
    """s1 gets one in the second step, s2 in the third; one that had its gradient may go without later."""
    alive = [["s0", "s1", "s2"], ["s0", "s2"], ["s0", "s1"], ["s0"]]

    def fitted(toy: Toy, patience: int) -> Outcome:
        toy.unused = lambda: toy.dead.pop(0)
        return fit(toy_loss(toy), toy, torch.optim.SGD(toy.net.parameters(), lr=0.01), plan=Plan(6), patience=patience)

    with pytest.raises(InputError, match=r"1 sites .* no gradient in the first 3 steps: s0\. Leave them out"):
        fitted(Toy(dead=alive), 3)
    toy = Toy(dead=[["s1"], [], ["s0"]])
    assert fitted(toy, 3).step == 6 and toy.dead == [["s0"]]  # nobody asks once all had one


def test_a_full_disk_for_the_log_is_one_line(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    log = Log(tmp_path / "metrics.jsonl", 0)
    log.path = Path("/dev/full")
    with pytest.raises(InputError, match="cannot write /dev/full: No space left"):
        log.write(1, {"loss": 0.0})


def test_files_are_whole_or_absent(tmp_path):
    path = files.write_file(tmp_path / "new" / "a.txt", "one")
    assert path.read_text() == "one" and path.stat().st_mode & 0o777 == 0o666 & ~_umask()

    def half(temporary: Path) -> None:
        assert temporary.suffix == ".txt"  # PIL and matplotlib go by it
        temporary.write_text("tw")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(InputError, match=r"cannot write .*a.txt: No space left"):
        files.write_file(path, half)
    assert path.read_text() == "one" and [p.name for p in path.parent.iterdir()] == ["a.txt"]
    with pytest.raises(InputError, match="cannot write"):
        files.write_file(path / "below-a-file", "x")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# -- several processes -----------------------------------------------------------------------------------------------


def test_processes_wait_for_the_one_that_draws():
    """Class images and samples of a large model take longer than NCCL waits by itself, ten minutes."""
    handler = runs.start_accelerator("no", None).init_handler
    assert handler.to_kwargs() == {"timeout": timedelta(hours=6)}


TWO = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from accelerate import Accelerator
from test_train import train
assert Accelerator().num_processes == 2
train(Path(sys.argv[1]), batch=1, steps=4)
"""


def test_two_processes_train_as_one(tmp_path):
    """Each draws its own rows; one all-reduce a step. Dropout masks differ by design, so the toy's are switched off."""
    script = tmp_path / "two.py"
    script.write_text(TWO.format(tests=str(ROOT / "tests")).replace("train(P", "import test_train\ntest_train.nn.Dropout = lambda p: test_train.nn.Identity()\ntrain(P"))  # fmt: skip # noqa: E501
    env = {**ENVIRONMENT, "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script]
    subprocess.run([*command, tmp_path / "run"], env=env, check=True, capture_output=True, timeout=500)
    toy = Toy()
    toy.net[1] = nn.Identity()
    _, one = train(tmp_path / "one", toy, batch=2, steps=4)
    shared, single = Toy(), rows(tmp_path / "one")
    shared.net[1] = nn.Identity()
    train(tmp_path / "run", shared, steps=4)  # restores step 4 and has nothing left to do
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(shared.state_dict()[name], tensor)
    for ours, theirs in zip(rows(tmp_path / "run"), single, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
