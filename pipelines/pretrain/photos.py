"""The photographs of the data folder, for the models of this folder that want more than emoji.

Read are `cifar100_train.npz`, `dreambooth/*/*.jpg` and `transfer/*/train/*/*.jpg`; what is missing is skipped with a
word. Emoji composites are in `vismodal.data.emoji`.
"""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from vismodal.data.emoji import SIZE, rng


class Photos:
    """Random 64 px crops of whatever photographs the data folder holds, for the autoencoder."""

    def __init__(self, data: Path, most: int = 6000, seed: int = 0) -> None:
        r = rng(seed, "photo files")
        files = sorted(data.glob("transfer/*/train/*/*.jpg"))
        files = [files[i] for i in r.permutation(len(files))[:most]]
        # Forty-odd DreamBooth photos against thousands of others: repeated, or they would hardly be seen.
        self.subjects = [self._read(p, 128) for p in sorted(data.glob("dreambooth/*/*.jpg"))]
        self.pictures = [self._read(p, 96) for p in files] + self._cifar(data / "cifar100_train.npz", r, most)
        if not self.pictures and not self.subjects:
            print(f"no photos under {data}: the autoencoder trains on emoji alone")

    def __bool__(self) -> bool:
        return bool(self.pictures or self.subjects)

    @staticmethod
    def _read(file: Path | io.BytesIO, side: int) -> np.ndarray:
        with Image.open(file) as picture:
            rgb = picture.convert("RGB")
        scale = side / min(rgb.size)
        if scale < 1:
            rgb = rgb.resize((round(rgb.width * scale), round(rgb.height * scale)), Image.Resampling.LANCZOS)
        return np.asarray(rgb)

    def _cifar(self, file: Path, r: np.random.Generator, most: int) -> list[np.ndarray]:
        if not file.exists():
            return []
        stored = np.load(file)
        blob, offsets = stored["jpeg"].tobytes(), stored["offsets"]
        chosen = r.permutation(len(offsets) - 1)[:most]
        return [self._read(io.BytesIO(blob[offsets[i] : offsets[i + 1]]), SIZE) for i in chosen]

    def draw(self, r: np.random.Generator) -> np.ndarray:
        """One crop, uint8 [64, 64, 3], mirrored half of the time."""
        pool = self.subjects if self.subjects and (not self.pictures or r.random() < 0.4) else self.pictures
        picture = pool[r.integers(len(pool))]
        h, w = picture.shape[:2]
        # From a crop of 3/4 of the short side to the whole of it.
        side = int(min(h, w) * r.uniform(0.75, 1))
        top, left = int(r.integers(h - side + 1)), int(r.integers(w - side + 1))
        crop = Image.fromarray(picture[top : top + side, left : left + side]).resize(
            (SIZE, SIZE), Image.Resampling.BICUBIC
        )
        out = np.asarray(crop)
        return out[:, ::-1] if r.random() < 0.5 else out
