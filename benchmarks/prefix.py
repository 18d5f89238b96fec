"""An epoch of training with the frozen prefix kept, beside one without.

    OMP_WAIT_POLICY=passive python benchmarks/prefix.py                 # minutes on 2 cores; writes results/prefix.md
    OMP_WAIT_POLICY=passive python benchmarks/prefix.py --quick true    # seconds; prints the table only

ViT-S/14 at 98 px with random weights, AdamW, batches of 32, smooth random pictures that lie in memory. The first epoch
finds the cut, which takes 20 to 60 forwards of two pictures, and computes what is kept; every other one goes on from
it. `fine=True` also keeps what is constant within the first adapted block. "From JPEG" is against a run that has to
read its pictures, of 500 x 375 px; the cache spares that too. Epochs are interleaved; columns are medians by the wall
clock, ratios medians over the rounds.
"""

import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import timm
import torch
from jsonargparse import auto_cli
from measure import Effort, Row, compare, facts, report, seconds, write
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torch.nn import functional as F

import vismodal as vm
from vismodal.methods import Method

MODEL, SIDE, CLASSES = "vit_small_patch14_dinov2", 98, 10
LAST = slice(-4, None)
METHODS: Mapping[str, tuple[Method, ...]] = {
    "LoRA r=8 in the last 4 blocks, and head": (vm.LoRA(layers=LAST), vm.LinearProbe()),
    "AdaptFormer in the last 4 blocks, and head": (vm.AdaptFormer(layers=LAST), vm.LinearProbe()),
    "Ladder, 1/8 of the width, and head": (vm.Ladder(), vm.LinearProbe()),
    "linear probe": (vm.LinearProbe(),),
}


@dataclass(frozen=True)
class Config:
    """Settings of the run.

    Args:
        quick: a few pictures and rounds; none of its figures mean anything.
        pictures: of an epoch.
        batch: of them in a step.
        rounds: measured epochs of each kind.
        only: of the methods, those with this in their names.
        threads: of torch.
        output: results without suffix.
    """

    quick: bool = False
    pictures: int = 128
    batch: int = 32
    rounds: int = 5
    only: str = ""
    threads: int = 2
    output: Path = Path(__file__).parent / "results/prefix"


def jpeg(seed: int) -> bytes:
    """About as many bytes as a photo of this size."""
    generator = torch.Generator().manual_seed(seed)
    x = F.interpolate(torch.rand(1, 3, 75, 100, generator=generator), (375, 500), mode="bicubic")[0].clamp(0, 1)
    buffer = io.BytesIO()
    Image.fromarray((255 * x).byte().permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def reader() -> Callable[[bytes], Tensor]:
    transform = create_transform((3, SIDE, SIDE), interpolation="bicubic")
    return lambda file: transform(Image.open(io.BytesIO(file)).convert("RGB"))


class Training:
    """A model in training, which an epoch goes on with."""

    def __init__(self, methods: tuple[Method, ...], pictures: int, batch: int, dtype: torch.dtype):
        torch.manual_seed(0)
        self.model = timm.create_model(MODEL, img_size=SIDE, num_classes=CLASSES).train()
        self.adapter = vm.adapt(self.model, methods)
        self.optimizer = torch.optim.AdamW(self.adapter.parameters(), 1e-3)
        self.files = [jpeg(seed) for seed in range(pictures)]
        self.read = reader()
        self.x, self.batch, self.dtype = torch.stack([self.read(file) for file in self.files]), batch, dtype
        self.labels = torch.arange(pictures) % CLASSES
        self.kept, self.fine = vm.FrozenPrefix(self.model), vm.FrozenPrefix(self.model, fine=True)

    def epoch(self, run: Callable[[Tensor, range], Tensor]) -> None:
        for start in range(0, len(self.x), self.batch):
            rows = range(start, min(start + self.batch, len(self.x)))
            with torch.autocast("cpu", self.dtype, enabled=self.dtype is not torch.float32):
                y = run(self.x[rows.start : rows.stop], rows)
            self.optimizer.zero_grad()
            F.cross_entropy(y.float(), self.labels[rows.start : rows.stop]).backward()
            self.optimizer.step()

    def without(self) -> None:
        self.epoch(lambda x, rows: self.model(x))

    def reading(self) -> None:
        self.epoch(lambda x, rows: self.model(torch.stack([self.read(self.files[row]) for row in rows])))

    def finer(self) -> None:
        self.epoch(self.fine)

    def first(self) -> None:
        self.epoch(vm.FrozenPrefix(self.model))

    def later(self) -> None:
        self.epoch(self.kept)


def epochs(config: Config, name: str, dtype: torch.dtype) -> Iterator[Row]:
    """Later epochs and the first one, each against one without a cache."""
    pictures = 2 * config.batch if config.quick else config.pictures
    training = Training(METHODS[name], pictures, config.batch, dtype)
    training.later()
    training.finer()
    rounds = 2 if config.quick else config.rounds
    contenders = {n: getattr(training, n) for n in ("later", "without", "first", "reading")}
    apart = training.fine.at != training.kept.at  # there is something within the first adapted block
    contenders |= {"finer": training.finer} if apart else {}
    samples = Effort(rounds, rounds, 0).interleave({n: partial(seconds, call) for n, call in contenders.items()})
    setting = f"{name}, {'fp32' if dtype is torch.float32 else 'bf16 autocast'}"
    yield compare("later epoch", setting, "s", samples["later"], samples["without"], about_cut(training.kept))
    yield compare("later epoch, from JPEG", setting, "s", samples["later"], samples["reading"])
    if apart:
        fine = about_cut(training.fine)
        yield compare("later epoch, fine=True", setting, "s", samples["finer"], samples["without"], fine)
    yield compare("first epoch", setting, "s", samples["first"], samples["without"])


def about_cut(kept: vm.FrozenPrefix) -> str:
    return f"{100 * kept.share:.0f}% of a forward's FLOPs spared; {kept.row_bytes / 2**10:,.0f} KiB a picture"


def main(config: Config) -> None:
    torch.set_num_threads(config.threads)
    about = facts(("torch", "timm"))
    rows: list[Row] = []
    for dtype in (torch.float32, torch.bfloat16):
        for name in [n for n in METHODS if config.only in n][: 1 if config.quick else None]:
            rows += epochs(config, name, dtype)
            print(f"{name}, {dtype}: first {rows[-1].ratio:.2f}", flush=True)
    text = report("Keeping the frozen prefix", rows, about, (__doc__ or "").split("\n\n")[2], "without")
    print(text)
    if not config.quick:
        write(text, rows, about, config.output)


if __name__ == "__main__":
    main(auto_cli(Config, as_positional=False))
