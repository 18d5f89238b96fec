"""One thread a process: the models are tiny, and two test processes share two cores."""

import torch

torch.set_num_threads(1)
