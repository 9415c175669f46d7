"""One thread of torch in each process of the tests: they run side by side, and threads
that wait for each other on a busy machine take many times as long."""

import torch

torch.set_num_threads(1)
