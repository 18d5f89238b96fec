"""Several adapters, with a slider for each: what is drawn with at which strength, what is merged by which weight."""

from __future__ import annotations

from typing import Any

import gradio as gr

from .page import on
from .work import Studio

MOST = 4


class Chosen:
    """A list to choose from, and sliders under it, which keep their places when others go.

    Args:
        studio: whose adapters.
        word: what a slider is called, before the adapter's name.
        least, most, value: of a slider.
    """

    def __init__(self, studio: Studio, word: str, least: float, most: float, value: float) -> None:
        self.studio, self.word, self.value = studio, word, value
        self.adapters = gr.Dropdown([], label="Adapters", multiselect=True, max_choices=MOST, allow_custom_value=True)
        self.sliders = [gr.Slider(least, most, value=value, step=0.05, visible=False) for _ in range(MOST)]
        self.before = gr.State([])

    def inputs(self) -> list[Any]:
        """The adapters, and after them a number for each."""
        return [self.adapters, *self.sliders]

    def tie(self, *events: Any) -> None:
        """The choices are made anew when the list is opened, and at these events."""
        on([self.adapters.focus, *events], self.choices, [], [self.adapters], quiet=True)
        sliders = [self.before, *self.sliders]
        on(self.adapters.change, self.label, [self.adapters, *sliders], sliders, quiet=True)

    def choices(self) -> Any:
        return gr.update(choices=[(each.name, str(each.id)) for each in self.studio.shelf.adapters()])

    def label(self, chosen: list[str], before: list[str], *numbers: float) -> list[Any]:
        """A slider for each adapter, with its name, where it was set to before."""
        set_to = dict(zip(before, numbers, strict=False))
        shown = [
            gr.update(
                visible=True,
                label=f"{self.word} of {self.studio.shelf.get(key).name}",
                value=set_to.get(key, self.value),
            )
            for key in chosen[:MOST]
        ]
        return [chosen, *shown, *[gr.update(visible=False)] * (MOST - len(shown))]
