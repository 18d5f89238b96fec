"""The package's own `CLIPClassifier`; the model within is found through the tables of its library.

The text towers of open_clip's flat CLIP, of its CustomTextCLIP and of transformers lie at three places, of which a
model has one.
"""

import torch
from torch import nn

from vismodal.clip import CLIPClassifier
from vismodal.site import Span, Table

NAME = "vismodal"
MODELS = "CLIPClassifier over CLIP or SigLIP of open_clip or transformers"
HOLDS = ("open_clip", "transformers")

TOWERS = (  # the token embedding, the blocks
    ("model.token_embedding", "model.transformer.resblocks.*"),
    ("model.text.token_embedding", "model.text.transformer.resblocks.*"),
    ("model.text_model.embeddings.token_embedding", "model.text_model.encoder.layers.*"),
)


def text(tokens: str, blocks: str) -> tuple[Span, Span]:
    """From token ids to the features of the classes, and all that is done to a picture."""
    taps = {"tokens": tokens, "block": blocks}
    whole = {"image": "image", "text": "text", "tokens": tokens}
    return (
        Span("text.features", "text", "text", taps, tokens, tower="text"),
        Span("classifier", "", "", whole, tokens, widths={"image": "image"}),
    )


TABLE: Table = {
    CLIPClassifier: (
        *(span for tower in TOWERS for span in text(*tower)),
        Span("image.features", "image", "image", width="image", tower="image"),
        Span("logits", "logits", "logits", width="logits"),
    ),
}


def example() -> nn.Module:
    """A small one over a CLIP of the library that is there; by its sites `vm.methods` tells what works."""
    try:
        from vismodal.families.open_clip import example as clip
    except ImportError:
        from vismodal.families.transformers import clip_example as clip
    model = clip()
    with torch.device("cpu"):  # ids of texts are numbers, wherever the model's weights are
        return CLIPClassifier(model, lambda texts: torch.zeros(len(texts), 8, dtype=torch.long), ["cat", "dog"])
