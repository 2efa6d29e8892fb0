"""One thread a test process: tests run side by side, and threads that wait for busy cores make them crawl."""

import os

import torch

torch.set_num_threads(1)
# For the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
